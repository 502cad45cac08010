"""Trackers in a process of their own, so that no tracker delays or disturbs training.

The search's process holds a `TrackerProcess`, whose methods put messages into a pipe. The tracker process reads them in
order (`serve`), calls each tracker, and answers over a second pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import counted
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics
from pipeline.tracking.mlflow import MLflowTracker
from pipeline.tracking.tracker import StoredTrial, StudyInfo, StudySummary, Tracker

TRACKERS: tuple[Callable[[Path], Tracker], ...] = (MLflowTracker,)
"""Every tracker of a search; each is built with the root folder and may refuse it with `InvalidInput`."""
MAX_RESTARTS = 10
"""A killed tracker process is started again so many times in a search."""

_Message = tuple[str, tuple[Any, ...]]
"""The name of a tracker's method, and its arguments."""


class TrackerProcess:
    """The trackers of a search; nothing here raises or waits for a tracker, except `links` and `close`.

    The process starts at once and imports what trackers need, while the caller imports PyTorch. No file is touched
    until `open`. Ctrl-C does not reach the process. The process ends with `close`, or when the caller's process has
    died and everything that was sent is recorded. A process that is killed is started again, and is told once more of
    every trial that is not recorded.
    """

    def __init__(
        self,
        root: Path,
        *,
        trackers: Sequence[Callable[[Path], Tracker]] = TRACKERS,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Build the trackers and start their process.

        Args:
            root: The root folder.
            trackers: Each builds a tracker.
            warn: Takes one sentence, from another thread, when a tracker begins to fail, and when it no longer does.

        Raises:
            InvalidInput: A tracker cannot use the root.
        """
        self._trackers = [build(root) for build in trackers]
        self._records = [_Record(tracker) for tracker in self._trackers]
        self._root = root.absolute()
        self._warn = warn
        self._lock = threading.Lock()  # of the outbox, of the messages to send again, and of the records
        self._study: StudyInfo | None = None
        self._trials: defaultdict[int, list[_Message]] = defaultdict(list)
        """Number of each trial that some tracker has not recorded, to its messages."""
        self._ended: list[StoredTrial] = []
        """Trials that have ended, before the study was opened and since."""
        self._before: set[int] = set()
        """Numbers of the trials that had ended when the study was opened, and that were not told since."""
        self._finish: _Message | None = None
        self._closing = False
        self._end: str | None = None
        """Why the process ended, if it did not end by itself."""
        self._ready = threading.Event()
        self._warnings: list[str] | None = None
        self._start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def missing(self) -> int:
        """Number of trials that some tracker has not recorded."""
        with self._lock:
            return len(set().union(*(record.missing for record in self._records)))

    @property
    def incomplete(self) -> bool:
        """Whether a tracker has not recorded everything; after `close`, it never will."""
        return bool(self.missing) or any(record.finish_is_missing for record in self._records)

    def open(self, study: StudyInfo) -> None:
        """Have every tracker open a study, with the environment variables of this moment."""
        with self._lock:
            self._before = {trial.number for trial in study.ended}
            for record in self._records:
                record.name = str(record.tracker)
                record.missing |= self._before
            self._study, self._ended = study, list(study.ended)
            self._environment = dict(os.environ)
            self._outbox.put(self._opening())

    def untold(self, *, wait: bool = False) -> list[int]:
        """Return the numbers of trials that had ended when the study was opened, and that a tracker lacks.

        None is known before the trackers are open. A trial whose end is told is left out from then on.

        Args:
            wait: Whether to wait until the trackers are open, at most a minute.
        """
        if not self._before or not self._ready.wait(timeout=60 if wait else 0):
            return []
        with self._lock:
            return sorted(self._before & set().union(*(r.missing for r in self._records if r.opened)))

    def links(self) -> list[str]:
        """Return how a person looks at each record, once it is open; wait at most a minute."""
        self._ready.wait(timeout=60)
        return [record.link for record in self._records if record.link is not None]

    def begin(self, trial: BegunTrial) -> None:
        """Have every tracker take a trial that begins or goes on."""
        self._send(trial.number, "begin", trial)

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        """Have every tracker take the metrics of an epoch that has just ended."""
        now = time.time()
        with self._lock:
            for number, epoch in metrics.items():
                self._trials[number].append(("epochs", ({number: epoch}, now)))
            self._outbox.put(("epochs", (metrics, now)))

    def end(self, trial: EndedTrial) -> None:
        """Have every tracker record a trial that has ended."""
        with self._lock:
            self._before.discard(trial.number)
            self._ended.append(StoredTrial.of(trial))
            for record in self._records:
                record.missing.add(trial.number)
        self._send(trial.number, "end", trial)

    def finish(self, summary: StudySummary) -> None:
        """Have every tracker record how the search ended."""
        with self._lock:
            for record in self._records:
                record.finish_is_missing = True
            self._finish = "finish", (summary,)
            self._outbox.put(self._finish)

    def close(self, *, stalled_s: float = 60.0, waiting: Callable[[int], None] = lambda _: None) -> list[str]:
        """Wait until everything is recorded, as long as there is progress; return what went wrong, one sentence each.

        Args:
            stalled_s: Seconds without an answer after which the process is ended.
            waiting: Called about once a second with the number of trials that are not recorded.
        """
        if self._warnings is not None:
            return self._warnings
        with self._lock:
            self._closing = True
            self._outbox.put(None)
        if self._study is None:
            self._process.kill()
        answers, since = self._answers(), time.monotonic()
        while self._reader.is_alive():
            self._reader.join(min(1.0, stalled_s))
            if not self._reader.is_alive():
                break
            waiting(self.missing)
            if answers != self._answers():
                answers, since = self._answers(), time.monotonic()
            elif time.monotonic() - since >= stalled_s:
                self._end = f"nothing was recorded for {stalled_s:g} s"
                self._process.kill()
        self._writer.join()
        opened = [] if self._study is None else self._records
        self._warnings = [line for record in opened for line in record.warnings(self._end)]
        return self._warnings

    def _answers(self) -> int:
        return sum(record.answers for record in self._records)

    def _send(self, number: int, verb: str, *arguments: Any) -> None:
        with self._lock:
            self._trials[number].append((verb, arguments))
            self._outbox.put((verb, arguments))

    def _opening(self) -> _Message | None:
        if self._study is None:
            return None
        study = dataclasses.replace(self._study, ended=tuple(self._ended))
        return "open", (self._root, study, self._environment)

    def _start(self) -> None:
        """Start the process, and send what is not recorded."""
        # Not multiprocessing: its new process would import the caller's main module once more.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from pipeline.tracking.server import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A warning within a library must not become an error, as PYTHONWARNINGS can have it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path()), "PYTHONWARNINGS": "ignore"},
            process_group=0,
        )
        again = [message for _, messages in sorted(self._trials.items()) for message in messages]
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for message in filter(None, (self._trackers, self._opening(), *again, self._finish)):
            self._outbox.put(message)
        if self._closing:
            self._outbox.put(None)
        self._writer = threading.Thread(target=_feed, args=[self._process, self._outbox], daemon=True)
        self._writer.start()

    def _read(self) -> None:
        """Take answers until the process ends; start it again if something killed it."""
        try:
            for _ in range(MAX_RESTARTS):
                status = self._take_answers()
                unneeded = self._closing and self._study is None
                if status >= 0 or unneeded or self._end:
                    break
                with self._lock:
                    self._outbox.put(None)  # ends the thread that feeds the old process
                    self._start()
            else:
                status = self._take_answers()
            if status:
                self._end = self._end or f"its process ended with {_exit(status)}"
        finally:
            self._ready.set()

    def _take_answers(self) -> int:
        """Take the process's answers until it ends; return its status."""
        assert self._process.stdout
        with contextlib.suppress(EOFError, pickle.UnpicklingError), self._process.stdout as pipe:
            while True:
                index, *answer = pickle.load(pipe)
                with self._lock:
                    recorded = self._records[index].take(*answer)
                    news = None if self._closing else self._records[index].news()
                    if recorded is not None and not any(recorded in record.missing for record in self._records):
                        self._trials.pop(recorded, None)
                if news:
                    self._warn(news)
                if all(record.answered for record in self._records):
                    self._ready.set()
        return self._process.wait()


def _feed(process: subprocess.Popen[bytes], outbox: queue.SimpleQueue[Any]) -> None:
    """Feed a process from an outbox, so that no caller waits for the pipe."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        for message in iter(outbox.get, None):
            pickle.dump(message, pipe)
            pipe.flush()
        pickle.dump(None, pipe)


class _Record:
    """What the search's process knows of one tracker: the answers so far."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.name = str(tracker)
        self.link: str | None = None
        self.answered = False
        """Whether the tracker has tried to open the study."""
        self.opened = False
        self.answers = 0
        self.missing: set[int] = set()
        """Numbers of the ended trials that are not recorded."""
        self.finish_is_missing = False
        self._causes: dict[str | int, str] = {}
        """Number of a trial, or a method, to why it failed the last time."""
        self._notes: list[str] = []
        self._is_failing = False

    def take(self, verb: str, number: int | None, result: Any, cause: str | None) -> int | None:
        """Take an answer, what the tracker returned or why it failed; return the number of a trial now recorded."""
        self.answers += 1
        self.answered = self.answered or verb == "open"
        if cause is not None:
            self._causes[verb if number is None else number] = cause
            return None
        self._causes.pop(verb if number is None else number, None)
        if verb == "open":
            self.link, recorded = result
            self.opened = True
            self.missing -= recorded
        elif verb == "close":
            self._notes += result
        elif verb == "finish":
            self.finish_is_missing = False
        elif number is not None:
            self.missing.discard(number)
        return number

    def news(self) -> str | None:
        """Return a sentence when the tracker begins to fail, and when it no longer does."""
        cause = self._causes.get("open") or self._causes.get("flush")
        if (cause is not None) == self._is_failing:
            return None
        self._is_failing = cause is not None
        if cause is None:
            return f"{self.name}: records again, also what it has missed"
        return f"{self.name}: {cause}; the search goes on, and tries again every few seconds"

    def warnings(self, end: str | None) -> list[str]:
        """Return what went wrong, given why the process ended if it did not end by itself."""
        because = end or "its process ended too early"
        lost: defaultdict[str, list[str | int]] = defaultdict(list)
        keys: list[str | int] = [*sorted(self.missing), *(["finish"] if self.finish_is_missing else [])]
        for key in keys:
            lost[self._causes.get(key, self._causes.get("open", because))].append(key)
        for cause in [*self._causes.values(), *([end] if end else []), *self._notes]:
            lost[cause] += []
        return [f"{self.name}: {_sentence(cause, keys)}" for cause, keys in lost.items()]


def _import_path() -> list[str]:
    """Return where the process imports from: where this process does, but not from the working folder.

    A file there, such as `random.py`, would otherwise run in place of a module. The folder that holds this package may
    be the working folder, and comes last.
    """
    here = Path.cwd()
    return [folder for folder in sys.path if Path(folder).resolve() != here] + [str(Path(__file__).parents[2])]


def _exit(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _sentence(cause: str, lost: Sequence[str | int]) -> str:
    trials = sum(key != "finish" for key in lost)
    missing = [counted(trials, "trial")] if trials else []
    missing += ["the summary"] if "finish" in lost else []
    verb = "are" if len(lost) > 1 else "is"
    return f"{cause}; {' and '.join(missing)} {verb} not recorded" if missing else cause
