"""The digits' splits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.workloads.digits import digits
from pipeline.workloads.workload import Split


def labels(train_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labels of the test, validation and training images, in the fixed order of all images."""
    workload = digits("mlp", train_samples=train_samples)
    splits = (workload.test, workload.val, workload.train)
    found = [split.targets for split in splits if isinstance(split, Split)]
    return found[0], found[1], found[2]


@pytest.mark.parametrize(
    ("train_samples", "sizes"), [(1257, [270, 270, 1257]), (600, [598, 599, 600]), (1795, [1, 1, 1795])]
)
def test_what_is_not_trained_on_is_halved_into_test_and_validation(train_samples: int, sizes: list[int]) -> None:
    assert [len(split) for split in labels(train_samples)] == sizes


def test_fewer_training_images_are_among_more_and_more_test_images_hold_the_fewer() -> None:
    few, many = labels(600), labels(1257)
    assert torch.equal(torch.cat(few), torch.cat(many))  # one order of all images
    assert len(few[0]) > len(many[0])
    assert len(few[2]) < len(many[2])
