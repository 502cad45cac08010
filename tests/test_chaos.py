"""Searches that are killed: at every step of storing and saving, and at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crash import DIED, POINTS, WHOLE

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of a search that ended at each point; forked processes run them, since imports take longest."""
    command = [sys.executable, str(ROOT / "tests" / "crash.py"), str(tmp_path_factory.mktemp("crashed"))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found[WHOLE]["again"] == 0, done.stderr
    return found


@pytest.mark.parametrize("point", POINTS)
def test_a_search_that_ends_at_any_step_goes_on_to_the_same_trials(crashed: dict[str, Any], point: str) -> None:
    found = crashed[point]
    assert (found["died"], found["again"]) == (DIED, 0)
    assert found["outcomes"] == crashed[WHOLE]["outcomes"]
    assert found["left"] == []


def test_a_search_killed_at_random_loses_nothing_and_does_nothing_twice() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "5", "--trials", "8", "--epochs", "20"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "nothing lost, nothing twice" in done.stdout
