"""Searches that are killed: at every step of storing and saving, and at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from crash import DIED, POINTS, WHOLE

ROOT = Path(__file__).parent.parent


def test_a_search_that_ends_at_any_step_of_storing_or_saving_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "crash.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    whole = found.pop(WHOLE)["outcomes"]
    assert whole
    as_wanted = {"died": DIED, "again": 0, "outcomes": whole, "left": []}
    assert {point: result for point, result in found.items() if result != as_wanted} == {}
    assert list(found) == POINTS


def test_a_search_killed_at_random_loses_nothing_and_does_nothing_twice() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "3", "--trials", "8", "--epochs", "20"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "nothing lost, nothing twice" in done.stdout
