"""The saved view of a study in MLflow's web page: which trials, which columns, which charts.

Without a saved view a first-time visitor sees one collapsed row and no learning-rate curve. MLflow keeps a shared view
as an experiment tag, `mlflow.sharedViewState.<key>`. The format is not documented; MLflow 3.17 reads the one below.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

TAG_PREFIX = "mlflow.sharedViewState."
RANK = "rank"
"""The metric that holds the rank of a complete trial, 1 for the winner: trials that were confirmed stand before the
others. The view is sorted by it."""
CONFIRMED = "confirmed"
"""The metric that holds a trial's mean objective over fresh seeds."""
WINNER = "hpo.winner"
"""The tag of the winner's run."""


def mlflow_name(text: str) -> str:
    """Return a text as a name of a metric, parameter, tag or folder that MLflow accepts.

    Characters that MLflow refuses become `_`, and so does a slash, which would start another section of charts. A
    changed name ends with a hash of the text, so that two texts never share a name: `fc.1` stays, `fc,1` becomes
    `fc_1-eb1b`.
    """
    clean = re.sub(r"[^\w.\- ]|^\.+", "_", text)[:200] or "_"
    return clean if clean == text else f"{clean}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def runs_path(experiment_id: str) -> str:
    """Return what follows `http://host:port` in the link to every run of an experiment.

    Without the last part the page opens on traces of language models, and shows no run.
    """
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def view_path(experiment_id: str, study: str) -> str:
    """Return what follows `http://host:port` in the link to a study's saved view."""
    # Any sort or filter in the link would make the page ignore the view.
    return f"{runs_path(experiment_id)}&viewStateShareKey={quote(mlflow_name(study))}&compareRunsMode=CHART"


def saved_view(
    *,
    study: str,
    identity: str,
    metric: str,
    ranking: str,
    columns: Sequence[str],
    axes: Sequence[str],
    lr_metrics: Sequence[str],
    created_ms: int,
) -> tuple[str, str]:
    """Return the experiment tag, key and value, that holds the view of one study.

    Args:
        study: Name of the view.
        identity: The value of the tag `hpo.study_id` of the trials to show.
        metric: The metric of the objective.
        ranking: The metric that holds a trial's value.
        columns: Parameters worth a column.
        axes: Parameters worth an axis of the parallel coordinates, which show only trials with all of these.
        lr_metrics: Metrics that hold learning rates, in one chart of the best trials.
        created_ms: Milliseconds since 1970.
    """
    state = {
        "searchFilter": f"tags.`hpo.kind` = 'trial' and tags.`hpo.study_id` = {_quoted(identity)}",
        "orderByKey": f"metrics.`{RANK}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [
            *(f"metrics.`{name}`" for name in dict.fromkeys([RANK, CONFIRMED, ranking, "val/loss"])),
            "tags.`hpo.state`",
            f"tags.`{WINNER}`",
            *(f"params.`{name}`" for name in columns),
            "attributes.`Duration`",
        ],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "FIRST_10_RUNS",  # of more trials than the ten best, nobody can tell the curves apart
        "compareRunCharts": _charts(metric, ranking, axes, lr_metrics),
        "compareRunSections": _sections(metric),
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "groupBy": None,
        "groupsExpanded": {},
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state, separators=(",", ":")).encode(), 9)).decode()
    view = {"name": study, "createdAt": created_ms, "updatedAt": created_ms, "state": f"deflate;{packed}"}
    return TAG_PREFIX + mlflow_name(study), json.dumps(view)


def _quoted(text: str) -> str:
    """Quote a value of a search filter; filters have two kinds of quotes and no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _charts(metric: str, ranking: str, axes: Sequence[str], lr_metrics: Sequence[str]) -> list[dict[str, Any]]:
    undrawn = [*lr_metrics[1:], RANK, CONFIRMED]
    return [
        {
            **_chart("PARALLEL", "parallel", "search space"),
            "selectedParams": list(axes),
            "selectedMetrics": [ranking],
            "showAllRuns": True,
        },
        {
            **_line("lr", scale="log"),
            "metricSectionId": "section lr",
            "selectedMetricKeys": list(lr_metrics),
            "metricKey": lr_metrics[0],
        },
        # The page itself would draw a metric that has no chart.
        *(_line(name, scale="log") | {"metricSectionId": "section lr", "deleted": True} for name in undrawn),
        # A dict, because the objective can be the validation loss itself.
        *(_line(name, scale="linear") for name in dict.fromkeys([ranking, metric, "val/loss", "train/loss"])),
    ]


def _line(name: str, *, scale: str) -> dict[str, Any]:
    return {
        **_chart("LINE", name, _section_of(name)),
        "metricKey": name,
        "selectedMetricKeys": [name],
        "scaleType": scale,
        "xAxisKey": "step",
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _chart(kind: str, uuid: str, section: str) -> dict[str, Any]:
    return {
        "uuid": f"chart {uuid}",
        "type": kind,
        "metricSectionId": f"section {section}",
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
    }


def _sections(metric: str) -> list[dict[str, Any]]:
    names = dict.fromkeys(["search space", _section_of(metric), "lr", "val", "train"])
    return [
        {
            "uuid": f"section {name}",
            "name": name,
            "display": True,
            "isReordered": False,
            "deleted": False,
            "isGenerated": False,
            "columns": 1 if name in ("search space", "lr") else 2,
        }
        for name in names
    ]


def _section_of(metric: str) -> str:
    """Return the section where the page itself puts a metric: the text before the last slash."""
    return metric.rpartition("/")[0] or "Model metrics"
