"""Which trainer trains which trial: rows of a matrix where that is possible, plain where it is not.

How many rows share a matrix, and how many matrices train at once, changes no result. On a CPU each matrix, or plain
trial, trains with one thread, since a sum whose parts are split between threads depends on how it is split. Several of
them train in as many processes, each with as many rows as the others: see `pipeline.training.process`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch

from pipeline.errors import PipelineError
from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import arithmetic
from pipeline.training.process import RemoteTrials, Worker, WorkerEnded, can_fork
from pipeline.training.rows.probe import Finding, probe
from pipeline.training.rows.trainer import FusedTrials, has_rule
from pipeline.training.shards import Part, TrialParts
from pipeline.training.stepwise import AtOnce, train_epoch_together, trouble_of_its_own
from pipeline.workloads.data import free_memory, is_streamed, to_device
from pipeline.workloads.workload import Workload

MEMORY_SHARE = 0.5
"""Of a CPU's free memory, what the rows of all matrices may take."""


class Trainer:
    """Decides once how a workload's trials train, and builds groups of them.

    Args:
        workload: Data, model, loss and metrics.
        config: Any trial's, to try the workload with.
        device: Where to train.
        dtype: Of parameters and floating-point data.
        rows: At most this many trials in a matrix; None: as many as there are for each process, and fit into memory.
        processes: On a CPU, in how many processes to train, this one included.
    """

    def __init__(
        self,
        workload: Workload,
        config: TrialConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rows: int | None = None,
        processes: int = 1,
    ) -> None:
        self.rows = rows
        self.workload = to_device(workload, device=device, dtype=dtype)
        self.device = device
        self._dtype = dtype
        self._config = config
        self._findings: dict[tuple[str, ...], Finding] = {}
        finding = self._finding(config)
        self.plain_because = finding.plain_because
        """Why trials that freeze what `config` does cannot be rows; None if they can."""
        self._seeded = finding.draws_random_numbers
        self._processes = processes if device.type == "cpu" and can_fork() else 1
        self._workers: list[Worker] = []
        # Random numbers come from a state that all threads of the process share.
        alone = device.type != "cpu" or self._seeded
        self._threads = 1 if alone else torch.get_num_threads()
        self._room: int | None = None
        """Rows that fit beside those that train at the same time; None: until memory runs out."""
        if device.type == "cpu":  # which has no error for it: the process would be killed
            at_once = max(self._threads, self._processes)
            self._room = max(1, int(MEMORY_SHARE * free_memory(device) / finding.trial_bytes / at_once))

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which all trials train: a search has one precision."""
        return arithmetic(self._config, self.device)

    def fuses(self, config: TrialConfig) -> bool:
        """Say whether a trial trains as a row."""
        return has_rule(config.optimizer.name) and self._finding(config).plain_because is None

    def on(self, workload: Workload) -> Trainer:
        """Return a trainer like this one for other samples of the same data."""
        other = copy.copy(self)
        other.workload, other._workers = workload, []
        return other

    def close(self) -> None:
        """End the workers, and with them what they train."""
        for worker in self._workers:
            worker.end()

    def build(self, configs: Mapping[int, TrialConfig]) -> TrialParts:
        """Build the trainers of a group of trials; `close` when they are done with."""
        for config in configs.values():
            self._finding(config)  # which workers that are new then have too
        self._start_workers(len(configs))
        return TrialParts(self, [part for lane, some in self.plan(configs) for part in self._build(some, lane)])

    def plan(self, configs: Mapping[int, TrialConfig]) -> list[tuple[int, dict[int, TrialConfig]]]:
        """Divide trials into parts, and these equally among lanes: 0 is this process, the others are workers."""
        fused = {number: config for number, config in configs.items() if self.fuses(config)}
        single = [{number: config} for number, config in configs.items() if number not in fused]
        loads = [0] * (1 + len(self._living()))
        planned = []
        for part in (*self._spread(fused, len(loads)), *single):
            lane = loads.index(min(loads))
            loads[lane] += len(part)
            planned.append((lane, part))
        return planned

    def lane(self, part: Part) -> int:
        """Return where a part trains."""
        living = self._living()
        return 1 + living.index(part.worker) if isinstance(part, RemoteTrials) and part.worker in living else 0

    def build_part(self, configs: Mapping[int, TrialConfig], lane: int = 0) -> Part:
        """Build the trainer of rows of one matrix, or of one plain trial, in a lane."""
        living = self._living()
        if 0 < lane <= len(living):
            with contextlib.suppress(WorkerEnded):
                return living[lane - 1].build(configs, fused=all(map(self.fuses, configs.values())))
        return self._build_here(configs)

    def train(self, parts: Sequence[Part], *, epochs: int) -> list[dict[int, EpochMetrics] | Exception]:
        """Train each part, at once where that is possible; return each trial's last metrics, or what was raised."""
        if is_streamed(self.workload) and len(parts) > 1:
            return self._train_streamed(parts, epochs)
        lanes: dict[int, list[Part]] = {}
        for own, part in enumerate(parts):
            lanes.setdefault(self.lane(part) if self._living() else own, []).append(part)
        queues = [lanes[lane] for lane in sorted(lanes)]
        with self._threads_for(len(queues)) as at_once:
            found = at_once(lambda queue: [(id(part), _attempt(part, epochs)) for part in queue], queues)
        outcomes = {part: outcome for queue in found for part, outcome in queue}
        return [outcomes[id(part)] for part in parts]

    def again(self, configs: Mapping[int, TrialConfig], error: Exception) -> list[Part]:
        """Build the trials of a part that failed anew: as two, unless its worker ended.

        If it was too large, none is larger from now on.
        """
        if isinstance(error, WorkerEnded):
            warnings.warn(f"{error}; its trials train anew", RuntimeWarning, stacklevel=2)
            return self._build(configs, 0)
        size = -(-len(configs) // 2)
        if isinstance(error, torch.OutOfMemoryError):
            self.rows = min(self.rows or size, size)
        return [part for half in _split(configs, size) for part in self._build(half, 0)]

    def _finding(self, config: TrialConfig) -> Finding:
        """Return what is known of trials that freeze what this one does, tried once."""
        key = _frozen(config)
        if key not in self._findings:
            with self.arithmetic():
                self._findings[key] = probe(self.workload, config, device=self.device, dtype=self._dtype)
        return self._findings[key]

    def _start_workers(self, trials: int) -> None:
        """Start as many workers as so many trials need."""
        self._workers = self._living()
        while len(self._workers) < min(self._processes, trials) - 1 and not is_streamed(self.workload):
            with self.arithmetic():  # in which a worker stays
                try:
                    self._workers.append(Worker(self._build_here))
                except OSError:  # no more processes are to be had; fewer find the same
                    break

    def _living(self) -> list[Worker]:
        return [worker for worker in self._workers if not worker.ended]

    def _spread(self, configs: Mapping[int, TrialConfig], lanes: int) -> Iterator[dict[int, TrialConfig]]:
        """Spread trials that train as rows over matrices, as equally as can be."""
        for alike in _alike(configs):
            size = -(-len(alike) // lanes)
            yield from _split(alike, min(size, self.rows or size, self._room or size))

    def _build(self, configs: Mapping[int, TrialConfig], lane: int) -> list[Part]:
        """Build the trainers of trials in as few parts as fit into memory."""
        try:
            return [self.build_part(configs, lane)]
        except torch.OutOfMemoryError:
            if len(configs) == 1:
                raise PipelineError(f"{self.device}: no memory is left for even one trial") from None
            torch.cuda.empty_cache()
            return [part for half in _split(configs, -(-len(configs) // 2)) for part in self._build(half, lane)]

    def _build_here(self, configs: Mapping[int, TrialConfig]) -> FusedTrials | PlainTrials:
        place: dict[str, Any] = {"device": self.device, "dtype": self._dtype, "seeded": self._seeded}
        if all(self.fuses(config) for config in configs.values()):
            company = self._finding(next(iter(configs.values()))).company
            return FusedTrials(configs, self.workload, **place, company=company)
        return PlainTrials(configs, self.workload, **place)

    def _train_streamed(self, parts: Sequence[Part], epochs: int) -> list[dict[int, EpochMetrics] | Exception]:
        """Train parts on batches that are read once."""
        assert not self._workers
        here = cast(Sequence[FusedTrials | PlainTrials], parts)
        outcomes: list[Any] = [{} for _ in here]
        with self._threads_for(len(here)) as at_once:
            for _ in range(epochs):
                going = [n for n, part in enumerate(here) if part.configs and isinstance(outcomes[n], dict)]
                if not going:
                    break
                for n, now in zip(going, train_epoch_together([here[n] for n in going], at_once), strict=True):
                    outcomes[n] = {**outcomes[n], **now} if isinstance(now, dict) else now
        return outcomes

    @contextlib.contextmanager
    def _threads_for(self, count: int) -> Iterator[AtOnce]:
        """Give a `map` that makes so many calls at once: to workers, or in as many threads as train here."""
        threads = count if self._living() else min(count, self._threads)
        with self.arithmetic():
            if threads <= 1:
                yield lambda function, queues: [function(queue) for queue in queues]
                return
            with ThreadPoolExecutor(threads) as pool:
                yield functools.partial(_map, pool)


def _frozen(config: TrialConfig) -> tuple[str, ...]:
    """Return the groups that a trial freezes."""
    return tuple(name for name, group in config.param_groups.items() if group.lr_ratio == 0)


def _alike(configs: Mapping[int, TrialConfig]) -> Iterator[dict[int, TrialConfig]]:
    """Yield trials that freeze the same groups: a frozen group is no part of a row."""

    def frozen(number: int) -> tuple[str, ...]:
        return _frozen(configs[number])

    for _, numbers in itertools.groupby(sorted(configs, key=lambda number: (frozen(number), number)), key=frozen):
        yield {number: configs[number] for number in numbers}


def _split(configs: Mapping[int, TrialConfig], size: int) -> Iterator[dict[int, TrialConfig]]:
    """Yield parts of at most `size` trials, as equal as can be."""
    items = list(configs.items())
    count = -(-len(items) // size)
    for index in range(count):
        yield dict(items[index * len(items) // count : (index + 1) * len(items) // count])


def _map(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call a function on all items at once, on the first in this thread: a new one has none of oneDNN's kernels yet."""
    others = [pool.submit(function, item) for item in items[1:]]
    return [function(items[0]), *(other.result() for other in others)]


def _attempt(part: Part, epochs: int) -> dict[int, EpochMetrics] | Exception:
    results: dict[int, EpochMetrics] = {}
    try:
        for _ in range(epochs):
            results |= part.train_epoch()
        return results
    except WorkerEnded as error:
        return error
    except Exception as error:
        return trouble_of_its_own(error)
