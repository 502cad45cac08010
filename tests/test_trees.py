"""Trees: batches and outputs as nested tuples, lists, dicts and dataclasses."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from pipeline.workloads.trees import (
    concatenate,
    described,
    leaves,
    map_leaves,
    map_leaves_of,
    map_tensors,
    tensors,
    with_tensors,
    without_lists,
)

Point = namedtuple("Point", ["x", "y"])


@dataclass(frozen=True)
class Output:
    """Outputs of a model, with a field that the constructor does not take."""

    logits: Any
    hidden: Any = None
    count: int = field(init=False, default=3)


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """Outputs as those of transformers: a dict that is a dataclass, and holds what is not None."""

    loss: Any = None
    logits: Any = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


X, Y = numbers(2, 3), numbers(2)
TREES: dict[str, tuple[Any, str]] = {
    "tensor": (X, "(2, 3)"),
    "scalar": (X[0, 0], "()"),
    "tuple": ((X, Y), "((2, 3), (2))"),
    "list": ([X, Y], "[(2, 3), (2)]"),
    "dict": ({"x": X, "y": (Y, 3)}, "{x: (2, 3), y: ((2), int)}"),
    "named tuple": (Point(X, Y), "((2, 3), (2))"),
    "dataclass": (Output(X, [Y]), "{logits: (2, 3), hidden: [(2)]}"),
    "model output": (ModelOutput(logits=X), "{loss: NoneType, logits: (2, 3)}"),
    "nothing": ((), "()"),
    "None": (None, "NoneType"),
    "packed": (pack_sequence([Y, Y[:1]]), "PackedSequence"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_says_its_shapes_and_is_rebuilt_in_its_form(name: str) -> None:
    tree, shapes = TREES[name]
    assert described(tree) == shapes
    same = map_leaves(lambda leaf: leaf, tree)
    assert type(same) is type(tree)
    assert described(same) == shapes
    assert [one is other for one, other in zip(leaves(same), leaves(tree), strict=True)] == [True] * len(
        [*leaves(tree)]
    )
    doubled = with_tensors(tree, [2 * tensor for tensor in tensors(tree)])
    for one, other in zip(tensors(map_tensors(lambda tensor: 2 * tensor, tree)), tensors(doubled), strict=True):
        assert torch.equal(one, other)


def test_a_packed_sequence_is_one_leaf_that_keeps_its_lengths() -> None:
    packed = pack_sequence([numbers(3), numbers(1)])
    (leaf,) = leaves({"walks": packed})
    assert leaf is packed
    assert isinstance(map_tensors(torch.neg, packed), PackedSequence)


def test_trees_of_one_form_are_joined_and_a_scalar_becomes_one_of_several() -> None:
    joined = concatenate([Output(X, X[0, 0]), Output(X, X[0, 1])])
    assert torch.equal(joined.logits, torch.cat([X, X]))
    assert joined.hidden.tolist() == [0.0, 1.0]
    assert concatenate([[X, Y], [Y]]) == [X, Y, Y]
    assert concatenate([(X[None], "name"), (X[None], "name")], axis=1)[0].shape == (1, 4, 3)


FORMS: dict[str, tuple[list[Any], str]] = {
    "a part more": ([(X, Y), (X, Y, Y)], r"\(\(2, 3\), \(2\)\) and \(\(2, 3\), \(2\), \(2\)\) differ in form"),
    "other keys": ([{"x": X}, {"y": X}], r"\{x: \(2, 3\)\} and \{y: \(2, 3\)\} differ in form"),
    "a tensor": ([(X, Y), X], r"\(\(2, 3\), \(2\)\) and \(2, 3\) differ in form"),
    "nothing": ([(X,), ()], r"\(\(2, 3\)\) and \(\) differ in form"),
}


@pytest.mark.parametrize("name", FORMS)
def test_trees_that_differ_in_form_are_named(name: str) -> None:
    trees, message = FORMS[name]
    with pytest.raises(ValueError, match=f"^{message}$"):
        map_leaves_of(list, trees)


def test_lists_become_tuples_at_any_depth() -> None:
    assert without_lists([1, {"a": [2, (3, [4])]}]) == (1, {"a": (2, (3, (4,)))})
