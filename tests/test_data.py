"""Data on the device or read batch by batch: the same batches, whatever reads them."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import random_images, write_dataset, write_photos
from tiny import TinyModel, tiny_config, tiny_workload
from torch import Tensor

from pipeline.errors import DataError
from pipeline.space.config import ImageFolder, TorchvisionDataset, TrialConfig
from pipeline.space.optimizers import SGD, AdamW, Optimizer, Rprop
from pipeline.training.executor import LocalExecutor
from pipeline.workloads import streamed
from pipeline.workloads.data import evaluation_batches, is_streamed, samples_of, to_device, training_batches
from pipeline.workloads.image_folder import image_folder
from pipeline.workloads.streamed import Streamed
from pipeline.workloads.torchvision_dataset import torchvision_dataset
from pipeline.workloads.workload import Batch, Split, Workload

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
]

CPU = torch.device("cpu")
Sample = tuple[Tensor, Tensor]
ENOUGH = 1 << 30
"""Bytes that every data set here fits into, whatever memory this machine has."""


class Samples:
    """A data set of a split's samples that notes which were read; with workers, only what this process reads."""

    def __init__(self, split: Split, *, noise: bool = False) -> None:
        self.split = split
        self.noise = noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        drawn = torch.rand(()) + random.random() + np.random.rand() if self.noise else torch.zeros(())
        return self.split.inputs[index] + drawn, self.split.targets[index]


class Broken(Samples):
    """One of its samples cannot be read."""

    def __getitem__(self, index: int) -> Sample:
        if index == 30:
            raise OSError("sample 30 is broken")
        return super().__getitem__(index)


class BrokenLater(Samples):
    """One of its samples can be read a few times only."""

    def __getitem__(self, index: int) -> Sample:
        if index == 30 and self.read.count(30) == 5:
            raise OSError("sample 30 is broken")
        return super().__getitem__(index)


class OwnGenerator(Samples):
    """It draws from a generator of its own, which no seed reaches, into an array that it returns each time."""

    generator = np.random.default_rng(0)
    buffer = np.zeros(6, dtype=np.float32)

    def __getitem__(self, index: int) -> Any:
        self.generator.standard_normal(6, dtype=np.float32, out=self.buffer)
        return self.buffer, self.split.targets[index]


class NoisyLater(Samples):
    """Its samples from number 30 on draw at random."""

    def __getitem__(self, index: int) -> Sample:
        inputs, target = super().__getitem__(index)
        return inputs + torch.rand(()) if index >= 30 else inputs, target


@pytest.fixture(params=[0, 2])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read with so many processes."""
    return use_workers(monkeypatch, request.param)


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> int:
    return use_workers(monkeypatch, 0)


def use_workers(monkeypatch: pytest.MonkeyPatch, count: int) -> int:
    monkeypatch.setattr(streamed, "_reader_count", lambda: count)
    return count


def as_samples(workload: Workload, cls: type[Samples] = Samples, **options: Any) -> Workload:
    """Return a workload whose splits are data sets."""
    splits: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        split = getattr(workload, name)
        assert isinstance(split, Split)
        splits[name] = cls(split, **options)
    return dataclasses.replace(workload, **splits)


def batches(workload: Workload, config: TrialConfig, *, free: int = ENOUGH) -> list[Batch]:
    """Return what two epochs of training see, and an evaluation of each split."""
    placed = to_device(workload, device=CPU, dtype=torch.float32, free=free)
    seen: list[Batch] = []
    for epoch in (0, 1):
        seen += training_batches(placed, config, epoch=epoch, device=CPU, dtype=torch.float32)
    for name in ("val", "test"):
        seen += evaluation_batches(placed, name, config, dtype=torch.float32)
    return seen


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for batch, other_batch in zip(one, other, strict=True):
        assert batch.size == other_batch.size
        assert batch.inputs.dtype == other_batch.inputs.dtype
        assert batch.inputs.stride() == other_batch.inputs.stride()
        assert torch.equal(batch.inputs, other_batch.inputs)
        assert torch.equal(batch.targets, other_batch.targets)


def folder_workload(tmp_path: Path, *, augment: bool, memory: int) -> Workload:
    folder = tmp_path / "photos"
    if not folder.exists():
        write_photos(folder, {"a": 12, "b": 9})
    choice = ImageFolder(folder=str(folder), model="small_cnn", image_size=16, augment=augment)
    return image_folder(choice, memory=memory)


def cifar_workload(folder: Path, patch: pytest.MonkeyPatch, *, augment: bool) -> Workload:
    write_dataset("cifar10", folder, random_images("cifar10", 40, seed=1), random_images("cifar10", 20, seed=2), patch)
    return torchvision_dataset(
        TorchvisionDataset(name="cifar10", model="small_cnn", folder=str(folder), augment=augment)
    )


@pytest.mark.parametrize("augment", [True, False])
def test_an_image_folder_gives_the_same_batches_kept_and_read(augment: bool, workers: int, tmp_path: Path) -> None:
    config = tiny_config()
    kept = folder_workload(tmp_path, augment=augment, memory=ENOUGH)
    read = folder_workload(tmp_path, augment=augment, memory=0)
    on_device = batches(kept, config)
    assert_same(on_device, batches(kept, config, free=0))
    assert_same(on_device, batches(read, config))
    assert_same(on_device, batches(read, config, free=0))


@pytest.mark.parametrize("augment", [True, False])
def test_a_data_set_of_torchvisions_gives_the_same_batches_on_the_device_and_streamed(
    augment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    workload = cifar_workload(tmp_path, monkeypatch, augment=augment)
    on_device = batches(workload, tiny_config())
    assert_same(on_device, batches(workload, tiny_config(), free=0))
    assert_same(on_device, batches(as_samples_of_bytes(workload), tiny_config(), free=0))


def as_samples_of_bytes(workload: Workload) -> Workload:
    """Return a workload whose splits are lists of samples, as one of any size may be."""
    splits: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        split = getattr(workload, name)
        assert isinstance(split, Split)
        splits[name] = list(zip(split.inputs, split.targets, strict=True))
    return dataclasses.replace(workload, **splits)


def test_what_fits_is_moved_and_what_does_not_is_streamed(no_workers: int) -> None:
    workload = as_samples(tiny_workload())
    split = workload.train
    size = len(split) * (6 * 4 + 8)
    enough = to_device(workload, device=CPU, dtype=torch.float32, free=size)
    assert isinstance(enough.train, Split)
    assert isinstance(enough.val, Streamed)  # the training split has taken the memory
    assert is_streamed(to_device(workload, device=CPU, dtype=torch.float32, free=size - 1))


def test_a_split_that_is_on_the_device_stays_there_whatever_is_free() -> None:
    workload = tiny_workload()
    placed = to_device(workload, device=CPU, dtype=torch.float32, free=0)
    assert isinstance(placed.train, Split)


@pytest.mark.parametrize("free", [ENOUGH, 0])
def test_a_workload_that_is_on_the_device_is_returned_as_it_is(free: int, no_workers: int) -> None:
    workload = as_samples(tiny_workload())
    placed = to_device(workload, device=CPU, dtype=torch.float32, free=free)
    assert to_device(placed, device=CPU, dtype=torch.float32, free=ENOUGH) is placed
    double = to_device(placed, device=CPU, dtype=torch.float64, free=ENOUGH)
    assert is_streamed(double) == is_streamed(placed) == (free == 0)
    (batch,) = samples_of(double, "train").batches([torch.tensor([3, 1])], seed=0)
    assert (batch.inputs.dtype, batch.targets.dtype) == (torch.float64, torch.int64)


def test_a_split_too_large_for_the_device_is_read_from_memory() -> None:
    workload, meta = tiny_workload(), torch.device("meta")
    assert isinstance(workload.train, Split)
    placed = to_device(workload, device=meta, dtype=torch.float32, free=workload.train.inputs.nbytes)
    assert is_streamed(placed)
    (batch,) = samples_of(placed, "train").batches([torch.tensor([3, 1])], seed=0)
    assert (batch.inputs.device, batch.inputs.shape, batch.targets.shape) == (meta, (2, 6), (2,))


def test_a_data_set_that_draws_at_random_is_never_kept(workers: int) -> None:
    placed = to_device(as_samples(tiny_workload(), noise=True), device=CPU, dtype=torch.float32, free=ENOUGH)
    assert is_streamed(placed)


def test_a_data_set_whose_last_samples_alone_draw_at_random_is_never_kept(no_workers: int) -> None:
    placed = to_device(as_samples(tiny_workload(), NoisyLater), device=CPU, dtype=torch.float32, free=ENOUGH)
    assert is_streamed(placed)


@pytest.mark.parametrize("collate", [None, lambda samples: samples])
def test_a_data_set_that_no_seed_repeats_is_refused(collate: Any, no_workers: int) -> None:
    workload = dataclasses.replace(as_samples(tiny_workload(), OwnGenerator), collate=collate)
    message = (
        "train: sample 0 differs when it is read again from the same seed; "
        "draw from the global random state of torch, Python or NumPy"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        to_device(workload, device=CPU, dtype=torch.float32, free=ENOUGH)


def test_samples_with_missing_values_and_texts_are_no_random_draw() -> None:
    sample = {"x": torch.tensor([float("nan"), 1 + 2j]).conj(), "text": "a", "words": np.array(["a", None]), "n": 2}
    assert not streamed.draws_at_random([sample] * 3)


def test_what_samples_draw_does_not_depend_on_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for count in (0, 1, 3):
        use_workers(monkeypatch, count)
        seen.append(batches(as_samples(tiny_workload(), noise=True), tiny_config()))
    assert_same(seen[0], seen[1])
    assert_same(seen[0], seen[2])


def test_what_samples_draw_changes_with_epoch_and_seed(no_workers: int) -> None:
    placed = to_device(as_samples(tiny_workload(), noise=True), device=CPU, dtype=torch.float32, free=ENOUGH)
    order = [torch.arange(5)]
    one, same, other = (next(iter(samples_of(placed, "train").batches(order, seed=seed))).inputs for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_sample_that_an_epoch_repeats_draws_anew_each_time(no_workers: int) -> None:
    placed = to_device(as_samples(tiny_workload(), noise=True), device=CPU, dtype=torch.float32, free=ENOUGH)
    once, repeats = (
        [batch.inputs for batch in samples_of(placed, "train").batches(order, seed=0)]
        for order in ([torch.tensor([3, 5])], [torch.tensor([3, 3]), torch.tensor([5, 3])])
    )
    assert torch.equal(torch.stack([repeats[0][0], repeats[1][0]]), once[0])
    drawn = [repeats[0][0], repeats[0][1], repeats[1][1]]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(drawn, 2))


def test_reading_leaves_the_global_random_states_alone(no_workers: int) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    batches(as_samples(tiny_workload(), noise=True), tiny_config())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state(legacy=False)) == repr(before[2])


def test_an_augment_that_leaves_samples_out_of_an_odd_batch_is_refused() -> None:
    def pairs(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        even = len(inputs) // 2 * 2
        return inputs[:even], targets[:even]

    workload = to_device(dataclasses.replace(tiny_workload(), augment=pairs), device=CPU, dtype=torch.float32)
    message = r"^augment must return as many samples as it is given, 5, got \(4, 6\); "
    with pytest.raises(DataError, match=message):
        list(training_batches(workload, tiny_config(), epoch=0, device=CPU, dtype=torch.float32))


def test_a_pass_that_is_broken_off_leaves_the_next_one_as_it_is(workers: int) -> None:
    placed = to_device(as_samples(tiny_workload()), device=CPU, dtype=torch.float32, free=0)
    config = tiny_config()

    def epoch() -> Iterator[Batch]:
        return training_batches(placed, config, epoch=0, device=CPU, dtype=torch.float32)

    whole = list(epoch())
    next(epoch())
    assert_same(list(epoch()), whole)


def test_a_sample_that_cannot_be_read_says_so(workers: int) -> None:
    workload = as_samples(tiny_workload(), Broken)
    placed = to_device(workload, device=CPU, dtype=torch.float32, free=0)
    with pytest.raises(DataError, match=r"^sample 30 raised OSError: sample 30 is broken$"):
        list(training_batches(placed, tiny_config(), epoch=0, device=CPU, dtype=torch.float32))


def test_a_program_ends_although_a_sample_could_not_be_read(tmp_path: Path) -> None:
    script = tmp_path / "read.py"
    script.write_text(READ_A_BROKEN_SAMPLE)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "sample 30 raised OSError: sample 30 is broken\n"), ended.stderr


READ_A_BROKEN_SAMPLE = """
import torch
from test_data import Broken, as_samples
from tiny import tiny_config, tiny_workload

from pipeline.errors import DataError
from pipeline.workloads import streamed
from pipeline.workloads.data import to_device, training_batches

CPU = torch.device("cpu")
streamed._reader_count = lambda: 2
placed = to_device(as_samples(tiny_workload(), Broken), device=CPU, dtype=torch.float32, free=0)
try:
    list(training_batches(placed, tiny_config(), epoch=0, device=CPU, dtype=torch.float32))
except DataError as error:
    print(error)
    kept = error  # and with its traceback the reader
"""


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_sample_that_cannot_be_read_ends_no_trial_but_the_run(rows: int, no_workers: int) -> None:
    placed = to_device(as_samples(tiny_workload(), BrokenLater), device=CPU, dtype=torch.float32, free=0)
    configs = dict.fromkeys(range(2), tiny_config())
    group = LocalExecutor(placed, configs[0], device=CPU, rows=rows).build(configs)
    with pytest.raises(DataError, match="sample 30 raised OSError: sample 30 is broken"):
        [group.train_epoch() for _ in range(10)]


class InPlace(TinyModel):
    """Begins by changing its input, as `nn.ReLU(inplace=True)` in front would."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        return super().forward(inputs.sub_(0.5))


def test_a_model_that_changes_a_batch_in_place_changes_it_for_no_other_trial(no_workers: int) -> None:
    placed = to_device(as_samples(tiny_workload(InPlace)), device=CPU, dtype=torch.float32, free=0)
    configs = {number: tiny_config(Rprop(base_lr=0.01)) for number in range(3)}
    trainer = LocalExecutor(placed, configs[0], device=CPU)
    together, alone = trainer.build(configs), trainer.build({2: configs[2]})
    for _ in range(2):
        assert together.train_epoch()[2] == alone.train_epoch()[2]


def test_a_data_set_that_draws_seldom_is_never_kept(no_workers: int) -> None:
    class Seldom(Samples):
        def __getitem__(self, index: int) -> Sample:
            inputs, target = super().__getitem__(index)
            return (-inputs if random.random() < 1e-9 else inputs), target

    assert is_streamed(to_device(as_samples(tiny_workload(), Seldom), device=CPU, dtype=torch.float32, free=ENOUGH))


def test_an_augmentation_may_draw_from_torchs_global_state() -> None:
    workload = dataclasses.replace(tiny_workload(), augment=lambda inputs, generator: inputs + torch.rand(1))
    placed = to_device(workload, device=CPU, dtype=torch.float32, free=ENOUGH)

    def epoch(number: int) -> list[Batch]:
        return list(training_batches(placed, tiny_config(), epoch=number, device=CPU, dtype=torch.float32))

    state = torch.get_rng_state()
    once, again = epoch(0), epoch(0)
    assert_same(once, again)
    assert not torch.equal(once[0].inputs, epoch(1)[0].inputs)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_worker_processes_leave_signals_to_their_parent(
    monkeypatch: pytest.MonkeyPatch, signal_number: signal.Signals
) -> None:
    use_workers(monkeypatch, 2)
    placed = to_device(as_samples(tiny_workload()), device=CPU, dtype=torch.float32, free=0)
    group = LocalExecutor(placed, tiny_config(), device=CPU).build({0: tiny_config()})
    group.train_epoch()
    children = multiprocessing.active_children()
    assert children
    for child in children:
        assert child.pid is not None
        subprocess.run(["kill", f"-{signal_number.name.removeprefix('SIG')}", str(child.pid)], check=True)
    assert group.train_epoch()[0].finished


@pytest.mark.parametrize("build_model", [TinyModel, lambda: TinyModel(dropout=0.5)])
def test_a_streamed_search_has_the_numbers_of_one_on_the_device(build_model: Any, workers: int) -> None:
    workload = tiny_workload(build_model)
    optimizers: list[Optimizer] = [SGD(base_lr=0.1), AdamW(base_lr=0.01), Rprop(base_lr=0.01)]
    configs = {number: tiny_config(optimizer) for number, optimizer in enumerate(optimizers)}
    found = []
    for free in (ENOUGH, 0):
        placed = to_device(as_samples(workload), device=CPU, dtype=torch.float32, free=free)
        assert is_streamed(placed) == (free == 0)
        executor = LocalExecutor(placed, configs[0], device=CPU)
        assert executor.describe(configs) == "rows 2, plain 1"
        group = executor.build(configs)
        epochs = [group.train_epoch() for _ in range(2)]
        found.append((epochs, group.test(), [group.model_state(number) for number in configs]))
    (epochs, tested, states), (other_epochs, other_tested, other_states) = found
    assert epochs == other_epochs
    assert tested == other_tested
    for one, other in zip(states, other_states, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_and_plain_trials_of_a_group_share_what_is_read(no_workers: int) -> None:
    workload = as_samples(tiny_workload())
    placed = to_device(workload, device=CPU, dtype=torch.float32, free=0)
    configs = {
        0: tiny_config(SGD(base_lr=0.1)),
        1: tiny_config(Rprop(base_lr=0.01)),
        2: tiny_config(Rprop(base_lr=0.02)),
    }
    trainer = LocalExecutor(placed, configs[0], device=CPU)
    group = trainer.build(configs)
    assert trainer.describe(configs) == "rows 1, plain 2"
    train, val = workload.train, workload.val
    assert isinstance(train, Samples)
    assert isinstance(val, Samples)
    group.train_epoch()
    train.read.clear()
    val.read.clear()
    group.train_epoch()
    assert sorted(train.read) == list(range(len(train)))
    assert sorted(val.read) == list(range(len(val)))


def test_the_model_sees_what_preprocess_makes_of_what_augment_makes(no_workers: int) -> None:
    def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + torch.randint(1, 5, (len(inputs), 1), generator=generator)

    plain = tiny_workload()
    workload = dataclasses.replace(plain, augment=augment, preprocess=lambda inputs: 100 * inputs)
    changed, unchanged = batches(workload, tiny_config()), batches(plain, tiny_config())
    for number, (batch, before) in enumerate(zip(changed, unchanged, strict=True)):
        added = batch.inputs / 100 - before.inputs
        assert torch.allclose(added, added.round(), atol=1e-4)
        assert bool(added.round().any()) == (number < 2 * 5)  # in training alone


def test_augmentation_is_another_at_each_step(no_workers: int) -> None:
    drawn: list[list[float]] = []

    def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(torch.rand(3, generator=generator).tolist())
        return inputs

    batches(dataclasses.replace(tiny_workload(), augment=augment), tiny_config())
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn) == 2 * 5
