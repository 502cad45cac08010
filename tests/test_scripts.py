from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pipeline.search
from pipeline import __version__
from pipeline.space.config import WORKLOADS
from pipeline.space.ready_made import ready_made

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


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_says_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(SCRIPTS[name].partition(":")[0])
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main(["--version"])
    assert capsys.readouterr().out == f"lr-strategy-search {__version__}\n"


def test_the_help_of_a_search_names_every_space_and_workload_and_its_examples_parse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        pipeline.search.main(["--help"])
    help = capsys.readouterr().out
    for name in (*ready_made(), *(name for name in WORKLOADS if name != "own")):
        assert re.search(rf"(?m)^  {name} |\b{name}[,;]", help), name
    examples = re.findall(r"(?m)^  python -m pipeline.search (.*)$", help)
    assert len(examples) == 3
    for example in examples:
        with pytest.raises(SystemExit, match=r"^0$"):
            pipeline.search.main([*example.split(), "--version"])


def test_nothing_is_left_out_of_the_last_collection_where_a_module_would_print_what_is_left() -> None:
    code = """
import atexit, gc
from pipeline.app import cli
type("nb_meta", (type,), {"__module__": "nanobind"})
atexit.register(lambda: print(gc.get_freeze_count()))
cli.run(lambda: 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
