"""The learning-rate range test: `python -m pipeline.lr_range --space FILE`.

Trains every optimizer of a search space at a log grid of rates for a few steps, draws loss against rate, and proposes
bounds of `base_lr`, which `--write` puts into the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem
from pipeline.space.config import Own
from pipeline.space.ready_made import find_space

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from pipeline.app.range_test import RateCurve
    from pipeline.space.search_space import SearchSpace
    from pipeline.training.executor import Trainer


TABLE_WIDTH = 100
"""Characters that the table needs: a narrow terminal breaks its lines rather than lose numbers."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parse(argv)

    from rich.console import Console

    from pipeline.space.load import load_space
    from pipeline.space.overrides import source_of

    overrides = cli.overrides_of(options)
    file = find_space(options.space, with_workload="workload" in overrides)
    space = load_space(file, overrides, searching=False)
    own = [space.workload.function.rpartition(":")[2]] if isinstance(space.workload, Own) else []
    if options.write and file != options.space:
        message = f"is a ready-made search space, {file}; copy that file, and name the copy"
        raise InvalidInput("--write", [Problem(str(options.space), message)])
    picture = options.root / "mlruns" / f"{'-'.join(['lr_range', space.name, *own])}.png"
    cli.refuse_unwritable(picture, "--root")
    if options.write:
        cli.refuse_unwritable(file.resolve(), "--write")

    from pipeline.app.prepare import prepare

    cli.say_own_code(space)
    trainer = prepare(space, source=source_of(file, overrides), device=options.device, searching=False)
    console = Console(highlight=False, markup=False)
    curves = _test(space, trainer, console)
    if options.write:
        _write(file, curves, console)
    _save_picture(picture, trainer.workload.name, curves, console)
    return 0 if any(curve.bounds() for curve in curves.values()) else 1


def _test(space: SearchSpace, trainer: Trainer, console: Console) -> Mapping[str, RateCurve]:
    """Test every optimizer of a space, and show what came out."""
    from pipeline.app.range_picture import range_table
    from pipeline.app.range_test import RATES, STEPS, range_test
    from pipeline.training.rows.trainer import has_rule

    what = f"{trainer.workload.name} · at least {STEPS} steps at each of {len(RATES)} rates · {trainer.device}"
    if trainer.plain_because is not None:
        what += f", one after another, since {trainer.plain_because}"
    elif alone := [name for name in space.optimizers if not has_rule(name)]:
        what += f", those of {' and '.join(alone)} one after another"
    console.print(f"{what}   seed {space.seed}", soft_wrap=True)
    curves: dict[str, RateCurve] = {}
    with console.status("") as status:
        for name in space.optimizers:
            status.update(f"{name}, {len(curves) + 1} of {len(space.optimizers)}")
            curves[name] = range_test(space, name, trainer)
    console.print()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(range_table(space, curves), crop=False)
    console.print()
    return curves


def _write(path: Path, curves: Mapping[str, RateCurve], console: Console) -> None:
    """Put the proposed bounds into the file."""
    from pipeline.app.range_picture import as_written
    from pipeline.space.edit import write_bounds

    proposed = {name: bounds for name, curve in curves.items() if (bounds := curve.bounds())}
    changed = write_bounds(path, {name: (as_written(b.low), as_written(b.high)) for name, b in proposed.items()})
    news = f"base_lr of {', '.join(proposed)} is now as proposed" if changed else "has nothing to change"
    console.print(f"file      {path}   {news}", soft_wrap=True)


def _save_picture(path: Path, title: str, curves: Mapping[str, RateCurve], console: Console) -> None:
    from pipeline.app.range_picture import range_png
    from pipeline.files.atomic import write_atomic

    try:
        write_atomic(path, range_png(title, curves))
    except OSError as error:
        raise InvalidInput("--root", [Problem(str(path), f"cannot be written: {error.strerror}")]) from None
    console.print(f"picture   {path}", soft_wrap=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.lr_range", description="Find bounds for base_lr.")
    cli.add_space(parser)
    parser.add_argument("--write", action="store_true", help="put the proposed bounds into the file of --space")
    parser.add_argument("--seed", type=cli.whole_number(0, 2**32 - 1), metavar="N", help="instead of the file's")
    cli.add_root(parser)
    cli.add_device(parser)
    options = parser.parse_args(argv)
    if options.write and options.space is None:
        parser.error("--write needs --space FILE, the file to put the bounds into")
    return options


if __name__ == "__main__":
    cli.run(main)
