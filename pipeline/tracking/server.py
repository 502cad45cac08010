"""The tracker process's side: read messages of a `TrackerProcess`, call each tracker, and answer."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.errors import StorageError
from pipeline.files.locks import folder_locked, study_folder
from pipeline.space.trial import EndedTrial
from pipeline.tracking.tracker import StudyInfo, Tracker, root_cause

FLUSH_EVERY_S = 1.0
"""Seconds between two flushes, as long as a flush takes at most `FLUSH_SHARE` of them."""
MAX_FLUSH_EVERY_S = 2.0
FLUSH_SHARE = 0.1
MAX_FAILURES = 3
"""After so many failures in a row, a tracker is left alone until the next flush: its server may be away."""


def serve() -> None:
    """Run the trackers of a `TrackerProcess`: read messages from standard input, answer on standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # some hosts signal every process; the caller decides
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that a library prints must not come between the answers
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with contextlib.suppress(EOFError), contextlib.ExitStack() as lock:
        servers = [Server(index, tracker, answers) for index, tracker in enumerate(pickle.load(sys.stdin.buffer))]
        threading.Thread(target=_receive, args=[inbox], daemon=True).start()
        # A thread, because the first message locks the study's folder, which must not wait for imports.
        threading.Thread(target=_load, args=[servers]).start()
        flush_at = time.monotonic() + FLUSH_EVERY_S
        waiting: deque[Any] = deque()
        while (message := waiting.popleft() if waiting else _next(inbox, flush_at)) is not None:
            verb, arguments = message
            if verb == "open":
                arguments = (_prepare(lock, *arguments),)
            for server in servers:
                server.do(verb, *arguments)
            if time.monotonic() >= flush_at:
                while not inbox.empty():
                    waiting.append(inbox.get())
                flush_at = _flush(servers, ending=trials_ending(waiting))
        for server in servers:
            server.do("close")


def _receive(inbox: queue.SimpleQueue[Any]) -> None:
    """Read messages as they come, so that a slow tracker does not fill the pipe; end with None."""
    # The end of the pipe would not do: it has none while a process that the caller's model forked is alive.
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while (message := pickle.load(sys.stdin.buffer)) is not None:
            inbox.put(message)
    inbox.put(None)


def _next(inbox: queue.SimpleQueue[Any], flush_at: float) -> Any:
    """Return the next message; "idle" if none has come when it is time to flush."""
    try:
        return inbox.get(timeout=max(0.0, flush_at - time.monotonic()))
    except queue.Empty:
        return "idle", ()


def trials_ending(messages: Iterable[Any]) -> set[int]:
    """Return the numbers of the trials whose end is among messages."""
    return {message[1][0].number for message in messages if message is not None and message[0] == "end"}


def _flush(servers: Sequence[Server], *, ending: Collection[int]) -> float:
    """Flush every tracker; return when to flush again."""
    began = time.monotonic()
    for server in servers:
        server.do("flush", ending)
    ended = time.monotonic()
    return ended + min(max(FLUSH_EVERY_S, (ended - began) / FLUSH_SHARE), MAX_FLUSH_EVERY_S)


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
    """Calls one tracker, and answers with its number, the verb, the trial's number, the result, and why it failed.

    A trial's end says once more all that was taken before. A trial that could not be recorded is tried again with each
    flush, and answered in the end; so is a study that could not be opened. The answer of a flush is why something could
    not be recorded, if so.
    """

    def __init__(self, index: int, tracker: Tracker, answers: IO[bytes]) -> None:
        self._index = index
        self._tracker = tracker
        self._answers = answers
        self._study: tuple[Any, ...] = ()
        self._closed: str | None = None
        """Why the tracker could not open the study; None if it could, or is still to do so."""
        self._taken: list[tuple[str, tuple[Any, ...]]] = []
        """What came while the tracker could not open the study, besides ends."""
        self._failures = 0
        self._missed: list[EndedTrial] = []

    def load(self) -> None:
        """Import what the tracker needs; an error comes again in `open`, which is answered."""
        with contextlib.suppress(Exception):
            self._tracker.load()

    def do(self, verb: str, *arguments: Any) -> None:
        """Call a method of the tracker; "idle" calls none."""
        if verb == "open":
            self._study = arguments
            self._open()
        elif verb == "end":
            self._end(*arguments)
        elif verb in ("begin", "epochs"):
            if self._closed:
                self._taken.append((verb, arguments))
            else:
                self._attempt(verb, *arguments)
        elif verb == "flush":
            self._flush(*arguments)
        elif verb in ("finish", "close"):
            if self._closed and verb == "finish":
                self._open()
            self._retry(last=True)
            self._answer(verb, None, *self._attempt(verb, *arguments))

    def _open(self) -> None:
        """Open the study, and have the tracker take what came meanwhile."""
        self._closed = None
        link, self._closed = self._attempt("open", *self._study)
        recorded, self._closed = self._attempt("recorded")
        self._answer("open", None, (link, recorded), self._closed)
        if not self._closed:
            taken, self._taken = self._taken, []
            for verb, arguments in taken:
                self._attempt(verb, *arguments)

    def _end(self, trial: EndedTrial) -> None:
        if self._closed or self._failures >= MAX_FAILURES:
            self._missed.append(trial)
            return
        _, cause = self._attempt("end", trial)
        self._failures = self._failures + 1 if cause else 0
        if cause:
            self._missed.append(trial)
        else:
            self._answer("end", trial.number, None, None)

    def _flush(self, ending: Collection[int]) -> None:
        if self._closed:
            self._open()
        cause = self._closed or self._retry(last=False)
        if self._study and not self._closed and self._failures < MAX_FAILURES:
            _, failed = self._attempt("flush", ending)
            cause = cause or failed
        self._answer("flush", None, None, cause)

    def _retry(self, *, last: bool) -> str | None:
        """Record the missed trials, until too many fail in a row; answer those that fail only the last time.

        Returns:
            Why a trial could not be recorded; None if all could.
        """
        missed, self._missed, self._failures = self._missed, [], 0
        cause: str | None = None
        failed: str | None = None
        for trial in missed:
            if self._failures < MAX_FAILURES:
                _, cause = self._attempt("end", trial)
                self._failures = self._failures + 1 if cause else 0
                failed = cause or failed
            if cause and not last:
                self._missed.append(trial)
            else:
                self._answer("end", trial.number, None, cause)
        return failed

    def _attempt(self, verb: str, *arguments: Any) -> tuple[Any, str | None]:
        """Return what a method returned, or why it failed."""
        if self._closed:
            return None, self._closed
        try:
            return getattr(self._tracker, verb)(*arguments), None
        except Exception as error:
            return None, root_cause(error)

    def _answer(self, verb: str, number: int | None, result: Any, cause: str | None) -> None:
        with contextlib.suppress(BrokenPipeError):  # the caller died: the rest is recorded all the same
            pickle.dump((self._index, verb, number, result, cause), self._answers)
            self._answers.flush()
