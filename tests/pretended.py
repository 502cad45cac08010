"""A pretended device: its tensors report this device, and compute on the CPU.

The device refuses operations on tensors of two devices, as a GPU does. It records each operation for which the host
would wait for a GPU, such as reading a number. Results equal the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")
"""A type of device that PyTorch knows and that needs no driver."""
READ = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operations for which the host waits, since it needs the result or the result's shape."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that take indices on the CPU, and copy them."""
WHOLE = {"stack", "cat"}
"""Operations that refuse even a scalar tensor on the CPU."""

_waits: list[str] = []


@contextmanager
def pretended_device() -> Iterator[list[str]]:
    """Make `DEVICE` usable within the context; yield the list of operations for which the host has waited."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    _waits.clear()
    torch.__future__.set_swap_module_params_on_conversion(True)  # else a moved module keeps its old tensors
    torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor` moves its result without calling the mode
    try:
        with torch.autograd.set_multithreading_enabled(False), _Pretending():  # type: ignore[no-untyped-call]
            yield _waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swaps)


class _There(Tensor):
    """A tensor on the pretended device."""

    held: Tensor
    """The values, as a tensor on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        tensor: _There = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the values; the host waits."""
        _waits.append("tolist")
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the values."""
        return self.held.untyped_storage()


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Compute an operation on the CPU, and return the result on the device where a GPU would put it."""
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, _There) for tensor in tensors)
    asked = options.get("device")
    result = function(*_held(arguments), **_held({**options, **({"device": torch.device("cpu")} if asked else {})}))
    if name == "_to_copy" and asked is not None:
        leaves, there = there, torch.device(asked).type == DEVICE.type
        if leaves != there and not (there and options.get("non_blocking")):
            _waits.append("a copy")
    elif name == "copy_":
        there = isinstance(arguments[0], _There)
        if there != isinstance(arguments[1], _There):
            _waits.append("a copy")
    elif there:
        strangers = [t for t in tensors if (t.ndim or name in WHOLE) and not isinstance(t, _There)]
        indices = arguments[1] if name in INDEXED else ()
        if any(all(stranger is not index for index in indices) for stranger in strangers):
            raise RuntimeError(f"{name} of tensors on {DEVICE} and on the CPU")
        if name in READ or strangers or any(index is not None and index.dtype == torch.bool for index in indices):
            _waits.append(name)
    else:
        there = asked is not None and torch.device(asked).type == DEVICE.type
    if not there:
        return result
    placed = tree_map(lambda leaf: _There(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(function, tuple(arguments), dict(options), placed)


def _held(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, _There) else leaf, values)
