"""With what rows are computed on a CPU, for each to be the same to the bit in any company: found by trying.

Two things make a row notice the others. Which kernel multiplies, convolves or sums depends on the shapes beside it;
that changes many numbers, and comparing rows finds it. And some functions round the end of a tensor otherwise; see
`pipeline.tensor_ends`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TrialConfig
from pipeline.data import evaluation_batch_size, samples_of
from pipeline.fused import FusedTrials
from pipeline.row_model import Company
from pipeline.tensor_ends import FEW, MORE, ONE_SAMPLE, Runs, Watched, rows_at_ends, runs_of_rows
from pipeline.workloads.workload import Split, Workload

MANY, MANY_PARAMETERS = 33, 1 << 22
"""Rows in company: a column more than 32 even of a model with one, but fewer if they have many parameters."""
ENOUGH_SAMPLES, DIFFERENT_SAMPLES = 64, 128
"""In training steps and among all samples: kernels that differ can agree on a few."""
MIN_STEPS, MAX_STEPS, ENOUGH_NUMBERS = 4, 16, 1 << 13
"""Steps that rows train: as many as it takes for so many numbers of gradients, since few can be the same by chance."""
MAX_OFTEN = 1 << 12
"""Rows times samples that are evaluated after each epoch; more, after the last one, when they say enough."""
NOISE = 0.1
"""That is added to the first parameters, relative to them: zeros and ones are computed alike by every kernel."""
MULTIPLES, MAX_EXTRA = (1, 2, 4, 8), 8
"""More extra rows at the usual size of a batch would cost more than rows gain."""


def company_of(
    workload: Workload, configs: Sequence[TrialConfig], size: int, *, device: torch.device, dtype: torch.dtype
) -> Company | None:
    """Return with what each row is the same to the bit alone and among many; None if there is nothing.

    Which kernel computes a product also depends on the size of a batch, so each size is tried that training and
    evaluation have.

    Args:
        workload: What is trained.
        configs: Two trials of it that differ.
        size: Number of its parameters.
        device: A CPU.
        dtype: Of parameters and floating-point data.
    """
    rows = _Rows(_of_same_batch_sizes(workload, configs[0]), configs, size, device=device, dtype=dtype)
    for company in _companies(rows):
        trained = functools.cache(functools.partial(rows.trained, company=company))
        # Together with many: a lone row, several, and where a matrix can end.
        *fewer, few = sorted({1, 2, 3, *(n * company.multiple for n in (1, 2, 3))})
        if few <= rows.most and all(_alike(trained(n), trained(few)) for n in (min(MANY, rows.most), *fewer)):
            plain = dataclasses.replace(company, lone_is_plain=True)
            return plain if company.multiple == 1 and _alike(rows.trained(1, plain), trained(few)) else company
    return None


class _Rows:
    """Rows of two trials that are trained to see in which company they are alike; see `company_of`."""

    def __init__(
        self, workload: Workload, configs: Sequence[TrialConfig], size: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._workload, self._configs, self._device, self._dtype = workload, configs, device, dtype
        self._splits = [name for name in ("val", "test") if getattr(workload, name) is not None]
        self.most = max(3, MANY_PARAMETERS // size)
        """That are tried."""
        self.usual = min(configs[0].batch_size, len(workload.train))
        """Samples of a batch."""
        steps = min(MAX_STEPS, max(MIN_STEPS, ENOUGH_NUMBERS // size))
        self._epochs = math.ceil(steps / math.ceil(len(workload.train) / configs[0].batch_size))

    def trained(self, rows: int, company: Company) -> dict[int, Any]:
        """Return each row's losses and gradients of every step, outputs after epochs, and state in the end."""
        group = self._built(rows, company)
        seen: dict[Any, Tensor] = {}
        for epoch in range(self._epochs):
            group.begin_epoch()
            for step, (inputs, targets) in enumerate(group.training_batches()):
                losses, gradients = group.gradients(inputs, targets)
                seen[epoch, step, "losses"], seen[epoch, step, "gradients"] = losses, gradients.clone()
                group.update(losses, gradients, samples=len(inputs))
            for name in self._splits:
                if epoch == self._epochs - 1 or rows * len(getattr(self._workload, name)) <= MAX_OFTEN:
                    seen[epoch, name] = group.outputs(name)
        states = group.state_dict()
        return {row: (states[str(row)], {what: of[row] for what, of in seen.items()}) for row in range(rows)}

    def runs(self, *, filled_up: bool) -> Runs | None:
        """Return the runs of rows in loops that round ends otherwise; None if rows cannot be alike.

        Args:
            filled_up: Whether rows lie in memory as if there were copies, or else as views of their matrix.
        """
        return runs_of_rows(*(self._watched(rows, Company(multiple=rows if filled_up else 1)) for rows in (FEW, MORE)))

    def _watched(self, rows: int, company: Company) -> Watched:
        group, watch = self._built(rows, company), Watched()
        group.begin_epoch()
        for inputs, targets in group.training_batches():
            with watch.of_batch(len(inputs)):
                group.train_step(inputs, targets)
        for name in self._splits:
            for inputs, targets in group.evaluation_batches(name):
                with watch.of_batch(len(inputs)):
                    group.evaluate_step(inputs, targets)
        return watch

    def _built(self, rows: int, company: Company) -> FusedTrials:
        """Return rows of the two trials by turns, which begin with parameters of their own."""
        trials = {number: self._configs[number % 2] for number in range(rows)}
        group = FusedTrials(trials, self._workload, device=self._device, dtype=self._dtype, company=company)
        states = group.state_dict()
        for number in trials:
            row = states[str(number)]["row"]
            noise = NOISE * (2 * torch.rand(row.shape, generator=torch.Generator().manual_seed(number % 2)) - 1)
            states[str(number)]["row"] = torch.where(row == 0, noise.to(row), row * (1 + noise))
        group.load_state_dict(states)
        return group


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
        return max(rows_at_ends(multiple, filled_up[samples]), 1 if multiple == 1 else 0)

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
    yield from sorted(worth_it, key=lambda company: company.multiple / 2 + company.spare[rows.usual])


def _alike(rows: Mapping[int, Any], others: Mapping[int, Any]) -> bool:
    """Say whether rows are the same as the first two of others, of which they are copies, in what is known of them."""
    return all(_same_bits(its, others[row % 2]) for row, its in rows.items())


def _same_bits(one: Any, other: Any) -> bool:
    """Say whether two states are the same, in the tensors within tuples and lists, and dicts under keys of both."""
    if isinstance(one, Mapping):
        return all(_same_bits(value, other[key]) for key, value in one.items() if key in other)
    if isinstance(one, tuple | list):
        return all(map(_same_bits, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


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
