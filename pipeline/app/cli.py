"""The part that all command lines share: options with their types, and exit statuses."""

from __future__ import annotations

import argparse
import gc
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import __version__
from pipeline.errors import InvalidInput, PipelineError, Problem, did_you_mean, printable
from pipeline.files.atomic import check_writable
from pipeline.files.locks import is_study_name, refuse_links
from pipeline.files.postgres import STORAGE, read_url
from pipeline.files.signals import CtrlC
from pipeline.space.config import WORKLOADS, Own
from pipeline.space.overrides import parse_override
from pipeline.space.ready_made import DEFAULT, DEFAULT_WITH_WORKLOAD, ready_made, summary

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""
MAX_SEED = 2**32 - 1
MAX_SHOWN = 120
"""Most characters of a bad value that a message shows."""


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status; print a deliberate error as one message, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks `·` shows its code instead
    ctrl_c = CtrlC()
    try:
        with ctrl_c:
            status = main()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has ended
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
    # At exit Python would search all objects of torch and Optuna for garbage, which takes over a second. A module built
    # with nanobind prints a line for each of its objects that is left then.
    if not any(kind.__module__ == "nanobind" for kind in type.__subclasses__(type)):
        gc.freeze()
    sys.exit(status)


def build_parser(command: str, description: str, *, more: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of a command, with `--version`.

    Args:
        command: Name of the command's module.
        description: A sentence.
        more: Lines below the options.
    """
    parser = _Parser(
        prog=f"python -m pipeline.{command}",
        description=description,
        epilog="\n".join(more),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lr-strategy-search {__version__}")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with a message that shows no password of a URL, such as one that is no argument of the command."""
        super().error(printable(message))


def choices_of_spaces() -> list[str]:
    """Return lines that say which ready-made spaces and built-in workloads there are."""
    width = shutil.get_terminal_size().columns - 2
    spaces = {name: summary(file) for name, file in ready_made().items()}
    indent = max(map(len, spaces)) + 4
    lines = [
        textwrap.fill(f"  {name:{indent - 2}}{words}", width, subsequent_indent=" " * indent)
        for name, words in spaces.items()
    ]
    built_in = ", ".join(name for name in WORKLOADS if name != "own")
    workloads = textwrap.fill(f"  {built_in}; or your own, path/to/file.py:function", width, subsequent_indent="  ")
    return ["ready-made spaces:", *lines, "", "workloads:", workloads]


def add_root(parser: argparse.ArgumentParser, *, help: str = "folder that holds mlflow.db and mlruns/") -> None:
    """Add `--root`."""
    help = f"{help} (default: the working folder)"
    parser.add_argument("--root", type=folder, default=Path(), metavar="DIR", help=help)


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Add `--storage`."""
    help = "a PostgreSQL database that holds the ended trials, postgresql://user@host/database; its password is read "
    help += f"from PGPASSWORD or ~/.pgpass (default: {STORAGE}, else mlruns/optuna.db)"
    parser.add_argument("--storage", type=storage_url, metavar="URL", help=help)


def add_study(parser: argparse.ArgumentParser, *, help: str) -> None:
    """Add `--study`."""
    parser.add_argument("--study", type=study_name, metavar="NAME", help=help)


def add_delete(parser: argparse.ArgumentParser) -> None:
    """Add `--delete` and `--yes`."""
    help = "delete this study, with its trials, files and MLflow runs, instead of searching; asks first"
    parser.add_argument("--delete", type=study_name, metavar="NAME", help=help)
    parser.add_argument("--yes", action="store_true", help="delete without asking")


def add_device(parser: argparse.ArgumentParser, *, help: str = "") -> None:
    """Add `--device`."""
    help += "auto, cpu, cuda, cuda:1 or mps (default: auto)"
    parser.add_argument("--device", type=device_name, default="auto", metavar="NAME", help=help)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`, `--ray` and `--cpus-per-worker`."""
    help = "train on N GPUs of this machine at a time; without GPUs, in N shares of its cores (default: on one device)"
    parser.add_argument("--workers", type=WORKERS, metavar="N", help=help)
    help = "train on a Ray cluster, host:port or auto, with --workers N or as many workers as it has GPUs or nodes"
    parser.add_argument("--ray", type=ray_address, metavar="ADDRESS", help=help)
    help = "cores of each worker (default: the cores of a machine divided by its workers)"
    parser.add_argument("--cpus-per-worker", type=CPUS, metavar="N", help=help)


def add_space(parser: argparse.ArgumentParser) -> None:
    """Add `--space`, `--seed`, and what `add_overrides` adds."""
    help = f"a search-space file, or the name of a ready-made one, such as decay (default: {DEFAULT}; with --workload, "
    parser.add_argument("--space", type=file, metavar="FILE", help=f"{help}{DEFAULT_WITH_WORKLOAD})")
    add_overrides(parser)
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), metavar="N", help="replaces the file's seed")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--workload` and `--set`, which change the values of a file; `overrides_of` reads both."""
    help = "path/to/file.py:function or package.module:function that returns a Workload or Epochs, or a built-in name"
    parser.add_argument("--workload", type=workload_choice, metavar="NAME", help=help)
    help = "change a value of the file, such as batch_size=32 or optimizer.sgd.base_lr.high=0.5; null removes it"
    parser.add_argument("--set", type=parse_override, metavar="PLACE=VALUE", action="append", default=[], help=help)


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the changes that `--workload`, `--seed` and `--set` make to a file, by place."""
    chosen = {"workload": arguments.workload, "seed": getattr(arguments, "seed", None)}
    return {**{place: value for place, value in chosen.items() if value is not None}, **dict(arguments.set)}


def say_own_code(space: SearchSpace, say: Callable[[str], None] = print) -> None:
    """Name the user's function before it runs, if the workload is one."""
    if isinstance(space.workload, Own):
        say(f"workload from {printable(space.workload.function)}")


def warn(warning: str) -> None:
    """Print a warning."""
    print(f"warning: {printable(warning)}", file=sys.stderr)


def shown(value: Any) -> str:
    """Return a value for a message, cut if it is long."""
    return repr(value)[:MAX_SHOWN]


def quoted(path: Path) -> str:
    """Return a path quoted for a shell."""
    return shlex.quote(str(path))


def whole_number(low: int, high: int = 10**9) -> Callable[[str], int]:
    """Return an option's type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text) and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text[:MAX_SHOWN]!r}")

    return parse


SEEDS, FINALISTS = whole_number(2, 50), whole_number(1, 20)
"""Readers of the size of a confirmation, within the limits of `Confirm`."""


WORKERS, CPUS = whole_number(1, 4096), whole_number(1, 4096)
"""Readers of the number of workers, and of the cores of each."""


def ray_address(text: str) -> str:
    """Read the address of a Ray cluster."""
    if text == "auto" or re.fullmatch(r"[\w.-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}", text):
        return text
    rule = "must be auto, or host:port of the head of a cluster of which this machine is a node, such as 10.0.0.1:6379"
    raise argparse.ArgumentTypeError(f"{rule}, got {text[:MAX_SHOWN]!r}")


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text[:MAX_SHOWN]!r}")
    return value


def file(text: str) -> Path:
    """Read the path of a file, which need not exist; `~` is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a file, got ''")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no such home folder, got {text[:MAX_SHOWN]!r}") from None


def folder(text: str) -> Path:
    """Read the path of a folder, which need not exist; `~` is the home folder."""
    path = file(text)
    try:
        there = os.path.lexists(path)
        path.is_dir()  # raises for a name that is too long
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a folder, got {text[:MAX_SHOWN]!r}: {error.strerror}") from None
    if there and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got the file {text[:MAX_SHOWN]!r}; name another")
    return path


def study_name(text: str) -> str:
    """Read the name of a study."""
    if not is_study_name(text):
        rule = "must be 1 to 100 letters, digits, '_', '-' and '.', not starting with '-' or '.'"
        raise argparse.ArgumentTypeError(f"{rule}, got {text[:MAX_SHOWN]!r}")
    return text


def storage_url(text: str) -> str:
    """Read the URL of a PostgreSQL database; no message shows any of it, since it may hold a password."""
    try:
        return read_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def chosen_storage(given: str | None) -> str | None:
    """Return the URL of the database that an option or else the environment names; None for SQLite's.

    Raises:
        InvalidInput: The environment names no PostgreSQL database.
    """
    try:
        return given or (read_url(os.environ[STORAGE]) if os.environ.get(STORAGE) else None)
    except ValueError as error:
        raise InvalidInput(STORAGE, [Problem("", str(error))]) from None


def root_options(root: Path, storage: str | None) -> str:
    """Return the options, with a space before each, that name the studies of a root again."""
    words = "" if root == Path() else f" --root {quoted(root)}"
    return words + ("" if storage is None else f" --storage {shlex.quote(storage)}")


def workload_choice(text: str) -> dict[str, str]:
    """Read a workload that is named in one word; return it in the words of a file."""
    file, colon, function = text.rpartition(":")
    if not colon and re.search(r"[./]", text):
        raise argparse.ArgumentTypeError(f"must name a function, {text[:MAX_SHOWN]}:function, got {text[:MAX_SHOWN]!r}")
    built_in = [name for name in WORKLOADS if name != "own"]
    if not colon and text not in built_in:
        remedy = f"{did_you_mean(text, built_in)}; one of your own is path/to/file.py:function"
        raise argparse.ArgumentTypeError(f"unknown workload {text[:MAX_SHOWN]!r}; {remedy}")
    if not colon:
        return {"name": text}
    return {"name": "own", "function": f"{os.path.normpath(file) if file.endswith('.py') else file}:{function}"}


def device_name(text: str) -> str:
    """Read the name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N, got {text[:MAX_SHOWN]!r}")
    return text


def refuse_unwritable(path: Path, place: str) -> None:
    """Refuse a file that could not be written, before any work is done for it; write nothing.

    Raises:
        InvalidInput: A permission is missing, or the path is no regular file.
    """
    try:
        check_writable(path)
    except OSError as error:
        raise InvalidInput(place, [Problem(str(path), f"cannot be written: {error.strerror}; name another")]) from None


def refuse_root(root: Path, *names: str) -> None:
    """Refuse a root in which files of these names, such as `mlruns/optuna.db`, could not be written, or are links.

    Raises:
        InvalidInput: A permission is missing, something that is no file has the path, or a link is in the way.
    """
    refuse_links(root, *(root / name for name in names))
    for name in names:
        refuse_unwritable(root / name, "--root")


def writable_out(path: Path) -> Path:
    """Return the absolute path of an `--out`, before any work is done for it: own code may change the working folder.

    Raises:
        InvalidInput: The folder does not exist, or the file cannot be written.
    """
    if not path.absolute().parent.is_dir():
        message = f"there is no folder {path.absolute().parent}; make it first"
        raise InvalidInput("--out", [Problem(str(path), message)])
    refuse_unwritable(path.resolve(), "--out")
    return path.resolve()
