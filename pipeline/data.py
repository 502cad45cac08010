"""Where samples come from while trials train: moved to the device once, or read batch by batch.

Both ways give the same batches. What a sample or an augmentation draws at random is a function of the seed, the epoch
and the sample or step, so it is the same for every trial, in any order, with any number of worker processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.config import TrialConfig
from pipeline.memory import free_memory
from pipeline.trainer import derive_seed
from pipeline.workloads.workload import Dataset, Samples, Split, Workload

SHARE = 0.25
"""Of the memory that is free, what data may take to be kept on the device."""
MAX_WORKERS = 8
TRIED = 16
"""Samples that are read twice, to see whether a data set draws at random."""
MAX_EVAL_BATCH, MAX_EVAL_NUMBERS = 1024, 1 << 20
"""Samples per forward pass of an evaluation, and numbers in their inputs: one, then the other sets the limit."""


class Streamed:
    """Samples that are read from a data set batch by batch, by worker processes where that pays.

    Args:
        dataset: What is read.
        device: Where batches go.
        dtype: Of floating-point batches.
    """

    def __init__(self, dataset: Dataset | Split, *, device: torch.device, dtype: torch.dtype) -> None:
        self._dataset = dataset
        self._device = device
        self._dtype = dtype
        self._loader: DataLoader[Any] | None = None
        self._plan: list[list[tuple[int, int]]] = []

    @functools.cached_property
    def sample_size(self) -> int:
        """The count of numbers in the input of one sample."""
        return first_samples(self, 1).inputs.numel()

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, indices: Sequence[Tensor], *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and targets of batches; see `Samples`."""
        for inputs, targets in self._read(indices, seed):
            yield self._place(inputs), self._place(targets)

    def take(self, chosen: Tensor) -> Streamed:
        """Return some of the samples; see `Samples`."""
        if isinstance(self._dataset, Split):
            return Streamed(self._dataset.take(chosen), device=self._device, dtype=self._dtype)
        some = torch.utils.data.Subset(cast(Any, self._dataset), chosen.tolist())
        return Streamed(some, device=self._device, dtype=self._dtype)

    def _read(self, indices: Sequence[Tensor], seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        if isinstance(self._dataset, Split):
            return self._dataset.batches(indices)
        self._plan[:] = [[(index, seed) for index in batch.tolist()] for batch in indices]
        if self._loader is None:
            self._loader = self._build_loader(self._dataset)
        return self._loader

    def _place(self, values: Tensor) -> Tensor:
        return values.to(self._device, self._dtype if values.is_floating_point() else None, non_blocking=True)

    def _build_loader(self, dataset: Dataset) -> DataLoader[Any]:
        workers = _workers()
        return DataLoader(
            _Seeded(dataset),
            batch_sampler=cast(Any, self._plan),  # read anew at the beginning of each pass
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else each pass draws from torch's global random state
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
        )


class _Seeded(torch.utils.data.Dataset[Any]):
    """A data set whose samples draw random numbers from a state of their own."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any]:
        index, seed = key
        with _seeded(derive_seed(seed, "sample", index)):
            sample, target = self._dataset[index]
            return sample, target


def place(workload: Workload, *, device: torch.device, dtype: torch.dtype, free: int | None = None) -> Workload:
    """Return a workload whose splits are `Samples` on a device: moved there if they fit, else read batch by batch.

    Args:
        workload: Its splits are in memory or data sets.
        device: Where trials train.
        dtype: Of floating-point data.
        free: Bytes that the data may take there; None: a quarter of the memory that is free.
    """
    free = int(SHARE * free_memory(device)) if free is None else free
    splits: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        split = getattr(workload, name)
        if split is None or isinstance(split, Streamed):
            continue
        splits[name], taken = _placed(split, device=device, dtype=dtype, free=free)
        free -= taken
    return dataclasses.replace(workload, **splits)


def is_streamed(workload: Workload) -> bool:
    """Say whether training data are read batch by batch."""
    return isinstance(workload.train, Streamed)


def training_batches(
    workload: Workload, config: TrialConfig, *, epoch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch, counted from 0, as the model sees them: a function of seed and epoch alone."""
    order = epoch_order(len(workload.train), seed=config.seed, epoch=epoch)
    seed = derive_seed(config.seed, "samples", epoch)
    batches = samples_of(workload, "train").batches(order.split(config.batch_size), seed=seed)
    for step, (inputs, targets) in enumerate(batches):
        if workload.augment is not None:
            generator = torch.Generator(device).manual_seed(derive_seed(config.seed, "augment", epoch, step))
            inputs = workload.augment(inputs, generator)
        yield model_inputs(workload, inputs, dtype), targets


def evaluation_batches(
    workload: Workload, name: str, config: TrialConfig, *, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a split in order, as the model sees them."""
    split = samples_of(workload, name)
    size = max(config.batch_size, min(MAX_EVAL_BATCH, MAX_EVAL_NUMBERS // max(1, split.sample_size)))
    for inputs, targets in split.batches(torch.arange(len(split)).split(size), seed=derive_seed(config.seed, name)):
        yield model_inputs(workload, inputs, dtype), targets


def model_inputs(workload: Workload, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the model sees of a batch."""
    inputs = inputs if workload.preprocess is None else workload.preprocess(inputs)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def samples_of(workload: Workload, name: str) -> Samples:
    """Return a split of a workload that `place` returned."""
    return cast(Samples, getattr(workload, name))


def first_samples(samples: Samples, count: int) -> Split:
    """Return the first samples of a split."""
    ((inputs, targets),) = samples.batches([torch.arange(min(count, len(samples)))], seed=0)
    return Split(inputs, targets)


def some_samples(samples: Samples, count: int, *, seed: int) -> Any:
    """Return so many samples of a split, chosen at random, or all of them if there are no more."""
    return samples if count >= len(samples) else samples.take(epoch_order(len(samples), seed=seed, epoch=0)[:count])


def epoch_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order (sample,) in which an epoch visits the training data: a function of seed and epoch alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def _placed(split: Split | Dataset, *, device: torch.device, dtype: torch.dtype, free: int) -> tuple[Samples, int]:
    """Return a split's samples, and the bytes that they take on the device."""
    streamed = Streamed(split, device=device, dtype=dtype)
    if isinstance(split, Split):
        size = split.inputs.nbytes + split.targets.nbytes
        fits = size <= free or split.inputs.device == device
        return (split.to(device, dtype), size) if fits else (streamed, 0)
    sample = first_samples(streamed, 1)
    size = len(split) * (sample.inputs.nbytes + sample.targets.nbytes)
    if size > free or _draws_at_random(streamed):
        return streamed, 0
    order = torch.arange(len(split))
    batches = list(streamed.batches(order.split(MAX_WORKERS), seed=0))
    return Split(torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])), size


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every global random state that a data set may draw from, and leave them as they were."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _draws_at_random(samples: Streamed) -> bool:
    indices = [torch.arange(min(TRIED, len(samples)))]
    (one,), (other,) = (list(samples.batches(indices, seed=seed)) for seed in (0, 1))
    return not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _workers() -> int:
    """Return how many processes read samples; forked ones see a data set of any kind, and not every system can."""
    if "fork" not in multiprocessing.get_all_start_methods() or os.uname().sysname != "Linux":
        return 0
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))
