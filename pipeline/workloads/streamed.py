"""Read samples from a data set batch by batch, with reader processes where the system can fork."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from pipeline.errors import DataError
from pipeline.files.signals import signals_blocked
from pipeline.space.config import derive_seed
from pipeline.workloads.random_state import random_states, seeded
from pipeline.workloads.workload import Dataset, Split

MAX_READERS = 8
"""Processes that read one data set."""
SAMPLES_READ_TWICE = 16
"""Samples that show whether a data set draws at random."""


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
        ((inputs, _),) = self.batches([torch.arange(1)], seed=0)
        return inputs.numel()

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
        return read_sample(self._dataset, index, seed=derive_seed(seed, "sample", index))[0]


def read_sample(dataset: Dataset, index: int, *, seed: int) -> tuple[tuple[Any, Any], bool]:
    """Return a sample, and whether reading it drew from a global random state.

    Raises:
        DataError: The data set raised, or returned something other than (input, target).
    """
    with seeded(seed):
        before = random_states()
        sample = checked_call(f"sample {index}", dataset.__getitem__, index)
        drew = random_states() != before
    if not (isinstance(sample, tuple | list) and len(sample) == 2):
        raise DataError(f"sample {index} must be (input, target), got {type(sample).__name__}")
    if wrong := [
        type(part).__name__ for part in sample if not isinstance(part, Tensor | np.ndarray | np.generic | int | float)
    ]:
        raise DataError(f"sample {index} must hold tensors, arrays or numbers, got {wrong[0]}")
    return (sample[0], sample[1]), drew


def draws_at_random(dataset: Dataset) -> bool:
    """Say whether a data set draws random numbers: a global random state moved, or a sample differs between seeds."""
    for index in range(min(SAMPLES_READ_TWICE, len(dataset))):
        (one, drew), (other, _) = (read_sample(dataset, index, seed=seed) for seed in (0, 1))
        if drew or any(not torch.equal(*default_collate([a, b])) for a, b in zip(one, other, strict=True)):
            return True
    return False


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


def checked_call(who: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the workload.

    Raises:
        DataError: The function raised; the message names `who`.
    """
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
