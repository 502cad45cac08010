"""Which trainer trains which trial: rows of a matrix where that is possible, plain where it is not.

How many rows share a matrix, and how many matrices train at once, changes no result, so it is chosen by measurement.
On a CPU each matrix, or plain trial, trains with one thread, and several of them in as many threads as PyTorch would
use: a sum whose parts are split between threads depends on how it is split, and small models wait for each other more
than they compute.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pipeline.arithmetic import arithmetic
from pipeline.config import TrialConfig
from pipeline.data import is_streamed, place
from pipeline.errors import PipelineError
from pipeline.fused import FusedTrials, has_rule
from pipeline.memory import free_memory
from pipeline.plain import PlainTrials
from pipeline.probe import probe
from pipeline.stepwise import AtOnce, train_epoch_together, trouble_of_its_own
from pipeline.trainer import EpochMetrics
from pipeline.workloads.workload import Workload

Part = FusedTrials | PlainTrials
"""What one thread trains."""
MEMORY_SHARE = 0.5
"""Of a CPU's free memory, what the rows of all matrices may take."""
ROUNDS = 5
"""How often a step is timed to choose the number of matrices; the least counts."""


class Trainer:
    """Decides once how a workload's trials train, and builds groups of them.

    Args:
        workload: Data, model, loss and metrics.
        config: Any trial's, to try the workload with.
        device: Where to train.
        dtype: Of parameters and floating-point data.
        rows: At most this many trials in a matrix; None: as many as train fastest.
    """

    def __init__(
        self,
        workload: Workload,
        config: TrialConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rows: int | None = None,
    ) -> None:
        self.rows = rows
        self._matrices = 1
        self._measured = 1
        """Rows with which the number of matrices was chosen: a larger group is measured again."""
        self.workload = place(workload, device=device, dtype=dtype)
        self.device = device
        self._dtype = dtype
        self._config = config
        with self.arithmetic():
            finding = probe(self.workload, config, device=device, dtype=dtype)
        self.plain_because = finding.plain_because
        """Why no trial of the workload can be a row; None if they can."""
        self._seeded = finding.draws_random_numbers
        self._row_multiple = finding.row_multiple
        # Random numbers come from a state that all threads of the process share.
        alone = device.type != "cpu" or self._seeded
        self._threads = 1 if alone else torch.get_num_threads()
        self._room: int | None = None
        """Rows that fit beside those of the other threads; None: until memory runs out."""
        if device.type == "cpu":  # which has no error for it: the process would be killed
            self._room = max(1, int(MEMORY_SHARE * free_memory(device) / finding.trial_bytes / self._threads))

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which all trials train: a search has one precision."""
        return arithmetic(self._config, self.device)

    def fuses(self, config: TrialConfig) -> bool:
        """Say whether a trial trains as a row."""
        return self.plain_because is None and has_rule(config.optimizer.name)

    def build(self, configs: Mapping[int, TrialConfig]) -> TrialParts:
        """Build the trainers of a group of trials."""
        fused = {number: config for number, config in configs.items() if self.fuses(config)}
        if self.rows is None and len(fused) > self._measured:
            self._matrices, self._measured = self._fastest(dict(list(fused.items())[: self._room])), len(fused)
        single = [{number: config} for number, config in configs.items() if number not in fused]
        return TrialParts(self, [part for some in (*self.spread(fused), *single) for part in self._build(some)])

    def spread(self, configs: Mapping[int, TrialConfig]) -> list[dict[int, TrialConfig]]:
        """Spread trials that train as rows over matrices, as equally as can be."""
        parts = []
        for alike in _alike(configs):
            size = -(-len(alike) // (self._matrices))
            parts += list(_split(alike, min(size, self.rows or size, self._room or size)))
        return parts

    def build_part(self, configs: Mapping[int, TrialConfig]) -> Part:
        """Build the trainer of trials that train in one thread: rows of one matrix, or one plain trial."""
        place: dict[str, Any] = {"device": self.device, "dtype": self._dtype, "seeded": self._seeded}
        if all(self.fuses(config) for config in configs.values()):
            return FusedTrials(configs, self.workload, **place, row_multiple=self._row_multiple)
        return PlainTrials(configs, self.workload, **place)

    def _build(self, configs: Mapping[int, TrialConfig]) -> list[Part]:
        """Build the trainers of trials in as few parts as fit into memory."""
        try:
            return [self.build_part(configs)]
        except torch.OutOfMemoryError:
            if len(configs) == 1:
                raise PipelineError(f"{self.device}: no memory is left for even one trial") from None
            torch.cuda.empty_cache()
            return [part for half in _split(configs, -(-len(configs) // 2)) for part in self._build(half)]

    def train(self, parts: Sequence[Part], *, epochs: int) -> list[dict[int, EpochMetrics] | Exception]:
        """Train each part, at once where that is possible; return each trial's last metrics, or what was raised."""
        with self._threads_for(parts) as at_once:
            if not is_streamed(self.workload) or len(parts) < 2:
                return at_once(lambda part: _attempt(part, epochs), parts)
            outcomes: list[Any] = [{} for _ in parts]
            for _ in range(epochs):
                going = [n for n, part in enumerate(parts) if part.configs and isinstance(outcomes[n], dict)]
                if not going:
                    break
                for n, now in zip(going, train_epoch_together([parts[n] for n in going], at_once), strict=True):
                    outcomes[n] = {**outcomes[n], **now} if isinstance(now, dict) else now
            return outcomes

    def halve(self, configs: Mapping[int, TrialConfig], *, too_large: bool) -> list[Part]:
        """Build the trials of a matrix that failed as two; if it was too large, none is larger from now on."""
        size = -(-len(configs) // 2)
        if too_large:
            self.rows = min(self.rows or size, size)
        return [part for half in _split(configs, size) for part in self._build(half)]

    def _fastest(self, configs: Mapping[int, TrialConfig]) -> int:
        """Return how many matrices at once train the rows fastest, from the time of a step of all rows and of half.

        A step takes a + b · rows: `a` is Python's work, for which threads wait for each other, `b` is arithmetic. One
        matrix alone is timed, since whatever else runs at this moment would decide between threads.
        """
        rows, half = len(configs), -(-len(configs) // 2)
        if self._threads == 1 or rows == half:
            return 1
        whole, part = self.build_part(configs), self.build_part(next(_split(configs, half)))
        try:
            times = [(self._time_step(whole), self._time_step(part)) for _ in range(1 + ROUNDS)]
        except Exception:  # training will meet it too, and say so for each trial
            return 1
        slow, fast = (min(seconds) for seconds in zip(*times[1:], strict=True))
        arithmetic = max(slow - fast, 0.0) / (rows - half)
        work = max(slow - arithmetic * rows, 0.0)
        return min(range(1, min(self._threads, rows) + 1), key=lambda n: n * work + arithmetic * rows / n)

    def _time_step(self, part: Part) -> float:
        """Return the seconds of a step of one matrix."""
        assert isinstance(part, FusedTrials)
        with self.arithmetic():
            start = time.perf_counter()
            part.time_step()
            return time.perf_counter() - start

    @contextlib.contextmanager
    def _threads_for(self, parts: Sequence[Part]) -> Iterator[AtOnce]:
        """Give a `map` that calls in as many threads as there are for parts, each of which computes alone."""
        with self.arithmetic():
            if self._threads == 1 or len(parts) == 1:
                yield lambda function, parts: [function(part) for part in parts]
                return
            with ThreadPoolExecutor(self._threads) as pool:
                yield lambda function, parts: list(pool.map(function, parts))


class TrialParts:
    """A group of trials in several trainers; see `TrialGroup` for the contract."""

    def __init__(self, trainer: Trainer, parts: Sequence[Part]) -> None:
        self._trainer = trainer
        self.parts = list(parts)
        self._epochs = 0

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch.

        A matrix that runs out of memory or raises is halved, again and again, so that one trial's trouble is its own.
        Its halves begin anew and train as far as it had come: then they are what it was.
        """
        self._rebalance()
        waiting, self.parts = self.parts, []
        results, broken = self._train(waiting, epochs=1)
        while broken:
            del waiting  # its memory is needed
            torch.cuda.empty_cache()
            waiting = [
                half for configs, too_large in broken for half in self._trainer.halve(configs, too_large=too_large)
            ]
            more, broken = self._train(waiting, epochs=self._epochs + 1)
            results |= more
        self._epochs += 1
        return dict(sorted(results.items()))

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        self._part(number).drop(number)
        self.parts = [part for part in self.parts if part.configs]

    def describe(self) -> str:
        """Return how trials are spread: `rows 4 + 4, plain 1`."""
        rows = [str(len(part.configs)) for part in self.parts if isinstance(part, FusedTrials)]
        plain = len(self.parts) - len(rows)
        words = [f"rows {' + '.join(rows)}" if rows else "", f"plain {plain}" if plain else ""]
        return ", ".join(word for word in words if word)

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        with self._trainer.arithmetic():
            return {number: values for part in self.parts for number, values in part.test().items()}

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        return self._part(number).model_state(number)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial; how trials were spread over matrices is no part of it."""
        trials = {number: state for part in self.parts for number, state in part.state_dict().items()}
        return {"epochs": self._epochs, "trials": trials}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; trials that it does not hold were dropped."""
        self._epochs = state["epochs"]
        for part in self.parts:
            part.load_state_dict(state["trials"])
        self.parts = [part for part in self.parts if part.configs]

    def _rebalance(self) -> None:
        """Spread the rows that are left equally over matrices again; rows do not notice."""
        matrices = [part for part in self.parts if isinstance(part, FusedTrials)]
        wanted = self._trainer.spread({n: config for part in matrices for n, config in part.configs.items()})
        if sorted(len(part.configs) for part in matrices) == sorted(len(configs) for configs in wanted):
            return
        try:
            states = {number: state for part in matrices for number, state in part.state_dict().items()}
            spread = [self._trainer.build_part(configs) for configs in wanted]
        except torch.OutOfMemoryError:  # while both are in memory; as they are, the matrices fit
            return
        for part in spread:
            part.load_state_dict({str(number): states[str(number)] for number in part.configs})
        self.parts = [*spread, *(part for part in self.parts if part not in matrices)]

    def _train(
        self, parts: Sequence[Part], *, epochs: int
    ) -> tuple[dict[int, EpochMetrics], list[tuple[Mapping[int, TrialConfig], bool]]]:
        """Train parts, keep those that have trials left; return the matrices that failed, and whether for memory."""
        results: dict[int, EpochMetrics] = {}
        broken: list[tuple[Mapping[int, TrialConfig], bool]] = []
        for part, outcome in zip(parts, self._trainer.train(parts, epochs=epochs), strict=True):
            if isinstance(outcome, dict):
                results |= outcome
                self.parts += [part] if part.configs else []
            elif _can_halve(part):
                broken.append((part.configs, isinstance(outcome, torch.OutOfMemoryError)))
            else:
                failed = f"{type(outcome).__name__}: {outcome}"
                lost = EpochMetrics(epoch=self._epochs, step=0, metrics={}, lr={}, failed=failed)
                results |= dict.fromkeys(part.configs, lost)
        return results, broken

    def _part(self, number: int) -> Part:
        return next(part for part in self.parts if number in part.configs)


def _can_halve(part: Part) -> bool:
    return isinstance(part, FusedTrials) and len(part.configs) > 1


def _alike(configs: Mapping[int, TrialConfig]) -> Iterator[dict[int, TrialConfig]]:
    """Yield trials that freeze the same groups: a frozen group is no part of a row."""

    def frozen(number: int) -> tuple[str, ...]:
        return tuple(name for name, group in configs[number].param_groups.items() if group.lr_ratio == 0)

    for _, numbers in itertools.groupby(sorted(configs, key=lambda number: (frozen(number), number)), key=frozen):
        yield {number: configs[number] for number in numbers}


def _split(configs: Mapping[int, TrialConfig], size: int) -> Iterator[dict[int, TrialConfig]]:
    """Yield parts of at most `size` trials, as equal as can be."""
    items = list(configs.items())
    count = -(-len(items) // size)
    for index in range(count):
        yield dict(items[index * len(items) // count : (index + 1) * len(items) // count])


def _attempt(part: Part, epochs: int) -> dict[int, EpochMetrics] | Exception:
    results: dict[int, EpochMetrics] = {}
    try:
        for _ in range(epochs):
            results |= part.train_epoch()
        return results
    except Exception as error:
        return trouble_of_its_own(error)
