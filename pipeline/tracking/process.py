"""Trackers in a process of their own, so that no tracker delays or disturbs training.

The search's process holds a `TrackerProcess`, whose methods put messages into a pipe. The tracker process reads them in
order (`serve`), calls each tracker, and answers over a second pipe.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.errors import StorageError
from pipeline.files.locks import folder_locked, study_folder
from pipeline.space.trial import EndedTrial
from pipeline.tracking.mlflow import MLflowTracker
from pipeline.tracking.tracker import StudyInfo, StudySummary, Tracker, root_cause

TRACKERS: tuple[Callable[[Path], Tracker], ...] = (MLflowTracker,)
"""Every tracker of a search; each is built with the root folder and may refuse it with `InvalidInput`."""


class TrackerProcess:
    """The trackers of a search; nothing here raises or waits for a tracker, except `links` and `close`.

    The process starts at once and imports what trackers need, while the caller imports PyTorch. No file is touched
    until `open`. Ctrl-C does not reach the process. The process ends with `close`, or when the caller's process has
    died and everything that was sent is recorded.
    """

    def __init__(self, root: Path, *, trackers: Sequence[Callable[[Path], Tracker]] = TRACKERS) -> None:
        """Build the trackers and start their process.

        Raises:
            InvalidInput: A tracker cannot use the root.
        """
        built = [build(root) for build in trackers]
        self._records = [_Record(tracker) for tracker in built]
        self._root = root.absolute()
        self._opened = False
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox.put(built)
        self._sent: Counter[str] = Counter()
        self._ready = threading.Event()
        self._warnings: list[str] | None = None
        # Not multiprocessing: its new process would import the caller's main module once more.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from pipeline.tracking.process import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())},
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def open(self, study: StudyInfo) -> None:
        """Have every tracker open a study, with the environment variables of this moment."""
        self._opened = True
        for record in self._records:
            record.name = str(record.tracker)
        self._send("open", self._root, study, dict(os.environ))

    def links(self) -> list[str]:
        """Return how a person looks at each record, once it is open; wait at most a minute."""
        self._ready.wait(timeout=60)
        return [record.link for record in self._records if record.link is not None]

    def end(self, trial: EndedTrial) -> None:
        """Have every tracker record a trial that has ended."""
        self._send("end", trial)

    def finish(self, summary: StudySummary) -> None:
        """Have every tracker record how the search ended."""
        self._send("finish", summary)

    def close(self, timeout: float = 60.0) -> list[str]:
        """Wait until everything is recorded, at most `timeout` seconds; return what went wrong, one sentence each."""
        if self._warnings is not None:
            return self._warnings
        self._outbox.put(None)
        if not self._opened:
            self._process.kill()
        self._reader.join(timeout)
        end = None
        if self._reader.is_alive():
            end = f"it was not done after {timeout:g} s"
            self._process.kill()
            self._reader.join()
        status = self._process.wait()
        self._writer.join()
        if status and self._opened:
            end = end or f"its process ended with {_exit(status)}"
        self._warnings = [line for record in self._records for line in record.warnings(self._sent, end)]
        return self._warnings

    def _send(self, verb: str, *arguments: Any) -> None:
        self._sent[verb] += 1
        self._outbox.put((verb, arguments))

    def _write(self) -> None:
        """Feed the process from the outbox, so that no caller waits for the pipe."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            for message in iter(self._outbox.get, None):
                pickle.dump(message, pipe)
                pipe.flush()
            pickle.dump(None, pipe)

    def _read(self) -> None:
        """Take the process's answers, until it ends."""
        assert self._process.stdout
        try:
            with contextlib.suppress(EOFError, pickle.UnpicklingError), self._process.stdout as pipe:
                while True:
                    number, *answer = pickle.load(pipe)
                    self._records[number].take(*answer)
                    if all(record.answered["open"] for record in self._records):
                        self._ready.set()
        finally:
            self._ready.set()


class _Record:
    """What the search's process knows of one tracker: the answers so far."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.name = str(tracker)
        self.link: str | None = None
        self.answered: Counter[str] = Counter()
        self._failures: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def take(self, verb: str, result: Any, cause: str | None) -> None:
        """Take an answer: what the tracker returned, or why it failed."""
        self.answered[verb] += 1
        if cause is not None:
            self._failures[cause][verb] += 1
        elif verb == "open":
            self.link = result
        elif verb == "close":
            self._failures.update({warning: Counter() for warning in result})

    def warnings(self, sent: Counter[str], end: str | None) -> list[str]:
        """Return what went wrong, given what was sent, and why the process ended if it did not end by itself."""
        unanswered = sent - self.answered
        if end or unanswered:
            self._failures[end or "its process ended too early"] += unanswered
        return [f"{self.name}: {_sentence(cause, lost)}" for cause, lost in self._failures.items()]


def _import_path() -> list[str]:
    """Return where the process imports from: where this process does, but not from the working folder.

    A file there, such as `random.py`, would otherwise run in place of a module. The folder that holds this package may
    be the working folder, and comes last.
    """
    here = Path.cwd()
    return [folder for folder in sys.path if Path(folder).resolve() != here] + [str(Path(__file__).parents[2])]


def serve() -> None:
    """Run the trackers of a `TrackerProcess`: read messages from standard input, answer on standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # some hosts signal every process; the caller decides
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # training comes first; the rest of the processor's time is enough for trackers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that a library prints must not come between the answers
    with contextlib.suppress(EOFError), contextlib.ExitStack() as lock:
        servers = [Server(number, tracker, answers) for number, tracker in enumerate(pickle.load(sys.stdin.buffer))]
        # A thread, because the first message locks the study's folder, which must not wait for imports.
        threading.Thread(target=_load, args=[servers]).start()
        with contextlib.suppress(EOFError):
            # The end of the pipe would not do: it has none while a process that the caller's model forked is alive.
            while (message := pickle.load(sys.stdin.buffer)) is not None:
                verb, arguments = message
                if verb == "open":
                    arguments = [_prepare(lock, *arguments)]
                for server in servers:
                    server.do(verb, *arguments)
        for server in servers:
            server.do("close")


def _load(servers: Sequence[Server]) -> None:
    for server in servers:
        server.load()


def _prepare(lock: contextlib.ExitStack, root: Path, study: StudyInfo, environment: Mapping[str, str]) -> StudyInfo:
    """Take the caller's environment, and lock the study's folder until this process ends.

    If a search is killed, its tracker process records everything that it was sent, and only then the next search's
    process opens the record: otherwise both would record the same trials.
    """
    os.environ.update(environment)
    with contextlib.suppress(OSError, StorageError):  # no folder or no lock, so no other search can use it either
        lock.enter_context(folder_locked(study_folder(root, study.name)))
    return study


class Server:
    """Calls one tracker, and answers with its number, the verb, the result, and why the call failed.

    A trial that could not be recorded is not answered yet, and tried once more at the end.
    """

    def __init__(self, number: int, tracker: Tracker, answers: IO[bytes]) -> None:
        self._number = number
        self._tracker = tracker
        self._answers = answers
        self._broken: str | None = None
        self._missed: list[EndedTrial] = []

    def load(self) -> None:
        """Import what the tracker needs; an error comes again in `open`, which is answered."""
        with contextlib.suppress(Exception):
            self._tracker.load()

    def do(self, verb: str, *arguments: Any) -> None:
        """Call a method of the tracker."""
        if verb != "end":
            self._retry()
        result, cause = self._attempt(verb, *arguments)
        if verb == "end" and cause and not self._broken:
            self._missed += arguments
        else:
            self._answer(verb, result, cause)

    def _retry(self) -> None:
        """Record the missed trials, until one fails again."""
        cause: str | None = None
        for trial in self._missed:
            _, cause = (None, cause) if cause else self._attempt("end", trial)
            self._answer("end", None, cause)
        self._missed = []

    def _attempt(self, verb: str, *arguments: Any) -> tuple[Any, str | None]:
        """Return what a method returned, or why it failed."""
        if self._broken:
            return None, self._broken
        try:
            return getattr(self._tracker, verb)(*arguments), None
        except Exception as error:
            cause = root_cause(error)
            if verb == "open":
                self._broken = cause
            return None, cause

    def _answer(self, verb: str, result: Any, cause: str | None) -> None:
        with contextlib.suppress(
            BrokenPipeError
        ):  # the caller died: the rest of its messages are recorded all the same
            pickle.dump((self._number, verb, result, cause), self._answers)
            self._answers.flush()


def _exit(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _sentence(cause: str, lost: Counter[str]) -> str:
    trials = lost["end"]
    missing = [f"{trials} trial{'s' if trials > 1 else ''}"] if trials else []
    missing += ["the summary"] if lost["finish"] else []
    verb = "are" if len(missing) > 1 or trials > 1 else "is"
    return f"{cause}; {' and '.join(missing)} {verb} not recorded" if missing else cause
