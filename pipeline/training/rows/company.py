"""With what rows are computed on a CPU, for each to be the same to the bit in any company: found by trying.

Two things make a row notice the others. Which kernel multiplies, convolves or sums depends on the shapes beside it;
that changes many numbers, and comparing rows finds it. And some functions round the end of a tensor otherwise; see
`pipeline.training.rows.tensor_ends`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.space.config import TrialConfig
from pipeline.training.rows.model import Company
from pipeline.training.rows.tensor_ends import FEW, MORE, ONE_SAMPLE, Runs, Watched, rows_at_ends, runs_of_rows
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.data import evaluation_batch_size, samples_of
from pipeline.workloads.workload import Split, Workload

MANY, SEVERAL, MANY_PARAMETERS = 33, 13, 1 << 22
"""Rows in company: a column more than 32, and more than 8 and 4, even of a model with one column, since a sum takes so
many at once; but fewer rows if they have many parameters."""
ENOUGH_SAMPLES, DIFFERENT_SAMPLES = 64, 128
"""In training steps and among all samples: kernels that differ can agree on a few."""
MIN_STEPS, MAX_STEPS, ENOUGH_NUMBERS = 2, 16, 1 << 13
"""Steps that are tried: as many as it takes for so many numbers of gradients, since few can be the same by chance."""
NOISE, SCALES = 0.1, (1.0, 0.3, 0.03)
"""Rows of three kinds begin with the model's first parameters, changed by so large a part, and times so much: zeros and
ones are computed alike by every kernel, and so is what inputs of large numbers saturate."""
MAX_OFTEN = 1 << 12
"""Rows times samples that are evaluated after each epoch; more, after the last one, when they say enough."""
MULTIPLES, MAX_EXTRA = (1, 2, 4, 8), 8
"""More extra rows at the usual size of a batch would cost more than rows gain."""


def company_of(
    workload: Workload, config: TrialConfig, size: int, *, device: torch.device, dtype: torch.dtype
) -> Company | None:
    """Return with what each row is the same to the bit alone and among many; None if there is nothing.

    Which kernel computes a product also depends on the size of a batch, so each size is tried that training and
    evaluation have, and on which parameters are frozen, since these are no part of a row.

    Args:
        workload: What is trained.
        config: A trial of it, which says what is frozen.
        size: Number of its parameters.
        device: A CPU.
        dtype: Of parameters and floating-point data.
    """
    rows = _Rows(_of_same_batch_sizes(workload, config), config, size, device=device, dtype=dtype)
    alone = [range(kind, kind + 1) for kind in range(len(SCALES))]
    for company in _companies(rows):
        # Together with many: a lone row, several, and where a matrix can end.
        few = [range(1, 3), *(range(count) for count in {3, *(n * company.multiple for n in (1, 2, 3))} - {1})]
        few += [range(SEVERAL)] if rows.most >= MANY else []
        if 3 * company.multiple > rows.most:
            continue
        many = rows.tried(range(min(MANY, rows.most)), company)
        if all(_alike(some, many) for some in (many, *(rows.tried(numbers, company) for numbers in (*alone, *few)))):
            plain = dataclasses.replace(company, lone_is_plain=True)
            plain_too = company.multiple == 1 and all(_alike(rows.tried(numbers, plain), many) for numbers in alone)
            return plain if plain_too else company
    return None


_Seen = Mapping[Any, bytes]
"""What was computed of a row, to a digest of its bits."""


class _Rows:
    """Rows that are computed to see in which company they are alike; see `company_of`."""

    def __init__(
        self, workload: Workload, config: TrialConfig, size: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._workload, self._config, self._device, self._dtype = workload, config, device, dtype
        self._splits = [name for name in ("val", "test") if getattr(workload, name) is not None]
        self.most = max(len(SCALES), MANY_PARAMETERS // size)
        """That are tried."""
        self.usual = min(config.batch_size, len(workload.train))
        """Samples of a batch."""
        steps = min(MAX_STEPS, max(MIN_STEPS, ENOUGH_NUMBERS // size))
        self._epochs = math.ceil(steps / math.ceil(len(workload.train) / config.batch_size))
        self._first: Tensor = self._built(range(1), Company()).state_dict()["0"]["row"]

    def tried(self, numbers: range, company: Company) -> Mapping[int, _Seen]:
        """Return what is seen of rows: losses and gradients of every step, outputs and buffers.

        Args:
            numbers: Of the rows; those that leave the same rest modulo `len(SCALES)` begin with the same parameters.
            company: With what they are computed.
        """
        group = self._built(numbers, company)
        seen: dict[int, dict[Any, bytes]] = {number: {} for number in numbers}

        def note(what: Any, of_rows: Tensor) -> None:
            for number, digest in zip(numbers, _digests(of_rows), strict=True):
                seen[number][what] = digest

        for epoch in range(self._epochs):
            self._begin(group, epoch)
            for step, (inputs, targets) in enumerate(group.training_batches()):
                losses, gradients = group.gradients(inputs, targets)
                note((epoch, step, "losses"), losses)
                note((epoch, step, "gradients"), gradients)
            for name in self._splits:
                if epoch == self._epochs - 1 or len(numbers) * len(getattr(self._workload, name)) <= MAX_OFTEN:
                    note((epoch, name), group.outputs(name))
        for number, state in group.state_dict().items():
            buffers = {name: _digests(buffer.unsqueeze(0))[0] for name, buffer in state["buffers"].items()}
            seen[int(number)].update(buffers)
        return seen

    def runs(self, *, filled_up: bool) -> Runs | None:
        """Return the runs of rows in loops that round ends otherwise; None if rows cannot be alike.

        Args:
            filled_up: Whether rows lie in memory as if there were copies, or else as views of their matrix.
        """
        return runs_of_rows(*(self._watched(rows, Company(multiple=rows if filled_up else 1)) for rows in (FEW, MORE)))

    def _watched(self, rows: int, company: Company) -> Watched:
        group, watch = self._built(range(rows), company), Watched()
        self._begin(group, 0)
        for inputs, targets in group.training_batches():
            with watch.of_batch(len(inputs)):
                group.gradients(inputs, targets)
        for name in self._splits:
            for inputs, targets in group.evaluation_batches(name):
                with watch.of_batch(len(inputs)):
                    group.evaluate_step(inputs, targets)
        return watch

    def _built(self, numbers: range, company: Company) -> FusedTrials:
        trials = dict.fromkeys(numbers, self._config)
        return FusedTrials(trials, self._workload, device=self._device, dtype=self._dtype, company=company)

    def _begin(self, group: FusedTrials, epoch: int) -> None:
        """Begin an epoch with parameters of its own for each kind of rows."""
        first, states, kinds = self._first, group.state_dict(), []
        for kind, scale in enumerate(SCALES):
            draws = torch.rand(first.shape, generator=torch.Generator().manual_seed(len(SCALES) * epoch + kind))
            noise = NOISE * (2 * draws.to(first) - 1)
            kinds.append(scale * torch.where(first == 0, noise, first * (1 + noise)))
        for number in group.configs:
            states[str(number)]["row"] = kinds[number % len(SCALES)]
        group.load_state_dict(states)
        group.begin_epoch()


def _companies(rows: _Rows) -> Iterator[Company]:
    """Yield what leaves no row of a trial at an end, in order of cost at the usual size of a batch.

    A loop goes along what lies together in the memory of all its tensors. If that is of several rows, how much is left
    at its end, to be taken singly, depends on the number of rows, and whose it is on how many numbers of a row lie side
    by side. Such rows must be spare ones. Where each row has ends of its own, they are the same in any company.
    """
    bare = rows.runs(filled_up=False)
    if bare is None:
        return
    if not any(rows_at_ends(1, of_batch) for of_batch in bare.values()):
        yield Company()
    filled_up = rows.runs(filled_up=True)
    if filled_up is None:
        return

    def spare(multiple: int, samples: int) -> int:
        if multiple == 1 and not rows_at_ends(1, bare[samples]):
            return 0
        at_least = 1 if multiple == 1 else 0  # without a copy a matrix would lie in memory as a bare one
        return max(rows_at_ends(multiple, filled_up[samples]), at_least)

    companies = [
        Company(
            multiple=multiple,
            spare={samples: spare(multiple, samples) for samples in bare if samples != ONE_SAMPLE},
            spare_otherwise=spare(multiple, ONE_SAMPLE),
        )
        for multiple in MULTIPLES
    ]
    with_copies = [company for company in companies if company.multiple > 1 or company.spare_otherwise]
    worth_it = [company for company in with_copies if company.multiple - 1 + company.spare[rows.usual] <= MAX_EXTRA]
    # Filling a multiple up takes half of it on average.
    yield from sorted(worth_it, key=lambda company: company.multiple / 2 + company.spare[rows.usual])


def _alike(rows: Mapping[int, _Seen], many: Mapping[int, _Seen]) -> bool:
    """Say whether rows are the same as those of their kind among many, in what was seen of both."""
    kinds = {number: many[number % len(SCALES)] for number in rows}
    return all(its[what] == kinds[number][what] for number, its in rows.items() for what in its.keys() & kinds[number])


def _digests(rows: Tensor) -> list[bytes]:
    """Return a digest of each row (row, …); a NaN is like any other, and so are zeros of either sign."""
    rows = rows.detach().reshape(len(rows), -1)
    if rows.is_floating_point():
        rows = (rows + 0.0).masked_fill_(rows.isnan(), math.nan)
    return [hashlib.blake2b(row.view(torch.uint8).numpy()).digest() for row in rows.contiguous()]


def _of_same_batch_sizes(workload: Workload, config: TrialConfig) -> Workload:
    """Return a workload with few samples, from all over it and again and again, that has batches of the same sizes."""

    def some(name: str, size: int) -> Split:
        samples = samples_of(workload, name)
        different = torch.linspace(0, len(samples) - 1, min(len(samples), max(size, DIFFERENT_SAMPLES))).long()
        ((inputs, targets),) = samples.batches([different], seed=0)
        count = size * math.ceil(ENOUGH_SAMPLES / size) + len(samples) % size
        again = torch.arange(min(len(samples), count), device=inputs.device) % len(inputs)
        return Split(inputs[again], targets[again])

    def evaluated(name: str) -> Split:
        return some(name, evaluation_batch_size(samples_of(workload, name), config))

    # One of as many samples as `val` has the same batches.
    test = None if workload.test is None or len(workload.test) == len(workload.val) else evaluated("test")
    return dataclasses.replace(workload, train=some("train", config.batch_size), val=evaluated("val"), test=test)
