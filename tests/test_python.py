"""Search and train called from Python: from a script, as the docs have it, and from a notebook, which no file holds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest
import torch
from tiny import TinyModel, tiny_config, tiny_workload
from torch.nn import functional as F

import pipeline.train as train_command
from pipeline.app.display import failure_line
from pipeline.app.options import read_search
from pipeline.app.result import SearchResult
from pipeline.errors import InvalidInput, TrainingEnded
from pipeline.files.signals import Interrupts
from pipeline.files.strict_yaml import dumps
from pipeline.search import search
from pipeline.space.optimizers import SGD
from pipeline.space.trial import TrialState
from pipeline.train import train
from pipeline.workloads.workload import Split, Workload

# MLflow's own use of SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

PAGE = (Path(__file__).parent.parent / "docs" / "own-workloads.md").read_text()


@dataclass(frozen=True)
class Ran:
    """Python code that ran to its end."""

    names: dict[str, Any]
    printed: str

    def hint(self, words: str) -> str:
        """Return the code that was printed after some words."""
        return str(re.findall(rf"{words}: (.*)$", self.printed, re.MULTILINE)[0])


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder; PyTorch has one thread, and there is no MLflow server of the user's."""
    root = tmp_path_factory.mktemp("python")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        yield root
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script(root: Path, mlflow_tables: Path) -> Ran:
    """The page's calls as a script; its first search is stopped after an epoch, and so after two of its trials."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    template, calls = (next(code for code in blocks if word in code) for word in ("-> Workload", "train(result"))
    assert (calls.count("trials=20, "), calls.count("trials=30, "), calls.count('"batch_size": 32')) == (1, 1, 1)
    calls = calls.replace(
        '"batch_size": 32', '"batch_size": 32, "epochs": 1, "pruner": {"name": "none"}, "sampler": {"group_size": 2}'
    )
    calls = calls.replace("trials=20, ", "trials=8, timeout=1e-9, ").replace("trials=30, ", "trials=9, ")
    (root / "script.py").write_text(template + calls)
    shutil.copy(mlflow_tables, root)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path("script.py", run_name="__main__")
    return Ran(names, printed.getvalue())


NOTEBOOK = """
from tiny import tiny_workload
from pipeline.search import search
from pipeline.train import train
from pipeline.workloads.workload import Metric, Workload
import dataclasses

def near(outputs, targets):
    if outputs.abs().max() > 50:
        raise RuntimeError("far off\\nand more")
    return outputs.abs().mean()

def mine() -> Workload:
    return dataclasses.replace(tiny_workload(), metrics={"near": Metric(near, "minimize")})

sgd = [{"optimizer": {"sgd": {"base_lr": rate}}} for rate in (0.1, 1000.0, 2000.0)]
space = {
    "workload": {"name": "digits"}, "epochs": 2, "batch_size": 8,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {"sgd": {"base_lr": {"low": 1e-3, "high": 1e4, "log": True}}},
    "scheduler": {"constant": {}}, "param_groups": {"all": {"pattern": "*"}}, "enqueue": sgd,
}
result = search(space, workload=mine, trials=3, device="cpu")
trained = train(result, workload=mine, test=True)
"""


@pytest.fixture(scope="module")
def notebook(root: Path) -> Iterator[Ran]:
    """A main module without a file, in which the tests go on."""
    main = ModuleType("__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", main)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(NOTEBOOK, vars(main))
        yield Ran(vars(main), printed.getvalue())


def test_the_pages_calls_train_the_best_trial_again_to_the_last_bit(script: Ran) -> None:
    result, trained = script.names["result"], script.names["trained"]
    assert isinstance(result, SearchResult)
    assert result.best is not None
    assert trained.metrics == result.best.metrics
    assert "repeated      every metric of the search, to the last bit\n" in script.printed
    assert script.names["outputs"].shape == (1, 1)


def test_what_a_stopped_search_prints_goes_on_with_it(script: Ran) -> None:
    call = script.hint("stopped after 1e-09 minutes; go on with")
    assert call == f"search(study='{script.names['result'].study}', trials=8, workload=sine)"
    assert len(script.names["result"].trials) == 2
    assert "seed 0, goes on from trial 2\n" in script.printed  # as the page's last call, the same one, did
    assert "9/9 trials   " in script.printed
    assert script.printed.count("time limit    1e-09 minutes; an epoch that trains then is finished first\n") == 1


def test_what_a_search_prints_trains_its_best_trial(notebook: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    code = notebook.hint("train it again")
    assert code == "from pipeline.train import train; train('mlruns/studies/search-1/best.yaml', workload=mine)"
    exec(code, notebook.names)
    assert "repeated      every metric of the search, to the last bit\n" in capsys.readouterr().out


def test_a_trained_model_is_on_the_cpu_and_scores_its_metrics(notebook: Ran) -> None:
    trained, workload = notebook.names["trained"], notebook.names["mine"]()
    assert isinstance(trained.model, TinyModel)
    assert not trained.model.training
    assert [epoch.epoch for epoch in trained.history] == [1, 2]
    assert trained.metrics == {**trained.history[-1].metrics, **{n: trained.metrics[n] for n in TESTED}}
    for name in ("val", "test"):
        split: Split = getattr(workload, name)
        loss = F.cross_entropy(trained.model(split.inputs), split.targets).item()
        assert trained.metrics[f"{name}/loss"] == pytest.approx(loss, abs=1e-6)


TESTED = ("test/loss", "test/near")


def test_a_history_is_a_table_of_its_epochs(notebook: Ran) -> None:
    table = pandas.DataFrame(epoch.metrics for epoch in notebook.names["trained"].history)
    assert list(table.columns) == ["train/loss", "val/loss", "val/near"]
    assert table["val/loss"].tolist() == [epoch.metrics["val/loss"] for epoch in notebook.names["result"].best.epochs]


def test_the_first_failure_stands_below_the_table(notebook: Ran) -> None:
    states = [trial.state for trial in notebook.names["result"].trials]
    assert states == [TrialState.COMPLETE, TrialState.FAILED, TrialState.FAILED]
    table, failure = notebook.printed.index("#   val/loss"), notebook.printed.index("trial 1 failed")
    assert table < failure < notebook.printed.index("best config")
    assert notebook.printed[failure:].startswith("trial 1 failed: RuntimeError: far off; 2 trials failed\n")
    assert failure_line(notebook.names["result"].trials[:1]) == ""


def test_a_result_shows_itself_as_a_short_table(notebook: Ran) -> None:
    result = notebook.names["result"]
    first, header, *rows = repr(result).splitlines()
    assert first == "study search-1: 3 trials, complete 1 · failed 2"
    assert header.split() == ["#", "val/loss", "optimizer", "base_lr", "schedule"]
    *rows, nothing, answer = rows
    assert [row.split() for row in rows] == [["0", f"{result.best.value:.4f}", "sgd", "1.00e-01", "constant"]]
    assert (nothing, answer) == ("", "best: #0, unconfirmed")
    many = dataclasses.replace(result, ranking=result.ranking * 9)
    assert len(repr(many).splitlines()) == 2 + 5 + 2
    none = dataclasses.replace(result, ranking=(), best=None)
    assert repr(none) == first
    assert none.best is None


def test_a_trial_and_what_was_trained_show_themselves_in_a_line(notebook: Ran) -> None:
    best, trained = notebook.names["result"].best, notebook.names["trained"]
    assert repr(best) == (
        "EndedTrial(number=0, params={'sgd.base_lr': 0.1}, state=<TrialState.COMPLETE: 'complete'>, "
        f"reason=None, value={best.value!r})"
    )
    assert repr(trained) == f"Trained(metrics={trained.metrics!r})"
    assert repr(trained.history[0]) == f"EpochMetrics(epoch=1, step=5, metrics={trained.history[0].metrics!r}, " + (
        "diverged=None, failed=None)"
    )


def test_any_trial_of_a_search_trains_again(notebook: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    result, mine = notebook.names["result"], notebook.names["mine"]
    with pytest.raises(TrainingEnded, match=r"^trial 1: training ended: RuntimeError: far off"):
        train(result.trials[1], mine, device="cpu")
    capsys.readouterr()
    changed = train(result.trials[0], mine, overrides={"epochs": 3}, device="cpu")
    assert len(changed.history) == 3
    printed = capsys.readouterr().out
    assert "repeated" not in printed  # a changed config has nothing to repeat
    assert " given anew, so nothing is compared with the search\n" in printed
    assert len(train(result.trials[0].config, mine, device="cpu", quiet=True).history) == 2
    assert capsys.readouterr().out == ""


def test_a_workload_that_was_made_in_python_must_be_given_again(notebook: Ran) -> None:
    with pytest.raises(InvalidInput, match=re.escape("workload.function: python:tiny was made in Python; train it ")):
        train(notebook.names["result"].config_file)
    with pytest.raises(InvalidInput, match=re.escape("from Python, search(study='search-1', workload=…)")):
        search(study="search-1")


def scaled(*, factor: float = 1.0) -> Workload:
    workload = tiny_workload()
    assert isinstance(workload.train, Split)
    return dataclasses.replace(workload, train=Split(factor * workload.train.inputs, workload.train.targets))


def test_a_function_that_a_config_names_keeps_the_configs_arguments() -> None:
    config = tiny_config(epochs=1).to_dict()
    config["workload"] = {"name": "own", "function": f"{__name__}:scaled", "arguments": {"factor": 3.0}}
    by_name, given = train(config, quiet=True), train(config, workload=scaled, quiet=True)
    assert given.metrics == by_name.metrics
    assert given.metrics != train(config, scaled(), quiet=True).metrics


def test_a_config_is_a_file_a_mapping_or_a_config(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    (tmp_path / "mine.yaml").write_text(dumps(config.to_dict()))
    ways = (config, config.to_dict(), tmp_path / "mine.yaml", str(tmp_path / "mine.yaml"))
    first, *others = (train(way, quiet=True).metrics for way in ways)
    assert all(other == first for other in others)


def test_a_training_that_diverges_raises_with_its_reason() -> None:
    with pytest.raises(TrainingEnded, match=r"^config: training ended: the loss became (nan|inf) at step \d, in epoch"):
        train(tiny_config(SGD(base_lr=1e30)), quiet=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": 3}, "config: must be a file, a mapping, a TrialConfig, a trial, or the result of a search, got 3"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: "),
        ({"config": {"epochs": 1}}, "config: 5 problems"),
        ({"config": "~nobody-of-that-name/x"}, "config: there is no such home folder"),
        ({"device": "tpu"}, "device: must be auto, cpu"),
        ({"device": None}, "device: must be a name, got None"),
        ({"overrides": [1]}, "overrides: must be a mapping from places"),
        ({"overrides": {"epochs": 0}}, "config with --set epochs: 1 problem\n  epochs: must be"),
        ({"workload": 3}, "workload: must be a Workload, a function that returns one, or a name, got int"),
        ({"workload": "digit"}, "workload: unknown workload 'digit'; did you mean digits?"),
        ({"workload": dataclasses.replace(tiny_workload(), test=None), "test": True}, "tiny has no test split"),
    ],
)
def test_a_training_from_python_refuses_bad_input(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        train(**{"config": tiny_config(), **given})


def test_the_result_of_a_search_without_a_complete_trial_trains_nothing(notebook: Ran) -> None:
    result = dataclasses.replace(notebook.names["result"], ranking=(), best=None)
    with pytest.raises(InvalidInput, match=r"study search-1: no trial is complete; give one of `trials`"):
        train(result, notebook.names["mine"])


def test_the_second_interrupt_of_a_search_from_python_raises() -> None:
    with Interrupts(None, exit_message="go on with: search()", exits=False) as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked()
        with pytest.raises(KeyboardInterrupt, match=re.escape("go on with: search()")):
            os.kill(os.getpid(), signal.SIGINT)


def test_own_code_that_changes_the_working_folder_changes_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def task() -> Workload:
        os.chdir(tmp_path / "elsewhere")
        return tiny_workload()

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    imports = "import os\nfrom tiny import tiny_workload\nfrom pipeline.workloads.workload import Workload\n"
    body = "def task() -> Workload:\n    os.chdir('elsewhere')\n    return tiny_workload()\n"
    (tmp_path / "task.py").write_text(imports + body)
    config = tiny_config(epochs=1).to_dict() | {"workload": {"name": "own", "function": "task.py:task"}}
    (tmp_path / "mine.yaml").write_text(dumps(config))
    assert train_command.main(["mine.yaml", "--device", "cpu", "--out", "model.pt"]) == 0
    assert (tmp_path / "model.pt").exists()
    assert "model         model.pt   a state dict" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    content = config | {"optimizer": {"sgd": {"base_lr": {"low": 0.1, "high": 1.0}}}}
    rest: dict[str, Any] = dict.fromkeys(("trials", "timeout", "study", "rows"))
    given = {**rest, "root": "mine", "device": "cpu", "changed_code": False, "from_python": True}
    options = read_search(space=content, workload=task, overrides={}, **given)
    assert Path.cwd() == tmp_path / "elsewhere"
    assert options.folder == tmp_path / "mine"
    assert list((tmp_path / "elsewhere").iterdir()) == []
