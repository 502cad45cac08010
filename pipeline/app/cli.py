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
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import InvalidInput, PipelineError, Problem, did_you_mean
from pipeline.files.signals import CtrlC
from pipeline.space.config import WORKLOADS, Own
from pipeline.space.ready_made import DEFAULT, DEFAULT_WITH_WORKLOAD

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command to its exit status; a deliberate error is one message on standard error, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without `·` is no reason to stop
    ctrl_c = CtrlC()
    try:
        with ctrl_c:
            status = main()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (Exception, KeyboardInterrupt) as error:
        if ctrl_c.pressed or isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            status = INTERRUPTED
        elif isinstance(error, PipelineError):
            print(error, file=sys.stderr)
            status = error.exit_status
        else:
            raise
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
    parser.add_argument("--study", type=study_name, metavar="NAME", help=help)


def add_delete(parser: argparse.ArgumentParser) -> None:
    """Add `--delete` and `--yes`."""
    help = "delete this study, with its trials, files and MLflow runs, in place of searching; asks first"
    parser.add_argument("--delete", type=study_name, metavar="NAME", help=help)
    parser.add_argument("--yes", action="store_true", help="delete without asking")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1 or mps (default: auto)",
    )


def add_space(parser: argparse.ArgumentParser) -> None:
    """Add `--space`, `--workload` and `--set`."""
    help = f"a search-space file, or the name of a ready-made one, such as decay (default: {DEFAULT}; with --workload, "
    parser.add_argument("--space", type=file, metavar="FILE", help=f"{help}{DEFAULT_WITH_WORKLOAD})")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, and `--workload`, to change what a file says; `overrides_of` reads both."""
    from pipeline.space.overrides import parse_override

    help = "path/to/file.py:function or package.module:function that returns a Workload, or a built-in name"
    parser.add_argument("--workload", type=workload_choice, metavar="NAME", help=help)
    help = "change a value of the file, such as batch_size=32 or optimizer.sgd.base_lr.high=0.5; null removes it"
    parser.add_argument("--set", type=parse_override, metavar="PLACE=VALUE", action="append", default=[], help=help)


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `--workload` and `--set` change, by place."""
    chosen = {"workload": arguments.workload, "seed": getattr(arguments, "seed", None)}
    return {**{place: value for place, value in chosen.items() if value is not None}, **dict(arguments.set)}


def say_own_code(space: SearchSpace, say: Callable[[str], None] = print) -> None:
    """Say which code of a person's own is about to run, if any."""
    if isinstance(space.workload, Own):
        say(f"workload from {space.workload.function}")


def warn(warning: str) -> None:
    """Say what a person should know, without ending the command."""
    print(f"warning: {warning}", file=sys.stderr)


def whole_number(low: int, high: int = 10**9) -> Callable[[str], int]:
    """Return an option's type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text) and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text[:120]!r}")

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


def file(text: str) -> Path:
    """Read the path of a file, which need not exist."""
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a file, got ''")
    return Path(text)


def folder(text: str) -> Path:
    """Read the path of a folder that exists."""
    if not os.path.isdir(text):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise argparse.ArgumentTypeError(f"must be a folder that exists, got {text[:120]!r}; make it first")
    return Path(text)


def refuse_unwritable(path: Path, place: str) -> None:
    """Refuse, before anything is done, what could not be saved in the end.

    Raises:
        InvalidInput: The file could not be written.
    """
    from pipeline.files.atomic import check_writable

    try:
        check_writable(path)
    except OSError as error:
        raise InvalidInput(place, [Problem(str(path), f"cannot be written: {error.strerror}; name another")]) from None


def refuse_out(path: Path) -> None:
    """Refuse, before anything is done, an `--out` that could not be written in the end.

    Raises:
        InvalidInput: Its folder is not there, or the file could not be written.
    """
    if not path.absolute().parent.is_dir():
        message = f"there is no folder {path.absolute().parent}; make it first"
        raise InvalidInput("--out", [Problem(str(path), message)])
    refuse_unwritable(path.resolve(), "--out")


def quoted(path: Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))


def study_name(text: str) -> str:
    """Read the name of a study."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", text):
        rule = "must be 1 to 100 letters, digits, '_', '-' and '.', not starting with '-' or '.'"
        raise argparse.ArgumentTypeError(f"{rule}, got {text[:120]!r}")
    return text


def workload_choice(text: str) -> dict[str, str]:
    """Return what a file says of a workload that was named in one word.

    Raises:
        InvalidInput: It is a file or a module without a function, or nothing has that name.
    """
    file, colon, function = text.rpartition(":")
    if not colon and re.search(r"[./]", text):
        raise InvalidInput("--workload", [Problem(text, f"has no function; name one, {text}:function")])
    built_in = [name for name in WORKLOADS if name != "own"]
    if not colon and text not in built_in:
        message = f"unknown workload; {did_you_mean(text, built_in)}; one of your own is path/to/file.py:function"
        raise InvalidInput("--workload", [Problem(repr(text), message)])
    if not colon:
        return {"name": text}
    return {"name": "own", "function": f"{os.path.normpath(file) if file.endswith('.py') else file}:{function}"}


def device_name(text: str) -> str:
    """Read the name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N, got {text!r}")
    return text
