"""Ray's workers: an actor per device holds an executor; groups here have their trials trained by the actor.

An actor and its groups are lost when its process or node dies. The worker then starts another actor, perhaps elsewhere,
and its group goes on from the last checkpoint. Only this process writes checkpoints, so that no late result counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import InvalidInput, PipelineError, Problem, first_line
from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement, PlacementRules
from pipeline.training.ray_actor import Actor, Start, WorkerDied, packed, unpacked
from pipeline.training.ray_group import RayGroup
from pipeline.workloads.loop import Loop
from pipeline.workloads.workload import Workload

MAX_STARTS = 5
"""Times that a worker is started whose process dies before it can train."""
ASK_S = 0.5
"""Seconds after which it is asked again whether to go on waiting for a free place."""


class NoPlace(Exception):
    """The wait for a free place was given up."""


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


def _why(failure: Exception) -> str:
    """Return in a few words what happened to an actor."""
    text = str(failure)
    node = "its node has died" if "node" in text.lower() and "died" in text and "worker process" not in text else ""
    return f"a worker has ended: {node or 'its process has died'}"
