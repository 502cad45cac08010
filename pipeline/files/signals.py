"""End a search early: Ctrl-C, SIGTERM and the time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread, and in processes that start meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class CtrlC:
    """Remember Ctrl-C while a command starts: an import may turn KeyboardInterrupt into any error, or lose it."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> CtrlC:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell has `command &` ignore it
            signal.signal(signal.SIGINT, self)
        return self

    def __exit__(self, *exception: object) -> None:
        if signal.getsignal(signal.SIGINT) is self:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, number: int, frame: object) -> NoReturn:
        """Handle SIGINT."""
        self.pressed = True
        raise KeyboardInterrupt


class Interrupts:
    """Note Ctrl-C, SIGTERM and the time limit for the loop to ask about; the second signal ends the loop at once.

    Args:
        minutes: The time limit; None for no limit.
        exit_message: Text for people if the second signal comes.
        exits: Whether the second signal ends the process, as is right for a command. If not, it raises
            KeyboardInterrupt, so that a notebook keeps its variables.
    """

    def __init__(self, minutes: float | None, *, exit_message: str = "", exits: bool = True) -> None:
        self.reason: str | None = None
        self.exit_status = 0
        self._deadline = time.monotonic() + minutes * 60 if minutes is not None else None
        self._minutes = minutes
        self._exit_message = exit_message
        self._exits = exits
        self._ends_at_once = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python handles signals in the main thread alone
            before = signal.getsignal(signal.SIGINT)
            if isinstance(before, CtrlC) and before.pressed:
                raise KeyboardInterrupt
            self._handlers = {s: signal.signal(s, self._on_signal) for s in STOPS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def is_overdue(self) -> bool:
        """Whether the time limit has passed, which the loop notices only at the end of an epoch."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def asked(self) -> bool:
        """Say whether to stop now."""
        if self.is_overdue and self.reason is None:
            self.reason = f"stopped after {self._minutes:g} minutes"
        return self.reason is not None

    def _on_signal(self, number: int, frame: object) -> None:
        if self.exit_status and not self._exits:
            raise KeyboardInterrupt(self._exit_message)
        if self.exit_status:  # stored trials are on the disk, and the tracker process ends after this one
            if self._ends_at_once:  # else the next one would repeat the message
                return
            self._ends_at_once = True
            with contextlib.suppress(OSError):
                cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # the progress display hides the cursor
                os.write(2, f"{cursor}{self._exit_message}\n".encode())
            os._exit(self.exit_status)
        self.reason = "interrupted"
        self.exit_status = 128 + number
