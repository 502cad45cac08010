"""Ray's workers: an actor per device holds an executor; groups here have their trials trained by the actor.

An actor and its groups are lost when its process or node dies. The worker then starts another actor, perhaps elsewhere,
and its group goes on from the last checkpoint. Only this process writes checkpoints, so that no late result counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InvalidInput, PipelineError, Problem, first_line
from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement, PlacementRules
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import GroupLost, exit_error, portable_error
from pipeline.training.placement import split
from pipeline.workloads.loop import Loop
from pipeline.workloads.workload import Workload

if TYPE_CHECKING:
    from pipeline.training.executor import LocalExecutor

MAX_LOSSES = 4
"""Times that workers may die while they train one epoch of a group before the search stops."""
MAX_STARTS = 5
"""Times that a worker is started whose process dies before it can train."""
ASK_S = 0.5
"""Seconds after which it is asked again whether to go on waiting for a free place."""
Start = Callable[[], tuple["LocalExecutor", Mapping[str, Any]]]
"""Builds an executor in the actor's process, and returns it with what is recorded of its device and machine."""


class WorkerDied(Exception):
    """The process or the node of a worker died; its groups are lost."""


class NoPlace(Exception):
    """The wait for a free place was given up."""


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


class RayWorker:
    """A worker, one actor at a time; see `Executor` for the contract.

    Args:
        start: Builds the executor in the actor's process.
        resources: What an actor takes of a node, as Ray's options: `{"num_gpus": 1}`.
        threads: Number of PyTorch's threads in the actor.
        make_room: Called before a wait for a free place; releases the places that other workers no longer need.
    """

    def __init__(
        self,
        start: Start,
        *,
        resources: Mapping[str, float],
        threads: int,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.gives_up: Callable[[], bool] = lambda: False
        """Says whether to wait no longer for a free place."""
        self.waits = False
        """Whether a group waits for a free place."""
        self.is_idle = False
        """Whether this worker will get no further group."""
        self._start, self._resources, self._threads, self._make_room = start, dict(resources), threads, make_room
        self._actor: Any = None
        self._started: Any = None
        self.generation = 0
        """Number of actors so far."""
        self._keys = 0
        self._rules: PlacementRules | None = None
        self._environment: Mapping[str, Any] = {}
        self._adopted: PlacementRules | None = None

    @property
    def rules(self) -> PlacementRules:
        """What the placement of trials depends on now."""
        if self._rules is None:
            self.place()
        assert self._rules is not None
        return self._rules

    @property
    def environment(self) -> Mapping[str, Any]:
        """What is recorded of the device and the machine."""
        if not self._environment:
            self.place()
        return self._environment

    def adopt(self, rules: PlacementRules) -> None:
        """Place trials by the rules of a resumed study."""
        self._adopted = rules
        self._rules = self._adopted
        if self._actor is not None and self._started is None:
            self._call("adopt", rules)

    def begin(self) -> None:
        """Start an actor without waiting for a free place, unless there is one."""
        if self._actor is not None:
            return
        import ray

        self.generation += 1
        options = {"max_restarts": 0, "num_cpus": 0, **self._resources}
        self._actor = ray.remote(Actor).options(**options).remote(self._threads)
        self._started = self._actor.start.remote(self._start)

    def place(self) -> None:
        """Start an actor and wait for a free place, unless there is one; start another if the actor dies meanwhile.

        Raises:
            NoPlace: `gives_up` said to wait no longer.
            PipelineError: The actor cannot load the workload, or every actor dies.
        """
        for _ in range(MAX_STARTS):
            try:
                self.begin()
                if self._started is not None:
                    self._wait_for_start()
            except WorkerDied as error:
                why = str(error)
            else:
                return
        raise PipelineError(f"{why}, {MAX_STARTS} times as it began; perhaps memory is short")

    def _wait_for_start(self) -> None:
        import ray

        while not ray.wait([self._started], timeout=ASK_S)[0]:
            if self.gives_up():
                self.close()
                raise NoPlace
        self._environment = self._take(self._started)
        self._started = None
        if self._adopted is not None:
            self._call("adopt", self._adopted)

    def place_again(self) -> None:
        """Start another actor if the last one has died, and wait for a free place; raises as `place` does."""
        self.waits = True
        try:
            if self._actor is None:
                self._make_room()
            self.place()
        finally:
            self.waits = False

    def build(self, configs: Mapping[int, TrialConfig], *, placement: Sequence[Placement] | None = None) -> RayGroup:
        """Build a group of trials; the actor builds it when it is used."""
        assert placement is None, "a worker trains no trial again"
        return RayGroup(self, configs)

    def build_there(self, configs: Mapping[int, TrialConfig], *, beside: bool = False) -> int:
        """Have the actor build a group in place of all others, or beside one; return its key.

        Raises:
            WorkerDied: The actor has died.
        """
        self._keys += 1
        key = -self._keys if beside else self._keys
        self._call("build", key, dict(configs))
        return key

    def ask(self, key: int, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of a group in the actor."""
        return self._call("ask", key, method, arguments, options)

    def load(self, key: int, state: Mapping[str, Any]) -> None:
        """Have a group in the actor continue from a state."""
        self._call("load", key, packed(state))

    def states(self, key: int) -> Iterator[tuple[str, Any]]:
        """Yield number and state of each trial of a group in the actor, one at a time."""
        part = self._call("next_state", key, True)
        while part is not None:
            yield part[0], unpacked(part[1])
            part = self._call("next_state", key, False)

    def close(self) -> None:
        """End the actor; its place is free."""
        actor, self._actor, self._started = self._actor, None, None
        if actor is not None:
            import ray

            with contextlib.suppress(Exception):  # Ray may have ended
                ray.kill(actor)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            raise WorkerDied("a worker has ended")
        return self._take(self._actor.call.remote(method, *arguments))

    def _take(self, answer: Any) -> Any:
        """Wait for an answer of the actor; return its value, or raise its error.

        Raises:
            WorkerDied: The actor has died.
        """
        import ray
        from ray import exceptions

        lost = exceptions.ActorDiedError, exceptions.ActorUnavailableError, exceptions.WorkerCrashedError
        try:
            value, error, rules = ray.get(answer)
        except (*lost, exceptions.ObjectLostError, exceptions.NodeDiedError) as failure:
            self.close()
            raise WorkerDied(_why(failure)) from None
        except exceptions.RayError as failure:
            raise PipelineError(f"Ray: {failure}") from failure
        self._rules = rules or self._rules
        if error is not None:
            raise error
        return value


@dataclass(frozen=True)
class _There:
    """Where a group is: its key in an actor."""

    key: int
    generation: int


class RayGroup:
    """Trials that a worker's actor trains; see `TrialGroup` for the contract."""

    def __init__(self, worker: RayWorker, configs: Mapping[int, TrialConfig]) -> None:
        self._worker = worker
        self._all = dict(configs)
        self._running = dict(configs)
        self._there: _There | None = None
        self._epoch = 0
        self._losses = Counter[int]()
        """Epoch to the number of times that the worker died in it."""
        self._suspects: set[int] = set()
        """Epochs in which the worker died twice, until it is known which trial kills it."""
        self._lost: str | None = None
        """Why the group must be loaded from a state; None if it need not be."""

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch; a trial that kills its worker, alone too, has failed.

        Raises:
            GroupLost: The worker died, or as the worker's group raises it.
        """
        failed = self._find_killing(average=average) if self._epoch in self._suspects else {}
        results: dict[int, EpochMetrics] = self._ask("train_epoch", average=average) if self._running else {}
        self._epoch += 1
        results = {**results, **failed}
        self._running = {n: c for n, c in self._running.items() if n in results and results[n].finished}
        return dict(sorted(results.items()))

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        self._running.pop(number, None)
        if self._lost is None and self._there is not None:
            with contextlib.suppress(GroupLost):  # the next epoch raises it again
                self._ask("drop", number)

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        metrics: dict[int, dict[str, float]] = self._ask("test")
        return metrics

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        state: dict[str, Any] = self._ask("model_state", number)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial."""
        return {"epochs": self._epoch, "trials": dict(self.trial_states())}

    def trial_states(self) -> Iterator[tuple[str, Any]]:
        """Yield the state of each trial, one at a time."""
        if not self._running:
            return
        there = self._placed()
        try:
            yield from self._worker.states(there.key)
        except WorkerDied as error:
            raise self._loss(error) from None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state; an empty state is the beginning."""
        states = state.get("trials")
        self._running = self._all if states is None else {n: c for n, c in self._all.items() if str(n) in states}
        self._running, self._epoch, self._lost = dict(self._running), state.get("epochs", 0), None
        if not self._running:
            return
        there = self._placed()
        try:
            self._worker.load(there.key, state)
        except WorkerDied as error:
            raise self._loss(error) from None

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        there = self._placed()
        try:
            return self._worker.ask(there.key, method, *arguments, **options)
        except WorkerDied as error:
            raise self._loss(error) from None

    def _placed(self) -> _There:
        """Return where the group is; have an actor build it if it is nowhere.

        Raises:
            GroupLost: The group must be loaded from a state.
        """
        if self._lost is not None:
            raise GroupLost(self._lost)
        if self._there is None or self._there.generation != self._worker.generation:
            try:
                self._worker.place_again()
                self._there = _There(self._worker.build_there(self._all), self._worker.generation)
            except WorkerDied as error:
                raise self._loss(error) from None
        return self._there

    def _loss(self, error: WorkerDied) -> GroupLost:
        """Return the error for a worker that died.

        Raises:
            PipelineError: It has happened too often.
        """
        self._there = None
        self._losses[self._epoch] += 1
        if self._losses[self._epoch] > MAX_LOSSES:
            raise PipelineError(f"{error}, {MAX_LOSSES + 1} times in one epoch; perhaps memory is short")
        if self._losses[self._epoch] > 1:
            self._suspects.add(self._epoch)
        self._lost = f"{error}; its trials go on from their last checkpoint"
        return GroupLost(self._lost)

    def _find_killing(self, *, average: bool) -> dict[int, EpochMetrics]:
        """Find by repeated halving which trials kill their worker alone; return each as failed."""
        state = self.state_dict()
        self._suspects.discard(self._epoch)
        numbers = list(self._running)
        waiting = list(split(numbers, -(-len(numbers) // 2)))
        failed: dict[int, EpochMetrics] = {}
        while waiting:
            part = waiting.pop()
            states = {str(number): state["trials"][str(number)] for number in part if str(number) in state["trials"]}
            try:
                self._worker.place_again()
                key = self._worker.build_there({number: self._all[number] for number in part}, beside=True)
                self._worker.load(key, {"epochs": self._epoch, "trials": states} if self._epoch else {})
                self._worker.ask(key, "train_epoch", average=average)
            except GroupLost:  # memory ran out, or one of the actor's own processes died
                continue
            except WorkerDied as error:
                if len(part) > 1:
                    waiting += split(part, -(-len(part) // 2))
                else:
                    failed[part[0]] = EpochMetrics(epoch=self._epoch, step=0, metrics={}, lr={}, failed=str(error))
        self.load_state_dict({**state, "trials": {n: s for n, s in state["trials"].items() if int(n) not in failed}})
        return failed


def check_sendable(workload: Workload | Loop) -> None:
    """Check that a workload that Python made can be sent to a worker.

    Raises:
        InvalidInput: With every member that cannot.
    """
    from ray import cloudpickle

    problems = []
    for field in dataclasses.fields(workload):
        try:
            cloudpickle.dumps(getattr(workload, field.name))
        except Exception as error:
            message = f"cannot be sent to a worker: {first_line(error)}; build it in the function that returns it"
            problems.append(Problem(f"workload.{field.name}", message))
    if problems:
        raise InvalidInput("workload", problems)


def packed(state: Any) -> bytes:
    """Return a state as bytes, whatever device its tensors are on."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def unpacked(state: bytes) -> Any:
    """Return a packed state; its tensors are on the CPU."""
    return torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")


def _why(failure: Exception) -> str:
    """Return in a few words what happened to an actor."""
    text = str(failure)
    node = "its node has died" if "node" in text.lower() and "died" in text and "worker process" not in text else ""
    return f"a worker has ended: {node or 'its process has died'}"
