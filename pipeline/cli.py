"""What the command lines share: options, and how a command ends."""

from __future__ import annotations

import argparse
import gc
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.errors import PipelineError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command to its exit status; a deliberate error is one message on standard error, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without `·` is no reason to stop
    try:
        status = main()
        sys.stdout.flush()
    except PipelineError as error:
        print(error, file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    gc.freeze()  # else Python looks for garbage among all that torch and Optuna made, for over a second
    sys.exit(status)


def add_root(parser: argparse.ArgumentParser) -> None:
    """Add `--root`."""
    parser.add_argument(
        "--root",
        type=folder,
        default=Path(),
        metavar="DIR",
        help="folder that holds mlflow.db and mlruns/ (default: the working folder)",
    )


def add_study(parser: argparse.ArgumentParser, *, help: str) -> None:
    """Add `--study`."""
    parser.add_argument("--study", type=_study_name, metavar="NAME", help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device", type=_device, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps (default: auto)"
    )


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an option's type: a whole number from `low` to `high`."""
    limits = f"from {low} to {high}" if high is not None else f"of at least {low}"

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text) and low <= int(text) and (high is None or int(text) <= high):
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number {limits}, got {text!r}")

    return parse


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def folder(text: str) -> Path:
    """Read the path of a folder that exists."""
    if not os.path.isdir(text):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise argparse.ArgumentTypeError(f"must be a folder that exists, got {text[:120]!r}; make it first")
    return Path(text)


def quoted(path: Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))


def _study_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", text):
        rule = "must be 1 to 100 letters, digits, '_', '-' and '.', not starting with '-' or '.'"
        raise argparse.ArgumentTypeError(f"{rule}, got {text[:120]!r}")
    return text


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N, got {text!r}")
    return text
