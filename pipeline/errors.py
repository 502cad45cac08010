"""Every deliberate error of the pipeline.

    PipelineError            the command line prints one message and exits with `exit_status`
    ├── InvalidInput         a file, option or workload cannot be used: all problems of a stage at once, exit status 2
    ├── StudyBusy            another process runs the study, exit status 1
    ├── StorageError         a store cannot be read or written, exit status 1
    ├── TrainingEnded        a config diverged or raised in its training again, exit status 1
    ├── DataError            a data set raised during training, exit status 1
    └── DeviceError          the device failed, so nothing can train on it, exit status 1

Any other exception is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MAX_PROBLEMS = 20
"""Problems that a message lists."""
MAX_PLACE, MAX_MESSAGE = 200, 600
"""Characters of a problem that are shown; the middle of more is cut, since a long value stands in the middle."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input."""

    place: str
    """A dotted path in a file, or an option of the command line; empty for the input as a whole."""
    message: str
    """The rule, the value that was given, and the remedy."""

    def __str__(self) -> str:
        """Return one line of printable characters."""
        place, message = shortened(self.place, MAX_PLACE), shortened(self.message, MAX_MESSAGE)
        return printable(f"{place}: {message}" if place else message)


class PipelineError(Exception):
    """The root of every deliberate error."""

    exit_status = 1

    def __str__(self) -> str:
        """Return lines of printable characters."""
        return "\n".join(map(printable, super().__str__().split("\n")))


class InvalidInput(PipelineError):
    """A file, an option or a workload cannot be used as written."""

    exit_status = 2

    def __init__(self, source: str, problems: Iterable[Problem], *, remedy: str = "", show: int = MAX_PROBLEMS) -> None:
        """Collect every problem of `source`, a file name or an option.

        Args:
            source: What has the problems.
            problems: All of them.
            remedy: The last line of the message, for a remedy that all problems share.
            show: The message lists at most so many problems, and says how many more there are.
        """
        self.source = source
        self.problems = tuple(problems)
        count = counted(len(self.problems), "problem")
        shown = self.problems[:show]
        more = f"… ({len(self.problems) - len(shown)} more)" if len(shown) < len(self.problems) else ""
        source = printable(shortened(source, MAX_PLACE))
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, shown), *filter(None, (more, remedy))]))


class StudyBusy(PipelineError):
    """Another process runs the study."""


class StorageError(PipelineError):
    """A store cannot be read or written."""


class TrainingEnded(PipelineError):
    """The one config that was to be trained diverged, or its model, loss or metric raised."""


class DataError(PipelineError):
    """A data set, `augment` or `preprocess` raised."""


class DeviceError(PipelineError):
    """The device failed, so nothing can train on it."""


@contextlib.contextmanager
def collect(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of an `InvalidInput` raised inside the block to a list, and go on after the block."""
    try:
        yield
    except InvalidInput as error:
        problems += error.problems


def printable(text: str) -> str:
    """Return a text for a terminal: escapes stand for control characters, which it would obey, `***` for passwords."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in masked(text))


def masked(text: str) -> str:
    """Return a text with `***` for the names and passwords in its URLs.

    A name alone may be a token, except in PostgreSQL's URLs, whose names are needed to connect again.
    """
    name = r"(?<!postgresql://)(?<!postgresql\+psycopg://)(?<!postgres://)[^\s/]*|[^\s/]*@[^\s/]*"
    text = re.sub(rf"(?<=://)([^\s/@]*:\S*|{name})@", "***@", text)
    return re.sub(r"(?i)([?&][^\s=&]*(?:password|passwd|pwd|secret|token)[^\s=&]*=)[^\s&]*", r"\1***", text)


def shortened(text: str, limit: int) -> str:
    """Return a text with its middle cut out if it has more characters than `limit`."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}… ({len(text) - 2 * half} more) …{text[-half:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or all of them."""
    known = list(known)
    near = nearest(word, known)
    return f"did you mean {near}?" if near else f"known: {', '.join(known)}"


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like a word, if one is more like it than `cutoff`, from 0 to 1."""
    by_lower_case = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else None


def listed(names: Sequence[str], *, show: int = 8) -> str:
    """Return the first names as text, and how many more there are."""
    more = f", … ({len(names) - show} more)" if len(names) > show else ""
    return ", ".join(names[:show]) + more


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 epoch`, `2 epochs`."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
