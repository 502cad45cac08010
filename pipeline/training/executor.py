"""The executor of this machine: builds trainers in their processes, and trains them at the same time.

On a CPU each matrix, or plain trial, trains with one thread, because the rounding of a sum depends on the number of
threads. The placement rules give the number of processes. Which process trains a shard does not affect any number.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement, PlacementRules, matrix_key
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import Map, Stepwise, TrialGroup, train_epoch_together, trial_error
from pipeline.training.loops import LoopTrial, ask
from pipeline.training.offload import OffloadedTrials, released
from pipeline.training.placement import Shard, describe, place, why_plain
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import precision
from pipeline.training.process import ProcessDied, RemoteTrials, TrainingProcess, can_fork
from pipeline.training.replay import ReplayedTrial
from pipeline.training.rows.captured import capture_on
from pipeline.training.rows.measure import Finding
from pipeline.training.rows.probe import probe
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.shards import ShardedTrials, ShardTrainer
from pipeline.workloads.build import built_model
from pipeline.workloads.data import free_memory, is_streamed, to_device
from pipeline.workloads.loop import Loop
from pipeline.workloads.random_state import KINDS, random_states_kept
from pipeline.workloads.workload import Workload

MEMORY_SHARE = 0.5
"""Share of a CPU's free memory that the rows of all matrices may take."""
OWN_LOOP = Finding(
    plain_because="it has a training loop of its own",
    draws=frozenset(KINDS),
    unsaved=None,
    output_size=0,
    trial_bytes=0,
)
"""What is found without probing of trials that a loop trains; their memory is not known."""


class LocalExecutor:
    """Trains groups of trials on one device of this machine; see `Executor` for the contract.

    Args:
        workload: Data, model, loss and metrics, or a training loop.
        config: Config of a trial of the largest batch size, to probe the workload with: its memory gives the row limit.
        device: Where to train.
        dtype: Type of parameters and floating-point data.
        rows: Most trials in a matrix; None: the trials divided by the processes, as far as memory allows.
        processes: On a CPU, number of processes that train at once, this one included.
    """

    def __init__(
        self,
        workload: Workload | Loop,
        config: TrialConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rows: int | None = None,
        processes: int = 1,
    ) -> None:
        self.workload = workload if isinstance(workload, Loop) else to_device(workload, device=device, dtype=dtype)
        self.device = device
        self._dtype = dtype
        self._config = config
        self._findings: dict[str, Finding] = {}
        self._processes: list[TrainingProcess] = []
        self._tried_rows = Counter[int]()
        """Batch size to the rows of the largest matrix for which `try_memory` succeeded."""
        self._offloads = False
        """Whether plain trials are on the device one at a time, because memory ran out with all of a group."""
        on_cpu = device.type == "cpu"
        self._forks = on_cpu and can_fork() and not is_streamed(self.workload)
        self.rules = PlacementRules(
            device=device.type, processes=processes if self._forks else 1, rows=rows, row_limit=rows
        )
        finding = self._probed(config)
        self._draws, self._output_size, self._unsaved = finding.draws, finding.output_size, finding.unsaved is not None
        # Threads share the global random states, so trials that draw random numbers train one after another.
        self._threads = 1 if not on_cpu or self._draws else torch.get_num_threads()
        if on_cpu and finding.trial_bytes:  # without memory a CPU raises no error: the system kills the process
            at_once = max(self._threads, self.rules.processes)
            fitting = max(1, int(MEMORY_SHARE * free_memory(device) / finding.trial_bytes / at_once))
            self.rules = dataclasses.replace(self.rules, row_limit=min(fitting, rows or fitting))

    def adopt(self, rules: PlacementRules) -> None:
        """Place trials by the rules of a resumed study; on another kind of device, only its `--rows` stays."""
        if rules.device == self.device.type:
            self.rules = rules
        else:
            limits = [limit for limit in (self.rules.row_limit, rules.rows) if limit is not None]
            self.rules = dataclasses.replace(self.rules, rows=rules.rows, row_limit=min(limits, default=None))
        self._probed(self._config)

    @property
    def plain_because(self) -> str | None:
        """Why trials like the probed config train plain with any optimizer; None if such trials can be rows."""
        return self.plain_with_any_optimizer(self._config)

    def plain_with_any_optimizer(self, config: TrialConfig) -> str | None:
        """Return why trials like a config train plain with any optimizer; None if such trials can be rows."""
        self._probed(config)
        return self.rules.plain_because[matrix_key(config)]

    def why_plain(self, config: TrialConfig) -> str | None:
        """Return why a trial trains plain; None if the trial is a row."""
        self._probed(config)
        return why_plain(config, self.rules)

    def build(self, configs: Mapping[int, TrialConfig], *, placement: Sequence[Placement] | None = None) -> TrialGroup:
        """Build a group of trials; see `Executor`."""
        for config in configs.values():
            self._probed(config)
        if placement is None:
            return ShardedTrials(self, configs)
        ((number, config),) = configs.items()
        return ReplayedTrial(number, config, placement, device=self.device, build=self.build_here)

    def on(self, workload: Workload) -> LocalExecutor:
        """Return an executor like this one for other samples of the same data."""
        other = copy.copy(self)
        other.workload, other._processes, other._tried_rows = workload, [], Counter()
        return other

    def untrained_model(self, config: TrialConfig) -> nn.Module:
        """Return the model of a trial as it is before training, on the CPU."""
        cpu = torch.device("cpu")
        if isinstance(self.workload, Loop):
            return ask(self.workload, config, device=self.device).model.to(cpu)
        return built_model(self.workload, seed=config.seed, device=cpu, dtype=self._dtype)

    def close(self) -> None:
        """End the processes, and with them their trainers."""
        for process in self._processes:
            process.end()

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Return the context in which all trials of a search train."""
        with precision(self._config, self.device), warnings.catch_warnings():
            # Of operations that `vmap` computes row by row; the probe has let PyTorch say so once.
            warnings.filterwarnings("ignore", "There is a performance drop")
            yield

    def place(self, configs: Mapping[int, TrialConfig]) -> list[Shard]:
        """Divide running trials into shards."""
        return place(configs, self.rules)

    @property
    def eager_because(self) -> str | None:
        """Why rows like the probed config train operation by operation on a CUDA device; None if they do not."""
        return self._probed(self._config).eager_because

    def describe(self, configs: Mapping[int, TrialConfig]) -> str:
        """Return how trials are placed, for people: `rows 4 + 4, plain 1`."""
        for config in configs.values():
            self._probed(config)
        return describe(self.place(configs))

    def lower_row_limit(self, rows: int) -> None:
        """Lower the row limit to half of `rows`, which did not fit into memory; if `rows` is 1, offload plain trials.

        Raises:
            PipelineError: A single trial did not fit.
        """
        if rows > 1:
            self.rules = dataclasses.replace(self.rules, row_limit=-(-rows // 2))
        elif not self.offload():
            raise PipelineError(f"{self.device}: no memory is left for even one trial")
        released()

    def offload(self) -> bool:
        """Keep plain trials on the device one at a time from now on; return whether this is a change."""
        changes = not (self._offloads or self.device.type == "cpu" or isinstance(self.workload, Loop))
        self._offloads = self._offloads or changes
        return changes

    def start_processes(self, shards: int) -> int:
        """Start the processes that a number of shards needs; return the number of processes, this one included."""
        self._processes = [process for process in self._processes if not process.ended]
        while self._forks and len(self._processes) < min(self.rules.processes, shards) - 1:
            with self.precision():  # a fork inherits these settings
                try:
                    self._processes.append(TrainingProcess(self.build_here))
                except OSError:  # the system allows no more processes; fewer processes train the same numbers
                    break
        return 1 + len(self._processes)

    def process_of(self, trainer: ShardTrainer) -> int:
        """Return the index of the process that holds a trainer; 0 is this process."""
        remote = isinstance(trainer, RemoteTrials) and trainer.process in self._processes
        return 1 + self._processes.index(cast(RemoteTrials, trainer).process) if remote else 0

    def build_shard(self, configs: Mapping[int, TrialConfig], *, plain: bool, process: int = 0) -> ShardTrainer:
        """Build the trainer of a shard in a process; 0 is this process.

        Raises:
            torch.OutOfMemoryError: A training or evaluation batch does not fit into the device's memory.
        """
        if 0 < process <= len(self._processes):
            with contextlib.suppress(ProcessDied):
                return self._processes[process - 1].build(configs, plain=plain)
        if plain and self._offloads and not self._unsaved:  # a state that is not saved would be trained again
            return OffloadedTrials(configs, lambda configs: cast(PlainTrials, self.build_here(configs, True)))
        trainer = self.build_here(configs, plain)
        size = _batch_size(trainer)
        if self.device.type != "cpu" and isinstance(trainer, FusedTrials) and len(configs) > self._tried_rows[size]:
            with self.precision():
                trainer.try_memory()
            self._tried_rows[size] = len(configs)
        return trainer

    def build_here(self, configs: Mapping[int, TrialConfig], plain: bool) -> FusedTrials | PlainTrials | LoopTrial:
        """Build a trainer in this process."""
        if isinstance(self.workload, Loop):
            return LoopTrial(configs, self.workload, device=self.device)
        options: dict[str, Any] = {"device": self.device, "dtype": self._dtype}
        options |= {"draws": self._draws, "output_size": self._output_size}
        if plain:
            return PlainTrials(configs, self.workload, unsaved=self._unsaved, **options)
        finding = self._probed(next(iter(configs.values())))
        capture = capture_on(self.device) if finding.eager_because is None else None
        return FusedTrials(configs, self.workload, capture=capture, **options)

    def train(
        self, trainers: Sequence[ShardTrainer], *, average: bool = False
    ) -> list[dict[int, EpochMetrics] | Exception]:
        """Train shards for an epoch, at the same time where possible; return the metrics or the exception of each."""
        if is_streamed(self.workload) and len(trainers) > 1 and not self._offloads:
            return self._train_streamed(trainers, average=average)
        queues: dict[int, list[ShardTrainer]] = {}
        for index, trainer in enumerate(trainers):
            queues.setdefault(self.process_of(trainer) if self._processes else index, []).append(trainer)
        ordered = [queues[process] for process in sorted(queues)]
        with self._map(len(ordered)) as each:
            found = each(lambda queue: [(id(t), _attempt(t, average=average)) for t in queue], ordered)
        outcomes = {trainer: outcome for queue in found for trainer, outcome in queue}
        return [outcomes[id(trainer)] for trainer in trainers]

    def _train_streamed(
        self, trainers: Sequence[ShardTrainer], *, average: bool
    ) -> list[dict[int, EpochMetrics] | Exception]:
        """Train shards for an epoch, reading the data once for those of one batch size."""
        assert not self._processes
        outcomes: dict[int, dict[int, EpochMetrics] | Exception] = {}
        for size in sorted({_batch_size(trainer) for trainer in trainers}):
            together = [trainer for trainer in trainers if _batch_size(trainer) == size]
            with self.precision():
                for trainer in together:
                    if isinstance(trainer, PlainTrials):
                        trainer.repeat_epochs()  # one after the other, as all read from one loader
            with self._map(len(together)) as each:
                found = train_epoch_together(cast(Sequence[Stepwise], together), each, average=average)
            outcomes |= {id(trainer): outcome for trainer, outcome in zip(together, found, strict=True)}
        return [outcomes[id(trainer)] for trainer in trainers]

    def _probed(self, config: TrialConfig) -> Finding:
        """Probe trials of one batch size that freeze the same groups, once, and store the verdict in the rules."""
        key = matrix_key(config)
        if key not in self._findings:
            self._findings[key] = self._probe(config)
        finding = self._findings[key]
        if key not in self.rules.plain_because:
            verdicts = {**self.rules.plain_because, key: finding.plain_because}
            self.rules = dataclasses.replace(self.rules, plain_because=verdicts)
        return finding

    def _probe(self, config: TrialConfig) -> Finding:
        if isinstance(self.workload, Loop):
            return OWN_LOOP
        with precision(self._config, self.device):
            return probe(self.workload, config, device=self.device, dtype=self._dtype)

    @contextlib.contextmanager
    def _map(self, calls: int) -> Iterator[Map]:
        """Yield a `map` that makes `calls` calls at once: to processes, or in the threads that train here."""
        threads = calls if self._processes else min(calls, self._threads)
        with self.precision():
            if threads <= 1:
                yield lambda function, items: [function(item) for item in items]
                return
            # Steps seed torch's global state and restore it, which several threads do in any order.
            with random_states_kept(("torch",), self.device), ThreadPoolExecutor(threads) as pool:
                yield functools.partial(_map_threads, pool)


def _batch_size(trainer: ShardTrainer) -> int:
    """Return the batch size of a trainer's trials, which is the same for all."""
    return next(iter(trainer.configs.values())).batch_size


def _map_threads(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call a function on all items at once, on the first in this thread, which has oneDNN's kernels in its cache."""
    others = [pool.submit(function, item) for item in items[1:]]
    return [function(items[0]), *(other.result() for other in others)]


def _attempt(trainer: ShardTrainer, *, average: bool) -> dict[int, EpochMetrics] | Exception:
    try:
        return trainer.train_epoch(average=average)
    except ProcessDied as error:
        return error
    except (Exception, SystemExit) as error:
        return trial_error(error)
