from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from image_files import write_photos
from PIL import Image
from torch import Tensor

import pipeline.search
from pipeline.errors import DataError, InvalidInput
from pipeline.files.strict_yaml import dumps, loads
from pipeline.space.config import ImageFolder, TrialConfig
from pipeline.space.optimizers import SGD
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant
from pipeline.study.store import Store
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.image_folder import Images, image_folder
from pipeline.workloads.workload import Split, Workload

pytestmark = pytest.mark.usefixtures("one_thread")

ENOUGH = 1 << 30
"""Bytes that every folder here fits into, whatever memory this machine has."""

COUNTS = {"cat": 20, "dog": 13, "emu": 7}
SPACE = Path(__file__).parent.parent / "search_spaces" / "finetune.yaml"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", COUNTS)


def choice(folder: Path, **changes: Any) -> ImageFolder:
    return ImageFolder(**{"folder": str(folder), "model": "small_cnn", "image_size": 16, **changes})


def refusal(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        image_folder(choice(folder, **changes))
    return [str(problem) for problem in caught.value.problems]


def splits(workload: Workload) -> dict[str, Split]:
    found = {"train": workload.train, "val": workload.val, "test": workload.test}
    kept = {name: split for name, split in found.items() if isinstance(split, Split)}
    assert kept.keys() == {name for name, split in found.items() if split is not None}
    return kept


def resnet18_weights(folder: Path) -> Path:
    file = folder / "resnet18.pt"
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), file)
    return file


def test_each_class_is_split_by_the_same_fractions(photos: Path) -> None:
    parts = splits(image_folder(choice(photos), memory=ENOUGH))
    counts = {name: part.targets.bincount().tolist() for name, part in parts.items()}
    assert counts == {"train": [14, 9, 5], "val": [3, 2, 1], "test": [3, 2, 1]}
    assert {part.inputs.shape[1:] for part in parts.values()} == {(3, 16, 16)}


def test_splits_share_no_image_and_leave_none_out(photos: Path) -> None:
    workload = image_folder(choice(photos), memory=0)
    files: list[str] = []
    for part in (workload.train, workload.val, workload.test):
        assert isinstance(part, Images)
        files += part.files
    assert sorted(files) == sorted(str(path) for path in photos.rglob("*") if path.is_file())


def test_the_split_is_the_same_whatever_the_seed(photos: Path) -> None:
    torch.manual_seed(1)
    one = splits(image_folder(choice(photos), memory=ENOUGH))
    torch.manual_seed(2)
    other = splits(image_folder(choice(photos), memory=ENOUGH))
    assert all(torch.equal(one[name].inputs, other[name].inputs) for name in one)


def test_without_a_test_fraction_there_is_no_test_split(photos: Path) -> None:
    assert splits(image_folder(choice(photos, test_fraction=0.0), memory=ENOUGH)).keys() == {"train", "val"}


def test_folders_train_val_and_test_are_the_splits(tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "val", "test")):
        write_photos(tmp_path / name, {"a": 4 + seed, "b": 3}, seed=seed)
    parts = splits(image_folder(choice(tmp_path), memory=ENOUGH))
    assert {name: part.targets.tolist() for name, part in parts.items()} == {
        "train": [0] * 4 + [1] * 3,
        "val": [0] * 5 + [1] * 3,
        "test": [0] * 6 + [1] * 3,
    }


def test_a_folder_test_may_be_absent(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_photos(tmp_path / name, {"a": 4, "b": 3})
    assert splits(image_folder(choice(tmp_path), memory=ENOUGH)).keys() == {"train", "val"}


def test_an_image_is_its_middle_square_resized(tmp_path: Path) -> None:
    write_photos(tmp_path, {"a": 3, "b": 3})
    stripes = torch.arange(3).repeat_interleave(20).mul(100).to(torch.uint8)
    Image.fromarray(stripes.expand(20, 60).contiguous().numpy()).save(tmp_path / "a" / "00.png")
    image, label = Images([str(tmp_path / "a" / "00.png")], torch.tensor([1]), 10)[0]
    assert (image.dtype, image.shape, int(label)) == (torch.uint8, (3, 10, 10), 1)
    assert image[:, :, 2:-2].unique().tolist() == [100]


def test_images_that_are_kept_are_those_that_are_read_again_and_again(photos: Path) -> None:
    kept = splits(image_folder(choice(photos), memory=ENOUGH))["train"]
    read = image_folder(choice(photos), memory=0).train
    assert isinstance(read, Images)
    pairs = [read[index] for index in range(len(read))]
    assert torch.equal(torch.stack([image for image, _ in pairs]), kept.inputs)
    assert torch.equal(torch.stack([label for _, label in pairs]), kept.targets)


def test_images_are_normalised_as_imagenet_and_augmented_within_bounds(photos: Path) -> None:
    workload = image_folder(choice(photos), memory=ENOUGH)
    assert workload.preprocess is not None
    assert workload.augment is not None
    grey = torch.full((1, 3, 1, 1), 102, dtype=torch.uint8)
    expected = [(0.4 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(workload.preprocess(grey).flatten(), torch.tensor(expected))
    white = torch.full((8, 3, 16, 16), 255, dtype=torch.uint8)
    shifted = workload.augment(white, torch.Generator().manual_seed(0))
    assert shifted[:, :, 2:-2, 2:-2].eq(255).all()
    assert not shifted.eq(255).all()
    assert image_folder(choice(photos, augment=False)).augment is None


def truncate(photos: Path) -> None:
    file = photos / "cat" / "01.jpg"
    file.write_bytes(file.read_bytes()[:600])
    (photos / "emu" / "02.png").write_text("<html>")


def empty(photos: Path) -> None:
    (photos / "gnu").mkdir()
    (photos / "gnu" / "readme.txt").touch()


def one_class(photos: Path) -> None:
    shutil.rmtree(photos / "cat")
    shutil.rmtree(photos / "dog")


def few(photos: Path) -> None:
    write_photos(photos, {"ant": 2})


def other_classes(photos: Path) -> None:
    move_into(photos, "train")
    write_photos(photos / "val", {"cat": 1, "dog": 1, "gnu": 1})


def no_train(photos: Path) -> None:
    move_into(photos, "val")


def no_val(photos: Path) -> None:
    move_into(photos, "train")


def move_into(photos: Path, name: str) -> None:
    photos.rename(photos.with_name("moved"))
    photos.mkdir()
    photos.with_name("moved").rename(photos / name)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (
            truncate,
            [
                "'{}/cat/01.jpg' cannot be read (",
                "'{}/emu/02.png' cannot be read (cannot identify image file",
            ],
        ),
        (empty, ["no image in '{}/gnu'; remove what is no class, or put images there (.jpg"]),
        (one_class, ["'{}' must have a folder of images for each of two or more classes, it has only 'emu'"]),
        (shutil.rmtree, ["there is no folder '{}'; give one with --set workload.folder=…"]),
        (few, ["too few images to train, validate and test on each: 'ant' (2); add some, or lower"]),
        (
            other_classes,
            [
                "train and val must have the same classes; only val has gnu, not train",
                "train and val must have the same classes; only train has emu, not val",
            ],
        ),
        (no_train, ["'{}/train' must have a folder of images for each of two or more classes, it has none"]),
        (no_val, ["'{}' has train but no val; add val, or give '{}/train' to split it"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    harm: Callable[[Path], Any], expected: list[str], photos: Path
) -> None:
    harm(photos)
    found = refusal(photos)
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(f"workload.folder: {beginning.replace('{}', str(photos))}")


def test_a_path_that_the_system_refuses_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 300)
    assert refusal(folder) == [f"workload.folder: '{folder}' cannot be read: File name too long"]


def test_the_message_names_twenty_images_that_cannot_be_read(photos: Path) -> None:
    for file in photos.rglob("*.*"):
        file.write_text("no image")
    with pytest.raises(InvalidInput) as caught:
        image_folder(choice(photos))
    first, *named, last = str(caught.value).splitlines()
    assert (first, last) == ("workload: 40 problems", "  … (20 more)")
    assert len(named) == 20


def test_names_that_begin_with_a_dot_are_left_out(photos: Path) -> None:
    before = image_folder(choice(photos), memory=0)
    shutil.copytree(photos / "cat", photos / ".ipynb_checkpoints")
    shutil.copytree(photos / "cat", photos / "cat" / ".thumbnails")
    (photos / "cat" / "._00.png").write_text("what a Mac leaves beside a file")
    (photos / "dog" / ".DS_Store").touch()
    after = image_folder(choice(photos), memory=0)
    for one, other in ((before.train, after.train), (before.val, after.val), (before.test, after.test)):
        assert isinstance(one, Images)
        assert isinstance(other, Images)
        assert one.files == other.files


def test_a_hidden_folder_is_no_class(photos: Path) -> None:
    one_class(photos)
    write_photos(photos, {".git": 2})
    assert refusal(photos) == [
        f"workload.folder: '{photos}' must have a folder of images for each of two or more classes, it has only 'emu'"
    ]


def test_images_in_folders_of_a_class_belong_to_it(photos: Path) -> None:
    write_photos(photos / "cat", {"black": 3, "white": 4})
    train = image_folder(choice(photos, val_fraction=0.01, test_fraction=0), memory=0).train
    assert isinstance(train, Images)
    assert train.labels.bincount().tolist() == [26, 12, 6]


def test_an_image_that_cannot_be_read_is_refused_also_where_images_are_not_kept(photos: Path) -> None:
    truncate(photos)
    with pytest.raises(InvalidInput, match=r"workload: 2 problems\n.*cat/01\.jpg' cannot be read.*\n.*emu/02\.png'"):
        image_folder(choice(photos), memory=0)


def test_an_image_that_is_damaged_later_is_named_when_it_is_read(photos: Path) -> None:
    train = image_folder(choice(photos), memory=0).train
    assert isinstance(train, Images)
    Path(train.files[0]).write_text("no image")
    message = f"'{train.files[0]}' cannot be read (cannot identify image file"
    with pytest.raises(DataError, match=re.escape(message)):
        train[0]


def test_images_of_12_bits_are_scaled_alike_in_the_whole_folder(photos: Path) -> None:
    for shade, name in ((4095, "cat/bright.png"), (2048, "dog/middle.png"), (0, "emu/black.png")):
        Image.fromarray(np.full((8, 8), shade, np.uint16)).save(photos / name)
    parts = splits(image_folder(choice(photos), memory=ENOUGH))
    shades = [image.flatten() for part in parts.values() for image in part.inputs]
    assert sorted(int(shade[0]) for shade in shades if shade.unique().numel() == 1) == [0, 127, 255]


@pytest.mark.parametrize("name", ["\x1b]0;x\x07.png", "two\nlines.png", "\x9b31m.jpg", "\u202egnp.exe.png"])
def test_control_characters_in_a_name_are_escaped(name: str, photos: Path) -> None:
    (photos / "cat" / name).write_text("no image")
    with pytest.raises(InvalidInput) as caught:
        image_folder(choice(photos))
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert f"/cat/{name.encode('unicode_escape').decode()}' cannot be read" in str(caught.value)


def test_fractions_that_leave_nothing_to_train_on_are_refused(photos: Path) -> None:
    assert refusal(photos, val_fraction=0.5, test_fraction=0.5) == [
        "workload.val_fraction: val_fraction and test_fraction must be below 1 together, got 1"
    ]


def test_a_wrong_model_and_a_corrupt_image_are_refused_together(photos: Path) -> None:
    truncate(photos)
    assert [problem.partition(":")[0] for problem in refusal(photos, model="resnet")] == [
        "workload.model",
        "workload.folder",
        "workload.folder",
    ]


@pytest.mark.parametrize("trainer", [FusedTrials, PlainTrials])
def test_a_frozen_backbone_stays_what_its_weights_are_to_the_bit(
    trainer: type[FusedTrials | PlainTrials], photos: Path, tmp_path: Path
) -> None:
    file = resnet18_weights(tmp_path)
    chosen = choice(photos, model="resnet18", weights=str(file), image_size=32)
    groups = {"head": ParamGroup(pattern=("fc.*",)), "backbone": ParamGroup(pattern=("*",), lr_ratio=0.0)}
    optimizer = SGD(base_lr=0.1, momentum=0.9, weight_decay=0.1)
    config = TrialConfig(
        workload=chosen, epochs=1, batch_size=8, seed=0, optimizer=optimizer, scheduler=Constant(), param_groups=groups
    )
    group = trainer({0: config}, image_folder(chosen), device=torch.device("cpu"))
    start = group.model_state(0)
    assert group.train_epoch()[0].finished
    trained = group.model_state(0)
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    parameters = dict(torchvision.models.resnet18(num_classes=3).named_parameters())
    changed = {name for name in parameters if not torch.equal(trained[name], start[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert all(torch.equal(trained[name], weights[name]) for name in parameters.keys() - changed)


@pytest.mark.usefixtures("root_with_tables")
def test_fine_tuning_is_searched_on_a_folder_of_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_photos(tmp_path / "photos", {"cat": 4, "dog": 4})
    space = loads(SPACE.read_text(), source=SPACE.name)
    weights = resnet18_weights(tmp_path)
    space["workload"] |= {"folder": str(tmp_path / "photos"), "weights": str(weights), "image_size": 32}
    space |= {"epochs": 1, "batch_size": 4}
    file = tmp_path / "finetune.yaml"
    file.write_text(dumps(space))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ["--space", str(file), "--trials", "2", "--root", str(tmp_path), "--device", "cpu"]
        assert pipeline.search.main(arguments) == 0
    assert printed.getvalue().startswith("photos · resnet18 · 1 epoch")
    trials = Store(tmp_path).open(None).ended
    assert [len(trial.epochs) for trial in trials] == [1, 1]
    assert {trial.config.workload for trial in trials} == {ImageFolder(**space["workload"])}
