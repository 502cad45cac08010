"""The commands that follow a range test, read as the shell and the command line read them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.app import cli
from pipeline.app.options import read_space
from pipeline.app.range_options import RangeTestOptions, read_range_test
from pipeline.app.range_test import Bounds
from pipeline.app.run_range_test import next_step
from pipeline.space.distributions import Range
from pipeline.space.search_space import SearchSpace

SGD = {"sgd": Bounds(0.0063, 0.63)}
FITS = {"low": 5e-3, "high": 1.0, "log": True}


def arguments_of(line: str) -> argparse.Namespace:
    """Read options that a search and a range test share, and `--write`."""
    parser = cli.build_parser("lr_range", "")
    cli.add_space(parser)
    cli.add_root(parser)
    cli.add_device(parser)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args(shlex.split(line))


def options_of(line: str) -> RangeTestOptions:
    return read_range_test(arguments_of(line))


def space_of(command: str) -> SearchSpace:
    """Return the space that a command of a search trains."""
    start = "python -m pipeline.search "
    assert command.startswith(start)
    arguments = arguments_of(command.removeprefix(start))
    return read_space(arguments.space, cli.overrides_of(arguments)).space


def next_of(line: str, proposed: dict[str, Bounds]) -> tuple[str, str]:
    """Return what is to be done after a range test with these options, and the command."""
    options = options_of(line)
    what, command = next_step(options, options.space, proposed).split(": ", 1)
    return what, command


@pytest.mark.parametrize(
    "present",
    [
        0.3,
        {"choices": [0.01, 0.1]},
        {**FITS, "low": 1e-2},
        {**FITS, "high": 0.6},
        {**FITS, "low": 1e-5},
        {**FITS, "log": False},
    ],
)
def test_bounds_that_do_not_fit_are_put_into_the_file(space_file: Callable[..., Path], present: Any) -> None:
    path = space_file(optimizer={"sgd": {"base_lr": present}})
    what, command = next_of(f"--space {path} --seed 3 --set epochs=2", SGD)
    assert what == "put the proposed bounds into the file"
    assert command == f"python -m pipeline.lr_range --space {path} --seed 3 --set epochs=2 --write"
    assert options_of(command.removeprefix("python -m pipeline.lr_range ")).write == path


def test_bounds_that_fit_are_searched_as_they_are(space_file: Callable[..., Path]) -> None:
    path = space_file(optimizer={"sgd": {"base_lr": FITS}})
    what, command = next_of(f"--space {path} --root 'a b' --device cpu", SGD)
    assert what == "search within the present bounds, which hold the proposed ones"
    assert command == f"python -m pipeline.search --space {path} --root 'a b' --device cpu"


def test_a_ready_made_space_is_searched_with_the_bounds_that_do_not_fit() -> None:
    proposed = {"sgd": Bounds(0.0063, 0.63), "adamw": Bounds(1e-6, 1e-4)}
    what, command = next_of("--set epochs=2 --set optimizer.adamw.base_lr.low=1e-2 --workload digits", proposed)
    assert what == "search within the proposed bounds"
    space = space_of(command)
    assert space.optimizers["adamw"]["base_lr"] == Range[float, float](low=1e-6, high=1e-4, log=True)
    assert space.optimizers["sgd"]["base_lr"] == Range[float, float](low=0.0063, high=0.63, log=True)
    assert command.count("base_lr") == 2
    assert (space.document["workload"]["name"], space.epochs) == ("digits", 2)


def test_an_optimizer_that_only_an_option_has_is_searched_with_the_bounds(space_file: Callable[..., Path]) -> None:
    path = space_file(optimizer={"sgd": {"base_lr": FITS}})
    what, command = next_of(f"--space {path} --set optimizer.adam.base_lr=0.1", {"adam": Bounds(1e-3, 0.1)})
    assert what == "search within the proposed bounds"
    assert space_of(command).optimizers["adam"]["base_lr"] == Range[float, float](low=1e-3, high=0.1, log=True)


def test_no_option_hides_the_bounds_that_were_written(space_file: Callable[..., Path]) -> None:
    path = space_file(optimizer={"sgd": {"base_lr": FITS}})
    changes = "--set optimizer.sgd.base_lr.low=0.1 --set 'optimizer.sgd.momentum={choices: [0.0, 0.9]}'"
    what, command = next_of(f"--space {path} --write {changes}", SGD)
    assert what == "search within the written bounds"
    space = space_of(command)
    assert space.optimizers["sgd"]["base_lr"].low == 5e-3
    assert space.optimizers["sgd"]["momentum"].choices == (0.0, 0.9)


def test_a_workload_of_ones_own_is_named_again(tmp_path: Path) -> None:
    _, command = next_of("--workload my.py:task", {"rmsprop": Bounds(1e-4, 1e-2)})
    assert command.startswith(
        "python -m pipeline.search --workload my.py:task --set 'optimizer.rmsprop.base_lr={low: 1e-4"
    )
    assert space_of(command).document["workload"]["function"] == "my.py:task"
