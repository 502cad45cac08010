"""Training loops of one's own: equal to a workload's training, resumed, pruned, refused; the pages' loops searched."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BODY_AND_HEAD, ONE_GROUP, STEPS_PER_EPOCH, TinyModel, on_device, tiny_config, tiny_workload
from torch import nn
from torch.nn import functional as F

import pipeline.lr_range
import pipeline.search
import pipeline.train
from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput, PipelineError
from pipeline.files.strict_yaml import dumps
from pipeline.search import search
from pipeline.space.config import TrialConfig
from pipeline.space.load import build_space
from pipeline.space.optimizers import SGD, AdamW, Muon
from pipeline.space.param_groups import ParamGroup
from pipeline.space.placement import Placement
from pipeline.space.schedules import OneCycle, Plateau, Scheduler, Step
from pipeline.space.trial import EpochMetrics
from pipeline.strategy import build
from pipeline.study.checkpoint import STATES, Checkpoints
from pipeline.train import train
from pipeline.training.contract import TrialGroup
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.process import can_fork
from pipeline.workloads.custom import call
from pipeline.workloads.data import epoch_order, to_device
from pipeline.workloads.fingerprint import fingerprint
from pipeline.workloads.loop import Epochs, Loop, Trial
from pipeline.workloads.workload import Split

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]
CPU = torch.device("cpu")
PAGE = (Path(__file__).parent.parent / "docs" / "own-loops.md").read_text()
WORKLOAD = on_device(tiny_workload(), device=CPU)
FROZEN_BODY = {**BODY_AND_HEAD, "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
SPACE: dict[str, Any] = {
    "workload": {"name": "own", "function": "python:loop"},
    "epochs": 2,
    "batch_size": 8,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {"sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}},
    "scheduler": {"constant": {}},
    "param_groups": {"all": {"pattern": "*"}},
}


def samples(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    split = getattr(WORKLOAD, name)
    assert isinstance(split, Split)
    return split.inputs, split.targets


def batches(config: TrialConfig, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = samples("train")
    for batch in epoch_order(WORKLOAD, seed=config.seed, epoch=epoch).split(config.batch_size):
        yield inputs[batch], targets[batch]


def evaluated(model: nn.Module) -> dict[str, float]:
    inputs, targets = samples("val")
    with torch.no_grad():
        outputs = model.eval()(inputs)
    hits = (outputs.argmax(dim=1) == targets).double().mean()
    return {"val/loss": F.cross_entropy(outputs, targets).item(), "val/accuracy": hits.item()}


def tiny_loop(trial: Trial) -> Epochs:
    """Train as a `Workload` of the same data does."""
    model = TinyModel()
    metrics: dict[str, Any] = {"val/loss": "minimize", "val/accuracy": "maximize"}
    strategy = trial.strategy(model, steps_per_epoch=STEPS_PER_EPOCH, metrics=metrics)
    for epoch in trial.epochs(keep=[]):
        model.train()
        total = 0.0
        for inputs, targets in batches(trial.config, epoch):
            strategy.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            strategy.step()
            total += loss.item() * len(targets)
        yield {"train/loss": total / 37, **evaluated(model)}


TRAINED: list[int] = []
"""Epochs that `two_models` has trained."""


def two_models(trial: Trial, *, keeps: bool = True) -> Epochs:
    """Train a second model with an optimizer, a scheduler and noise of the loop's own."""
    model, other = TinyModel(), nn.Linear(6, 3)
    strategy = trial.strategy(model, steps_per_epoch=1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    inputs, _ = samples("train")
    for epoch in trial.epochs(keep=[other, optimizer, scheduler, model, strategy] if keeps else None):
        TRAINED.append(epoch)
        noise = torch.randn(3) + random.random() + np.random.rand()
        for one in (strategy, optimizer):
            one.zero_grad()
        loss = (model(inputs) - other(inputs) + noise).square().mean()
        loss.backward()
        strategy.step()
        optimizer.step()
        scheduler.step()
        yield {"val/loss": loss.detach(), "own/lr": scheduler.get_last_lr()[0]}


def loop_of(function: Callable[..., Epochs], **arguments: Any) -> Loop:
    loop = call(function, function.__name__, **arguments)
    assert isinstance(loop, Loop)
    return loop


def group_of(
    function: Callable[..., Epochs], config: TrialConfig | None = None, *, processes: int = 1, **arguments: Any
) -> TrialGroup:
    config = config or tiny_config(param_groups=ONE_GROUP)
    executor = LocalExecutor(loop_of(function, **arguments), config, device=CPU, processes=processes)
    return executor.build({0: config, 1: config} if processes > 1 else {0: config})


def trained(group: TrialGroup, epochs: int) -> list[EpochMetrics]:
    return [group.train_epoch()[0] for _ in range(epochs)]


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(SGD(base_lr=0.1, momentum=0.9), Step(step_size=2)),
        tiny_config(AdamW(base_lr=0.01), OneCycle(interval="step"), clip_grad_norm=0.5),
        tiny_config(SGD(base_lr=0.1), Plateau(metric="val/accuracy", patience=0), param_groups=FROZEN_BODY),
        tiny_config(Muon(base_lr=0.02), clip_grad_norm=0.1),
    ],
    ids=["step", "one cycle and clipping", "plateau and a frozen group", "muon"],
)
def test_a_loop_trains_to_every_digit_of_the_same_training_as_a_workload(config: TrialConfig) -> None:
    loop, plain = group_of(tiny_loop, config), PlainTrials({0: config}, WORKLOAD, device=CPU)
    assert trained(loop, 4) == [plain.train_epoch()[0] for _ in range(4)]
    ours, theirs = loop.model_state(0), plain.model_state(0)
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []
    assert loop.test() == {0: {}}


def test_a_closure_makes_the_same_step_with_its_gradients_clipped() -> None:
    inputs, targets = samples("train")
    losses = []
    for with_closure in (False, True):
        torch.manual_seed(0)
        model = TinyModel()
        strategy = build(tiny_config(Muon(base_lr=0.02), clip_grad_norm=0.1), model, steps_per_epoch=1)

        def closure() -> torch.Tensor:
            strategy.zero_grad()  # noqa: B023
            loss = F.cross_entropy(model(inputs), targets)  # noqa: B023
            loss.backward()
            return loss

        for _ in range(3):
            loss = strategy.step(closure) if with_closure else closure()
            if not with_closure:
                strategy.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("keeps", "again"), [(True, [2, 3]), (False, [0, 1, 2, 3])])
@pytest.mark.parametrize("scheduler", [Step(step_size=1, gamma=0.5), OneCycle(interval="step")], ids=str)
def test_a_loop_goes_on_from_a_checkpoint_to_the_same_numbers(
    keeps: bool, again: list[int], scheduler: Scheduler, tmp_path: Path
) -> None:
    config = tiny_config(SGD(base_lr=0.1, momentum=0.9), scheduler, param_groups=ONE_GROUP)
    whole = group_of(two_models, config, keeps=keeps)
    trained(whole, 2)
    checkpoints = Checkpoints(tmp_path, warn=pytest.fail, share=1)
    checkpoints.save("one.pt", {}, whole.trial_states)
    rest = trained(whole, 2)
    TRAINED.clear()
    resumed = group_of(two_models, config, keeps=keeps)
    state = {"epochs": 2, "trials": next(checkpoints.load())[1][STATES]}
    resumed.load_state_dict(state)
    assert str(resumed.state_dict()) == str(state)
    assert trained(resumed, 2) == rest
    assert again == TRAINED
    for name, value in whole.model_state(0).items():
        assert torch.equal(resumed.model_state(0)[name], value)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_loops_model_can_be_had_before_training_and_from_a_checkpoint(keeps: bool) -> None:
    group, other = group_of(two_models, keeps=keeps), group_of(two_models, keeps=keeps)
    before = group.model_state(0)
    trained(group, 2)
    other.load_state_dict(group.state_dict())
    after = group.model_state(0)
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert torch.equal(other.model_state(0)["head.weight"], after["head.weight"])


def test_a_checkpoint_that_does_not_fit_the_loop_ends_the_search_with_a_remedy() -> None:
    group, other = group_of(two_models), group_of(tiny_loop)
    trained(group, 1)
    other.load_state_dict(group.state_dict())
    with pytest.raises(PipelineError, match="a checkpoint does not fit the loop: it keeps 1 things, and kept 4; if "):
        other.train_epoch()


def test_a_loop_draws_seeded_numbers_and_leaves_the_global_states_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    next_numbers = torch.rand(1).item(), random.random(), np.random.rand()
    histories = []
    for _ in range(2):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        histories.append(trained(group_of(two_models), 2))
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == next_numbers
    assert histories[0] == histories[1]


def without_gradients(trial: Trial) -> Epochs:
    model = TinyModel()
    strategy = trial.strategy(model, steps_per_epoch=1)
    for _ in trial.epochs():
        model(samples("train")[0]).mean().backward()
        strategy.step()
        with torch.no_grad():
            yield {"val/loss": 0.5}


def test_a_yield_without_gradients_turns_them_off_for_no_one_else() -> None:
    trained(group_of(without_gradients), 2)
    assert torch.is_grad_enabled()


def leaves_a_note(trial: Trial, *, folder: str) -> Epochs:
    model = TinyModel()
    strategy = trial.strategy(model, steps_per_epoch=1)
    try:
        for _ in trial.epochs(keep=[]):
            strategy.step()
            yield {"val/loss": 0.5}
    finally:
        notes = len(list(Path(folder).iterdir()))
        Path(folder, f"{notes}").touch()


@pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux, and not beside CUDA")
def test_a_pruned_loop_is_closed_in_its_process(tmp_path: Path) -> None:
    group = group_of(leaves_a_note, processes=2, folder=str(tmp_path))
    group.train_epoch()
    group.drop(1)
    assert list(group.train_epoch()) == [0]
    assert len(list(tmp_path.iterdir())) == 1
    group.drop(0)  # there is no next epoch
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loop_is_closed_after_its_last_epoch(tmp_path: Path) -> None:
    group = group_of(leaves_a_note, folder=str(tmp_path))
    trained(group, 4)
    assert len(list(tmp_path.iterdir())) == 1


def stubborn(trial: Trial) -> Epochs:
    strategy = trial.strategy(TinyModel(), steps_per_epoch=1)
    try:
        for _ in trial.epochs():
            strategy.step()
            yield {"val/loss": 0.5}
    finally:
        raise ValueError("cannot be closed")


def test_a_loop_that_raises_as_it_is_closed_is_only_warned_of() -> None:
    group = group_of(stubborn, tiny_config(param_groups=ONE_GROUP, epochs=1))
    with pytest.warns(UserWarning, match="stubborn raised when it was closed: ValueError: cannot be closed, in "):
        assert trained(group, 1)[0].finished


def bad_loop(trial: Trial, *, what: str) -> Epochs:
    model = TinyModel()
    steps = 2 if what == "too few steps" else 1
    strategy = trial.strategy(model, steps_per_epoch=steps)
    if what == "two strategies":
        trial.strategy(model, steps_per_epoch=1)
    elif what == "own end":
        strategy.end_epoch({"val/loss": 0.5})  # type: ignore[attr-defined]
    elif what == "one optimizer":
        strategy.optimizer.step()  # type: ignore[attr-defined]
    elif what == "own epochs":
        for _ in range(4):
            strategy.step()
            yield {"val/loss": 0.5}
    elif what == "before the epochs":
        yield {"val/loss": 0.5}
    keep: dict[str, Any] = {"kept number": [3], "kept state": [WithState()]}
    for epoch in trial.epochs(keep=keep.get(what)):
        for _ in range({"no step": 0, "too many steps": 2}.get(what, 1)):
            strategy.step()
        if what == "too few epochs" and epoch == 1:
            return
        if what == "exit":
            sys.exit(3)
        if what == "raises":
            raise KeyError("reward")
        values: dict[str, Any] = {
            "nan": {"val/loss": float("nan")},
            "no dict": 0.5,
            "nothing": None,
            "no number": {"val/loss": "0.5"},
            "several numbers": {"val/loss": torch.ones(2)},
            "no objective": {"val/los": 0.5},
            "bad name": {"val/loss": 0.5, "a metric!": 1.0},
        }
        yield values.get(what, {"val/loss": 0.5})
        if what == "two yields":
            yield {"val/loss": 0.5}


class WithState:
    def state_dict(self) -> dict[str, Any]:
        return {"values": [np.ones(2)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("what", "epochs", "reason"),
    [
        ("two strategies", 1, "RuntimeError: trial.strategy was asked for a second time; give other models optimizers"),
        (
            "own end",
            1,
            "a loop's schedule moves as the loop yields; leave strategy.end_epoch to scripts without it, in ",
        ),
        ("one optimizer", 1, "'LoopStrategy' object has no attribute 'optimizer'"),
        ("own epochs", 1, "the loop must yield once in each epoch of `for epoch in trial.epochs(…)`"),
        ("before the epochs", 1, "the loop must yield once in each epoch of `for epoch in trial.epochs(…)`"),
        ("two yields", 2, "the loop must yield once in each epoch of `for epoch in trial.epochs(…)`"),
        ("too few epochs", 2, "RuntimeError: bad_loop ended after 1 of its 4 epochs"),
        ("no step", 1, "strategy.step() was called 0 times in epoch 1, and steps_per_epoch says 1"),
        ("too few steps", 1, "strategy.step() was called 1 time in epoch 1, and steps_per_epoch says 2"),
        ("too many steps", 1, "was called more often in an epoch than the 1 time of steps_per_epoch, in "),
        ("exit", 1, "SystemExit: 3, in "),
        ("raises", 1, f"KeyError: 'reward', in {__file__}, line "),
        ("nan", 1, "val/loss became nan after epoch 1"),
        ("no dict", 1, "TypeError: the loop must yield a dict such as {'val/loss': 0.5}, got float"),
        ("nothing", 1, "TypeError: the loop must yield a dict such as {'val/loss': 0.5}, got NoneType"),
        ("no number", 1, "TypeError: the loop must yield numbers, got str for val/loss"),
        ("several numbers", 1, "TypeError: the loop must yield numbers, got Tensor for val/loss"),
        ("no objective", 1, "the loop must yield val/loss in each epoch; it yielded val/los; yield it, or name other"),
        ("bad name", 1, "a metric needs a name such as 'val/loss', of letters, digits, '_', '-' and '.', got 'a metri"),
        ("kept number", 1, "trial.epochs(keep=…) takes things with state_dict and load_state_dict, got int"),
        ("kept state", 1, "a checkpoint holds tensors, numbers and texts, and the state of WithState has a ndarray"),
    ],
)
def test_a_bad_loop_ends_its_trial_and_the_reason_says_why(what: str, epochs: int, reason: str) -> None:
    group = group_of(bad_loop, what=what)
    history = trained(group, epochs)
    assert all(epoch.finished for epoch in history[:-1])
    said = history[-1].diverged if what == "nan" else history[-1].failed
    assert reason in str(said)
    assert group.train_epoch() == {}


ONE_MODEL = nn.Linear(2, 1)


def refused_loop(trial: Trial, *, what: str = "") -> Epochs:
    if what == "epochs first":
        for _ in trial.epochs():
            return
    if what == "yields":
        yield {"val/loss": 0.5}
    if what == "ends":
        return
    if what == "raises":
        raise OSError("no such data")
    model: Any = {"shared": ONE_MODEL, "no model": 3, "frozen": nn.Identity()}.get(what, nn.Linear(2, 1))
    if what == "unseeded":
        nn.init.constant_(model.weight, random.SystemRandom().random())
    given: dict[str, Any] = {
        "no steps": {"steps_per_epoch": 0},
        "bad direction": {"metrics": {"val/loss": "down"}},
        "listed metrics": {"metrics": ["val/loss"]},
        "reward": {"metrics": {"val/reward": "maximize"}},
    }
    with contextlib.suppress(Exception):  # does not catch the end of a dry run
        trial.strategy(model, **{"steps_per_epoch": 5, **given.get(what, {})})
    if what in ("no model", "no steps", "bad direction", "listed metrics"):
        trial.strategy(model, **{"steps_per_epoch": 5, **given.get(what, {})})
    raise AssertionError("a dry run ends before")


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("yields", {}, "refused_loop must ask trial.strategy(model, steps_per_epoch=…) for its optimizer before it yi"),
        ("ends", {}, "refused_loop must ask trial.strategy(model, steps_per_epoch=…) for its optimizer before it ends"),
        ("epochs first", {}, "trial.epochs comes after trial.strategy(model, steps_per_epoch=…), in "),
        ("raises", {}, f"workload.function: refused_loop raised OSError: no such data, in {__file__}, line "),
        ("listed metrics", {}, "metrics must be a mapping such as {'val/reward': 'maximize'}, got list, in "),
        ("no model", {}, "TypeError: trial.strategy takes a torch.nn.Module, got int, in "),
        ("no steps", {}, "ValueError: steps_per_epoch must be a whole number of at least 1, got 0, in "),
        ("bad direction", {}, """metrics['val/loss'] must be "minimize" or "maximize", got 'down', in """),
        ("frozen", {}, "workload.model: has no parameter to train"),
        ("shared", {}, "refused_loop must make a new model each time, got the same parameters twice"),
        ("unseeded", {}, "refused_loop must give the same model from the same seed, got weight twice otherwise"),
        ("reward", {}, "objective.metric: unknown metric 'val/loss'; known: val/reward"),
        (
            "reward",
            {"objective": {"metric": "val/reward", "direction": "minimize"}},
            "objective.direction: must be maximize for val/reward, got minimize",
        ),
        ("", {"param_groups": {"head": {"pattern": "head.*"}}}, "pattern 'head.*' matches no parameter; the model has"),
        ("", {"scheduler": {"plateau": {"metric": "val/reward"}}}, "unknown metric 'val/reward'; known: val/loss"),
        (
            "",
            {"scheduler": {"constant": {"warmup": 10, "interval": "step"}}},
            "warmup: must be shorter than the run of 10 steps, got 10",
        ),
        ("", {"precision": "bf16"}, "precision: is what a training loop of one's own does itself, got bf16; remove it"),
        ("", {"accumulate": 2}, "accumulate: is what a training loop of one's own does itself, got 2; remove it"),
        ("", {"ema": 0.9}, "ema: is what a training loop of one's own does itself, got 0.9; remove it"),
    ],
)
def test_a_loop_is_refused_before_anything_is_written(what: str, changes: dict[str, Any], message: str) -> None:
    space = build_space({**SPACE, **changes}, source="mine.yaml", name="mine")
    loop = loop_of(refused_loop, what=what)
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        prepare(space, source="mine.yaml", device="cpu", searching=True, workload=loop)
    assert str(caught.value).startswith("mine.yaml: ")


FILE = """
from pipeline.workloads.loop import Epochs, Trial
import torch


def plain(trial) -> Epochs:
    return []


def loop(trial: Trial, *, size: int = 2) -> Epochs:
    model = torch.nn.Linear(size, 1)
    strategy = trial.strategy(model, steps_per_epoch=1)
    for epoch in trial.epochs(keep=[]):
        strategy.step()
        yield {"val/loss": epoch}
"""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            [pipeline.search.main, "--workload", "my.py:plain"],
            "my.py:plain says `-> Epochs`, so it must be a generator function",
        ),
        ([pipeline.search.main, "--workload", "my.py:lop"], "my.py has no function lop; did you mean loop?"),
        (
            [pipeline.search.main, "--workload", "my.py:loop", "--set", "workload.arguments={sise: 3}"],
            "workload.function: loop raised TypeError: loop() got an unexpected keyword argument 'sise'",
        ),
        (
            [pipeline.lr_range.main, "--workload", "my.py:loop"],
            "workload: a range test trains on a part of the data, which only a Workload has",
        ),
        (
            [pipeline.train.main, "config.yaml", "--test"],
            "loop has no test split; leave --test away",
        ),
    ],
)
def test_a_command_refuses_a_loop_and_writes_nothing(
    command: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(FILE)
    config = {**SPACE, "workload": {"name": "own", "function": "my.py:loop"}, "optimizer": {"sgd": {"base_lr": 0.1}}}
    Path("config.yaml").write_text(dumps(config))
    main, *arguments = command
    with pytest.raises(InvalidInput) as caught, contextlib.redirect_stdout(io.StringIO()):
        main([*arguments, "--device", "cpu"])
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["config.yaml", "my.py"]


def programs() -> dict[str, str]:
    """Return the files of the page, by name."""
    blocks = re.findall(r"```python\n(# my_.*?)```", PAGE, re.DOTALL)
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks}


def functions(file: str) -> dict[str, Any]:
    """Return what a file of the page defines."""
    names: dict[str, Any] = {"__name__": file.removesuffix(".py")}
    exec(programs()[file], names)
    return names


def test_the_gan_of_the_page_is_searched_and_trains_again_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "--workload my_gan.py:gan --trials 20" in PAGE
    Path("my_gan.py").write_text(programs()["my_gan.py"])
    command = "--workload my_gan.py:gan --trials 2 --device cpu --set epochs=2 --set clip_grad_norm=1.0"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert pipeline.search.main([*command.split(), "--set", "workload.arguments={steps: 2}"]) == 0
        assert pipeline.train.main(["mlruns/studies/my_gan-gan-1/best.yaml", "--device", "cpu"]) == 0
    assert "each alone, since it has a training loop of its own" in printed.getvalue()
    assert "repeated      every metric of the search, to the last bit" in printed.getvalue()
    assert set(torch.load("model.pt", weights_only=True)) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.usefixtures("root_with_tables")
def test_the_walk_of_the_page_is_searched_by_its_reward_from_python(tmp_path: Path) -> None:
    assert "--set objective.metric=val/reward --set objective.direction=maximize" in PAGE
    objective = {"metric": "val/reward", "direction": "maximize"}
    reinforce = functions("my_walk.py")["reinforce"]
    space = {**SPACE, "objective": objective}
    result = search(space, workload=reinforce, trials=2, root=tmp_path, device="cpu", quiet=True)
    assert result.best is not None
    assert result.best.value == max(trial.metrics["val/reward"] for trial in result.trials)
    again = train(result, workload=reinforce, device="cpu")
    assert again.metrics == result.best.metrics
    assert isinstance(again.model, nn.Linear)
    assert again.model.weight.abs().max() > 0


def test_the_series_of_the_page_is_learned() -> None:
    config = tiny_config(AdamW(base_lr=0.01), Step(step_size=2), param_groups=ONE_GROUP)
    losses = [
        epoch.metrics["val/loss"] for epoch in trained(group_of(functions("my_series.py")["forecast"], config), 4)
    ]
    assert losses[-1] < 0.5 * losses[0]


def with_closure(trial: Trial) -> Epochs:
    model = nn.Linear(6, 1)
    strategy = trial.strategy(model, steps_per_epoch=1)
    inputs, _ = samples("train")

    def closure() -> torch.Tensor:
        strategy.zero_grad()
        loss: torch.Tensor = (model(inputs).squeeze() - inputs.sum(dim=1)).square().mean()
        loss.backward()
        return loss

    for _ in trial.epochs(keep=[]):
        strategy.step(closure)
        yield {"val/loss": closure().detach()}


def test_a_loop_can_be_searched_with_lbfgs() -> None:
    lbfgs = {"torch.optim:LBFGS": {"base_lr": 1.0, "max_iter": {"choices": [5, 20]}}}
    space = build_space({**SPACE, "optimizer": lbfgs}, source="mine.yaml", name="mine")
    loop = loop_of(with_closure)
    space, executor = prepare(space, source="mine.yaml", device="cpu", searching=True, workload=loop)
    losses = [epoch.metrics["val/loss"] for epoch in trained(executor.build({0: space.example()}), 2)]
    assert losses[-1] < 1e-6


def batches_of_its_size(trial: Trial) -> Epochs:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    steps = 40 // trial.batch_size
    strategy = trial.strategy(model, steps_per_epoch=steps)
    for _ in trial.epochs(keep=[]):
        for _ in range(steps):
            strategy.step()
        yield {"val/loss": 0.5}


def test_a_loop_takes_its_batch_size_and_groups_of_every_kind_from_the_space() -> None:
    sections: dict[str, Any] = {
        "batch_size": {"choices": [8, 20]},
        "scheduler": {"cosine": {"warmup": "20%", "interval": "step"}},
        "param_groups": {"all": {"layers": ["{n}.*"], "layer_decay": 0.5}},
        "no_weight_decay": [{"dims": 1}],
        "optimizer": {"adamw": {"base_lr": 0.1}},
    }
    document = {**SPACE, **sections}
    space = build_space(document, source="mine.yaml", name="mine")
    space, executor = prepare(
        space, source="mine.yaml", device="cpu", searching=True, workload=loop_of(batches_of_its_size)
    )
    assert space.steps_per_epoch == {8: 5, 20: 2}
    for size, steps in ((8, 5), (20, 2)):
        config = dataclasses.replace(space.example(), batch_size=size)
        epoch = executor.build({0: config}).train_epoch()[0]
        assert epoch.failed is None
        assert epoch.step == steps
        assert epoch.lr["all.0"][-1][1] == pytest.approx(0.5 * epoch.lr["all.1"][-1][1])


def test_a_study_notices_that_the_code_of_its_loop_has_changed() -> None:
    parts = fingerprint(loop_of(two_models), TinyModel())
    assert set(parts) == {"code of test_loops.py", "code of tiny.py", "model"}
    assert parts != fingerprint(loop_of(two_models), TinyModel(batch_norm=True))


def test_a_script_of_ones_own_trains_a_config_as_a_search_does(tmp_path: Path) -> None:
    config = tiny_config(AdamW(base_lr=0.01), OneCycle(interval="step"), clip_grad_norm=0.5, param_groups=FROZEN_BODY)
    (tmp_path / "best.yaml").write_text(dumps(config.to_dict()))
    plain = PlainTrials({0: config}, to_device(WORKLOAD, device=CPU, dtype=torch.float32), device=CPU)
    expected = [plain.train_epoch()[0].metrics["val/loss"] for _ in range(4)]
    (block,) = re.findall(r"```python\n(from pipeline.strategy.*?)```", PAGE, re.DOTALL)
    for given in ("'best.yaml'", "config"):
        model = TinyModel()
        model.load_state_dict(PlainTrials({0: config}, WORKLOAD, device=CPU).model_state(0))
        losses: list[float] = []
        epochs = iter(range(4))

        def validate(model: nn.Module) -> float:
            losses.append(evaluated(model)["val/loss"])  # noqa: B023
            return losses[-1]  # noqa: B023

        class Loader:
            def __len__(self) -> int:
                return STEPS_PER_EPOCH

            def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                return batches(config, next(epochs))  # noqa: B023

        names = {"config": config, "model": model, "loader": Loader(), "validate": validate}
        path = repr(str(tmp_path / "best.yaml")) if given == "'best.yaml'" else given
        exec(block.replace('"best.yaml"', path), {**names, "loss_function": F.cross_entropy})
        assert losses == expected


def test_a_script_of_ones_own_is_told_which_arguments_are_of_another_kind() -> None:
    parameters: Any = nn.Linear(2, 2).parameters()
    with pytest.raises(InvalidInput) as refused:
        build(tiny_config(), parameters, steps_per_epoch=0, metrics=["val/loss"])  # type: ignore[arg-type]
    assert [str(problem) for problem in refused.value.problems] == [
        "model: must be a torch.nn.Module, got generator; give the model itself",
        "steps_per_epoch: must be a whole number of at least 1, got 0",
        "metrics: must be a mapping such as {'val/loss': 'minimize'}, got list",
    ]


def test_a_script_of_ones_own_is_told_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=re.escape("param_groups.head: pattern 'head.*' matches no parameter; the")):
        build(tiny_config(), nn.Linear(2, 2), steps_per_epoch=5)
    plateau = tiny_config(scheduler=Plateau(metric="val/accuracy"))
    with pytest.raises(InvalidInput, match="unknown metric 'val/accuracy'; known: val/loss; see the argument metrics"):
        build(plateau, TinyModel(), steps_per_epoch=5)
    build(plateau, TinyModel(), steps_per_epoch=5, metrics={"val/accuracy": "maximize"})
    config = tiny_config(scheduler=Step(step_size=30, gamma=0.1, interval="step")).to_dict()
    (tmp_path / "best.yaml").write_text(dumps(config))
    with pytest.raises(InvalidInput, match="step_size: must be at most the 20 steps of the run, got 30"):
        build(tmp_path / "best.yaml", TinyModel(), steps_per_epoch=5)


def test_a_loop_placed_as_a_search_had_it_repeats_its_numbers() -> None:
    config = tiny_config(param_groups=ONE_GROUP)
    executor = LocalExecutor(loop_of(two_models), config, device=CPU)
    replayed = executor.build({0: config}, placement=[Placement(trainer="plain", threads=1)])
    assert trained(replayed, 4) == trained(executor.build({0: config}), 4)
