"""The probe: find out whether trials of a workload can train as rows, by comparing both trainers on a few samples."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import DataError, InvalidInput, Problem, first_line
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD
from pipeline.space.schedules import Constant
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import copied
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.build import built_model, run_model
from pipeline.workloads.data import first_batch, model_batch, samples_of, to_device, with_fewer_samples
from pipeline.workloads.random_state import KINDS, random_states, random_states_kept, seeded
from pipeline.workloads.streamed import Streamed
from pipeline.workloads.trees import tensors
from pipeline.workloads.workload import Batch, Workload

PARAMETER_COPIES = 6
"""Copies of the parameters per training trial: value, gradient, two optimizer states, two temporaries."""
SAMPLES, BATCH = 32, 16
BASE_LRS = {0: 0.01, 1: 0.02}
"""Trial number to `base_lr`: two rows that differ."""
MAX_STEP_FLOPS = 64e6
"""Largest training step of a trial that trains as a row on a CPU. Rows save the time of Python, about half a
millisecond per step; larger products are slower in parallel than alone (benchmarks/NOTES.md)."""
TOLERANCE = {"fp64": 0.01, "fp32": 0.01, "tf32": 0.05, "bf16": 0.25}
"""Precision to the largest difference of a parameter, as a fraction of the parameters' largest change; the same for
buffers and losses. Over two steps, float32 rounding makes a difference below 0.001, also after BatchNorm over few
samples; bfloat16 rounding below 0.1; a wrong step about 1."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of probing a workload."""

    plain_because: str | None = None
    """Why the trials train plain; None if the trials are rows."""
    draws: frozenset[str]
    """The libraries that the model or the loss draws random numbers from, as dropout does; of `random_state.KINDS`."""
    unsaved: str | None
    """What of the model's state is neither parameter nor buffer, and so in no checkpoint; None if nothing is."""
    output_size: int
    """The count of numbers in the model's outputs for one sample."""
    trial_bytes: int
    """Approximate memory of a trial in a training step, in bytes; 0: not known."""


def probe(workload: Workload, config: TrialConfig, *, device: torch.device, dtype: torch.dtype) -> Finding:
    """Train two trials for two steps as rows and plain, every parameter that is not frozen at the same rate.

    An error shows a model that `torch.func.vmap` cannot compute; a different result shows one that `vmap` computes
    wrongly.

    Raises:
        InvalidInput: The plain trials fail, or the samples cannot be read.
    """
    try:
        return _find(workload, config, device, dtype)
    except DataError as error:
        raise InvalidInput("workload", [Problem("workload", str(error))]) from error


def _find(workload: Workload, config: TrialConfig, device: torch.device, dtype: torch.dtype) -> Finding:
    tolerance = TOLERANCE[config.precision]
    workload = to_device(workload, device=device, dtype=dtype)
    small = _with_samples(workload, SAMPLES)
    configs = _configs(dataclasses.replace(config, batch_size=min(config.batch_size, BATCH)))
    with random_states_kept(device=device):
        finding = _measure_step(small, config, device, dtype)
        plain = _train(PlainTrials, configs, small, device, dtype)
        for metrics in plain.metrics.values():
            if metrics.failed:
                message = f"training on a few samples raised {metrics.failed}"
                raise InvalidInput("workload", [Problem("workload", message)])
            if metrics.diverged:
                return _cannot_fuse(finding, f"it could not be tried, {metrics.diverged}")
        if finding.plain_because:
            return finding
        try:
            fused = _train(FusedTrials, configs, small, device, dtype)
            same = _same(fused, plain, tolerance)
            if not same and dtype != torch.float64:
                # After many layers such as ReLU, rounding in float32 alone may exceed the tolerance, in float64 not.
                fused, plain = (
                    _train(cls, configs, small, device, torch.float64) for cls in (FusedTrials, PlainTrials)
                )
                same = _same(fused, plain, tolerance)
        except (Exception, SystemExit) as error:  # a model may raise anything
            return _cannot_fuse(finding, _missing_vmap_rule(error) or f"{type(error).__name__}, {first_line(error)}")
        return finding if same else _cannot_fuse(finding, "as rows it trains to other numbers")


def _cannot_fuse(finding: Finding, why: str) -> Finding:
    return dataclasses.replace(finding, plain_because=f"the model cannot be rows of a matrix: {why}")


def _missing_vmap_rule(error: BaseException) -> str | None:
    """Return which operation `torch.func.vmap` has no rule for; None if the error has another cause."""
    missing = re.match(r"Batching rule not implemented for aten::(\w+)", str(error))
    return f"PyTorch's vmap has no rule for {missing[1]}" if missing else None


@dataclass(frozen=True)
class _Trained:
    """The result of training some trials for an epoch."""

    start: Mapping[str, Tensor]
    """Initial model state, the same for every trial."""
    parameters: frozenset[str]
    """Names of the parameters in a model state; the others are buffers."""
    metrics: Mapping[int, EpochMetrics]
    states: Mapping[int, Mapping[str, Tensor]]
    """Model state of each trial that finished the epoch."""


def _train(
    cls: type[FusedTrials | PlainTrials],
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
) -> _Trained:
    group = cls(configs, workload, device=device, dtype=dtype)
    start, metrics = group.model_state(0), group.train_epoch()
    names = frozenset(name for name, _ in built_model(workload, seed=0, device=device, dtype=dtype).named_parameters())
    return _Trained(start, names, metrics, {n: group.model_state(n) for n, epoch in metrics.items() if epoch.finished})


def _same(fused: _Trained, plain: _Trained, tolerance: float) -> bool:
    """Return whether rows and plain trials trained to the same numbers within the tolerance."""
    return all(
        _same_losses(fused.metrics[number], plain.metrics[number], tolerance)
        and _same_states(fused.states[number], plain.states[number], plain.start, names, tolerance)
        for number in BASE_LRS
        for names in (plain.parameters, plain.start.keys() - plain.parameters)
    )


def _configs(config: TrialConfig) -> dict[int, TrialConfig]:
    """Return two trials with different rates that freeze the groups that a config freezes; every other ratio is 1."""
    groups = {
        name: dataclasses.replace(group, lr_ratio=float(group.lr_ratio != 0))
        for name, group in config.param_groups.items()
    }
    optimizers = {number: SGD(base_lr=base_lr) for number, base_lr in BASE_LRS.items()}
    return {
        number: dataclasses.replace(config, optimizer=optimizer, scheduler=Constant(), param_groups=groups)
        for number, optimizer in optimizers.items()
    }


def _with_samples(workload: Workload, count: int) -> Workload:
    """Return a workload with `count` samples of each split, read by this process."""
    small = with_fewer_samples(workload, train=count, val=count)
    splits = {"train": small.train, "val": small.val}
    here = {name: split.read_here() for name, split in splits.items() if isinstance(split, Streamed)}
    return dataclasses.replace(small, **here)  # type: ignore[arg-type]


def _measure_step(workload: Workload, config: TrialConfig, device: torch.device, dtype: torch.dtype) -> Finding:
    """Measure a training step: random numbers, state, memory and FLOPs; see `Finding`."""
    batch = model_batch(workload, first_batch(samples_of(workload, "train"), BATCH), dtype)
    model = built_model(workload, seed=config.seed, device=device, dtype=dtype)
    saved, counter, numbers = _SavedTensors(model), FlopCounterMode(display=False), _RandomNumbersRead()
    state = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    attributes = _plain_attributes(model)
    versions = {name: parameter._version for name, parameter in model.named_parameters()}  # counts in-place writes
    draws, written, unsaved, chance, output_size = frozenset(KINDS), None, None, None, 0
    with contextlib.suppress(Exception, SystemExit):
        with seeded(0, device):
            before = random_states(device)
            with saved, counter, numbers:
                outputs = run_model(model.train(), copied(batch).inputs)
                workload.loss(outputs, batch.targets)
            held, changed = _held_state(model), _changed(attributes, _plain_attributes(model))
            with torch.no_grad():
                evaluated = run_model(model.eval(), copied(batch).inputs)
            after = random_states(device)
        output_size = sum(tensor.numel() for tensor in tensors(evaluated)) // batch.size
        draws = frozenset(kind for kind in KINDS if before[kind] != after[kind])
        written = next((name for name, p in model.named_parameters() if p._version != versions[name]), None)
        repeats = _repeats(model, batch, state, outputs, device)
        if name := changed or _changed(held, _held_state(model)):
            unsaved = f"{name} changes in training and is no buffer"
        elif not repeats:
            unsaved = "state is more than parameters and buffers"
        chance = _chance(draws, reads=numbers.found)
    steps = config.batch_size / batch.size
    flops = 3 * counter.get_total_flops() * steps  # the backward pass takes twice as many as the forward pass
    copies = PARAMETER_COPIES + (config.accumulate > 1) + (config.ema is not None)
    finding = Finding(
        draws=draws,
        unsaved=unsaved,
        output_size=output_size,
        trial_bytes=int(saved.bytes * steps) + copies * sum(p.nbytes for p in model.parameters()),
    )
    if unsaved:
        return _cannot_fuse(finding, f"its {unsaved}, and a trial that is resumed begins anew")
    if chance:
        return _cannot_fuse(finding, chance)
    if written:
        return _cannot_fuse(finding, f"its parameter {written} changes in a forward pass")
    if device.type == "cpu" and flops > MAX_STEP_FLOPS:
        why = f"a step of {flops / 1e9:.2g} GFLOP gains nothing as a row on a CPU"
        return dataclasses.replace(finding, plain_because=why)
    return finding


def _chance(draws: Container[str], *, reads: bool) -> str | None:
    """Return which random numbers may choose what a step computes, as in layer drop; None if none do.

    A parameter that a step leaves out is skipped by PyTorch's optimizers, which a row cannot do, and the few steps of
    the probe may have left out none.

    Args:
        draws: The libraries that the model or the loss draws from.
        reads: Whether Python has read a random number from a tensor.
    """
    for kind, library in (("python", "Python"), ("numpy", "NumPy")):
        if kind in draws:
            return f"random numbers of {library} may choose what a step computes"
    return "a random number that Python reads may choose what a step computes" if reads else None


def _repeats(model: nn.Module, batch: Batch, state: Sequence[Tensor], outputs: Any, device: torch.device) -> bool:
    """Return whether a model that has seen a batch computes the same outputs again, with its first `state`.

    If not, state remains in the model: a hidden state, a list, a random generator of its own.
    """
    with torch.no_grad():
        for tensor, value in zip((*model.parameters(), *model.buffers()), state, strict=True):
            tensor.copy_(value)
    with seeded(0, device):
        again = run_model(model.train(), copied(batch).inputs)
    pairs = zip(tensors(outputs), tensors(again), strict=True)
    return all(torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True) for one, other in pairs)


def _plain_attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and name != "training"
    }


def _held_state(model: nn.Module) -> dict[str, Any]:
    """Return what a model's attributes hold besides parameters and buffers, to be compared."""
    registered = ("_parameters", "_buffers", "_modules", "training")
    return {
        f"{prefix}.{name}".lstrip("."): _comparable(value)
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in registered
    }


def _comparable(value: Any) -> Any:
    """Return a value that is equal as long as a list, a dict, a tensor or a generator holds the same."""
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return tuple(value.shape), hash(held.numpy().tobytes())
    if isinstance(value, torch.Generator):
        return _comparable(value.get_state())
    if isinstance(value, Mapping):
        return [(str(key), _comparable(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [_comparable(item) for item in value]
    return value if isinstance(value, int | float | str) else None


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the name of a value that differs."""
    return next((name for name, value in after.items() if before.get(name) != value), None)


def _same_losses(fused: EpochMetrics, plain: EpochMetrics, tolerance: float) -> bool:
    return all(
        math.isclose(fused.metrics[name], plain.metrics[name], rel_tol=tolerance, abs_tol=tolerance)
        for name in ("train/loss", "val/loss")
    )


def _same_states(
    fused: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    names: Container[str],
    tolerance: float,
) -> bool:
    """Return whether parameters, or buffers, differ by at most `tolerance` times their largest change."""
    saved = [name for name in plain if name in names]
    floats = [name for name in saved if plain[name].is_floating_point()]
    moved = max((_largest_difference(plain[name], start[name]) for name in floats), default=0.0)
    apart = max((_largest_difference(plain[name], fused[name]) for name in floats), default=0.0)
    counts = all(torch.equal(plain[name], fused[name]) for name in saved if name not in floats)
    return counts and apart <= tolerance * moved


def _largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; equal infinities, as a causal mask holds them, do not differ."""
    differences = torch.where(one == other, 0.0, (one - other).abs())
    return float(differences.max()) if differences.numel() else 0.0


class _RandomNumbersRead(TorchDispatchMode):
    """A context that notes whether Python reads a random number from a tensor, as `if torch.rand(()) < 0.5` does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False
        self._random: dict[int, Tensor] = {}
        """Tensors that depend on random numbers, by their identity."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        inputs = tensors((args, kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags or any(id(tensor) in self._random for tensor in inputs):
            self.found = self.found or func is torch.ops.aten._local_scalar_dense.default
            self._random |= {id(tensor): tensor for tensor in tensors(value)}
        return value


class _SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts the bytes that a forward pass saves for the backward pass, without the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._sizes: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes saved so far."""
        return sum(self._sizes.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
