from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_console_script_imports_nothing_from_the_working_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('imported from the working folder')")
    module, _, function = SCRIPTS[name].partition(":")
    body = f"from {module} import {function}; {function}()"  # as an installer writes it
    command = [sys.executable, "-P", "-c", body, "--no-such-option"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"usage: python -m {module} " in done.stderr
    assert "--no-such-option" in done.stderr or "required: CONFIG" in done.stderr


def test_every_command_has_a_console_script() -> None:
    folder = Path(__file__).parent.parent / "pipeline"
    commands = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert {target.partition(":")[0].removeprefix("pipeline.") for target in SCRIPTS.values()} == commands
