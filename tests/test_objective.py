"""`objective: {of: best}`: the metric of the best epoch is the value of a trial, everywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyModel, tiny_workload
from torch import Tensor

import pipeline.train
from pipeline.files.strict_yaml import load
from pipeline.search import search
from pipeline.space.search_space import Objective
from pipeline.space.trial import EpochMetrics
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.train import train
from pipeline.training.rows import measure
from pipeline.workloads.workload import Metric, Workload

# MLflow's own use of SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

EPOCHS = 8


def closeness(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return how close the mean logit is to 1 in size: logits grow in training, so it rises and falls."""
    return -(outputs.abs().mean() - 1).abs()


def growing() -> Workload:
    """Return the tiny problem with a metric whose best epoch is not the last."""
    return dataclasses.replace(tiny_workload(), metrics={"closeness": Metric(closeness, "maximize")})


SPACE: dict[str, Any] = {
    "workload": {"name": "own", "function": "test_objective:growing"},
    "epochs": EPOCHS,
    "batch_size": {"choices": [8, 16]},
    "objective": {"metric": "val/closeness", "of": "best"},
    "optimizer": {"sgd": {"base_lr": {"low": 0.2, "high": 0.4}, "momentum": 0.9}},
    "scheduler": {"constant": {}},
    "param_groups": {"all": {"pattern": "*"}},
    "enqueue": [{"batch_size": 8}, {"batch_size": 16}],
}


@dataclass(frozen=True)
class Found:
    root: Path
    printed: str
    best_yaml: Path

    @property
    def study(self) -> Study:
        return Store(self.root).open(None)


@pytest.fixture(scope="module", autouse=True)
def _surroundings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Found:
    root, printed = tmp_path_factory.mktemp("search"), io.StringIO()
    shutil.copy(mlflow_tables, root)
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MAX_STEP_FLOPS", 12 * 3 * 2 * (6 * 8 + 8 * 3))  # a step of 12 samples
        result = search(SPACE, trials=4, root=root, device="cpu")
    assert result.config_file is not None
    return Found(root, printed.getvalue(), result.config_file)


def best_of(study: Study) -> tuple[float, int, int]:
    """Return the value of the best trial, the epoch of the value, and the trial's batch size."""
    (best,) = study.best()
    assert best.value is not None
    return best.value, study.space.objective.deciding(best.epochs).epoch, best.config.batch_size


def test_a_trials_value_is_its_best_epochs_and_the_search_says_which(found: Found) -> None:
    study = found.study
    for trial in study.ended:
        assert trial.value == max(epoch.metrics["val/closeness"] for epoch in trial.epochs)
    value, epoch, size = best_of(study)
    assert value == max(trial.value or -1 for trial in study.ended)
    assert 1 < epoch < EPOCHS
    assert re.search(r"# +val/closeness +epoch +optimizer +base_lr +batch_size +schedule\n", found.printed)
    assert re.search(rf"\S+ +{epoch} of {EPOCHS} +sgd +\S+ +{size} +constant", found.printed)
    assert f", batch {size}, constant" in found.printed


def test_the_first_line_says_which_batch_sizes_train_plain(found: Found) -> None:
    first, *_ = found.printed.splitlines()[1:]
    assert ", those of batch_size 16 each alone, since a step of 6.9e-06 GFLOP gains nothing" in first


def test_best_yaml_has_the_objective_and_what_it_chose(found: Found) -> None:
    value, epoch, size = best_of(found.study)
    content = load(found.best_yaml)
    assert content["objective"] == {"metric": "val/closeness", "direction": "maximize", "of": "best"}
    assert content["batch_size"] == size
    assert (content["found"]["value"], content["found"]["epoch"], content["found"]["epochs"]) == (value, epoch, EPOCHS)
    assert f" at epoch {epoch} of {EPOCHS}, complete.\n" in found.best_yaml.read_text()


def test_mlflow_has_the_best_so_far_as_a_metric_and_each_trials_own_steps(found: Found) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{found.root / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`hpo.kind` = 'trial'")
    for trial in found.study.ended:
        (run,) = [run for run in runs if run.data.tags["hpo.trial"] == str(trial.number)]
        points = sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, "val/closeness.best"))
        so_far = itertools.accumulate((epoch.metrics["val/closeness"] for epoch in trial.epochs), max)
        assert points == list(zip([epoch.step for epoch in trial.epochs], so_far, strict=True))
        assert run.data.params["batch_size"] == str(trial.config.batch_size)
        assert points[-1][0] == EPOCHS * {8: 5, 16: 3}[trial.config.batch_size]


def val_closeness(model_file: Path) -> float:
    model = TinyModel()
    model.load_state_dict(torch.load(model_file, weights_only=True))
    val: Any = growing().val
    return closeness(model(val.inputs), val.targets).item()


def test_training_keeps_the_model_of_the_best_epoch(
    found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, epoch, _ = best_of(found.study)
    command = [str(found.best_yaml), "--device", "cpu", "--out", str(tmp_path / "model.pt")]
    assert pipeline.train.main([*command, "--test"]) == 0
    printed = capsys.readouterr().out
    assert "repeated      every metric of the search, to the last bit\n" in printed
    assert f" at epoch {epoch} of {EPOCHS}, whose model this is; the search had the same\n" in printed
    assert val_closeness(tmp_path / "model.pt") == pytest.approx(value, abs=1e-5)
    (tested,) = re.findall(r"test/closeness (\S+)\n", printed)
    assert pipeline.train.main([*command, "--test", "--set", f"epochs={epoch}", "--set", "objective.of=last"]) == 0
    assert f"test/closeness {tested}\n" in capsys.readouterr().out
    assert pipeline.train.main([*command, "--set", "objective.of=last"]) == 0
    assert "whose model this is" not in capsys.readouterr().out
    (best,) = found.study.best()
    assert val_closeness(tmp_path / "model.pt") == pytest.approx(best.metrics["val/closeness"], abs=1e-5) != value


def test_a_trial_trains_to_the_model_of_its_best_epoch(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    (best,) = found.study.best()
    trained = train(best, workload=growing, device="cpu")
    assert trained.metrics["val/closeness"] == best.value != best.metrics["val/closeness"]
    assert "whose model this is; the search had the same\n" in capsys.readouterr().out


def epochs_of(*values: float, loss: float = 1.0) -> list[EpochMetrics]:
    return [
        EpochMetrics(epoch=n, step=n, metrics={"val/accuracy": value, "val/loss": loss}, lr={})
        for n, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("of", "direction", "values", "epoch"),
    [
        ("last", "maximize", [0.1, 0.9, 0.5], 3),
        ("best", "maximize", [0.1, 0.9, 0.5], 2),
        ("best", "minimize", [0.1, 0.9, 0.5], 1),
        ("best", "maximize", [0.5, 0.9, 0.9], 2),
    ],
)
def test_the_last_epoch_or_the_earliest_best_one_decides(
    of: Any, direction: Any, values: Sequence[float], epoch: int
) -> None:
    objective = Objective(direction=direction, of=of)
    epochs = epochs_of(*values)
    assert objective.deciding(epochs).epoch == epoch
    assert objective.value(epochs) == values[epoch - 1]
