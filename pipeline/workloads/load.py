"""Load a workload by its name."""

from __future__ import annotations

from pipeline.space.config import Digits, ImageFolder, Own, TorchvisionDataset, WorkloadChoice
from pipeline.workloads.workload import Workload


def load_workload(choice: WorkloadChoice) -> Workload:
    """Load a workload's data and choose its model.

    Raises:
        InvalidInput: The data or the model is not available; places are keys of a file, such as `workload.model`.
    """
    match choice:
        case Digits(model=model):
            from pipeline.workloads.digits import digits

            return digits(model)
        case TorchvisionDataset():
            from pipeline.workloads.torchvision_dataset import torchvision_dataset

            return torchvision_dataset(choice)
        case ImageFolder():
            from pipeline.workloads.image_folder import image_folder

            return image_folder(choice)
        case Own():
            from pipeline.workloads.custom import custom_workload

            return custom_workload(choice)
