"""The command lines end to end: search, go on, train again, export."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny import RULES
from torch import nn
from torch.nn import functional as F

import pipeline.export
import pipeline.search
import pipeline.train
from pipeline.app.answer import Answer
from pipeline.app.display import spread
from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput, StudyBusy, TrainingEnded
from pipeline.files import strict_yaml
from pipeline.files.locks import folder_locked
from pipeline.space.load import load_config, load_space
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.loop import run_group
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.executor import LocalExecutor
from pipeline.workloads.digits import DigitsMLP, digits
from pipeline.workloads.workload import Split

if TYPE_CHECKING:
    from mlflow.entities import Run

# MLflow's own use of SQLAlchemy 2.1 and, while it is imported, of types.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

TRIALS = 12
"""Proposed three at a time."""
EPOCHS = 3
STEPS_PER_EPOCH = 20
SPACE = """
workload: {name: digits, model: mlp}
epochs: 3
batch_size: 64
optimizer:
  sgd: {base_lr: {low: 1e-2, high: 1.0, log: true}, momentum: {choices: [0.0, 0.9]}}
  adamw: {base_lr: {low: 1e-4, high: 1e-1, log: true}}
scheduler:
  step: {step_size: {low: 1, high: 2}, gamma: {low: 0.05, high: 0.9, log: true}}
param_groups:
  head: {pattern: "fc.*", lr_ratio: {low: 0.1, high: 10, log: true}}
  body: {pattern: "*"}
sampler: {name: tpe, n_startup_trials: 4, group_size: 3}
pruner: {name: successive_halving, min_resource: 2, max_resource: 2}
confirm: {share: 0.6}
"""


@dataclass(frozen=True)
class Found:
    """A search that ran to its end in a folder of its own."""

    root: Path
    printed: str

    @property
    def study(self) -> Study:
        return Store(self.root).open(None)

    @property
    def answer(self) -> Answer:
        return Answer.of(self.study)

    @property
    def best(self) -> EndedTrial:
        assert self.answer.trial is not None
        return self.answer.trial

    @property
    def best_yaml(self) -> Path:
        return self.root / "mlruns" / "studies" / "small-1" / "best.yaml"


@pytest.fixture(scope="module", autouse=True)
def _surroundings() -> Iterator[None]:
    """One thread, which `train` sets to what the search had, and no MLflow server of the user's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield
    torch.set_num_threads(threads)


def write_space(root: Path) -> Path:
    path = root / "small.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    root = tmp_path_factory.mktemp("search")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = pipeline.search.main(
            ["--space", str(write_space(root)), "--trials", str(TRIALS), "--root", str(root), "--device", "cpu"]
        )
    assert status == 0
    return Found(root, printed.getvalue())


def outcomes(trials: list[EndedTrial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.params, t.config, t.state, t.reason, t.value, t.metrics, len(t.epochs)) for t in trials]


def test_a_search_leaves_its_record_and_says_where(found: Found) -> None:
    for name in ("mlflow.db", "mlruns/optuna.db", "mlruns/studies/small-1/best.yaml"):
        assert (found.root / name).is_file()
    assert not (found.root / "mlruns/optuna.db-wal").exists()  # whoever copies the database has all trials
    first, *_ = found.printed.splitlines()
    assert first == "digits · mlp · 3 epochs · cpu, 3 trials at once   study small-1, seed 0"
    assert f"{TRIALS}/{TRIALS} trials   " in found.printed
    assert (
        f"best config   {found.best_yaml}   train it again: python -m pipeline.train {found.best_yaml}" in found.printed
    )
    assert (
        f"python -m pipeline.ui --root {found.root}   then open http://127.0.0.1:5000/#/experiments/1" in found.printed
    )


@pytest.mark.usefixtures("root_with_tables")
def test_a_search_that_mlflow_lacks_says_so_and_the_same_command_logs_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--space", str(write_space(tmp_path)), "--trials", "2", "--study", "s", "--root", str(tmp_path)]
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert pipeline.search.main(command) == 1
    said = capsys.readouterr().err
    assert "Connection refused; 2 trials and the summary are not recorded" in said
    assert "run the same command again" in said
    assert pipeline.search.main(command) == 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert len(client.search_runs(["1"], "tags.`hpo.kind` = 'trial' and attributes.status != 'RUNNING'")) == 2


def test_a_search_ends_every_trial_and_prunes_some(found: Found) -> None:
    trials = found.study.ended
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    pruned = [trial for trial in trials if trial.state is TrialState.PRUNED]
    assert {trial.reason for trial in pruned} == {"successive_halving after epoch 2"}
    assert {len(trial.epochs) for trial in pruned} == {2}


def test_best_yaml_is_the_best_trials_config_and_what_was_found(found: Found) -> None:
    best = found.best
    _, config, noted = load_config(found.best_yaml)
    assert config == best.config
    assert noted["trial"] == best.number
    assert noted["metrics"] == best.metrics
    assert noted["metrics"]["val/accuracy"] == best.value
    assert found.study.best()[0].value == max(trial.value or 0 for trial in found.study.ended)
    assert [run["epochs"] for run in noted["environment"]["placement"]] == [2, 1]
    comment = f"# Trial {best.number} of study small-1: val/accuracy {best.value:.4f} after 3 epochs, complete."
    assert found.best_yaml.read_text().startswith(comment)


def mlflow_runs(root: Path) -> tuple[list[Run], dict[int, Run], Any]:
    """Return the parents, the trials by number, and a function from run, group to the points of its rate."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits-mlp")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id]))
    parents = [run for run in runs if run.data.tags["hpo.kind"] == "study"]
    children = {int(run.data.tags["hpo.trial"]): run for run in runs if run.data.tags["hpo.kind"] == "trial"}
    assert all(run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id for run in children.values())

    def lr_history(run: Run, group: str) -> list[tuple[int, float]]:
        history = client.get_metric_history(run.info.run_id, f"lr/{group}")
        return sorted((point.step, point.value) for point in history)

    return parents, children, lr_history


def test_the_confirmation_that_is_printed_is_the_one_that_mlflow_has(found: Found) -> None:
    from mlflow import MlflowClient

    client, table = MlflowClient(f"sqlite:///{found.root / 'mlflow.db'}"), found.answer.confirmation.table
    runs = client.search_runs(["1"], "tags.`hpo.kind` = 'confirmation'")
    assert len(runs) == len(table) * 3
    for confirmed in table:
        label, shown = confirmed.candidate.label, spread(confirmed)
        mine = [run for run in runs if run.data.tags["hpo.confirms"] == label]
        values = [run.data.metrics["val/accuracy"] for run in mine]
        assert sorted(run.data.params["seed"] for run in mine) == ["1", "2", "3"]
        assert all(run.info.run_name.startswith(f"{label}, seed {run.data.params['seed']}: ") for run in mine)
        assert shown == f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
        assert re.search(rf"^{re.escape(label)} +{shown}  ", found.printed, re.MULTILINE)
    (winner,) = client.search_runs(["1"], "tags.`hpo.winner` = 'yes'")
    assert winner.data.tags["hpo.trial"] == str(found.best.number)
    (_, _, noted) = load_config(found.best_yaml)
    assert noted["confirmed"]["mean"] == table[0].mean == winner.data.metrics["confirmed"]
    assert list(noted["confirmed"]["values_by_seed"].values()) == list(table[0].values.values())
    means = [confirmed.mean or 0.0 for confirmed in table]
    assert means == sorted(means, reverse=True)


def pytorch_rates(trial: EndedTrial, group: str) -> list[tuple[int, float]]:
    """Return the rate at the last step of each epoch that PyTorch's StepLR gives."""
    hyperparameters = trial.config.hyperparameters()
    rate = hyperparameters["base_lr"] * hyperparameters[f"lr_ratio.{group}"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer, step_size=hyperparameters["step_size"], gamma=hyperparameters["gamma"]
    )
    points = []
    for epoch in range(1, len(trial.epochs) + 1):
        points.append((STEPS_PER_EPOCH * epoch, optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return points


def test_mlflow_has_a_run_per_trial_below_the_studys_with_pytorchs_rates(found: Found) -> None:
    parents, children, lr_history = mlflow_runs(found.root)
    trials = found.study.ended
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert sorted(children) == list(range(TRIALS))
    for trial in trials:
        run = children[trial.number]
        assert run.data.tags["hpo.state"] == trial.state.value
        assert run.data.metrics["val/accuracy"] == trial.metrics["val/accuracy"]
        for group in ("head", "body"):
            assert lr_history(run, group) == pytorch_rates(trial, group)


def test_training_best_yaml_repeats_the_search_to_the_last_bit(
    found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pipeline.train.main([str(found.best_yaml), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "repeated      every metric of the search, to the last bit\n" in printed
    assert "differs" not in printed
    assert "test" not in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_model_that_could_not_be_saved_is_not_trained(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(InvalidInput, match=r"model\.pt: cannot be written: Is a directory; name another"):
        pipeline.train.main([str(found.best_yaml), "--device", "cpu", "--out", str(tmp_path / "model.pt")])
    assert capsys.readouterr().out == ""


def test_a_trained_model_loads_and_scores_what_was_printed(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        pipeline.train.main([str(found.best_yaml), "--device", "cpu", "--out", str(tmp_path / "model.pt"), "--test"])
        == 0
    )
    (tested,) = re.findall(r"^test +test/loss (\S+)  test/accuracy (\S+)$", capsys.readouterr().out, re.MULTILINE)
    model = DigitsMLP()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    model.eval()
    workload = digits("mlp")
    assert isinstance(workload.test, Split)
    assert isinstance(workload.val, Split)
    outputs = model(workload.test.inputs)
    loss = F.cross_entropy(outputs, workload.test.targets).item()
    accuracy = (outputs.argmax(dim=1) == workload.test.targets).double().mean().item()
    assert tested == (f"{loss:.4f}", f"{accuracy:.4f}")
    val_accuracy = (model(workload.val.inputs).argmax(dim=1) == workload.val.targets).double().mean().item()
    assert val_accuracy == found.best.value


def test_the_winners_model_is_a_file_and_an_artifact_of_the_study(found: Found) -> None:
    from mlflow import MlflowClient

    noted = load_config(found.best_yaml)[2]
    models = {trial.number for trial in found.study.ended if trial.state is TrialState.COMPLETE}
    kept = {int(path.stem.removeprefix("trial-")) for path in (found.best_yaml.parent / "models").iterdir()}
    assert {noted["trial"], found.study.best()[0].number} <= kept <= models
    assert len(kept) <= 4
    file = found.best_yaml.parent / "models" / f"trial-{noted['trial']:06}.pt"
    model, workload = DigitsMLP(), digits("mlp")
    model.load_state_dict(torch.load(file, weights_only=True))
    assert isinstance(workload.val, Split)
    hits = model.eval()(workload.val.inputs).argmax(dim=1) == workload.val.targets
    assert hits.double().mean().item() == noted["metrics"]["val/accuracy"]
    ((study,), _, _) = mlflow_runs(found.root)
    artifacts = MlflowClient(f"sqlite:///{found.root / 'mlflow.db'}").list_artifacts(study.info.run_id)
    assert {"best.yaml", file.name} <= {artifact.path for artifact in artifacts}


def test_export_prints_the_best_trial_as_best_yaml_has_it(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.export.main(["--root", str(found.root)]) == 0
    assert capsys.readouterr().out == found.best_yaml.read_text()


def test_export_as_json_has_the_content_of_best_yaml_and_is_a_config(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "best.json"
    assert pipeline.export.main(["--root", str(found.root), "--format", "json", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}   train it: python -m pipeline.train {out}\n"
    assert json.loads(out.read_text()) == strict_yaml.load(found.best_yaml) == strict_yaml.load(out)
    assert load_config(out)[1:] == load_config(found.best_yaml)[1:]
    assert pipeline.export.main([str(out)]) == 0
    assert capsys.readouterr().out == found.best_yaml.read_text().partition("\n")[2]
    assert pipeline.export.main([str(found.best_yaml)]) == 0
    assert capsys.readouterr().out == found.best_yaml.read_text()


def test_export_as_python_says_which_trial_it_is(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.export.main(["--root", str(found.root), "--format", "python"]) == 0
    code = capsys.readouterr().out
    head, _, body = code.partition("\n# Trained with ")
    assert head.replace("\n# ", " ") == found.best_yaml.read_text().partition("\n")[0]
    assert body.startswith(f"torch {torch.__version__} on cpu, seed 0.\n\nimport torch\n")
    assert repr(load_config(found.best_yaml)[1].optimizer.base_lr) in code
    assert pipeline.export.main([str(found.best_yaml), "--format", "python"]) == 0
    assert capsys.readouterr().out == code


def test_export_for_mlflow_saves_the_model_of_the_trial_for_any_batch_size(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    out = tmp_path / "model"
    options = ["--format", "mlflow", "--out", str(out), "--device", "cpu"]
    assert pipeline.export.main(["--root", str(found.root), *options]) == 0
    assert "repeated      every metric of the search, to the last bit" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    workload, loaded = digits("mlp"), mlflow.pyfunc.load_model(str(out))
    assert isinstance(workload.val, Split)
    images, labels = workload.val.inputs.numpy(), workload.val.targets.numpy()
    hits = [
        loaded.predict(images[first:last]).argmax(axis=1) == labels[first:last] for first, last in ((0, 7), (7, 270))
    ]
    metrics = load_config(found.best_yaml)[2]["metrics"]
    assert np.concatenate(hits).mean() == metrics["val/accuracy"]
    assert loaded.metadata.metadata["metrics"] == metrics


def test_an_exported_pruned_trial_trains_again(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = next(trial.number for trial in found.study.ended if trial.state is TrialState.PRUNED)
    out = tmp_path / "pruned.yaml"
    assert pipeline.export.main(["--root", str(found.root), "--trial", str(number), "--out", str(out)]) == 0
    _, config, noted = load_config(out)
    assert config == found.study.ended[number].config
    assert (noted["trial"], noted["state"], noted["epochs"]) == (number, "pruned", 2)
    assert pipeline.train.main([str(out), "--device", "cpu", "--out", str(tmp_path / "model.pt")]) == 0
    printed = capsys.readouterr().out
    assert "epoch   3/3" in printed
    assert "repeated      every metric of the search, to the last bit" in printed  # as far as it was trained
    second = next(line for line in printed.splitlines() if line.startswith("epoch   2/3"))
    assert f"val/accuracy {noted['metrics']['val/accuracy']:.4f}" in second


def test_export_refuses_a_trial_that_is_not_there(found: Found) -> None:
    with pytest.raises(
        InvalidInput, match=r"--trial: 1 problem\n  99: there is no such trial; the last of small-1 is 11"
    ):
        pipeline.export.main(["--root", str(found.root), "--trial", "99"])


def test_a_training_that_differs_says_in_what(found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = found.best.value
    changed = tmp_path / "changed.yaml"
    changed.write_text(found.best_yaml.read_text().replace(f"val/accuracy: {accuracy!r}", "val/accuracy: 0.5"))
    assert pipeline.train.main([str(changed), "--device", "cpu", "--out", str(tmp_path / "model.pt")]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^ +val/accuracy {accuracy!r}, the search had 0.5: [0-9.e-]+ apart$", printed, re.MULTILINE)


def changed_config(found: Found, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write best.yaml with a changed section `found`."""
    data = strict_yaml.load(found.best_yaml)
    change(data["found"])
    path.write_text(strict_yaml.dumps(data))
    return path


def test_training_on_another_kind_of_machine_says_so_first(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed_config(found, tmp_path / "c.yaml", lambda noted: noted["environment"].update(cpu="Zilog Z80"))
    assert pipeline.train.main([str(config), "--device", "cpu", "--out", str(tmp_path / "model.pt")]) == 0
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("note          cpu was Zilog Z80 and is ")
    assert second == "note          so metrics are repeated to rounding"
    assert third.startswith("epoch   1/3")


def test_fast_training_is_alone_and_says_how_close_it_came(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change: Callable[[dict[str, Any]], None] = lambda noted: noted["metrics"].update({"val/accuracy": 0.5})  # noqa: E731
    config = changed_config(found, tmp_path / "c.yaml", change)
    assert pipeline.train.main([str(config), "--fast", "--device", "cpu", "--out", str(tmp_path / "model.pt")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^compared      train/loss \S+, the search had \S+: \S+ apart \(alone\)$", printed, re.MULTILINE)
    assert re.search(r"^ +val/accuracy \S+, the search had 0.5: \S+ apart$", printed, re.MULTILINE)


def test_a_trial_that_failed_in_its_first_epoch_trains_alone(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(noted: dict[str, Any]) -> None:
        noted["environment"]["placement"] = []
        noted.update(epochs=1, metrics={})

    config = changed_config(found, tmp_path / "c.yaml", failed)
    assert pipeline.train.main([str(config), "--device", "cpu", "--out", str(tmp_path / "model.pt")]) == 0
    assert "epoch   3/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda noted: noted.pop("environment"), "must be as a search wrote it, got KeyError: 'environment'"),
        (lambda noted: noted.update(metrics=3), "must be as a search wrote it, got TypeError"),
        (lambda noted: noted["environment"].update(placement=[{"epochs": 3, "trainer": "rows"}]), "got TypeError"),
        (lambda noted: noted["environment"]["placement"][0].update(place=99), "got ValueError: rows at place 99 of"),
        (lambda noted: noted["environment"]["placement"][0].update(threads=None), "got ValueError: threads must be"),
        (lambda noted: noted.update(epochs="12"), "got ValueError: epochs '12' for 3 placements"),
        (lambda noted: noted["metrics"].update({"val/loss": "x"}), "got ValueError: val/loss 'x'"),
    ],
)
def test_a_record_that_no_search_wrote_is_refused(
    found: Found, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    config = changed_config(found, tmp_path / "c.yaml", change)
    with pytest.raises(InvalidInput, match=rf"c\.yaml: 1 problem\n  found: .*{re.escape(words)}"):
        pipeline.train.main([str(config), "--device", "cpu", "--out", str(tmp_path / "model.pt")])
    assert not (tmp_path / "model.pt").exists()


def test_a_diverging_config_ends_with_its_reason(found: Found, tmp_path: Path) -> None:
    _, config, _ = load_config(found.best_yaml)
    values = config.to_dict() | {"optimizer": {"sgd": {"base_lr": 1e30}}}
    path = tmp_path / "diverging.yaml"
    path.write_text(str(values))
    with pytest.raises(
        TrainingEnded, match=r"diverging\.yaml: training ended: the loss became (nan|inf) at step 2, in"
    ):
        pipeline.train.main([str(path), "--device", "cpu", "--out", str(tmp_path / "model.pt")])
    assert not (tmp_path / "model.pt").exists()


def search_until(store: Store, study: Study, trainer: LocalExecutor, *, epochs: int | None) -> int:
    """Search as the command line does, without MLflow, for a number of epochs; return how many there were."""
    trained: list[Mapping[int, EpochMetrics]] = []
    checkpoints = Checkpoints(store.folder(study.name) / "checkpoints", warn=pytest.fail)

    def interrupted() -> bool:
        return len(trained) == epochs

    while not interrupted() and (proposals := study.next_group(TRIALS)):
        for trials in run_group(
            trainer.build({number: config for number, (config, _) in proposals.items()}),
            proposals,
            study,
            checkpoints=checkpoints,
            environment={},
            on_epoch=trained.append,
            interrupted=interrupted,
            rules=lambda: trainer.rules,
        ):
            study.add(*trials)
    return len(trained)


def test_a_search_interrupted_within_a_group_goes_on_to_the_same_trials(found: Found, tmp_path: Path) -> None:
    _, trainer = prepare(found.study.space, source="small.yaml", device="cpu", searching=True)
    store = Store(tmp_path)
    whole, _ = (store.create(found.study.space, name=name, trials=TRIALS, rules=RULES) for name in ("whole", "pieces"))
    epochs = search_until(store, whole, trainer, epochs=None)
    pieces = sum(search_until(store, store.open("pieces"), trainer, epochs=piece) for piece in (1, 4, 5))
    assert 0 < len(store.open("pieces").ended) < TRIALS
    assert pieces + search_until(store, store.open("pieces"), trainer, epochs=None) == epochs  # none is trained twice
    assert list(store.folder("pieces").rglob("*.pt")) == []
    assert outcomes(store.open("pieces").ended) == outcomes(whole.ended) == outcomes(found.study.ended)


def search_with_signals(
    found: Found, root: Path, tables: Path, signals: list[signal.Signals]
) -> tuple[int, int, str, str]:
    """Send signals to a search after its first group; return its status, its ended trials and what it printed."""
    root.mkdir()
    shutil.copy(tables, root)
    options = ["--space", str(write_space(root.parent)), "--trials", str(TRIALS), "--device", "cpu", "--no-confirm"]
    command = [sys.executable, "-c", WAITS_BEFORE_ITS_SECOND_GROUP, "--root", str(root), *options]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        headline, first_group = process.stdout.readline(), process.stdout.readline()
        for number in signals:
            process.send_signal(number)
        printed, errors = process.communicate()
    assert headline.endswith("study small-1, seed 0\n")
    assert first_group.startswith(f"3/{TRIALS} trials   ")
    kept = Store(root).open("small-1").ended
    assert 3 <= len(kept) < TRIALS
    assert outcomes(kept) == outcomes(found.study.ended[: len(kept)])
    return process.returncode, len(kept), printed, errors


def go_on_of(root: Path) -> str:
    """Return the options that go on with the search that signals have ended."""
    return f"--study small-1 --trials {TRIALS} --no-confirm --root {root} --device cpu"


@pytest.mark.parametrize(
    ("signals", "expected"),
    [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT] * 1000, 130)],
    ids=["INT", "TERM", "INT again and again"],
)
def test_a_signal_keeps_what_was_done_and_the_search_goes_on_even_elsewhere(
    found: Found,
    tmp_path: Path,
    mlflow_tables: Path,
    capsys: pytest.CaptureFixture[str],
    signals: list[signal.Signals],
    expected: int,
) -> None:
    root, moved = tmp_path / "root", tmp_path / "moved"
    status, kept, printed, errors = search_with_signals(found, root, mlflow_tables, signals)
    assert status == expected
    go_on = go_on_of(root)
    after_the_epoch = f"interrupted; go on with: python -m pipeline.search {go_on}\n"
    at_once = f"ended at once; go on with: python -m pipeline.search {go_on}\n"
    assert (errors == "" and after_the_epoch in printed) or (errors == at_once and len(signals) > 1)
    with folder_locked(Store(root).folder("small-1")):  # as MLflow's process does, which may still write
        root.rename(moved)
    assert pipeline.search.main(shlex.split(go_on.replace(str(root), str(moved)))) == 0
    went_on = capsys.readouterr()
    assert f"study small-1, seed 0, goes on from trial {kept}\n" in went_on.out
    assert went_on.err == ""
    assert outcomes(Store(moved).open("small-1").ended) == outcomes(found.study.ended)
    assert not root.exists()
    parents, children, _ = mlflow_runs(moved)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert sorted(children) == list(range(TRIALS))
    assert all(run.info.artifact_uri.startswith(moved.as_uri()) for run in children.values())
    _, config, noted = load_config(moved / "mlruns/studies/small-1/best.yaml")
    (best,) = found.study.best()
    assert config == best.config
    assert noted["metrics"] == best.metrics


WAITS_BEFORE_ITS_SECOND_GROUP = """
import sys
import pipeline.search
from pipeline.study.study import Study

def next_group(study, trials, original=Study.next_group):
    if study.ended:
        sys.stdin.readline()
    return original(study, trials)

Study.next_group = next_group
sys.exit(pipeline.search.main(sys.argv[1:]))
"""
"""A search that waits for its standard input to end, so that signals come while it runs, however fast it is."""


@pytest.mark.parametrize("then", ["raise AttributeError('partially initialized module') from None", "pass"])
def test_ctrl_c_that_an_import_turns_into_another_error_or_loses_ends_a_search(tmp_path: Path, then: str) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "from pipeline.workloads.digits import digits\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n"
        f"    {then}\n"
        "def workload():\n"
        "    return digits('mlp')\n"
    )
    command = [sys.executable, "-m", "pipeline.search", "--workload", f"{tmp_path}/mine.py:workload"]
    ended = subprocess.run([*command, "--root", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.rglob("*.db"))


@pytest.mark.usefixtures("root_with_tables")
@pytest.mark.parametrize(("name", "told"), [("mine1", True), ("other", False)])
def test_a_new_study_of_a_name_like_another_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, told: bool
) -> None:
    space = write_space(tmp_path)
    with contextlib.closing(Store(tmp_path)) as store:
        store.create(load_space(space), name="mine-1", trials=2, rules=RULES)
    options = ["--study", name, "--trials", "1", "--set", "epochs=2", "--root", str(tmp_path), "--device", "cpu"]
    assert pipeline.search.main(["--space", str(space), *options]) == 0
    line = f"new study     {name}; did you mean to continue mine-1?\n"
    assert capsys.readouterr().out.startswith(line) == told


def test_a_second_search_of_a_study_is_refused_with_the_process_of_the_first(found: Found) -> None:
    store = Store(found.root)
    before = store.folder("small-1").stat().st_mtime_ns
    with store.lock("small-1"), pytest.raises(StudyBusy) as refused:
        pipeline.search.main(["--study", "small-1", "--trials", "50", "--root", str(found.root), "--device", "cpu"])
    assert f"small-1 is driven by process {os.getpid()} on {socket.gethostname()}; wait for it" in str(refused.value)
    assert store.folder("small-1").stat().st_mtime_ns == before
    assert store.header("small-1").trials == TRIALS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_stops_a_search_with_its_cause_and_the_same_command_goes_on(
    found: Found, small_disk: Path, tmp_path: Path
) -> None:
    options = ["--space", str(write_space(tmp_path)), "--study", "mine", "--root", str(small_disk), "--device", "cpu"]
    command = [*options, "--trials", str(TRIALS)]
    assert pipeline.search.main([*command, "--timeout", "1e-9"]) == 0  # one epoch
    kept = len(Store(small_disk).open("mine").ended)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    program = [sys.executable, "-m", "pipeline.search", *command]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # and so one process, as the other search had
    stopped = subprocess.run(program, env=one_thread, check=False, capture_output=True, text=True)
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    assert re.search(r"^(storing trial|.*checkpoint.*: cannot be written).*(full|No space left)", stopped.stderr, re.M)
    assert (
        f"once that is mended, go on with: python -m pipeline.search --study mine --trials {TRIALS}" in stopped.stderr
    )
    assert outcomes(Store(small_disk).open("mine").ended)[:kept] == outcomes(found.study.ended)[:kept]
    filler.unlink()
    assert pipeline.search.main(command) == 0
    assert outcomes(Store(small_disk).open("mine").ended) == outcomes(found.study.ended)
    parents, children, _ = mlflow_runs(small_disk)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert sorted(children) == list(range(TRIALS))
