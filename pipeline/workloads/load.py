"""Load a workload."""

from __future__ import annotations

import importlib

from pipeline.space.config import WorkloadChoice
from pipeline.workloads.loop import Loop
from pipeline.workloads.workload import Workload


def load_workload(choice: WorkloadChoice) -> Workload | Loop:
    """Load the data of a workload and choose its model.

    Raises:
        InvalidInput: The data or the model are not available; places are those of a file, such as `workload.model`.
    """
    module, _, function = choice.loader.partition(":")
    workload: Workload | Loop = getattr(importlib.import_module(module), function)(choice)
    return workload
