"""Supply batches while trials train, from data that were moved to the device once or are read batch by batch.

Both ways give the same batches. The random numbers of a sample or an augmentation are a function of the seed, the epoch
and the sample or step. They are therefore equal for every trial, in any order, with any number of reader processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from pipeline.errors import DataError
from pipeline.files.signals import signals_blocked
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.workloads.workload import Dataset, Samples, Split, Workload

MEMORY_SHARE = 0.25
"""The part of the free memory that data may take to be kept on the device."""
MAX_READERS = 8
"""Processes that read one data set."""
SAMPLES_READ_TWICE = 16
"""Samples that show whether a data set draws at random."""
MAX_EVAL_BATCH, MAX_EVAL_NUMBERS = 1024, 1 << 20
"""Most samples per forward pass of an evaluation, and most numbers in their inputs; the smaller limit holds."""


class Streamed:
    """Samples that are read from a data set batch by batch, by reader processes on Linux.

    Args:
        dataset: Supplies the samples.
        device: Where batches go.
        dtype: Type of floating-point batches on the device.
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
        with signals_blocked():  # reader processes start here
            reader = iter(self._read(indices, seed))
        try:
            while (batch := _next(reader)) is not None:
                inputs, targets = batch
                yield self._to_device(inputs), self._to_device(targets)
        except DataError:
            if self._loader is not None and self._loader.num_workers:
                self._loader = None
                cast(Any, reader)._shutdown_workers()  # garbage collection would take seconds for each process
            raise

    def take(self, chosen: Tensor) -> Streamed:
        """Return some of the samples; see `Samples`."""
        if isinstance(self._dataset, Split):
            return Streamed(self._dataset.take(chosen), device=self._device, dtype=self._dtype)
        some = torch.utils.data.Subset(cast(Any, self._dataset), chosen.tolist())
        return Streamed(some, device=self._device, dtype=self._dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Streamed:
        """Return the same samples for a device and a type; `self` if both are as wanted."""
        there = (self._device, self._dtype) == (device, dtype)
        return self if there else Streamed(self._dataset, device=device, dtype=dtype)

    def _read(self, indices: Sequence[Tensor], seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        if isinstance(self._dataset, Split):
            return self._dataset.batches(indices)
        self._plan[:] = [[(index, seed) for index in batch.tolist()] for batch in indices]
        if self._loader is None:
            self._loader = self._build_loader(self._dataset)
        return self._loader

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, self._dtype if values.is_floating_point() else None, non_blocking=True)

    def _build_loader(self, dataset: Dataset) -> DataLoader[Any]:
        readers = _reader_count()
        return DataLoader(
            _Seeded(dataset),
            batch_sampler=cast(Any, self._plan),  # the loader reads the plan at the beginning of each pass
            num_workers=readers,
            persistent_workers=readers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # without one each pass draws from torch's global random state
            worker_init_fn=_leave_signals_to_the_parent,
            multiprocessing_context=multiprocessing.get_context("fork") if readers else None,
        )


class _Seeded(torch.utils.data.Dataset[Any]):
    """A data set in which each sample draws its random numbers from a seed of its own."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any]:
        index, seed = key
        return _read(self._dataset, index, seed=derive_seed(seed, "sample", index))[0]


def to_device(workload: Workload, *, device: torch.device, dtype: torch.dtype, free: int | None = None) -> Workload:
    """Return a workload whose splits are `Samples` on a device: moved there if they fit, else read batch by batch.

    A workload that is on the device already, in `dtype`, is returned as it is. A split that is read batch by batch
    stays so, whatever is free.

    Args:
        workload: Splits are in memory, data sets, or `Streamed`.
        device: Where trials train.
        dtype: Type of floating-point data on the device.
        free: Bytes that the data may take on the device; None: a quarter of the free memory.

    Raises:
        DataError: A data set raised.
    """
    moving = {name: split for name, split in _splits(workload).items() if not _is_on(split, device, dtype)}
    if not moving:
        return workload
    free = int(MEMORY_SHARE * free_memory(device)) if free is None else free
    moved: dict[str, Any] = {}
    for name, split in moving.items():
        try:
            moved[name], taken = _moved(split, device=device, dtype=dtype, free=free)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        free -= taken
    return dataclasses.replace(workload, **moved)


def is_streamed(workload: Workload) -> bool:
    """Say whether training data are read batch by batch."""
    return isinstance(workload.train, Streamed)


def training_batches(
    workload: Workload, config: TrialConfig, *, epoch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch, counted from 0, as the model sees them; they depend on seed and epoch alone."""
    order = epoch_order(len(workload.train), seed=config.seed, epoch=epoch)
    seed = derive_seed(config.seed, "samples", epoch)
    batches = samples_of(workload, "train").batches(order.split(config.batch_size), seed=seed)
    for step, (inputs, targets) in enumerate(batches):
        if workload.augment is not None:
            inputs = augmented(workload, inputs, seed=derive_seed(config.seed, "augment", epoch, step))
        yield _laid_out(model_inputs(workload, inputs, dtype), config), targets


def evaluation_batches(
    workload: Workload, name: str, config: TrialConfig, *, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a split in order, as the model sees them."""
    split = samples_of(workload, name)
    batches = torch.arange(len(split)).split(evaluation_batch_size(split, config))
    for inputs, targets in split.batches(batches, seed=derive_seed(config.seed, name)):
        yield _laid_out(model_inputs(workload, inputs, dtype), config), targets


def _laid_out(inputs: Tensor, config: TrialConfig) -> Tensor:
    """Return a batch in the memory layout of a config."""
    images = config.channels_last and inputs.ndim == 4
    return inputs.contiguous(memory_format=torch.channels_last) if images else inputs


def evaluation_batch_size(split: Samples, config: TrialConfig) -> int:
    """Return how many samples of a split are evaluated at once."""
    return max(config.batch_size, min(MAX_EVAL_BATCH, MAX_EVAL_NUMBERS // max(1, split.sample_size)))


def augmented(workload: Workload, inputs: Tensor, *, seed: int) -> Tensor:
    """Return a batch as `augment` changes it, with every random state seeded that `augment` may draw from.

    Raises:
        DataError: `augment` raised.
    """
    assert workload.augment is not None
    generator = torch.Generator(inputs.device).manual_seed(seed)
    with _seeded(seed, inputs.device):
        changed: Tensor = _call("augment", workload.augment, inputs, generator)
        return changed


def model_inputs(workload: Workload, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the model's input for a batch.

    Raises:
        DataError: `preprocess` raised.
    """
    inputs = inputs if workload.preprocess is None else _call("preprocess", workload.preprocess, inputs)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def samples_of(workload: Workload, name: str) -> Samples:
    """Return a split of a workload that `to_device` returned."""
    return cast(Samples, getattr(workload, name))


def first_samples(samples: Samples, count: int) -> Split:
    """Return the first samples of a split."""
    ((inputs, targets),) = samples.batches([torch.arange(min(count, len(samples)))], seed=0)
    return Split(inputs, targets)


def some_samples(samples: Samples, count: int, *, seed: int) -> Any:
    """Return `count` samples of a split, chosen at random, or all samples if there are fewer."""
    return samples if count >= len(samples) else samples.take(epoch_order(len(samples), seed=seed, epoch=0)[:count])


def epoch_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order (sample,) in which an epoch visits the training data; it depends on seed and epoch alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def _splits(workload: Workload) -> dict[str, Split | Streamed | Dataset]:
    splits = {"train": workload.train, "val": workload.val, "test": workload.test}
    return {name: split for name, split in splits.items() if split is not None}


def _is_on(split: Split | Streamed | Dataset, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a split's batches are on a device already, floating-point values in `dtype`."""
    if isinstance(split, Streamed):
        return split.to(device, dtype) is split
    return isinstance(split, Split) and all(
        tensor.device == device and (tensor.dtype == dtype or not tensor.is_floating_point())
        for tensor in (split.inputs, split.targets)
    )


def _moved(
    split: Split | Streamed | Dataset, *, device: torch.device, dtype: torch.dtype, free: int
) -> tuple[Samples, int]:
    """Return a split's samples on a device, and the bytes that they newly take there."""
    if isinstance(split, Streamed):
        return split.to(device, dtype), 0
    streamed = Streamed(split, device=device, dtype=dtype)
    if isinstance(split, Split):
        size = 0 if split.inputs.device == device else split.inputs.nbytes + split.targets.nbytes
        return (split.to(device, dtype), size) if size <= free else (streamed, 0)
    inputs, targets = default_collate([_read(split, 0, seed=0)[0]])
    size = len(split) * (inputs.nbytes + targets.nbytes)
    if size > free or _draws_at_random(split):
        return streamed, 0
    batches = list(streamed.batches(torch.arange(len(split)).split(MAX_READERS), seed=0))
    return Split(torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])), size


def _read(dataset: Dataset, index: int, *, seed: int) -> tuple[tuple[Any, Any], bool]:
    """Return a sample, and whether reading it drew from a global random state.

    Raises:
        DataError: The data set raised, or returned something other than (input, target).
    """
    with _seeded(seed):
        before = _random_states()
        sample = _call(f"sample {index}", dataset.__getitem__, index)
        drew = _random_states() != before
    if not (isinstance(sample, tuple | list) and len(sample) == 2):
        raise DataError(f"sample {index} must be (input, target), got {type(sample).__name__}")
    if wrong := [
        type(part).__name__ for part in sample if not isinstance(part, Tensor | np.ndarray | np.generic | int | float)
    ]:
        raise DataError(f"sample {index} must hold tensors, arrays or numbers, got {wrong[0]}")
    return (sample[0], sample[1]), drew


def _random_states() -> tuple[bytes, Any, str]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())


def _draws_at_random(dataset: Dataset) -> bool:
    """Say whether a data set draws random numbers: a global random state moved, or a sample differs between seeds."""
    for index in range(min(SAMPLES_READ_TWICE, len(dataset))):
        (one, drew), (other, _) = (_read(dataset, index, seed=seed) for seed in (0, 1))
        if drew or any(not torch.equal(*default_collate([a, b])) for a, b in zip(one, other, strict=True)):
            return True
    return False


def seed_global(seed: int, device: torch.device) -> None:
    """Seed torch's global random states of the CPU and a device.

    `torch.manual_seed` also seeds kinds of devices that are absent, and records a traceback for each, which takes
    0.3 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the random states of torch, Python and NumPy inside the block, and restore them after it."""
    device = device or torch.device("cpu")
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_global(seed, device)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _next(reader: Iterator[Any]) -> Any:
    """Return the next batch, or None at the end.

    Raises:
        DataError: Reading the batch raised, here or in a reader process.
    """
    try:
        return next(reader, None)
    except torch.OutOfMemoryError:
        raise
    except DataError as error:  # from a reader process the message is a whole traceback
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("pipeline.errors.DataError: ")) from None
    except Exception as error:
        raise DataError(f"reading a batch raised {_what(error)}") from error


def _call(who: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (DataError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(f"{who} raised {_what(error)}") from error


def _what(error: Exception) -> str:
    """Return an error in one line; for an error of a reader process, that of the process."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Caught ") else f"{type(error).__name__}: {lines[0]}"


def _leave_signals_to_the_parent(reader: int) -> None:
    """Ignore signals in a reader process: some reach every process of a search, and the search ends its epoch first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # SIGTERM is blocked since the process started
    threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    """End this process at a SIGTERM from the parent, which waits for the process; ignore SIGTERM from others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _reader_count() -> int:
    """Return how many processes read samples; 0 if the system cannot fork, as only a fork can have any data set."""
    if "fork" not in multiprocessing.get_all_start_methods() or os.uname().sysname != "Linux":
        return 0
    return min(MAX_READERS, len(os.sched_getaffinity(0)))


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
