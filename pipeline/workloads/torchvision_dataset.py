"""Data sets of torchvision's, read by its own classes."""

from __future__ import annotations

from pipeline.config import TorchvisionDataset
from pipeline.workloads.workload import Workload


def torchvision_dataset(choice: TorchvisionDataset) -> Workload:
    """Return a data set's workload."""
    raise NotImplementedError(choice.name)
