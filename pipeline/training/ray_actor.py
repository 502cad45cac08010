"""The actor of a Ray worker: holds an executor and groups of trials, and answers one call at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.space.config import TrialConfig
from pipeline.space.placement import PlacementRules
from pipeline.training.contract import exit_error, portable_error

if TYPE_CHECKING:
    from pipeline.training.executor import LocalExecutor

Start = Callable[[], tuple["LocalExecutor", Mapping[str, Any]]]
"""Builds an executor in the actor's process, and returns it with what is recorded of its device and machine."""


class WorkerDied(Exception):
    """The process or the node of a worker died; its groups are lost."""


class Actor:
    """The actor: holds an executor and groups of trials, and answers one call at a time.

    Args:
        threads: Number of PyTorch's threads.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._executor: LocalExecutor | None = None
        self._groups: dict[int, Any] = {}
        self._states: Iterator[tuple[str, Any]] = iter(())

    def start(self, start: Start) -> Any:
        """Build the executor; return what is recorded of its device and machine."""

        def started() -> Mapping[str, Any]:
            self._executor, environment = start()
            return environment

        return self._answer(started)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call one of the methods below; return its value, the error in place of a value, and the placement rules."""
        return self._answer(lambda: getattr(self, method)(*arguments))

    def adopt(self, rules: PlacementRules) -> None:
        """Place trials by the rules of a resumed study."""
        assert self._executor is not None
        self._executor.adopt(rules)

    def build(self, key: int, configs: Mapping[int, TrialConfig]) -> None:
        """Build a group; keep no other, unless its key is negative."""
        assert self._executor is not None
        self._groups = {other: group for other, group in self._groups.items() if key < 0 and other >= 0}
        self._groups[key] = self._executor.build(configs)

    def ask(self, key: int, method: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Call a group's method."""
        return getattr(self._groups[key], method)(*arguments, **options)

    def load(self, key: int, packed: bytes) -> None:
        """Continue a group from a state."""
        self._groups[key].load_state_dict(unpacked(packed))

    def next_state(self, key: int, first: bool) -> tuple[str, bytes] | None:
        """Return number and state of the next trial of a group; None after the last."""
        if first:
            self._states = self._groups[key].trial_states()
        number, state = next(self._states, (None, None))
        return None if number is None else (number, packed(state))

    def _answer(self, function: Callable[[], Any]) -> Any:
        value, portable = None, None
        try:
            value = function()
        except (Exception, SystemExit) as error:
            portable = exit_error(error) if isinstance(error, SystemExit) else portable_error(error)
        return value, portable, None if self._executor is None else self._executor.rules


def packed(state: Any) -> bytes:
    """Return a state as bytes, whatever device its tensors are on."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def unpacked(state: bytes) -> Any:
    """Return a packed state; its tensors are on the CPU."""
    return torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")
