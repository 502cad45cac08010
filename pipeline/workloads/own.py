"""Workloads of a person's own: a function that they wrote, in a file or a package."""

from __future__ import annotations

from pipeline.config import Own
from pipeline.workloads.workload import Workload


def own_workload(choice: Own) -> Workload:
    """Call the function."""
    raise NotImplementedError(choice.function)
