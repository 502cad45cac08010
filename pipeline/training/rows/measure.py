"""Measure a training step: the random numbers that it draws, the state that it leaves, its memory and its FLOPs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import pickle
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import InvalidInput, Problem
from pipeline.space.config import TrialConfig
from pipeline.training.contract import copied
from pipeline.workloads.build import built_model, run_model
from pipeline.workloads.data import first_batch, model_batch, samples_of
from pipeline.workloads.random_state import KINDS, random_states, seeded
from pipeline.workloads.trees import leaves, tensors
from pipeline.workloads.workload import Batch, Workload

PARAMETER_COPIES = 6
"""Copies of the parameters per training trial: value, gradient, two optimizer states, two temporaries."""
BATCH = 16
"""Samples of the step that is measured."""
MAX_STEP_FLOPS = 64e6
"""Largest training step of a trial that trains as a row on a CPU. Rows save the time of Python, about half a
millisecond per step; larger products are slower in parallel than alone (benchmarks/NOTES.md)."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a training step needs, and whether trials can be rows."""

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
    eager_because: str | None = None
    """Why rows train operation by operation on a device that captures steps; None if their steps are captured."""

    def without_rows(self, why: str) -> Finding:
        """Return the finding for a model that cannot be rows."""
        return dataclasses.replace(self, plain_because=f"the model cannot be rows of a matrix: {why}")


def measure_step(workload: Workload, config: TrialConfig, device: torch.device, dtype: torch.dtype) -> Finding:
    """Measure a training step: random numbers, state, memory and FLOPs; see `Finding`.

    Raises:
        InvalidInput: The loss keeps state.
    """
    batch = model_batch(workload, first_batch(samples_of(workload, "train"), BATCH), dtype)
    model = built_model(workload, seed=config.seed, device=device, dtype=dtype)
    saved, counter, numbers = _SavedTensors(model), FlopCounterMode(display=False), _RandomNumbersRead()
    state = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    attributes = _plain_attributes(model)
    versions = {name: parameter._version for name, parameter in model.named_parameters()}  # counts in-place writes
    draws, written, unsaved, chance, output_size = frozenset(KINDS), None, None, None, 0
    eager_because, state_of_loss = None, _comparable(vars(workload.loss) if hasattr(workload.loss, "__dict__") else {})
    loss_repeats = True
    with contextlib.suppress(Exception, SystemExit):
        with seeded(0, device):
            before = random_states(device)
            with saved, counter, numbers:
                outputs = run_model(model.train(), copied(batch).inputs)
                loss = workload.loss(outputs, batch.targets)
            held, changed = _held_state(model), _changed(attributes, _plain_attributes(model))
            with torch.no_grad():
                evaluated = run_model(model.eval(), copied(batch).inputs)
            after = random_states(device)
        output_size = sum(tensor.numel() for tensor in tensors(evaluated)) // batch.size
        draws = frozenset(kind for kind in KINDS if before[kind] != after[kind])
        written = next((name for name, p in model.named_parameters() if p._version != versions[name]), None)
        again, loss_again = _computed_again(model, workload, batch, state, device)
        repeats = _are_close(outputs, again)
        loss_repeats = not repeats or _are_close(loss, loss_again)
        if name := changed or _changed(held, _held_state(model)):
            unsaved = f"{name} changes in training and is no buffer"
        elif not repeats:
            unsaved = "state is more than parameters and buffers"
        chance = _chance(draws, reads=numbers.found)
        eager_because = _why_eager(model, workload, state_of_loss)
    if not loss_repeats:
        message = "the loss keeps state, since it gives another value for the same batch; all trials would share it"
        raise InvalidInput("workload", [Problem("workload", f"{message}; keep it in a buffer of the model")])
    steps = config.batch_size / batch.size
    flops = 3 * counter.get_total_flops() * steps  # the backward pass takes twice as many as the forward pass
    copies = PARAMETER_COPIES + (config.accumulate > 1) + (config.ema is not None)
    finding = Finding(
        draws=draws,
        unsaved=unsaved,
        output_size=output_size,
        eager_because=eager_because,
        trial_bytes=int(saved.bytes * steps) + copies * sum(p.nbytes for p in model.parameters()),
    )
    if unsaved:
        return finding.without_rows(f"its {unsaved}, and a trial that is resumed begins anew")
    if chance:
        return finding.without_rows(chance)
    if written:
        return finding.without_rows(f"its parameter {written} changes in a forward pass")
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


def _why_eager(model: nn.Module, workload: Workload, state_of_loss: Any) -> str | None:
    """Return why a captured step may go stale: what Python replaces or changes stays as it was captured."""
    for name, value in _attributes(model).items():
        if any(isinstance(leaf, Tensor) for leaf in leaves(value)):
            return f"the model's {name} holds a tensor that is no buffer"
    if hasattr(workload.loss, "__dict__") and _comparable(vars(workload.loss)) != state_of_loss:
        return "the loss changes an attribute"
    return None


def _computed_again(
    model: nn.Module, workload: Workload, batch: Batch, state: Sequence[Tensor], device: torch.device
) -> tuple[Any, Tensor]:
    """Return the outputs and the loss of a model that has seen a batch, for the same batch and its first `state`.

    If the outputs differ, state remains in the model: a hidden state, a list, a random generator of its own.
    """
    with torch.no_grad():
        for tensor, value in zip((*model.parameters(), *model.buffers()), state, strict=True):
            tensor.copy_(value)
    with seeded(0, device):
        outputs = run_model(model.train(), copied(batch).inputs)
        return outputs, workload.loss(outputs, batch.targets)


def _are_close(one: Any, other: Any) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True) for first, second in pairs)


def _plain_attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and name != "training"
    }


def _held_state(model: nn.Module) -> dict[str, Any]:
    """Return what a model's attributes hold besides parameters and buffers, to be compared."""
    return {name: _comparable(value) for name, value in _attributes(model).items()}


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Return the attributes of all modules besides parameters, buffers and modules."""
    registered = ("_parameters", "_buffers", "_modules", "training")
    return {
        f"{prefix}.{name}".lstrip("."): value
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
    if isinstance(value, int | float | str):
        return value
    if inspect.isroutine(value):  # pickled, `random.random` would be the global random state
        return None
    try:
        return hash(pickle.dumps(value))  # an array, a set, an object that counts
    except Exception:  # a lock, a function of a function: nothing that can be compared
        return None


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the name of a value that differs."""
    return next((name for name, value in after.items() if before.get(name) != value), None)


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
