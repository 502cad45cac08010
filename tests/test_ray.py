"""Searches on a Ray cluster of two emulated nodes with a GPU each, which exists for Ray alone: trials train on CPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from ray_search import options_of, search, write_task

from pipeline.app.run_search import where_trained
from pipeline.space.config import Digits
from pipeline.space.placement import from_run_lengths
from pipeline.space.trial import EndedTrial, TrialState
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.executor import LocalExecutor
from pipeline.training.ray_cluster import local_ray
from pipeline.training.ray_worker import RayWorker

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an optional extra"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TRIALS = 16
CANARY = "canary-0815"
"""A password of the search, which no worker gets."""
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without resources, and one node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]))
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=1, num_gpus=1)
        yield cluster
        cluster.shutdown()


def actors() -> list[int]:
    """Return the processes of the actors that this test and its cluster have started."""
    own = psutil.Process().children(recursive=True)
    return [process.pid for process in own if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Actor")]


def outcomes(study: Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.params, t.state, t.value, [e.metrics for e in t.epochs], t.environment) for t in study.ended]


def trained_again(executor: LocalExecutor, trial: EndedTrial) -> list[Any]:
    """Return the metrics of a trial that this process trains with the placement that the trial had."""
    placement = from_run_lengths(trial.environment["placement"])
    group = executor.build({0: trial.config}, placement=placement)
    return [group.train_epoch()[0].metrics for _ in placement]


def test_what_goes_on_with_a_search_names_its_workers(tmp_path: Path) -> None:
    options = options_of(tmp_path, ray="10.0.0.1:6379", workers=2, cpus_per_worker=3)
    assert options.resume("mine").endswith(", workers=2, ray='10.0.0.1:6379', cpus_per_worker=3)")
    command = dataclasses.replace(
        options, from_python=False, root=Path(), space=dataclasses.replace(options.space, workload=Digits(model="mlp"))
    )
    assert command.resume("mine").endswith(" --workers 2 --ray 10.0.0.1:6379 --cpus-per-worker 3")
    assert command.confirm_again("mine").endswith(
        "pipeline.confirm --study mine --workers 2 --ray 10.0.0.1:6379 --cpus-per-worker 3"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda:0", "workers": None, "gpus": 2}, "cuda:0 (1 of 2 GPUs used; --workers 2), 25 trials at once"),
        ({"device": "cuda:0", "workers": None, "gpus": 1}, "cuda:0, 25 trials at once"),
        ({"device": "cpu", "workers": None, "gpus": 0}, "cpu, 25 trials at once"),
        ({"device": "H100", "workers": 2, "gpus": 2}, "2 workers on H100, at most 25 trials at once each"),
        ({"device": "cpu", "workers": 1, "gpus": 0}, "1 worker on cpu, 25 trials at once"),
    ],
)
def test_the_headline_says_where_trials_train_and_that_gpus_are_unused(options: dict[str, Any], words: str) -> None:
    assert where_trained(**options, group=25) == words


def test_one_worker_searches_as_this_process_does_with_code_that_it_does_not_have_and_no_password(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGPASSWORD", CANARY)  # after the nodes have started, as on machines of their own
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARY)
    expected, _, _ = search(tmp_path / "here")
    seen: list[str] = []

    def look(epoch: int, workers: list[RayWorker]) -> None:
        if epoch == 1:
            for process in psutil.Process().children(recursive=True):
                seen.extend([*process.cmdline(), *process.environ().values()])

    found, _, warnings = search(tmp_path / "there", look, ray=cluster.address, workers=1)
    assert outcomes(found) == outcomes(expected)
    assert warnings == []
    assert any(word.startswith("ray::Actor") for word in seen)
    logs = Path(cluster.head_node.get_logs_dir_path())
    seen += [p.read_text(errors="replace") for root in (tmp_path, logs) for p in root.rglob("*") if p.is_file()]
    assert [text for text in seen if CANARY in text] == []


@pytest.mark.usefixtures("cluster")
def test_ray_on_this_machine_is_not_a_cluster_that_runs_there_too() -> None:
    with local_ray(cpus=3, gpus=0, code=None) as started:
        assert (started.cpus, started.gpus, started.nodes) == (3, 0, 1)


def test_nothing_is_lost_or_done_twice_when_controller_and_worker_are_killed(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"FREE_BYTES": "1"})
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-P", TESTS / "ray_search.py", cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    asked = [params for group in Store(tmp_path).open("mine")._groups for params in group.params or ()]

    killed, limits = list[str](), set[int | None]()

    def kill(epoch: int, workers: list[RayWorker]) -> None:
        limits.update(worker.rules.row_limit for worker in workers)
        if epoch == 4:
            os.kill(actors()[0], signal.SIGKILL)
            killed.append("worker")

    study, executor, warnings = search(tmp_path, kill, ray=cluster.address, workers=2)
    assert killed == ["worker"]
    assert [trial.number for trial in study.ended] == list(range(TRIALS))
    assert [trial.params for trial in study.ended][: len(asked)] == asked
    assert {trial.state for trial in study.ended} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert 1 in limits
    assert max(limit or 0 for limit in limits) > 1  # the two nodes have unlike memory
    assert max(run["rows"] for trial in study.ended for run in trial.environment["placement"]) > 1
    for trial in study.ended:
        again, broken = trained_again(executor, trial), any("broken" in run for run in trial.environment["placement"])
        for metrics, epoch in zip(again, trial.epochs, strict=True):  # the last one before a kill may be trained twice
            assert metrics == (pytest.approx(epoch.metrics, rel=1e-4) if broken else epoch.metrics)
    died = "a worker has ended: its process has died; its trials go on from their last checkpoint"
    assert warnings == [died]
    assert not list(Store(tmp_path).folder("mine").rglob("*.pt"))
