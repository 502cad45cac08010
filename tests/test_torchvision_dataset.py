from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import Arrays, compress, idx, md5, random_images, write_dataset
from torch import Tensor
from torchvision import datasets

from pipeline.errors import InvalidInput
from pipeline.space.config import TorchvisionDataset
from pipeline.workloads.torchvision_dataset import FACTS, torchvision_dataset
from pipeline.workloads.workload import Split, Workload

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(FACTS)
Written = Callable[..., tuple[Arrays, Arrays]]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Write a data set with 200 training and 100 test images, unless given, to `tmp_path`."""

    def write(name: str, **changes: Arrays) -> tuple[Arrays, Arrays]:
        train = changes.get("train", random_images(name, 200, seed=1))
        test = changes.get("test", random_images(name, 100, seed=2))
        write_dataset(name, tmp_path, train, test, monkeypatch)
        return train, test

    return write


def load(name: str, folder: Path, **changes: Any) -> Workload:
    values: dict[str, Any] = {"model": "small_cnn", **changes}
    return torchvision_dataset(TorchvisionDataset(name=name, folder=str(folder), **values))  # type: ignore[arg-type]


def refusal(name: str, folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        load(name, folder, **changes)
    return [str(problem) for problem in caught.value.problems]


def split(workload: Workload, name: str) -> Split:
    found = getattr(workload, name)
    assert isinstance(found, Split)
    return found


def as_set(images: Tensor, labels: Tensor) -> set[tuple[bytes, int]]:
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_a_data_sets_images_and_labels_are_those_of_its_files(name: str, tmp_path: Path, written: Written) -> None:
    (images, labels), (test_images, test_labels) = written(name)
    workload = load(name, tmp_path)
    train, val, test = (split(workload, part) for part in ("train", "val", "test"))
    assert train.inputs.dtype == torch.uint8
    assert train.inputs.is_contiguous()
    assert as_set(train.inputs, train.targets) | as_set(val.inputs, val.targets) == as_set(
        torch.from_numpy(images), torch.from_numpy(labels)
    )
    assert len(train) + len(val) == len(images)
    assert torch.equal(test.inputs, torch.from_numpy(test_images))
    assert test.targets.tolist() == test_labels.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_data_sets_model_takes_its_images_and_has_its_classes(name: str, tmp_path: Path, written: Written) -> None:
    written(name)
    for model in ("small_cnn", "mnasnet0_5"):
        workload = load(name, tmp_path, model=model)
        assert workload.preprocess is not None
        outputs = workload.build_model()(workload.preprocess(split(workload, "train").inputs[:2]))
        assert outputs.shape == (2, 100 if name == "cifar100" else 10)


def test_a_tenth_of_each_class_validates_whatever_the_seed(tmp_path: Path, written: Written) -> None:
    written("cifar10")
    torch.manual_seed(1)
    one = split(load("cifar10", tmp_path), "val")
    torch.manual_seed(2)
    other = split(load("cifar10", tmp_path), "val")
    assert one.targets.bincount().tolist() == [2] * 10
    assert torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named_with_what_to_do(name: str, tmp_path: Path, written: Written) -> None:
    written(name)
    file = max(path for path in tmp_path.rglob("*") if path.is_file())
    file.unlink()
    assert refusal(name, tmp_path) == [
        f"workload.folder: {FACTS[name].cls} needs files that are missing in '{tmp_path}': "
        f"{file.relative_to(tmp_path)}; put them there, or download them with --set workload.download=true"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_named(name: str, tmp_path: Path, written: Written) -> None:
    written(name)
    file = max(path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-7])
    (problem,) = refusal(name, tmp_path)
    assert problem.startswith(f"workload.folder: {file} is damaged (")
    assert problem.endswith("remove it, then put it there anew, or download it with --set workload.download=true")


def test_images_of_another_shape_are_refused(tmp_path: Path, written: Written) -> None:
    images, labels = random_images("mnist", 50, seed=1)
    written("mnist", train=(images[:, :, :20], labels))
    assert refusal("mnist", tmp_path) == [
        f"workload.folder: images of MNIST in {tmp_path} must be (1, 28, 28) (channel, height, width), got (1, 20, 28)"
    ]


def test_a_label_too_few_is_refused(tmp_path: Path, written: Written) -> None:
    images, labels = random_images("kmnist", 50, seed=1)
    written("kmnist", train=(images, labels[:-1]))
    assert refusal("kmnist", tmp_path) == [
        f"workload.folder: KMNIST in {tmp_path} must have a label per image, got 50 images, 49 labels"
    ]


def test_a_data_set_without_images_is_refused(tmp_path: Path, written: Written) -> None:
    images, labels = random_images("mnist", 50, seed=1)
    written("mnist", train=(images[:0], labels[:0]))
    assert "MNIST" in refusal("mnist", tmp_path)[0]


def test_a_file_that_is_none_of_the_format_is_refused(tmp_path: Path, written: Written) -> None:
    written("fashion_mnist")
    file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_text("<html>404</html>")
    assert refusal("fashion_mnist", tmp_path)[0].startswith(f"workload.folder: {file} is damaged (")


def test_a_model_and_a_folder_that_are_wrong_are_refused_together(tmp_path: Path) -> None:
    model, folder = refusal("cifar10", tmp_path, model="resnet81")
    assert model == "workload.model: unknown model 'resnet81'; did you mean resnet18?"
    assert folder.startswith("workload.folder: CIFAR10 needs files that are missing")


def test_archives_are_unpacked_only_if_a_download_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Written
) -> None:
    """With its archive there, torchvision's download needs no network."""
    _, (images, _) = written("mnist")
    raw = tmp_path / "archives" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    packed = [compress(file, raw) for file in (tmp_path / "MNIST" / "raw").iterdir()]
    monkeypatch.setattr(datasets.MNIST, "resources", [(file.name, md5(file)) for file in packed])
    assert "needs files that are missing" in refusal("mnist", tmp_path / "archives")[0]
    workload = load("mnist", tmp_path / "archives", download=True)
    assert torch.equal(split(workload, "test").inputs, torch.from_numpy(images))


def test_cifars_archive_is_unpacked_if_a_download_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Written
) -> None:
    _, (images, _) = written("cifar10")
    archive = tmp_path / "archives" / datasets.CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    assert "needs files that are missing" in refusal("cifar10", archive.parent)[0]
    workload = load("cifar10", archive.parent, download=True)
    assert torch.equal(split(workload, "test").inputs, torch.from_numpy(images))


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_a_download_that_fails_says_which_files_to_put_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = getattr(datasets, FACTS[name].cls)
    monkeypatch.setattr(cls, "mirrors", ["file:///nowhere/"], raising=False)
    monkeypatch.setattr(cls, "url", "file:///nowhere/file", raising=False)
    (problem,) = refusal(name, tmp_path, download=True)
    assert problem.startswith(f"workload.folder: {FACTS[name].cls} needs files that are missing in '{tmp_path}': ")
    assert "they cannot be downloaded (" in problem
    assert "No such file or directory" in problem
    assert problem.endswith("); put them there")


def test_images_are_normalised_by_channel(tmp_path: Path, written: Written) -> None:
    written("cifar10")
    preprocess = load("cifar10", tmp_path).preprocess
    assert preprocess is not None
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (0.2 - 0.4465) / 0.2616]
    torch.testing.assert_close(preprocess(image).flatten(), torch.tensor(expected))


def test_a_grey_image_has_three_equal_channels_for_a_model_of_torchvisions(tmp_path: Path, written: Written) -> None:
    written("mnist")
    ours, theirs = (load("mnist", tmp_path, model=model).preprocess for model in ("small_cnn", "squeezenet1_1"))
    assert ours is not None
    assert theirs is not None
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(theirs(image), ours(image).expand(1, 3, 16, 16))


def test_augmentation_can_be_turned_off(tmp_path: Path, written: Written) -> None:
    written("svhn")
    assert load("svhn", tmp_path).augment is not None
    assert load("svhn", tmp_path, augment=False).augment is None


@pytest.mark.parametrize(("name", "flips"), [("cifar10", True), ("svhn", False), ("mnist", False)])
def test_an_augmented_image_is_a_crop_of_its_padded_self_perhaps_mirrored(
    name: str, flips: bool, tmp_path: Path, written: Written
) -> None:
    written(name)
    workload = load(name, tmp_path)
    images = split(workload, "train").inputs[:60]
    assert workload.augment is not None
    augmented = workload.augment(images, torch.Generator().manual_seed(0))
    padding, size = FACTS[name].padding, images.shape[-1]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    found = []
    for sample, image in enumerate(augmented):
        for place in range((2 * padding + 1) ** 2):
            top, left = divmod(place, 2 * padding + 1)
            crop = padded[sample, :, top : top + size, left : left + size]
            found += [
                (place, turned) for turned in (False, True) if torch.equal(crop.flip(2) if turned else crop, image)
            ]
    assert len(found) == len(images)
    assert len({place for place, _ in found}) > 15
    assert sum(turned for _, turned in found) == pytest.approx(30 if flips else 0, abs=12 if flips else 0)


def test_augmentation_is_a_function_of_its_generator(tmp_path: Path, written: Written) -> None:
    written("cifar10")
    workload = load("cifar10", tmp_path)
    augment, images = workload.augment, split(workload, "train").inputs[:8]
    assert augment is not None
    one, same, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.dtype == torch.uint8
    assert one.is_contiguous()


def test_the_files_of_the_tests_are_of_the_idx_format() -> None:
    assert idx(np.array([[1, 2, 3]], dtype=np.uint8)) == bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3])
