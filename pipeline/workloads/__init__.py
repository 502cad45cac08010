"""What is trained: data, model, loss and metrics. One file per built-in workload."""

from __future__ import annotations

from pipeline.config import WorkloadChoice
from pipeline.errors import InvalidInput, Problem, did_you_mean
from pipeline.workloads.digits import digits
from pipeline.workloads.workload import Metric, Split, Workload

__all__ = ["BUILT_IN", "Metric", "Split", "Workload", "load_workload"]

BUILT_IN = {"digits": digits}


def load_workload(choice: WorkloadChoice) -> Workload:
    """Load a workload's data and choose its model.

    Raises:
        InvalidInput: There is no such workload, or it has no such model.
    """
    if choice.name not in BUILT_IN:
        message = f"unknown workload {choice.name!r}; {did_you_mean(choice.name, BUILT_IN)}"
        raise InvalidInput("workload", [Problem("workload.name", message)])
    return BUILT_IN[choice.name](choice.model)
