"""Run the range test of a search space: train, show the table, write the bounds and the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.app import cli
from pipeline.app.prepare import prepare
from pipeline.app.range_options import RangeTestOptions
from pipeline.app.range_picture import range_png
from pipeline.app.range_table import range_table, rate_text
from pipeline.app.range_test import MIN_STEPS, RATES, Bounds, RateCurve, range_test
from pipeline.errors import InvalidInput, Problem, printable
from pipeline.files.atomic import write_atomic
from pipeline.space.distributions import Range, extremes
from pipeline.space.edit import write_bounds
from pipeline.space.optimizers import optimizer_class
from pipeline.space.search_space import SearchSpace
from pipeline.training.executor import LocalExecutor
from pipeline.training.rows.update_rules import has_rule
from pipeline.workloads.loop import Loop

WIDER = 10
"""How many times as wide as the proposed bounds present bounds may be, and be left as they are."""
TABLE_WIDTH = 100
"""Characters per line of the table; a narrow terminal wraps a line instead of cutting off numbers."""


def run_range_test(options: RangeTestOptions) -> int:
    """Test every optimizer of a space; return the exit status, 1 if no rate of any optimizer learns."""
    cli.say_own_code(options.space)
    space, executor = prepare(options.space, source=options.source, device=options.device, searching=False)
    if isinstance(executor.workload, Loop):
        message = "a range test trains on a part of the data, which only a Workload has; give base_lr a wide range"
        raise InvalidInput(options.source, [Problem("workload", message)])
    console = Console(highlight=False, markup=False)
    curves = _test(space, executor, console)
    proposed = {name: bounds for name, curve in curves.items() if (bounds := curve.bounds())}
    if options.write is not None:
        _write(options.write, proposed, console)
    _save_picture(options, range_png(space, curves, title=executor.workload.name), console)
    if proposed:
        console.print(f"next      {next_step(options, space, proposed)}", soft_wrap=True)
    return 0 if proposed else 1


def _test(space: SearchSpace, executor: LocalExecutor, console: Console) -> Mapping[str, RateCurve]:
    """Test every optimizer of a space, and show the losses and the bounds that they suggest."""
    name = printable(executor.workload.name)
    what = f"{name} · at least {MIN_STEPS} steps at each of {len(RATES)} rates · {executor.device}"
    if len(space.batch_sizes) > 1:
        what += f", batch_size {min(space.batch_sizes)}, the smallest"
    config = dataclasses.replace(space.example(), batch_size=min(space.batch_sizes))
    if (why := executor.plain_with_any_optimizer(config)) is not None:
        what += f", one after another, since {why}"
    elif alone := [name for name in space.optimizers if not has_rule(optimizer_class(name))]:
        what += f", those of {' and '.join(alone)} one after another"
    console.print(f"{what}   seed {space.seed}", soft_wrap=True)
    curves: dict[str, RateCurve] = {}
    with console.status("") as status:
        for name in space.optimizers:
            status.update(f"{name}, {len(curves) + 1} of {len(space.optimizers)}")
            curves[name] = range_test(space, name, executor)
    console.print()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(range_table(space, curves), crop=False)
    console.print()
    return curves


def _write(path: Path, proposed: Mapping[str, Bounds], console: Console) -> None:
    """Write the proposed bounds into the file."""
    changed = write_bounds(path, {name: (rate_text(b.low), rate_text(b.high)) for name, b in proposed.items()})
    news = f"base_lr of {', '.join(proposed)} is now as proposed" if changed else "has nothing to change"
    console.print(f"file      {path}   {news}", soft_wrap=True)


def _save_picture(options: RangeTestOptions, picture: bytes, console: Console) -> None:
    try:
        write_atomic(options.picture, picture)
    except OSError as error:
        raise InvalidInput("--root", [Problem(str(options.picture), f"cannot be written: {error.strerror}")]) from None
    console.print(f"picture   {options.picture_as_given}", soft_wrap=True)


def next_step(options: RangeTestOptions, space: SearchSpace, proposed: Mapping[str, Bounds]) -> str:
    """Return what to do next, and its command: write the bounds into the file, or search within them."""
    if options.write is not None:
        return f"search within the written bounds: {options.search_command(dict.fromkeys(proposed))}"
    other = {name: bounds for name, bounds in proposed.items() if not _fits(space.optimizers[name]["base_lr"], bounds)}
    if not other:
        return f"search within the present bounds, which hold the proposed ones: {options.search_command({})}"
    if options.can_write:
        return f"put the proposed bounds into the file: {options.write_command()}"
    texts = {name: f"{{low: {rate_text(b.low)}, high: {rate_text(b.high)}, log: true}}" for name, b in other.items()}
    return f"search within the proposed bounds: {options.search_command(texts)}"


def _fits(present: Any, proposed: Bounds) -> bool:
    """Say whether a present range holds the proposed bounds, and is little wider."""
    low, high = min(extremes(present)), max(extremes(present))
    holds = low <= proposed.low and proposed.high <= high
    return isinstance(present, Range) and present.log and holds and high / low <= WIDER * proposed.high / proposed.low
