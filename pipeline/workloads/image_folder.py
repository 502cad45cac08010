"""Images in folders, for fine-tuning."""

from __future__ import annotations

from pipeline.config import ImageFolder
from pipeline.workloads.workload import Workload


def image_folder(choice: ImageFolder) -> Workload:
    """Return the workload of a folder of images."""
    raise NotImplementedError(choice.name)
