from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import postgres_server
import pytest
from test_mlflow import DONE, begun, ended, epoch, opened, study

pytestmark = [
    pytest.mark.skipif(postgres_server.binaries() is None, reason="PostgreSQL is not installed"),
    # MLflow's own use of SQLAlchemy 2.1.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with postgres_server.running() as uri:
        yield uri


def test_a_study_is_recorded_whole_in_postgresql(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    epochs = epoch(1, accuracy=0.5), epoch(2, accuracy=0.75)
    tracker = opened(tmp_path, study())
    tracker.begin(begun(0))
    tracker.epochs({0: epochs[0]}, at=1_700_000_005.0)
    tracker.flush()
    tracker.end(ended(0, epochs=epochs))
    tracker.finish(DONE)
    assert tracker.close() == []

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name("digits-cnn")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], "tags.`hpo.kind` = 'trial'")
    assert (run.info.status, run.data.params["base_lr"]) == ("FINISHED", "0.01")
    points = client.get_metric_history(run.info.run_id, "val/accuracy")
    assert sorted((point.step, point.value) for point in points) == [(10, 0.5), (20, 0.75)]
    (parent,) = client.search_runs([found.experiment_id], "tags.`hpo.kind` = 'study'")
    assert parent.info.artifact_uri.startswith((tmp_path / "mlruns" / "artifacts").as_uri())
