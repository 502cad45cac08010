"""A training process: a fork on this machine that trains trials on a CPU core of its own.

Threads would wait for each other: PyTorch needs the interpreter's lock between any two operations, and two threads with
half of the rows each took as long as one with all of them. A fork inherits the workload, the model's code and all
settings, and starts in hundredths of a second. The process ends when its parent ends, even by SIGKILL; a stopped
process ends as soon as it continues.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import select
import signal
import stat
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.files.locks import LOCK
from pipeline.files.signals import STOPS, signals_blocked
from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import exit_error, portable_error

Build = Callable[[Mapping[int, TrialConfig], bool], Any]
"""Builds a trainer from configs by trial number, and whether the trials train plain."""
Packed = list[memoryview]
"""A message to another process: the pickled message, then the memory of its tensors."""
_AS_ARRAYS = {torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool}
"""Types of tensors that NumPy has under the same name; others are pickled as a copy."""


class ProcessDied(Exception):
    """A training process died; its trainers are lost."""


def can_fork() -> bool:
    """Return whether this process may be forked: the autograd threads of an accelerator do not survive a fork."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


class TrainingProcess:
    """A process that holds trainers and calls their methods, one call at a time.

    Args:
        build: Builds a trainer; called in the training process.
    """

    def __init__(self, build: Build) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._lock = threading.Lock()
        self._keys = 0
        self._released: collections.deque[int] = collections.deque()
        self._end_reason = "a process that trained trials has ended"
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else the child writes the buffer once more
        with warnings.catch_warnings(), signals_blocked():
            # `os.fork` warns of locks that other threads hold; forked workers of a DataLoader have the same risk.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
            if pid == 0:
                _serve(theirs, build)
        theirs.close()
        self.pid = pid
        self._end = weakref.finalize(self, _end, self._connection, pid, os.getpid())

    def end(self) -> None:
        """End the process, and with it its trainers."""
        self._end()

    @property
    def ended(self) -> bool:
        """Whether a call found that the process has ended, or `end` was called."""
        return not self._end.alive

    def build(self, configs: Mapping[int, TrialConfig], *, plain: bool) -> RemoteTrials:
        """Build a trainer of trials in the process."""
        self._keys += 1
        trials = RemoteTrials(self, self._keys, plain=plain)
        trials.call("build", dict(configs), plain)
        weakref.finalize(trials, self._released.append, self._keys).atexit = False
        return trials

    def call(self, key: int, method: str, *arguments: Any, **options: Any) -> tuple[Any, dict[int, TrialConfig]]:
        """Call a trainer's method; return its value and the configs of the remaining trials.

        Raises:
            ProcessDied: The process has ended.
        """
        with self._lock:
            released = [self._released.popleft() for _ in range(len(self._released))]
            try:
                _send(self._connection, _packed((key, method, arguments, options, released)))
                value, configs, error = _receive(self._connection)
            except (EOFError, OSError):
                if status := self._end():
                    self._end_reason += f", killed by signal {-status}" if status < 0 else f", with status {status}"
                raise ProcessDied(self._end_reason) from None
            except BaseException:  # the next call must not read this call's answer
                self._end()
                raise
        if error is not None:
            raise error
        return value, configs


class RemoteTrials:
    """Trials that another process trains; see `TrialGroup` for the contract."""

    def __init__(self, process: TrainingProcess, key: int, *, plain: bool) -> None:
        self.process = process
        self.plain = plain
        self.configs: dict[int, TrialConfig] = {}
        self._key = key

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the trainer in its process."""
        value, self.configs = self.process.call(self._key, method, *arguments, **options)
        return value

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it."""
        results: dict[int, EpochMetrics] = self.call("train_epoch", average=average)
        return results

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        self.call("drop", number)

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        metrics: dict[int, dict[str, float]] = self.call("test")
        return metrics

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name."""
        state: dict[str, Any] = self.call("model_state", number)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial."""
        state: dict[str, Any] = self.call("state_dict")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state."""
        self.call(
            "load_state_dict", {str(number): state[str(number)] for number in self.configs if str(number) in state}
        )


def _serve(connection: Connection, build: Build) -> NoReturn:
    """Answer the parent's calls until the parent closes the connection."""
    status = 1
    try:
        for number in STOPS:  # the parent decides when to stop
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        gc.freeze()  # no object of the parent may be finalized in the child
        _close_inherited(but=connection.fileno())
        threading.Thread(target=_end_with_parent, args=(connection.fileno(),), daemon=True).start()
        trainers: dict[int, Any] = {}
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                key, method, arguments, options, released = _receive(connection)
                for old in released:
                    trainers.pop(old, None)
                answer = _answer(trainers, key, method, arguments, options, build)
                sys.stdout.flush()
                _send(connection, answer)
                del answer, arguments  # which may be a trial's state
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _answer(
    trainers: dict[int, Any],
    key: int,
    method: str,
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    build: Build,
) -> Packed:
    """Return, packed, a value, the configs of the remaining trials, and the exception raised in place of a value."""
    try:
        if method == "build":
            trainers[key] = build(*arguments)
            return _packed((None, trainers[key].configs, None))
        value = getattr(trainers[key], method)(*arguments, **options)
        return _packed((value, trainers[key].configs, None))
    except (Exception, SystemExit) as error:
        portable = exit_error(error) if isinstance(error, SystemExit) else portable_error(error)
        return _packed((None, trainers[key].configs if key in trainers else {}, portable))


class _Pickler(pickle.Pickler):
    """Pickles tensors of a CPU without a copy of their memory."""

    def reducer_override(self, value: Any) -> Any:
        """Take a tensor as an array, whose memory `pickle` leaves out; see `pickle.Pickler`."""
        if type(value) not in (Tensor, Parameter) or value.device.type != "cpu" or not value.is_contiguous():
            return NotImplemented
        tensor = value.detach()
        if tensor.dtype in _AS_ARRAYS and not tensor.is_conj() and not tensor.is_neg():
            return torch.from_numpy, (tensor.numpy(),)
        return NotImplemented


def _packed(message: Any) -> Packed:
    """Return a message as bytes, then the memory of each tensor in it, without a copy."""
    pickled, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(pickled, protocol=5, buffer_callback=buffers.append).dump(message)
    return [pickled.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _send(connection: Connection, packed: Packed) -> None:
    connection.send_bytes(pickle.dumps([part.nbytes for part in packed]))
    for part in packed:
        connection.send_bytes(part)


def _receive(connection: Connection) -> Any:
    """Return the next message; its tensors are writable."""
    parts = [bytearray(size) for size in pickle.loads(connection.recv_bytes())]
    for part in parts:
        connection.recv_bytes_into(part)
    return pickle.loads(parts[0], buffers=parts[1:])


def _close_inherited(*, but: int) -> None:
    """Close inherited sockets, pipes and the study lock: while a child holds them, the parent seems alive."""
    for descriptor in [int(link.name) for link in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):  # the descriptor of `/proc/self/fd` itself, closed by now
            mode = os.fstat(descriptor).st_mode
            is_lock = Path(f"/proc/self/fd/{descriptor}").readlink().name == LOCK
            if descriptor > 2 and descriptor != but and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) or is_lock):
                os.close(descriptor)


def _end_with_parent(descriptor: int) -> None:
    """End the process as soon as the parent's side of the connection is closed, even in mid-epoch."""
    hung_up = select.poll()
    hung_up.register(descriptor, select.POLLRDHUP)
    hung_up.poll()
    os._exit(0)


def _end(connection: Connection, pid: int, parent: int) -> int | None:
    """Close the connection, kill the process, and return its exit status as `subprocess` would."""
    if os.getpid() != parent:  # another child inherits this finalizer
        return None
    connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # nothing to save; SIGKILL also ends a stopped process
    with contextlib.suppress(ChildProcessError):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None
