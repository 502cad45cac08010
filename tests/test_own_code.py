"""Optimizers and schedules of a person's own: read from their signatures, trained, recorded, never loaded unasked."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import own_optimizers
import pytest
import torch
from tiny import RULES, TinyModel, tiny_config, tiny_workload
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import pipeline.export
import pipeline.search
import pipeline.train
from pipeline.app.display import strategy_line
from pipeline.app.options import SearchOptions, read_search
from pipeline.errors import InvalidInput
from pipeline.space import own_code
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.load import build_space, schema_text, space_from_document
from pipeline.space.optimizers import SGD, OwnOptimizer
from pipeline.space.schedules import OwnScheduler
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.strategy import schedule_line
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.store import Store, fingerprint_changes
from pipeline.tracking.record import trial_params
from pipeline.train import train
from pipeline.training.executor import LocalExecutor
from pipeline.training.optim import replay_rates
from pipeline.training.plain import PlainTrials
from pipeline.workloads.data import to_device, training_batches
from pipeline.workloads.fingerprint import fingerprint
from pipeline.workloads.workload import Split

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

CPU = torch.device("cpu")
LION, NOAM, BELOW = "mine.py:Lion", "mine.py:noam", "mine.py:below"
RATE = {"low": 1e-3, "high": 1e-1, "log": True}
OPTIONS: dict[str, Any] = {
    "trials": 5,
    "timeout": None,
    "study": None,
    "root": Path(),
    "device": "auto",
    "rows": None,
    "from_python": False,
    "changed_code": False,
}
TASK = """
from tiny import tiny_workload
from pipeline.workloads.workload import Workload

def tiny() -> Workload:
    return tiny_workload()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder with the person's files; what they add to Python's modules and path leaves with the test."""
    shutil.copy(Path(__file__).parent / "own_optimizers.py", tmp_path / "mine.py")
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own_code, "_LOADED", {})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tmp_path
    for name in ("custom_mine", "custom_task"):
        sys.modules.pop(name, None)


def content(optimizer: Mapping[str, Any], scheduler: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """Return the content of a space: 3 epochs of 5 steps."""
    return {
        "workload": {"name": "own", "function": "task.py:tiny"},
        "epochs": 3,
        "batch_size": 8,
        "objective": {"metric": "val/loss", "direction": "minimize"},
        "optimizer": optimizer,
        "scheduler": scheduler,
        "param_groups": {"head": {"pattern": "head.*", "lr_ratio": 2.0}, "body": {"pattern": "*"}},
        **sections,
    }


def lion(**values: Any) -> dict[str, Any]:
    return {LION: {"base_lr": RATE, **values}}


def noam(**values: Any) -> dict[str, Any]:
    return {NOAM: {"warmup_steps": 4, **values}}


def space_of(optimizer: Mapping[str, Any], scheduler: Mapping[str, Any], **sections: Any) -> SearchSpace:
    return build_space(content(optimizer, scheduler, **sections), source="space", name="space")


def problems_of(optimizer: Mapping[str, Any], scheduler: Mapping[str, Any], **sections: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        space_of(optimizer, scheduler, **sections)
    return [str(problem) for problem in caught.value.problems]


def config_of(**sections: Any) -> TrialConfig:
    """Return a config of both."""
    optimizer = {LION: {"base_lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.1}}
    return space_of(optimizer, noam(interval="step", warmup_steps={"low": 4, "high": 6}), **sections).example()


def write_space(data: Mapping[str, Any]) -> None:
    Path("space.yaml").write_text(json.dumps(data))


def ended_trial(config: TrialConfig) -> EndedTrial:
    """Return a trial that was pruned after an epoch."""
    metrics = {"train/loss": 1.0, "val/loss": 1.0, "val/accuracy": 0.5}
    return EndedTrial(
        number=0,
        config=config,
        params={},
        state=TrialState.PRUNED,
        objective=Objective(),
        reason="worse than half",
        value=None,
        epochs=(EpochMetrics(epoch=1, step=5, metrics=metrics, lr={}),),
        started=1.0,
        ended=2.0,
        environment={},
    )


# What a file says and what the signature says.


def test_hyperparameters_are_those_of_the_signature_with_its_defaults() -> None:
    space = space_of(lion(weight_decay={"low": 0, "high": 1}), noam())
    values = space.optimizers[LION]
    assert values["betas"] == (0.9, 0.99)
    assert values["maximize"] is False
    assert (values["weight_decay"].low, type(values["weight_decay"].low)) == (0.0, float)
    assert "foreach" not in values  # a default of None is not passed
    assert space.schedulers[NOAM] == {"interval": "epoch", "warmup_steps": 4, "power": -0.5}


def test_a_list_is_passed_as_a_tuple_and_stays_a_list_of_a_config() -> None:
    config = config_of()
    assert config.optimizer.arguments() == {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": False}
    written = config.to_dict()["optimizer"][LION]
    assert written == {"base_lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.1, "maximize": False}
    choices = {"choices": [[0.9, 0.99], [0.95, 0.98]]}
    assert space_of(lion(betas=choices), noam()).example().optimizer.arguments()["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "expected"),
    [
        (lion(betsa=[0.9, 0.99]), noam(), [f"optimizer.{LION}.betsa: unknown key; did you mean betas?"]),
        (lion(maximize=1), noam(), [f"optimizer.{LION}.maximize: must be true or false, got 1"]),
        (lion(weight_decay="x"), noam(), [f"optimizer.{LION}.weight_decay: must be a finite number, got the text 'x'"]),
        (lion(betas={"a": 1}), noam(), [f"optimizer.{LION}.betas.low: is missing and has no default; add it",
                                        f"optimizer.{LION}.betas.high: is missing and has no default; add it",
                                        f"optimizer.{LION}.betas.a: unknown key; known: low, high, log, step"]),
        (lion(betas=[math.inf]), noam(), [f"optimizer.{LION}.betas: must be a finite number, true, false, text, or a "
                                          "list of these, got [inf]"]),
        ({LION: {}}, noam(), [f"optimizer.{LION}.base_lr: is missing and has no default; add it"]),
        ({LION: {"base_lr": 0}}, noam(), [f"optimizer.{LION}.base_lr: must be > 0, got 0"]),
        ({LION: 3}, {NOAM: {}}, [f"optimizer.{LION}: must be a mapping, `key: value`, got 3",
                                 f"scheduler.{NOAM}.warmup_steps: is missing and has no default; add it"]),
        (lion(), noam(warmup_steps={"low": 1.5, "high": 3}), [f"scheduler.{NOAM}.warmup_steps.low: must be a whole "
                                                              "number, got 1.5"]),
        (lion(), noam(interval="day"), [f"scheduler.{NOAM}.interval: must be one of epoch, step, got the text 'day'"]),
        (lion(), {"mine.py:naom": {}}, ["scheduler.mine.py:naom: mine.py has no naom; did you mean noam?"]),
        ({"sdg": {"base_lr": RATE}, **lion()}, noam(), ["optimizer.sdg: unknown optimizer; did you mean sgd?"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_signature_does_not_have_is_refused(
    optimizer: dict[str, Any], scheduler: dict[str, Any], expected: list[str]
) -> None:
    assert problems_of(optimizer, scheduler) == expected


def test_a_signature_that_takes_anything_checks_no_name() -> None:
    values = {"base_lr": RATE, "rho": 0.5, "steps": {"low": 1, "high": 3}, "share": {"low": 0.0, "high": 1}}
    domains = space_of({"mine.py:Rateless": values}, noam()).optimizers["mine.py:Rateless"]
    assert [type(domains[name].low) for name in ("steps", "share")] == [int, float]  # as the file has them
    assert domains["rho"] == 0.5


def test_the_schema_for_editors_allows_names_of_ones_own() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    assert list(validator.iter_errors(content(lion(betas=[0.9, 0.99]), noam()))) == []
    assert not validator.is_valid(content({"Lion": {"base_lr": 0.1}}, noam()))


def test_rules_of_built_in_schedules_are_not_those_of_arguments_with_their_names() -> None:
    Path("mine.py").write_text("def f(step, total, warmup=9, gamma=1.0, eta_min=5.0): return 1.0\n")
    space = space_of({"sgd": {"base_lr": RATE}}, {"mine.py:f": {"warmup": 99}})
    assert schedule_line(space.example()) == "f warmup 99, gamma 1, eta_min 5"


def test_a_value_is_enqueued_and_set_like_any_other() -> None:
    enqueue = [
        {"optimizer": {LION: {"base_lr": 0.01, "betas": [0.5, 0.6]}}},
        {"scheduler": {NOAM: {"warmup_steps": 9}}},
    ]
    betas = {"choices": [[0.9, 0.99], [0.5, 0.6]]}
    (problem,) = problems_of(lion(betas=betas), noam(warmup_steps={"low": 2, "high": 8}), enqueue=enqueue)
    assert problem == f"enqueue.1.scheduler.{NOAM}.warmup_steps: must be within [2, 8], as in this space, got 9"
    space = space_of(lion(betas=betas), noam(), enqueue=enqueue[:1])
    assert space.enqueue == ({f"{LION}.base_lr": 0.01, f"{LION}.betas": "[0.5, 0.6]"},)


# Stored studies and configs, without their code.


def test_a_config_and_a_stored_space_are_read_without_their_code(folder: Path) -> None:
    space = space_of(lion(betas={"choices": [[0.9, 0.99], [0.5, 0.6]]}), noam(power={"low": -1, "high": 0}))
    (folder / "mine.py").unlink()
    own_code._LOADED.clear()
    again = space_from_document(json.loads(json.dumps(space.document)), name=space.name)
    assert again == space
    config = space.example()
    assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert own_code._LOADED == {}


def begin_study() -> SearchOptions:
    """Store a study with one trial, of a space with changes; return the options of a search that goes on."""
    first = {"optimizer": {LION: {"base_lr": 0.01}}, "scheduler": {NOAM: {"warmup_steps": 5}}}
    optimizers = {"sgd": {"base_lr": RATE}, **lion(betas={"choices": [[0.9, 0.99], [0.5, 0.6]]})}
    schedulers = {"constant": {}, **noam(warmup_steps={"low": 4, "high": 6}, interval="step")}
    data = content(optimizers, schedulers, enqueue=[first, first])
    Path("space.yaml").write_text(json.dumps(data))
    changes: dict[str, Any] = {f"optimizer.{LION}.weight_decay": 1e-5, "seed": 3}
    given = {**OPTIONS, "study": "space-1", "trials": 3, "device": "cpu"}
    options = read_search(space="space.yaml", workload=None, overrides=changes, **given)
    study = Store(Path()).create(options.space, name="space-1", trials=3, rules=RULES)
    study.add(ended_trial(options.space.example()))
    return options


def test_a_stored_study_is_exported_without_its_code_and_goes_on_only_with_it(folder: Path) -> None:
    begin_study()
    sentinel = folder / "loaded"
    text = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(f"{text}\nopen({str(sentinel)!r}, 'w').close()\n")
    assert pipeline.export.main(["--trial", "0", "--out", "one.yaml"]) == 0
    assert pipeline.export.main(["--trial", "0", "--format", "python"]) == 0
    unnamed = re.escape("trains with task.py:tiny, code that is run only when you name its file")
    with pytest.raises(InvalidInput, match=unnamed):
        pipeline.export.main(["--trial", "0", "--format", "mlflow", "--out", "model"])
    with pytest.raises(InvalidInput) as caught:
        pipeline.search.main(["--study", "space-1", "--workload", "task.py:tiny"])
    (problem,) = caught.value.problems
    assert str(problem) == (
        f"space-1: trains with {LION} and {NOAM}, code that is run only when you name it: add --space FILE, its file, "
        "and the changes to it"
    )
    assert not sentinel.exists()
    changes = ["--seed", "3", "--set", f"optimizer.{LION}.weight_decay=0.5"]
    with pytest.raises(InvalidInput, match=re.escape("weight_decay: the study has 1e-05, this search 0.5")):
        pipeline.search.main(["--study", "space-1", "--space", "space.yaml", *changes])
    assert sentinel.exists()  # since the person named the file


def test_a_change_of_the_code_changes_the_fingerprint(folder: Path) -> None:
    workload, prints = to_device(tiny_workload(), device=CPU, dtype=torch.float32), []
    for text in ("", "# a comment", "STEPS = 4"):
        (folder / "mine.py").write_text(f"{(folder / 'mine.py').read_text()}\n{text}\n")
        code = [own_code.loaded(name) for name in space_of(lion(), noam()).own_code()]
        prints.append(fingerprint(workload, workload.build_model(), code))
    assert [sorted(part for part, _ in fingerprint_changes(prints[0], other)) for other in prints] == [
        [],
        [],
        ["code of mine.py"],
    ]


def test_a_trial_alone_does_not_load_the_code_that_it_names() -> None:
    config = config_of()
    own_code._LOADED.clear()
    with pytest.raises(InvalidInput, match="Lion is code that is loaded only for a file that you name") as caught:
        train(config, workload=tiny_workload, device="cpu", quiet=True)
    assert [problem.place for problem in caught.value.problems] == [f"optimizer.{LION}", f"scheduler.{NOAM}"]


def test_a_search_from_python_names_its_space_by_python_again() -> None:
    write_space(content(lion(), noam()))
    given = {**OPTIONS, "from_python": True}
    own = read_search(space="space.yaml", workload=tiny_workload, overrides={"seed": 3}, **given)
    call = "search(study='a', trials=5, space='space.yaml', workload=tiny_workload, overrides={'seed': 3})"
    assert own.resume("a") == call
    own = read_search(space=content(lion(), noam()), workload=None, overrides={}, **given)
    assert own.resume("a") == "search(study='a', trials=5, space=…)"


# Training.


def train_by_hand(config: TrialConfig) -> list[dict[str, float]]:
    """Train a config of Lion and noam by a loop as a person writes it; return the losses of each epoch."""
    workload = tiny_workload()
    assert isinstance(workload.val, Split)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = TinyModel()
    groups = [{"params": model.head.parameters(), "lr": 0.02}, {"params": model.hidden.parameters(), "lr": 0.01}]
    optimizer = own_optimizers.Lion(groups, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: own_optimizers.noam(step, 15, warmup_steps=4))
    history = []
    for epoch in range(3):
        total = 0.0
        batches = training_batches(workload, config, epoch=epoch, device=CPU, dtype=torch.float32)
        for batch in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() * batch.size
        with torch.no_grad():
            val = F.cross_entropy(model(workload.val.inputs), workload.val.targets).item()
        history.append({"train/loss": total / 37, "val/loss": val})
    return history


def test_the_metrics_are_those_of_a_loop_written_by_hand() -> None:
    config = config_of()
    trials = PlainTrials({0: config}, tiny_workload(), device=CPU)
    epochs = [trials.train_epoch()[0] for _ in range(3)]
    ours = [{name: epoch.metrics[name] for name in ("train/loss", "val/loss")} for epoch in epochs]
    assert ours == train_by_hand(config)
    rates = [rate for epoch in epochs for _, rate in epoch.lr["head"]]
    assert rates == [0.02 * min((n + 1) ** -0.5, (n + 1) * 4**-1.5) for n in range(15)]
    assert replay_rates(config, epochs, directions={}) == tuple(epochs)


def test_training_goes_on_from_a_saved_state_as_if_it_had_never_stopped() -> None:
    config = config_of()
    whole, first, rest = (PlainTrials({0: config}, tiny_workload(), device=CPU) for _ in range(3))
    expected = [whole.train_epoch()[0] for _ in range(3)]
    first.train_epoch()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    rest.load_state_dict(torch.load(file, weights_only=True))
    assert [rest.train_epoch()[0] for _ in range(2)] == expected[1:]


def test_an_optimizer_that_draws_random_numbers_repeats_its_trial() -> None:
    config = space_of({"mine.py:Noisy": {"base_lr": RATE}}, {"constant": {}}).example()
    metrics = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        trials = PlainTrials({0: config}, tiny_workload(), device=CPU)
        metrics.append([trials.train_epoch()[0].metrics for _ in range(2)])
        assert torch.equal(torch.get_rng_state(), state)
    assert metrics[0] == metrics[1]
    assert metrics[0][0] != metrics[0][1]


def test_an_own_optimizer_and_an_own_schedule_train_plain() -> None:
    config = config_of()
    both, one, none = config, tiny_config(SGD(base_lr=0.1), config.scheduler), tiny_config(SGD(base_lr=0.1))
    executor = LocalExecutor(tiny_workload(), none, device=CPU)
    assert executor.why_plain(none) is None
    assert executor.why_plain(one) == f"{NOAM} may raise, which would end every row of a matrix"
    assert executor.why_plain(both) == f"{LION} has no update rule for rows"
    assert executor.describe({0: both, 1: one, 2: none}) == "rows 1, plain 2"


def test_a_search_goes_on_by_its_command_trains_records_and_repeats(
    mlflow_tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(mlflow_tables, Path())
    begin, _, command = begin_study().resume("space-1").partition(" pipeline.search ")
    assert begin == "python -m"
    assert pipeline.search.main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert f"those of {LION} and {NOAM} each alone" in printed
    assert "goes on from trial 1" in printed
    study = Store(Path()).open("space-1")
    assert len(study.ended) == 3
    trial = study.ended[1]
    assert trial.state is TrialState.COMPLETE
    assert strategy_line(trial.config, study.space) == f"{LION} 1.0e-02, noam warmup_steps 5, power -0.5, head ×2"
    searched = ("optimizer", "scheduler", "base_lr", "Lion.betas", "noam.warmup_steps")
    assert study.space.searched_hyperparameters() == searched
    assert study.space.shared_hyperparameters() == searched[:3]
    recorded = trial_params(trial.config)
    assert recorded["optimizer"] == LION
    assert recorded["Lion.betas"] in ("[0.9, 0.99]", "[0.5, 0.6]")
    assert (recorded["noam.warmup_steps"], recorded["interval"], recorded["base_lr"]) == ("5", "step", "0.01")

    assert pipeline.export.main(["--trial", "1", "--out", "one.yaml"]) == 0
    assert pipeline.train.main(["one.yaml", "--device", "cpu"]) == 0
    assert "repeated      every metric of the search, to the last bit" in capsys.readouterr().out


def test_a_trial_whose_code_raises_fails_alone_with_the_reason() -> None:
    betas, floors = {"choices": [[0.9, 0.99], [1.5, 0.99]]}, {"choices": [0.0, -1.0]}
    good = space_of(lion(betas=betas), {BELOW: {"floor": floors}}, epochs=4).example()
    assert isinstance(good.optimizer, OwnOptimizer)
    bad_optimizer = OwnOptimizer(name=LION, base_lr=0.01, hyperparameters={"betas": (1.5, 0.99)})
    bad_schedule = OwnScheduler(name=BELOW, hyperparameters={"floor": -1.0})
    configs = {
        0: good,
        1: dataclasses.replace(good, optimizer=bad_optimizer),
        2: dataclasses.replace(good, scheduler=bad_schedule),
    }
    with contextlib.closing(LocalExecutor(tiny_workload(), good, device=CPU, processes=2)) as executor:
        group = executor.build(configs)
        epochs = [group.train_epoch() for _ in range(4)]
    assert [list(results) for results in epochs] == [[0, 1, 2], [0, 2], [0, 2], [0]]
    assert (epochs[0][1].failed or "").startswith("ValueError: betas must be below 1, got (1.5, 0.99), in ")
    rule = "a factor must be a finite number of at least 0"
    assert epochs[2][2].failed == f"FactorError: {BELOW} returned -0.5 at step 3 of 4; {rule}"
    assert all(results[0].finished for results in epochs)


def test_values_of_ones_own_are_plain_values() -> None:
    config = config_of()
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(config.optimizer, OwnOptimizer)
    assert isinstance(config.scheduler, OwnScheduler)
    assert re.fullmatch(r"noam warmup_steps 4, power -0\.5", str(config.scheduler))
