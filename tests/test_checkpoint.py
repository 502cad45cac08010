"""Checkpoints: written completely or not at all, and a group resumes from them to the bit."""

from __future__ import annotations

import functools
import gc
import hashlib
import pickle
import re
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tiny import TinyModel, tiny_config, tiny_workload
from torch import Tensor

from pipeline.errors import InvalidInput, StorageError
from pipeline.space.load import space_from_document
from pipeline.space.optimizers import SGD, Adam
from pipeline.space.schedules import (
    SCHEDULERS,
    Constant,
    Cosine,
    CosineWarmRestarts,
    Cyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    Scheduler,
    Step,
)
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.checkpoint import STATES, Checkpoints
from pipeline.study.loop import forget_ended, run_group, store_each
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
EPOCHS = 6
STEP_SIZE = 3
"""In epochs: a schedule that moves every epoch changes the rate after the third."""
SCHEDULES: list[Scheduler] = [
    Constant(warmup=STEP_SIZE),
    Step(step_size=STEP_SIZE, gamma=0.1),
    Step(step_size=STEP_SIZE * 5 + 1, gamma=0.1, interval="step"),
    MultiStep(milestones=(STEP_SIZE, 4)),
    Exponential(gamma=0.7),
    Exponential(gamma=0.97, interval="step"),
    Polynomial(power=2.0),
    Cosine(warmup=STEP_SIZE),
    Cosine(warmup=7, interval="step"),
    CosineWarmRestarts(T_0=STEP_SIZE),
    Linear(start_factor=0.1, total_iters=STEP_SIZE),
    OneCycle(cycle_momentum=True),
    Cyclic(max_lr_ratio=5.0, step_size_up=4, mode="exp_range", gamma=0.9),
    Plateau(metric="val/accuracy", patience=0, cooldown=1),
]


@dataclass
class Folder:
    """A folder of checkpoints that are saved whenever asked, and their warnings."""

    path: Path
    warnings: list[str] = field(default_factory=list)

    def open(self, *, share: float = 1.0) -> Checkpoints:
        return Checkpoints(self.path, warn=self.warnings.append, share=share)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())

    def newest(self) -> Path:
        return max(self.path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "checkpoints")


def saved(folder: Folder, *values: int) -> None:
    for value in values:
        content = {"value": value, "tensor": torch.arange(4)}
        folder.open().save(f"{value:03}.pt", content)


def values(folder: Folder) -> list[int]:
    return [content["value"] for _, content in folder.open().load()]


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_the_last_two_are_kept_and_load_newest_first(folder: Folder) -> None:
    saved(folder, 1, 2, 3, 4)
    assert folder.names() == ["003.pt", "004.pt"]
    assert values(folder) == [4, 3]
    assert folder.warnings == []


@pytest.mark.parametrize("at", [0, 50, 120, 400, -1], ids=["title", "hash", "start", "content", "end"])
def test_a_flipped_bit_in_the_newest_is_found_and_the_one_before_it_loads(folder: Folder, at: int) -> None:
    saved(folder, 1, 2)
    flip_bit(folder.newest(), at)
    assert values(folder) == [1]
    (warning,) = folder.warnings
    assert warning.startswith(f"{folder.path / '002.pt'}: is ")
    assert "damaged" in warning


@pytest.mark.parametrize("size", [0, 10, 60, 500])
def test_a_file_that_was_cut_off_is_damaged(folder: Folder, size: int) -> None:
    saved(folder, 1)
    folder.newest().write_bytes(folder.newest().read_bytes()[:size])
    assert values(folder) == []
    assert "damaged" in folder.warnings[0]


def test_another_format_is_refused_by_its_number(folder: Folder) -> None:
    saved(folder, 1)
    data = folder.newest().read_bytes()
    folder.newest().write_bytes(data.replace(b"format 3\n", b"format 7\n", 1))
    assert values(folder) == []
    assert folder.warnings == [f"{folder.path / '001.pt'}: is of format 7, and this version reads format 3"]


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("code of a checkpoint ran",)


def test_code_in_a_checkpoint_does_not_run(folder: Folder) -> None:
    saved(folder, 1)
    data = folder.newest().read_bytes()
    payload = pickle.dumps(Code(), protocol=2)  # torch's
    title, last = data.partition(b"\n")[0], f"[{len(payload)}]".encode()
    line = f"{hashlib.sha256(payload + last).hexdigest()} {len(last)}".encode()
    folder.newest().write_bytes(b"\n".join([title, line, payload + last]))
    assert values(folder) == []
    assert "001.pt: cannot be loaded: " in folder.warnings[0]


def test_a_checkpoint_that_cannot_be_written_says_why_and_leaves_the_others(folder: Folder) -> None:
    saved(folder, 1)
    (folder.path / "002.pt").mkdir()  # in the way
    with pytest.raises(StorageError, match=r"002\.pt: cannot be written: Is a directory$"):
        saved(folder, 2)
    (folder.path / "002.pt").rmdir()
    assert folder.names() == ["001.pt"]
    assert values(folder) == [1]


def peak_memory_growth(action: Callable[[], object]) -> int:
    """Return how many bytes of memory an action takes at its peak, as the system counts."""

    def status(field: str) -> int:
        (kilobytes,) = re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(kilobytes) * 1024

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux counts it")
def test_saving_takes_one_trials_state_at_a_time_and_loading_one_copy_of_all(folder: Folder) -> None:
    size, trials = 1 << 25, 6

    def states() -> Iterator[tuple[str, Any]]:
        for number in range(trials):
            yield str(number), {"row": torch.full((size // 4,), float(number))}

    assert peak_memory_growth(lambda: folder.open().save("001.pt", {"epoch": 1}, states)) < 1.5 * size
    loaded: list[Any] = []
    assert peak_memory_growth(lambda: loaded.extend(folder.open().load())) < (trials + 2.5) * size
    ((_, content),) = loaded
    assert content["epoch"] == 1
    assert all(torch.equal(content[STATES][number]["row"], state["row"]) for number, state in states())


def test_a_full_disk_in_the_middle_of_a_checkpoint_is_told_and_leaves_the_others(folder: Folder) -> None:
    saved(folder, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match=r"002\.pt: cannot be written: File too large$"):
            folder.open().save("002.pt", {"tensor": torch.zeros(1 << 20), "more": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert folder.names() == ["001.pt"]
    assert values(folder) == [1]


def test_saving_keeps_to_its_share_of_the_time(folder: Folder) -> None:
    assert folder.open(share=1.0).due()
    assert not folder.open(share=1e-9).due()


def test_what_a_killed_writer_left_is_swept_when_the_study_is_locked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    left = store.folder("mine") / "checkpoints" / ".001.pt.x7.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    with store.lock("mine"):
        assert list(left.parent.iterdir()) == []


def test_the_matrix_has_every_scheduler() -> None:
    assert {schedule.name for schedule in SCHEDULES} == SCHEDULERS.keys()


@pytest.mark.parametrize("trainer", [PlainTrials, FusedTrials], ids=["plain", "fused"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.name}-{schedule.interval}")
def test_a_group_goes_on_from_any_epochs_checkpoint_to_the_same_bits(
    folder: Folder, trainer: type[PlainTrials | FusedTrials], schedule: Scheduler
) -> None:
    workload = tiny_workload(lambda: TinyModel(dropout=0.2, batch_norm=True))
    optimizers = {3: Adam(base_lr=0.01), 8: SGD(base_lr=0.1, momentum=0.9)}
    configs = {number: tiny_config(optimizer, schedule, epochs=EPOCHS) for number, optimizer in optimizers.items()}
    uninterrupted = trainer(configs, workload, device=CPU)
    history: list[Mapping[int, EpochMetrics]] = []
    resumed: dict[int, PlainTrials | FusedTrials] = {}
    for epoch in range(EPOCHS):
        if epoch in (0, 1, STEP_SIZE - 1, EPOCHS - 1):
            folder.open().save(f"{epoch}.pt", {}, lambda: uninterrupted.state_dict().items())
            _, content = next(folder.open().load())
            resumed[epoch] = trainer(configs, workload, device=CPU)
            resumed[epoch].load_state_dict(content[STATES])
        history.append(uninterrupted.train_epoch())
    for epoch, group in resumed.items():
        assert [group.train_epoch() for _ in range(epoch, EPOCHS)] == history[epoch:]
        for number in configs:
            assert_same_bits(group.model_state(number), uninterrupted.model_state(number))


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


TRIALS = 8
"""Number of trials, which are proposed four at a time."""
DOCUMENT: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": 4,
    "batch_size": 8,
    "optimizer": {
        "sgd": {"base_lr": {"low": 1e-2, "high": 1.0, "log": True}},
        "adafactor": {"base_lr": {"low": 1e-3, "high": 1e-1, "log": True}},  # never a row
    },
    "scheduler": {"exponential": {"gamma": {"low": 0.1, "high": 0.9}}},
    "param_groups": {"all": {"pattern": "*"}},
    "pruner": {"name": "median", "n_startup_trials": 2, "n_warmup_epochs": 1},
    "sampler": {"name": "random", "group_size": 4},
}
"""A space whose configs also fit the tiny problem."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@functools.cache
def executor() -> LocalExecutor:
    return LocalExecutor(tiny_workload(), space_from_document(DOCUMENT, name="tiny").example(), device=CPU)


def begin(store: Store, **changes: Any) -> Study:
    space = space_from_document({**DOCUMENT, **changes}, name="tiny")
    return store.create(space, name="mine", trials=4 * 4, rules=executor().rules)


def search(
    store: Store,
    *,
    epochs: int | None = None,
    stored: int | None = None,
    trials: int = TRIALS,
    environment: Mapping[str, Any] = MappingProxyType({"torch": "2"}),
) -> tuple[int, list[str]]:
    """Search until all trials have ended, or stop after `epochs` epochs, or die after `stored` stored trials.

    Returns:
        The number of trained epochs, and the warnings.
    """
    study, warnings = store.open("mine"), list[str]()
    trained: list[Mapping[int, EpochMetrics]] = []
    checkpoints = Checkpoints(store.folder("mine") / "checkpoints", warn=warnings.append, share=1.0)
    while len(trained) != epochs and (proposals := study.next_group(trials)):
        for ended in run_group(
            executor().build({number: config for number, (config, _) in proposals.items()}),
            proposals,
            study,
            checkpoints=checkpoints,
            environment=environment,
            on_epoch=trained.append,
            interrupted=lambda: len(trained) == epochs,
            rules=lambda: study.rules,
        ):
            for trial in ended:
                study.add(trial)
                if len(study.ended) == stored:
                    return len(trained), warnings
    forget_ended(checkpoints, study)
    return len(trained), warnings


def outcomes(store: Store) -> list[tuple[Any, ...]]:
    return [outcome(trial) for trial in store.open("mine").ended]


def outcome(trial: EndedTrial) -> tuple[Any, ...]:
    metrics = [epoch.metrics for epoch in trial.epochs]
    return trial.number, trial.params, trial.config, trial.state, trial.reason, trial.value, metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[tuple[Any, ...]]]:
    """Return an uninterrupted search's number of epochs, and its outcomes."""
    store = Store(tmp_path_factory.mktemp("whole"))
    begin(store)
    epochs, warnings = search(store)
    assert warnings == []
    found = outcomes(store)
    assert {state for _, _, _, state, _, _, _ in found} == {TrialState.COMPLETE, TrialState.PRUNED}
    return epochs, found


def files(store: Store) -> list[Path]:
    return sorted((store.folder("mine") / "checkpoints").glob("*"))


def test_a_search_interrupted_after_every_epoch_trains_no_epoch_twice(
    store: Store, whole: tuple[int, list[tuple[Any, ...]]]
) -> None:
    begin(store)
    for _ in range(whole[0]):
        assert search(store, epochs=1) == (1, [])
    assert search(store) == (0, [])
    assert outcomes(store) == whole[1]
    assert files(store) == []


@pytest.mark.parametrize("stored", range(1, TRIALS + 1))
def test_a_search_that_dies_between_two_trials_goes_on_to_the_same(
    store: Store, stored: int, whole: tuple[int, list[tuple[Any, ...]]]
) -> None:
    begin(store)
    search(store, stored=stored)
    _, warnings = search(store)
    assert warnings == []
    assert outcomes(store) == whole[1]
    assert files(store) == []


@pytest.mark.parametrize("refused", [0, 2, TRIALS - 1])
def test_a_trial_that_cannot_be_stored_is_in_a_checkpoint_and_is_not_trained_again(
    store: Store, refused: int, whole: tuple[int, list[tuple[Any, ...]]]
) -> None:
    study, trained = begin(store), list[Mapping[int, EpochMetrics]]()

    def add(*trials: EndedTrial) -> None:
        for trial in trials:
            if trial.number == refused:
                raise StorageError("the database is away")
            study.add(trial)

    checkpoints = Checkpoints(store.folder("mine") / "checkpoints", warn=pytest.fail, share=1e-9)  # else none is due

    def search_on() -> None:
        while proposals := study.next_group(TRIALS):
            ended = run_group(
                executor().build({number: config for number, (config, _) in proposals.items()}),
                proposals,
                study,
                checkpoints=checkpoints,
                environment={"torch": "2"},
                on_epoch=trained.append,
                interrupted=lambda: False,
                rules=lambda: study.rules,
            )
            store_each(ended, add)

    with pytest.raises(StorageError, match=r"^the database is away$"):
        search_on()
    assert len(study.ended) == refused
    epochs, warnings = search(store)
    assert warnings == []
    assert len(trained) + epochs == whole[0]
    assert outcomes(store) == whole[1]


def test_a_damaged_newest_checkpoint_costs_an_epoch_and_changes_nothing(
    store: Store, whole: tuple[int, list[tuple[Any, ...]]]
) -> None:
    begin(store)
    search(store, epochs=3)
    newest = files(store)[-1]
    flip_bit(newest, 700)
    epochs, (warning,) = search(store)
    assert warning == f"{newest}: is damaged: its content is not what was written"
    assert epochs == whole[0] - 2
    assert outcomes(store) == whole[1]


def test_with_every_checkpoint_damaged_the_group_trains_anew(
    store: Store, whole: tuple[int, list[tuple[Any, ...]]]
) -> None:
    begin(store)
    search(store, epochs=3)
    for path in files(store):
        flip_bit(path, 700)
    epochs, warnings = search(store)
    assert len(warnings) == 2
    assert epochs == whole[0]
    assert outcomes(store) == whole[1]


def test_a_checkpoint_of_another_version_of_torch_is_not_used(
    store: Store, whole: tuple[int, list[tuple[Any, ...]]]
) -> None:
    begin(store)
    search(store, epochs=2)
    epochs, warnings = search(store, environment={"torch": "3"})
    assert len(warnings) == 2
    assert "not used, its trials train from the beginning: the torch was 2 and is 3" in warnings[0]
    assert epochs == whole[0]
    assert files(store) == []  # neither what was put aside, when its trials have ended


def test_a_group_goes_on_as_it_was_asked_for_when_more_trials_are_wanted(store: Store) -> None:
    begin(store)
    search(store, epochs=2, trials=3)
    assert search(store, epochs=1) == (1, [])
    assert [path.name for path in files(store)][-1] == "trials-to-000002-epoch-000003.pt"


def test_fewer_trials_than_there_are_leave_the_checkpoint(
    store: Store, whole: tuple[int, list[tuple[Any, ...]]]
) -> None:
    begin(store)
    epochs, _ = search(store, stored=4)
    epochs += search(store, epochs=2)[0]
    assert search(store, trials=3) == (0, [])
    assert search(store)[0] == whole[0] - epochs
    assert outcomes(store) == whole[1]


def test_a_study_of_the_same_name_does_not_take_the_other_ones_checkpoint(store: Store, tmp_path: Path) -> None:
    begin(store)
    search(store, epochs=1)
    store.database.unlink()
    store = Store(store.root)
    begin(store)
    _, (warning,) = search(store, epochs=1)
    assert "it is of another study that had this name" in warning


def test_other_proposals_do_not_take_the_checkpoint(store: Store) -> None:
    begin(store)
    search(store, epochs=1)
    (path,) = files(store)
    content = dict(next(Folder(path.parent).open().load())[1])
    content["trials"][3]["params"] = {**content["trials"][3]["params"], "exponential.gamma": 0.5}
    states = content.pop(STATES)
    Folder(path.parent).open().save(path.name, content, states.items)
    _, (warning,) = search(store, epochs=1)
    assert "trial 3 is proposed otherwise now" in warning


def test_a_checkpoint_of_another_model_is_refused_by_name(store: Store) -> None:
    begin(store)
    search(store, epochs=1)
    (path,) = files(store)
    content = dict(next(Folder(path.parent).open().load())[1])
    for state in content[STATES].values():
        for name in state.keys() & {"row"}:
            state[name] = torch.zeros(5)
    states = content.pop(STATES)
    Folder(path.parent).open().save(path.name, content, states.items)
    with pytest.raises(InvalidInput, match=rf"^{path}: 1 problem\n  does not fit the model: .*; if the model has chan"):
        search(store)
    assert files(store) == [path]
