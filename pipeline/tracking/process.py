"""BackgroundTracker: MLflow in a process of its own.

MLflow's import and its database cost seconds, and no trouble with MLflow may disturb training.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.files.locks import hold, study_folder
from pipeline.space.trial import EndedTrial
from pipeline.tracking.mlflow import StudyInfo, Tracker, cause_of, load_mlflow, remote_uri

SAMPLE_EVERY_S = 60.0
"""Between records of the machine's load: a search that is shorter has none."""


class BackgroundTracker:
    """A `Tracker` in a process of its own: nothing here raises or waits for MLflow, but `view_path` and `close`.

    The process starts at once and imports MLflow, whatever the caller does meanwhile; it touches nothing until `open`.
    It is in no danger from Ctrl-C, which only the caller hears, and it ends with `close` or, having written what it was
    sent, with its parent.
    """

    def __init__(self, root: Path) -> None:
        """Start the process."""
        self._root = root.absolute()
        self._opened = False
        self._outbox: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._store = ""
        self._sent: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()  # by the reader's thread, hence a counter of its own
        self._failures: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._ready = threading.Event()
        self._view_path: str | None = None
        self._warnings: list[str] | None = None
        # Not multiprocessing: its new process would import the caller's main module once more.
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from pipeline.tracking.process import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
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
        """Have a study's `Tracker` made, before anything else, with what the environment says now."""
        self._opened = True
        self._store = "at MLFLOW_TRACKING_URI" if remote_uri() else f"in {self._root}"
        self._outbox.put(("open", (self._root, study, dict(os.environ))))

    def view_path(self) -> str | None:
        """Return `Tracker.view_path()` once the store is open; None if it could not be, or not within a minute."""
        self._ready.wait(timeout=60)
        return self._view_path

    def log_trial(self, trial: EndedTrial) -> None:
        """Have `Tracker.log_trial` called."""
        self._send("log_trial", trial)

    def finish(self, best: EndedTrial | None, note: str, artifacts: Sequence[Path]) -> None:
        """Have `Tracker.finish` called; the artifacts must stay until `close`."""
        self._send("finish", best, note, [path.absolute() for path in artifacts])

    def interrupt(self, note: str) -> None:
        """Have `Tracker.interrupt` called."""
        self._send("interrupt", note)

    def close(self, timeout: float = 60.0) -> list[str]:
        """Wait until all is written, at most `timeout` seconds, and return what went wrong, one sentence each."""
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
        unanswered = self._sent - self._answered
        if end or unanswered:
            self._failures[end or "its process ended too early"] += unanswered
        self._warnings = [f"MLflow {self._store}: {_sentence(cause, lost)}" for cause, lost in self._failures.items()]
        return self._warnings

    def _send(self, verb: str, *arguments: Any) -> None:
        self._sent[verb] += 1
        self._outbox.put((verb, arguments))

    def _write(self) -> None:
        """Feed the process from the outbox, so that no caller waits for it."""
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
                    verb, result, causes = pickle.load(pipe)
                    for cause in causes:
                        self._failures[cause][verb] += 1
                    if verb == "open":
                        self._view_path = result
                        self._ready.set()
                    else:
                        self._answered[verb] += 1
        finally:
            self._ready.set()


def serve() -> None:
    """Run a `Tracker` for a `BackgroundTracker`: verbs come in on standard input, answers go out on standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # some hosts signal every process; the caller decides
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # training comes first; what is left of the cores is enough for this
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what MLflow prints must not come between the answers
    threading.Thread(target=_load).start()  # beside the first message, whose folder is to be held at once
    with contextlib.suppress(BrokenPipeError), contextlib.ExitStack() as held:
        server = Server(answers, held)
        with contextlib.suppress(EOFError):
            # The end of the pipe would not do: it has none while a process that the caller's model forked lives.
            while (message := pickle.load(sys.stdin.buffer)) is not None:
                server.do(*message)
        server.retry()


def _load() -> None:
    with contextlib.suppress(Exception):  # whatever it is, `open` meets it too, and answers
        load_mlflow()


class Server:
    """A `Tracker` whose failures are answers. What could not be logged is tried once more at the end.

    Args:
        answers: Where they go.
        held: Keeps the study's folder, so that the process of a search that was killed writes all it was told before
            the next search's begins: both would log the same trials.
    """

    def __init__(self, answers: IO[bytes], held: contextlib.ExitStack) -> None:
        self._answers = answers
        self._held = held
        self._tracker: Tracker | None = None
        self._broken = ""
        self._missed: list[EndedTrial] = []

    def do(self, verb: str, arguments: tuple[Any, ...]) -> None:
        """Do what a message says, and answer."""
        if verb != "log_trial":
            self.retry()
        causes = self._attempt(verb, arguments)
        if causes and verb == "log_trial" and self._tracker:
            self._missed += arguments
        else:
            self._answer(verb, causes)

    def retry(self) -> None:
        """Log what could not be logged, until it fails again."""
        causes: list[str] = []
        for trial in self._missed:
            causes = causes or self._attempt("log_trial", (trial,))
            self._answer("log_trial", causes)
        self._missed = []

    def _attempt(self, verb: str, arguments: tuple[Any, ...]) -> list[str]:
        """Return why something failed, or nothing."""
        try:
            if verb == "open":
                return self._open(*arguments)
            if self._tracker is None:
                return [self._broken]
            getattr(self._tracker, verb)(*arguments)
        except Exception as error:
            self._broken = cause_of(error)
            return [self._broken]
        return []

    def _open(self, root: Path, study: StudyInfo, environment: Mapping[str, str]) -> list[str]:
        os.environ.update(environment)
        self._held.enter_context(hold(study_folder(root, study.name)))
        self._tracker = Tracker(root, study, sample_every=SAMPLE_EVERY_S)
        return self._tracker.warnings

    def _answer(self, verb: str, causes: list[str]) -> None:
        result = self._tracker.view_path() if verb == "open" and self._tracker else None
        pickle.dump((verb, result, causes), self._answers)
        self._answers.flush()


def _exit(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _sentence(cause: str, lost: Counter[str]) -> str:
    trials = lost["log_trial"]
    missing = [f"{trials} trial{'s' if trials > 1 else ''}"] if trials else []
    missing += ["the summary"] if lost["finish"] or lost["interrupt"] else []
    verb = "are" if len(missing) > 1 or trials > 1 else "is"
    return f"{cause}; {' and '.join(missing)} {verb} not in MLflow" if missing else cause
