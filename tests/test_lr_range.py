"""The command line of the range test, end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import lr_range
from pipeline.errors import InvalidInput
from pipeline.space.load import load_space

ONE_RATE = {"sgd": {"base_lr": 0.3, "momentum": 0.9}}


def test_it_proposes_bounds_and_writes_a_picture_but_not_the_file(
    space_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = space_file(optimizer=ONE_RATE)
    before = path.read_bytes()
    assert lr_range.main(["--space", str(path), "--root", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "digits · mlp · at least 40 steps at each of 41 rates · cpu   seed 0" in printed
    assert "begin with " in printed
    assert "present  0.3 " in printed
    picture = tmp_path / "mlruns" / "lr_range-space.png"
    assert f"picture   {picture}" in printed.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert path.read_bytes() == before
    same = f"--space {path} --root {tmp_path} --device cpu"
    last = printed.splitlines()[-1]
    assert last == f"next      put the proposed bounds into the file: python -m pipeline.lr_range {same} --write"


def test_write_puts_what_it_proposes_into_the_file(
    space_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = space_file(optimizer=ONE_RATE)
    assert lr_range.main(["--space", str(path), "--root", str(tmp_path), "--device", "cpu", "--write"]) == 0
    printed = capsys.readouterr().out
    assert "base_lr of sgd is now as proposed" in printed
    search = f"python -m pipeline.search --space {path} --root {tmp_path} --device cpu"
    assert printed.splitlines()[-1] == f"next      search within the written bounds: {search}"
    base_lr = load_space(path).optimizers["sgd"]["base_lr"]
    assert base_lr.high / base_lr.low == pytest.approx(100)
    assert base_lr.log


def test_write_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        lr_range.main(["--write"])
    assert "--write needs --space FILE, the file to put the bounds into" in capsys.readouterr().err


def test_a_config_of_one_trial_is_refused_with_the_command_that_trains_it(
    space_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = space_file(found={"study": "default-1", "trial": 3})
    message = "found: makes this file a config of one trial, which `python -m pipeline.train` trains"
    with pytest.raises(InvalidInput, match=message):
        lr_range.main(["--space", str(path), "--root", str(tmp_path)])


def test_a_space_that_does_not_fit_its_model_is_refused_and_nothing_written(
    space_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = space_file(param_groups={"head": {"pattern": "classifier.*"}, "body": {"pattern": "*"}})
    with pytest.raises(InvalidInput, match=r"param_groups\.head: pattern 'classifier"):
        lr_range.main(["--space", str(path), "--root", str(tmp_path), "--device", "cpu"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["space.yaml"]
