"""Ready-made spaces go by name, in a checkout and in an installed package; their ranges hold good rates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline import __version__
from pipeline.app.prepare import prepare
from pipeline.app.range_test import range_test
from pipeline.errors import InvalidInput
from pipeline.space.load import load_space
from pipeline.space.ready_made import find_space, ready_made

ROOT = Path(__file__).parent.parent


def test_a_ready_made_space_goes_by_its_name_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_space(Path("decay")) == ROOT / "search_spaces" / "decay.yaml"
    Path("decay").touch()
    assert find_space(Path("decay")) == Path("decay")


def test_a_search_without_a_space_has_a_default_and_another_with_a_workload() -> None:
    assert find_space(None).stem == "default"
    assert find_space(None, with_workload=True).stem == "own"


def test_an_unknown_space_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no such file, and no search space of that name; did you mean dec"):
        find_space(tmp_path / "decya")


@pytest.mark.parametrize("name", ["default", "decay", "adaptive", "per_group"])
def test_a_ready_made_range_for_known_data_is_little_wider_than_a_range_test_proposes(name: str) -> None:
    ranges = [hyperparameters["base_lr"] for hyperparameters in load_space(ready_made()[name]).optimizers.values()]
    assert [base_lr for base_lr in ranges if not (base_lr.log and 100 <= base_lr.high / base_lr.low <= 335)] == []


@pytest.mark.parametrize(("name", "optimizer"), [("default", "rmsprop"), ("default", "sgd"), ("decay", "sgd")])
def test_a_ready_made_range_holds_the_rate_to_begin_with_away_from_its_bounds(name: str, optimizer: str) -> None:
    space, executor = prepare(load_space(ready_made()[name]), source=name, device="cpu", searching=False)
    rate, base_lr = range_test(space, optimizer, executor).begin_with(), space.optimizers[optimizer]["base_lr"]
    assert rate is not None
    assert 3 * base_lr.low <= rate <= base_lr.high / 3


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pipeline", "search_spaces"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(folder)],
        cwd=sources,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob(f"lr_strategy_search-{__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def run(installed: Path, *command: str, folder: Path) -> str:
    """Run Python in another folder, where the unpacked wheel comes before every other place of the package."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_every_module_and_every_ready_made_space(installed: Path) -> None:
    def files(folder: Path, inside: str) -> set[str]:
        found = (path.relative_to(folder) for path in (folder / inside).rglob("*") if path.is_file())
        return {str(path) for path in found if path.suffix != ".pyc"}

    spaces = {f"pipeline/{path}" for path in files(ROOT, "search_spaces")}
    assert files(installed, "pipeline") == files(ROOT, "pipeline") | spaces


def test_an_unpacked_wheel_searches_a_ready_made_space_from_any_folder(installed: Path, tmp_path: Path) -> None:
    where = "import pipeline; from pipeline.space.ready_made import ready_made; print(pipeline.__file__); "
    where += "print(*ready_made().values(), sep='\\n')"
    places = run(installed, "-c", where, folder=tmp_path).splitlines()
    assert len(places) == 1 + len(ready_made())
    assert {Path(place).is_relative_to(installed) for place in places} == {True}
    options = ["--space", "decay", "--trials", "4", "--set", "epochs=2", "--set", "scheduler.step.step_size=1"]
    printed = run(installed, "-m", "pipeline.search", *options, folder=tmp_path)
    assert "study decay-1, seed 0" in printed
    assert (tmp_path / "mlruns/studies/decay-1/best.yaml").is_file()
