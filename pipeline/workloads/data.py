"""Supply batches while trials train, from data that were moved to the device once or are read batch by batch.

Both ways give the same batches. The random numbers of a sample or an augmentation are a function of the seed, the epoch
and the sample or step. They are therefore equal for every trial, in any order, with any number of reader processes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.workloads.loop import Loop
from pipeline.workloads.random_state import random_states_kept, seeded
from pipeline.workloads.streamed import MAX_READERS, Streamed, checked_call, draws_at_random, read_sample, stacked
from pipeline.workloads.trees import concatenate, described, leaves, map_leaves, map_tensors, tensors
from pipeline.workloads.workload import Batch, Dataset, Samples, Split, Workload, move

MEMORY_SHARE = 0.25
"""The part of the free memory that data may take to be kept on the device."""
MAX_EVAL_BATCH, MAX_EVAL_NUMBERS = 1024, 1 << 20
"""Most samples per forward pass of an evaluation, and most numbers in their inputs or their outputs."""


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
        DataError: A data set raised, or a sample differs when it is read again from the same seed.
    """
    moved: dict[str, Any] = {}
    if (loss := on_device(workload.loss, device, dtype)) is not workload.loss:
        moved["loss"] = loss
    for name, metric in workload.metrics.items():
        if (function := on_device(metric.function, device, dtype)) is not metric.function:
            metrics = moved.setdefault("metrics", dict(workload.metrics))
            metrics[name] = dataclasses.replace(metric, function=function)
    moving = {name: split for name, split in _splits(workload).items() if not _is_on(split, device, dtype)}
    if moving:
        free = int(MEMORY_SHARE * free_memory(device)) if free is None else free
    elif not moved:
        return workload
    for name, split in moving.items():
        try:
            moved[name], taken = _moved(split, workload.collate, device=device, dtype=dtype, free=cast(int, free))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        free = cast(int, free) - taken
    return dataclasses.replace(workload, **moved)


def is_streamed(workload: Workload | Loop) -> bool:
    """Say whether training data are read batch by batch; a loop reads its own."""
    return isinstance(workload, Workload) and isinstance(workload.train, Streamed)


def training_batches(
    workload: Workload, config: TrialConfig, *, epoch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Batch]:
    """Yield the batches of an epoch, counted from 0, as the model sees them; they depend on seed and epoch alone.

    Raises:
        DataError: A function of the workload raised, or see `epoch_order`.
    """
    order = epoch_order(workload, seed=config.seed, epoch=epoch)
    seed = derive_seed(config.seed, "samples", epoch)
    for step, batch in enumerate(samples_of(workload, "train").batches(order.split(config.batch_size), seed=seed)):
        if workload.augment is not None:
            batch = augmented(workload, batch, seed=derive_seed(config.seed, "augment", epoch, step))
        seed_of_step = derive_seed(config.seed, "preprocess", epoch, step)
        yield model_batch(workload, batch, dtype, channels_last=config.channels_last, seed=seed_of_step)


def evaluation_batches(
    workload: Workload, name: str, config: TrialConfig, *, dtype: torch.dtype, output_size: int = 0
) -> Iterator[Batch]:
    """Yield the batches of a split in order, as the model sees them; see `evaluation_batch_size`."""
    split = samples_of(workload, name)
    batches = torch.arange(len(split)).split(evaluation_batch_size(split, config, output_size=output_size))
    for number, batch in enumerate(split.batches(batches, seed=derive_seed(config.seed, name))):
        seed = derive_seed(config.seed, "preprocess", name, number)
        yield model_batch(workload, batch, dtype, channels_last=config.channels_last, seed=seed)


def evaluation_batch_size(split: Samples, config: TrialConfig, *, output_size: int = 0) -> int:
    """Return how many samples of a split are evaluated at once.

    Args:
        split: Its samples.
        config: At least its `batch_size` is evaluated at once.
        output_size: The count of numbers in the outputs for one sample.
    """
    largest = max(1, split.sample_size, output_size)
    return max(config.batch_size, min(MAX_EVAL_BATCH, MAX_EVAL_NUMBERS // largest))


def augmented(workload: Workload, batch: Batch, *, seed: int) -> Batch:
    """Return a batch as `augment` changes it, with every random state seeded that `augment` may draw from.

    Raises:
        DataError: `augment` raised, returned something else than (inputs, targets) where it takes both, or returned
            another number of samples than it got; with `collate` this number is not known.
    """
    assert workload.augment is not None
    device = device_of(batch)
    generator = torch.Generator(device).manual_seed(seed)
    with seeded(seed, device):
        if augments_targets(workload.augment):
            changed = checked_call("augment", workload.augment, batch.inputs, batch.targets, generator)
        else:
            changed = checked_call("augment", workload.augment, batch.inputs, generator), batch.targets
    if not (isinstance(changed, tuple) and len(changed) == 2):
        raise DataError(f"augment takes targets too, so it must return (inputs, targets), got {described(changed)}")
    inputs, targets = changed
    for tensor in tensors(inputs)[:1]:
        if workload.collate is None and tensor.shape[:1] != (batch.size,):
            got = f"augment must return as many samples as it is given, {batch.size}, got {described(inputs)}"
            raise DataError(f"{got}; change samples in place of leaving some out")
    return Batch(inputs, targets, batch.size)


def augments_targets(augment: Callable[..., Any]) -> bool:
    """Say whether `augment` takes (inputs, targets, generator) rather than (inputs, generator)."""
    try:
        parameters = inspect.signature(augment).parameters.values()
    except (TypeError, ValueError):  # a function of C has no signature
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 3


def device_of(batch: Batch) -> torch.device:
    """Return the device of a batch."""
    return next((tensor.device for tensor in tensors(batch.both)), torch.device("cpu"))


def model_batch(
    workload: Workload, batch: Batch, dtype: torch.dtype, *, channels_last: bool = False, seed: int = 0
) -> Batch:
    """Return a batch with the inputs that the model takes; without targets the loss gets these inputs too.

    Args:
        workload: Supplies `preprocess`.
        batch: As the data has it.
        dtype: Type of floating-point inputs.
        channels_last: Whether images are laid out with the channels last.
        seed: Decides what `preprocess` draws from torch's global random state.

    Raises:
        DataError: `preprocess` raised.
    """
    inputs = batch.inputs
    if workload.preprocess is not None:
        with seeded(seed, device_of(batch), kinds=("torch",)):
            inputs = checked_call("preprocess", workload.preprocess, inputs)

    def laid_out(values: Tensor) -> Tensor:
        values = values.to(dtype) if values.is_floating_point() else values
        images = channels_last and values.ndim == 4
        return values.contiguous(memory_format=torch.channels_last) if images else values

    inputs = map_tensors(laid_out, inputs)
    return Batch(inputs, inputs if batch.targets is None else batch.targets, batch.size)


def samples_of(workload: Workload, name: str) -> Samples:
    """Return a split of a workload that `to_device` returned."""
    return cast(Samples, getattr(workload, name))


def first_batch(samples: Samples, count: int) -> Batch:
    """Return the first samples of a split, as the data has them."""
    return next(iter(samples.batches([torch.arange(min(count, len(samples)))], seed=0)))


def with_fewer_samples(workload: Workload, *, train: int, val: int, seed: int | None = None) -> Workload:
    """Return a workload with some samples of each split, and without a test split.

    Args:
        workload: Was moved by `to_device`.
        train: Most training samples, of the first epoch's order if the workload has an order.
        val: Most validation samples.
        seed: Decides which samples; None: the first.
    """
    chosen = {}
    for name, count in (("train", train), ("val", val)):
        samples = samples_of(workload, name)
        order = torch.arange(len(samples)) if seed is None else _shuffled(len(samples), seed=seed, epoch=0)
        if name == "train" and workload.order is not None:
            order = epoch_order(workload, seed=seed or 0, epoch=0)
        chosen[name] = samples if workload.order is None and count >= len(samples) else samples.take(order[:count])
    in_order = None if workload.order is None else lambda epoch, generator: torch.arange(len(chosen["train"]))
    return dataclasses.replace(workload, **cast(Any, chosen), test=None, order=in_order)


def epoch_length(workload: Workload, seed: int) -> int:
    """Return the number of samples that an epoch trains on."""
    return len(workload.train) if workload.order is None else len(epoch_order(workload, seed=seed, epoch=0))


def epoch_order(workload: Workload, *, seed: int, epoch: int) -> Tensor:
    """Return the order (sample,) in which an epoch visits the training data; it depends on seed and epoch alone.

    Raises:
        DataError: The workload's `order` raised, gave something other than indices of samples, or another number of
            indices than for epoch 0.
    """
    if workload.order is None:
        return _shuffled(len(workload.train), seed=seed, epoch=epoch)
    order_seed = derive_seed(seed, "order", epoch)
    with seeded(order_seed):
        given = checked_call("order", workload.order, epoch, torch.Generator().manual_seed(order_seed))
        order: Tensor = checked_call("order", _indices, given)
    if order.ndim != 1 or not len(order) or order.is_floating_point() or order.dtype == torch.bool:
        got = f"{described(order)} {order.dtype}" if order.numel() else "none"
        raise DataError(f"order must return the indices of at least one sample, got {got}")
    if int(order.min()) < 0 or int(order.max()) >= len(workload.train):
        least, most = int(order.min()), int(order.max())
        raise DataError(f"order must return indices from 0 to {len(workload.train) - 1}, got {least} to {most}")
    if epoch > 0 and len(order) != (first := epoch_length(workload, seed)):
        raise DataError(
            f"order must give as many indices in each epoch, got {first} and, in epoch {epoch}, {len(order)}"
        )
    return order.long()


def _indices(given: Any) -> Tensor:
    return torch.as_tensor(given if isinstance(given, Tensor | np.ndarray) else list(given)).cpu()


def _shuffled(samples: int, *, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def on_device(function: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a loss or a metric with its tensors on a device: a module, or arguments bound by `functools.partial`."""
    if isinstance(function, functools.partial):
        inner = on_device(function.func, device, dtype)
        bound = map_leaves(lambda leaf: on_device(leaf, device, dtype), (function.args, function.keywords))
        same = inner is function.func and all(
            a is b for a, b in zip(leaves(bound), leaves((function.args, function.keywords)), strict=True)
        )
        return function if same else functools.partial(inner, *bound[0], **bound[1])
    if isinstance(function, Tensor):
        return move(function, device=device, dtype=dtype)
    if not isinstance(function, nn.Module) or _is_module_on(function, device, dtype):
        return function
    return copy.deepcopy(function)._apply(functools.partial(move, device=device, dtype=dtype))


def _is_module_on(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a module is on a device; a metric of torchmetrics has no buffers, and says where it is."""
    said = [getattr(part, "device", None) for part in module.modules()]
    return all(not isinstance(place, torch.device) or place == device for place in said) and all(
        move(tensor, device=device, dtype=dtype) is tensor for tensor in (*module.parameters(), *module.buffers())
    )


def _splits(workload: Workload) -> dict[str, Split | Streamed | Dataset]:
    splits = {"train": workload.train, "val": workload.val, "test": workload.test}
    return {name: split for name, split in splits.items() if split is not None}


def _is_on(split: Split | Streamed | Dataset, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a split's batches are on a device already, floating-point values in `dtype`."""
    if isinstance(split, Streamed):
        return split.to(device, dtype) is split
    held = tensors((split.inputs, split.targets)) if isinstance(split, Split) else []
    return bool(held) and all(move(tensor, device=device, dtype=dtype) is tensor for tensor in held)


def _moved(
    split: Split | Streamed | Dataset,
    collate: Callable[[list[Any]], Any] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    free: int,
) -> tuple[Samples, int]:
    """Return a split's samples on a device, and the bytes that they newly take there."""
    if isinstance(split, Streamed):
        return split.to(device, dtype), 0
    streamed = Streamed(split, device=device, dtype=dtype, collate=None if isinstance(split, Split) else collate)
    if isinstance(split, Split):
        size = 0 if device_of(Batch(split.inputs, split.targets, len(split))) == device else split.nbytes
        return (split.to(device, dtype), size) if size <= free else (streamed, 0)
    draws = draws_at_random(split)
    if draws or collate is not None:
        return streamed, 0
    with random_states_kept():
        size = len(split) * sum(tensor.nbytes for tensor in tensors(stacked([read_sample(split, 0, seed=0)], [0]).both))
    if size > free:
        return streamed, 0
    batches = list(streamed.batches(torch.arange(len(split)).split(MAX_READERS), seed=0))
    inputs, targets = (concatenate(parts) for parts in zip(*(batch.both for batch in batches), strict=True))
    return Split(inputs, targets), size


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
