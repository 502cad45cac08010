import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InvalidInput
from pipeline.files.strict_yaml import load, loads, replace
from pipeline.space.edit import write_bounds
from pipeline.space.load import load_space

RANGE = "{low: 1.6e-2, high: 1.6, log: true}"
BOUNDS = {"sgd": ("1.6e-2", "1.6")}
SPACE = """\
# A comment at the top.
workload: {name: digits, model: mlp}     # and one at the end of a line
epochs:   4
batch_size: 64
optimizer:
  adam: {base_lr: {low: 1e-3, high: 0.1, log: true}}   # stays

  sgd: BASE_LR
scheduler: {constant: {}}
param_groups:
    all: {pattern: "*"}     # odd, but a person's own
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a space with SGD as given, byte by byte."""

    def write(sgd: str, space: str = SPACE) -> Path:
        path = tmp_path / "space.yaml"
        path.write_bytes(space.replace("BASE_LR", sgd).encode())
        return path

    return write


IN_BLOCK = """
    base_lr:
      low: 1e-4  # too low?
      high: 1.0
      # a guess
      log: true
    momentum: 0.5
"""
CHOICES_IN_BLOCK = """
    base_lr:
      choices:
        - 0.1
        - 1.0
    # of the rest
    momentum: 0.5
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{base_lr: 0.1}", f"{{base_lr: {RANGE}}}"),
        ('{"base_lr": 1e-2}', f'{{"base_lr": {RANGE}}}'),
        ("{base_lr: {choices: [1, 0.1]}}", f"{{base_lr: {RANGE}}}"),
        ("{base_lr: {low: 0.1, high: 0.2}, momentum: 0.9}", f"{{base_lr: {RANGE}, momentum: 0.9}}"),
        ("{base_lr: {low: 0.1, high: 1.1, step: 0.1}}", f"{{base_lr: {RANGE}}}"),
        (
            "{momentum: 0.9, base_lr: {high: 1,  low: 1e-3 , log: True}, dampening: 0} # ü",
            "{momentum: 0.9, base_lr: {high: 1.6,  low: 1.6e-2 , log: True}, dampening: 0} # ü",
        ),
        (IN_BLOCK, IN_BLOCK.replace("1e-4", "1.6e-2").replace("1.0", "1.6")),
        (CHOICES_IN_BLOCK, CHOICES_IN_BLOCK.replace("choices:\n        - 0.1\n        - 1.0", RANGE)),
    ],
)
def test_bounds_take_the_place_of_what_base_lr_was_and_all_else_stays(
    before: str, after: str, written: Callable[..., Path]
) -> None:
    path = written(before)
    load_space(path)
    assert write_bounds(path, BOUNDS)
    assert path.read_text() == SPACE.replace("BASE_LR", after)
    base_lr = load_space(path).optimizers["sgd"]["base_lr"]
    assert (base_lr.low, base_lr.high, base_lr.log) == (0.016, 1.6, True)


def test_several_optimizers_are_set_at_once(written: Callable[..., Path]) -> None:
    path = written("{base_lr: 0.1}")
    write_bounds(path, {**BOUNDS, "adam": ("1e-4", "1e-2")})
    expected = SPACE.replace("BASE_LR", f"{{base_lr: {RANGE}}}")
    assert path.read_text() == expected.replace(
        "{low: 1e-3, high: 0.1, log: true}", "{low: 1e-4, high: 1e-2, log: true}"
    )


@pytest.mark.parametrize("convert", [lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text])
def test_line_ends_and_a_byte_order_mark_stay(convert: Callable[[str], str], written: Callable[..., Path]) -> None:
    path = written("{base_lr: 0.1}", convert(SPACE))
    write_bounds(path, BOUNDS)
    expected = convert(SPACE.replace("BASE_LR", f"{{base_lr: {RANGE}}}"))
    assert path.read_bytes() == expected.encode()
    load_space(path)


def test_bounds_that_are_there_change_nothing(written: Callable[..., Path]) -> None:
    path = written(f"{{base_lr: {RANGE}}}")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert not write_bounds(path, BOUNDS)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_bounds_that_another_part_of_the_file_excludes_are_refused(written: Callable[..., Path]) -> None:
    path = written("{base_lr: 1e-3}", SPACE + "enqueue: [{optimizer: {sgd: {base_lr: 1e-3}}}]\n")
    before = path.read_bytes()
    with pytest.raises(
        InvalidInput, match=r"not written: 1 problem\n  enqueue.0.optimizer.sgd.base_lr: must be within"
    ):
        write_bounds(path, BOUNDS)
    assert path.read_bytes() == before


def test_a_link_to_a_file_stays_one(written: Callable[..., Path], tmp_path: Path) -> None:
    path = written("{base_lr: 0.1}")
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    write_bounds(link, BOUNDS)
    assert link.is_symlink()
    assert load(path)["optimizer"]["sgd"]["base_lr"]["low"] == 0.016


def test_a_file_that_cannot_be_written_is_refused_and_stays(written: Callable[..., Path], tmp_path: Path) -> None:
    path = written("{base_lr: 0.1}").rename(
        tmp_path / ("x" * 250)
    )  # a name that leaves no room for a new file beside it
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="x: cannot be written: File name too long; put the"):
        write_bounds(path, BOUNDS)
    assert path.read_bytes() == before


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidInput, match="must be a regular file to be written to"):
        write_bounds(pipe, BOUNDS)


def test_replace_leaves_the_place_of_every_other_value() -> None:
    text = "a: [1, {b: 2}]   # x\nc: {d: {e: 1, f: 'two words'}, g: 3}\n"
    edited = replace(text, {("c", "g"): "[3, 4]", ("c", "d", "f"): "2"})
    assert edited == "a: [1, {b: 2}]   # x\nc: {d: {e: 1, f: 2}, g: [3, 4]}\n"
    assert loads(edited, source="test") == {"a": [1, {"b": 2}], "c": {"d": {"e": 1, "f": 2}, "g": [3, 4]}}
