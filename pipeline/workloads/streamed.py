"""Read samples from a data set batch by batch, with reader processes where the system can fork."""

from __future__ import annotations

import collections
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, default_collate

from pipeline.errors import DataError, first_line
from pipeline.files.signals import signals_blocked
from pipeline.space.config import derive_seed
from pipeline.workloads.random_state import random_states, random_states_kept, seed_host, seeded
from pipeline.workloads.trees import bytes_of, leaves, map_leaves_of, tensors, without_lists
from pipeline.workloads.workload import Batch, Dataset, Split, move, why_unusable

MAX_READERS = 8
"""Processes that read one data set."""
SAMPLES_READ_TWICE = 16
"""Samples, spread over a data set, that show whether the data set draws at random."""
STACKED = (Tensor, np.ndarray, np.generic, int, float)
"""What samples hold that are stacked."""
Key = tuple[int, int, int]
"""A sample's index, how often the epoch has read the sample before, and the epoch's seed."""
DRAW_FROM = "draw from the global random state of torch, Python or NumPy"
"""Remedy for numbers that no seed repeats."""


class Streamed:
    """Samples that are read from a data set batch by batch, by reader processes on Linux.

    Args:
        dataset: Supplies the samples.
        device: Where batches go.
        dtype: Type of floating-point batches on the device.
        collate: Makes a batch of samples; None: they are stacked.
        readers: Most processes that read; None: as many as there are cores.
    """

    def __init__(
        self,
        dataset: Dataset | Split,
        *,
        device: torch.device,
        dtype: torch.dtype,
        collate: Callable[[list[Any]], Any] | None = None,
        readers: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._device = device
        self._dtype = dtype
        self._collate = collate
        self._readers = readers
        self._loader: DataLoader[Any] | None = None
        self._plan: list[list[Key]] = []

    @functools.cached_property
    def sample_size(self) -> int:
        """The count of numbers in the input of one sample."""
        (batch,) = self.batches([torch.arange(1)], seed=0)
        return sum(tensor.numel() for tensor in tensors(batch.inputs))

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, indices: Sequence[Tensor], *, seed: int) -> Iterator[Batch]:
        """Yield batches; see `Samples`."""
        with signals_blocked():  # reader processes start here
            reader = iter(self._read(indices, seed))
        try:
            while (batch := _next(reader)) is not None:
                yield batch.map(functools.partial(move, device=self._device, dtype=self._dtype))
        except DataError:
            if self._loader is not None and self._loader.num_workers:
                self._loader = None
                cast(Any, reader)._shutdown_workers()  # garbage collection would take seconds for each process
            raise

    def take(self, chosen: Tensor) -> Streamed:
        """Return some of the samples; see `Samples`."""
        if isinstance(self._dataset, Split):
            return self._for(self._dataset.take(chosen))
        return self._for(torch.utils.data.Subset(cast(Any, self._dataset), chosen.tolist()))

    def to(self, device: torch.device, dtype: torch.dtype) -> Streamed:
        """Return the same samples for a device and a type; `self` if both are as wanted."""
        there = (self._device, self._dtype) == (device, dtype)
        return self if there else self._for(self._dataset, device=device, dtype=dtype)

    def read_here(self) -> Streamed:
        """Return the same samples, read by this process."""
        return self._for(self._dataset, readers=0)

    def _for(self, dataset: Dataset | Split, **changes: Any) -> Streamed:
        options = {"device": self._device, "dtype": self._dtype, "collate": self._collate, "readers": self._readers}
        return Streamed(dataset, **{**options, **changes})

    def _read(self, indices: Sequence[Tensor], seed: int) -> Iterable[Batch]:
        if isinstance(self._dataset, Split):
            return self._dataset.batches(indices)
        seen: dict[int, Iterator[int]] = collections.defaultdict(itertools.count)
        self._plan[:] = [[(index, next(seen[index]), seed) for index in batch.tolist()] for batch in indices]
        if self._loader is None:
            self._loader = self._build_loader(self._dataset)
        return self._loader

    def _build_loader(self, dataset: Dataset) -> DataLoader[Any]:
        readers = _reader_count() if self._readers is None else self._readers
        return DataLoader(
            _Batches(dataset, self._collate),
            collate_fn=cast(Any, _as_it_is),
            batch_sampler=cast(Any, self._plan),  # the loader reads the plan at the beginning of each pass
            num_workers=readers,
            persistent_workers=readers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # without one each pass draws from torch's global random state
            worker_init_fn=_leave_signals_to_the_parent,
            multiprocessing_context=multiprocessing.get_context("fork") if readers else None,
        )


class _Batches(torch.utils.data.Dataset[Any]):
    """Makes the batches of a data set; each sample draws its random numbers from a seed of its own."""

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Any] | None) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        indices = [index for index, *_ in keys]
        with random_states_kept():
            samples = [read_sample(self._dataset, key[0], seed=_sample_seed(*key)) for key in keys]
            if self._collate is not None:
                return _with_parts(checked_call("collate", self._collate, samples), "collate", len(keys))
        return stacked(samples, indices)


def _sample_seed(index: int, repeat: int, seed: int) -> int:
    """Return the seed of a sample; each repeat in an epoch has another."""
    return derive_seed(seed, "sample", index, *([repeat] if repeat else []))


def read_sample(dataset: Dataset, index: int, *, seed: int) -> Any:
    """Return a sample that draws from a seed; the random states change.

    Raises:
        DataError: The data set raised.
    """
    seed_host(seed)
    return checked_call(f"sample {index}", dataset.__getitem__, index)


def stacked(samples: Sequence[Any], indices: Sequence[int]) -> Batch:
    """Return a batch of samples of the same form.

    Args:
        samples: What the data set returned; lists are taken as tuples.
        indices: Their numbers, for messages.

    Raises:
        DataError: A sample holds something other than tensors, arrays and numbers, or samples differ in form or shape.
    """
    try:
        parts = without_lists(map_leaves_of(functools.partial(_stacked_leaves, indices=indices), samples))
    except (TypeError, ValueError, RuntimeError) as error:
        some = ", ".join(map(str, indices[:3])) + (", …" if len(indices) > 3 else "")
        raise DataError(f"samples {some} differ, {first_line(error)}; a `collate` may pad or list them") from None
    return _with_parts(parts, f"sample {indices[0]}", len(samples))


def _stacked_leaves(leaves: Sequence[Any], indices: Sequence[int]) -> Tensor:
    for index, leaf in zip(indices, leaves, strict=True):
        if isinstance(leaf, Tensor) and (why := why_unusable(leaf)):
            raise DataError(f"sample {index} must hold dense tensors, got {why}")
        if not isinstance(leaf, STACKED):
            held = f"sample {index} must hold tensors, arrays or numbers, got {type(leaf).__name__}"
            raise DataError(f"{held}; a `collate` takes anything")
    shapes = list(dict.fromkeys(tuple(np.shape(leaf)) for leaf in leaves))
    if len(shapes) > 1:
        raise ValueError(f"with shapes {shapes[0]} and {shapes[1]}")
    stacked: Tensor = default_collate(list(leaves))
    return stacked


def _with_parts(value: Any, who: str, size: int) -> Batch:
    """Return a batch of (inputs…, targets), or of one tree that is both."""
    if value is None or (isinstance(value, tuple | list) and not len(value)):
        raise DataError(f"{who} must give (inputs…, target), got {'None' if value is None else 'nothing'}")
    if not isinstance(value, tuple | list) or isinstance(value, PackedSequence):
        return Batch(value, None, size)
    *inputs, targets = value
    if not inputs:
        return Batch(targets, None, size)
    return Batch(inputs[0] if len(inputs) == 1 else tuple(inputs), targets, size)


def draws_at_random(dataset: Dataset) -> bool:
    """Say whether a data set draws random numbers: a global random state moved, or a sample differs between seeds.

    Raises:
        DataError: A sample differs when it is read again from the same seed, or see `read_sample`.
    """
    draws = False
    spread = np.linspace(0, len(dataset) - 1, min(SAMPLES_READ_TWICE, len(dataset)), dtype=int)
    for index in spread.tolist():
        with seeded(0):
            before = random_states()
            values = numbers_of(read_sample(dataset, index, seed=0))
            draws = draws or random_states() != before
            if numbers_of(read_sample(dataset, index, seed=0)) != values:
                raise DataError(f"sample {index} differs when it is read again from the same seed; {DRAW_FROM}")
            draws = draws or numbers_of(read_sample(dataset, index, seed=1)) != values
    return draws


def numbers_of(tree: Any) -> list[tuple[tuple[int, ...], bytes]]:
    """Return shape and bytes of each tensor, array and number of a tree, to be compared; other leaves are left out."""
    found = []
    for leaf in leaves(tree):
        if not isinstance(leaf, STACKED):
            continue
        if not isinstance(leaf, Tensor):
            array = np.asarray(leaf)
            found += [] if array.dtype.hasobject else [(array.shape, array.tobytes())]
        elif why_unusable(leaf) is None:
            found.append((tuple(leaf.shape), bytes_of(leaf)))
    return found


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
    except (Exception, SystemExit) as error:
        raise DataError(f"{who} raised {_what(error)}") from error


def _what(error: BaseException) -> str:
    """Return an error in one line; for an error of a reader process, that of the process."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Caught ") else f"{type(error).__name__}: {lines[0]}"


def _as_it_is(batch: Batch) -> Batch:
    return batch


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
