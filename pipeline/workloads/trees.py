"""Trees: values in nested tuples, lists, dicts and dataclasses, as batches and a model's outputs have them.

A leaf is anything else: a tensor, a number, None, a batch of graphs. PyTorch's own pytrees are private, and do not take
a dataclass before it is registered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def leaves(tree: Any) -> Iterator[Any]:
    """Yield the leaves of a tree, in order."""
    children = _children(tree)
    if children is None:
        yield tree
    else:
        for child in children:
            yield from leaves(child)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree of the same form, with `function` of each leaf."""
    children = _children(tree)
    return function(tree) if children is None else _rebuilt(tree, [map_leaves(function, child) for child in children])


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a tree of the same form, with `function` of each tensor; other leaves stay."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def with_tensors(tree: Any, values: Sequence[Tensor]) -> Any:
    """Return a tree of the same form, with other tensors, in order."""
    remaining = iter(values)
    return map_tensors(lambda _: next(remaining), tree)


def without_lists(tree: Any) -> Any:
    """Return a tree with tuples in place of lists."""
    children = _children(tree)
    if children is None:
        return tree
    parts = [without_lists(child) for child in children]
    return tuple(parts) if isinstance(tree, list) else _rebuilt(tree, parts)


def map_leaves_of(function: Callable[[Sequence[Any]], Any], trees: Sequence[Any]) -> Any:
    """Return a tree of the same form as each of some trees, with `function` of the leaves at each place.

    Raises:
        ValueError: The trees differ in form.
    """
    first, parts = trees[0], [_children(tree) for tree in trees]
    if parts[0] is None:
        return function(trees)
    keys = [
        list(tree) if isinstance(tree, Mapping) else len(part or ()) for tree, part in zip(trees, parts, strict=True)
    ]
    for tree, key in zip(trees, keys, strict=True):
        if key != keys[0]:
            raise ValueError(f"{described(first)} and {described(tree)} differ in form")
    return _rebuilt(first, [map_leaves_of(function, leaves) for leaves in zip(*parts, strict=True)])


def concatenate(trees: Sequence[Any], *, axis: int = 0) -> Any:
    """Join trees of the same form along an axis of their tensors; a list of samples is joined end to end.

    A tensor without the axis, such as a batch's loss, becomes one of several along the axis.

    Raises:
        RuntimeError: Shapes differ in another axis.
        ValueError: The trees differ in form.
    """
    if isinstance(trees[0], list):
        return [value for tree in trees for value in tree]
    return map_leaves_of(functools.partial(_joined, axis=axis), trees)


def _joined(leaves: Sequence[Any], axis: int) -> Any:
    first = leaves[0]
    if not isinstance(first, Tensor):
        return first
    return torch.cat(tuple(leaves), dim=axis) if first.ndim > axis else torch.stack(tuple(leaves), dim=axis)


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a dense tensor's values."""
    return tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def described(tree: Any) -> str:
    """Return the shapes of a tree, for people: `(4, 3)`, `{ids: (4, 7), mask: (4, 7)}`."""
    if isinstance(tree, Tensor):
        return f"({', '.join(map(str, tree.shape))})"
    children = _children(tree)
    if children is None:
        return type(tree).__name__
    parts = [described(child) for child in children]
    if isinstance(tree, Mapping) or _is_dataclass(tree):
        return f"{{{', '.join(f'{key}: {part}' for key, part in zip(_keys(tree), parts, strict=True))}}}"
    return f"{'[' if isinstance(tree, list) else '('}{', '.join(parts)}{']' if isinstance(tree, list) else ')'}"


def _children(tree: Any) -> list[Any] | None:
    """Return the parts of a tree, or None for a leaf."""
    if isinstance(tree, Tensor | PackedSequence):  # a PackedSequence is a named tuple, which moves as a whole
        return None
    if isinstance(tree, tuple | list):
        return list(tree)
    if _is_dataclass(tree):
        return [getattr(tree, key) for key in _keys(tree)]
    return list(tree.values()) if isinstance(tree, Mapping) else None


def _is_dataclass(tree: Any) -> bool:
    return hasattr(type(tree), "__dataclass_fields__")


def _keys(tree: Any) -> list[str]:
    if isinstance(tree, Mapping) and not _is_dataclass(tree):
        return list(tree)
    return [field.name for field in dataclasses.fields(tree) if field.init]


def _rebuilt(tree: Any, children: Sequence[Any]) -> Any:
    """Return a tree like another one, with other parts."""
    if _is_dataclass(tree):
        return dataclasses.replace(tree, **dict(zip(_keys(tree), children, strict=True)))
    if isinstance(tree, Mapping):
        return dict(zip(tree, children, strict=True))
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
