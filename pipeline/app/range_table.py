"""Show a range test as a table: a rate to begin with, proposed and present bounds, loss against rate in blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.app.range_test import PER_DECADE, RATES, Bounds, RateCurve
from pipeline.space.distributions import Range, extremes
from pipeline.space.search_space import SearchSpace

BLOCKS = "▁▂▃▄▅▆▇█"
DIVERGED = "×"


def range_table(space: SearchSpace, curves: Mapping[str, RateCurve]) -> Table:
    """Return a table of three lines per optimizer: loss against rate, the proposed bounds, the present bounds."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("\noptimizer", Text(f"val/loss at each base_lr\n{_axis()}"), ""):
        table.add_column(column, no_wrap=True)
    for name, curve in curves.items():
        present = space.optimizers[name]["base_lr"]
        drawing, words = (
            [_blocks(curve), _present_line(present)],
            ["no rate learns", f"present  {present_text(present)}"],
        )
        if (bounds := curve.bounds()) and (rate := curve.begin_with()):
            drawing.insert(1, _proposed_line(bounds, rate))
            words[:1] = [f"begin with {rate_text(rate)}", f"proposed {range_text(bounds.low, bounds.high)}"]
        table.add_row(name, Text("\n").join(drawing), "\n".join(words))
    return table


def present_text(distribution: Any) -> str:
    """Return the present `base_lr` for people to read: its bounds, or its only value."""
    rates = extremes(distribution)
    count = "" if isinstance(distribution, Range) or len(rates) == 1 else f", {len(rates)} choices"
    return f"{range_text(min(rates), max(rates))}{count}"


def range_text(low: float, high: float) -> str:
    """Return a range for people to read: its bounds, or its only value."""
    return rate_text(low) if low == high else f"{rate_text(low)}–{rate_text(high)}"


def rate_text(rate: float) -> str:
    """Return a rate of two digits as people write rates in a file: `1.8e-3`, `0.32`, `1.0`."""
    if rate < 0.1:
        digits, exponent = f"{rate:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    text = f"{rate:.2g}"
    return text if "." in text or "e" in text else f"{text}.0"


def _axis() -> str:
    """Return the rate of each decade, above its block."""
    return "".join(f"{rate_text(rate):{PER_DECADE}}" for rate in RATES[::PER_DECADE]).rstrip()


def _blocks(curve: RateCurve) -> Text:
    """Return one block per rate, as high as the loss; those within the proposed bounds are green."""
    losses = [loss for loss in curve.losses if loss is not None]
    low, before = min(losses, default=0.0), curve.losses[0] or max(losses, default=1.0)
    blocks = Text("".join(DIVERGED if loss is None else _block(loss - low, before - low) for loss in curve.losses))
    if bounds := curve.bounds():
        blocks.stylize("green", RATES.index(bounds.low), RATES.index(bounds.high) + 1)
    return blocks


def _proposed_line(bounds: Bounds, rate: float) -> Text:
    first, last = RATES.index(bounds.low), RATES.index(bounds.high)
    line = [*f"{' ' * first}└{'─' * (last - first - 1)}┘"]
    line[RATES.index(rate)] = "┴"
    return Text("".join(line), "green")


def _present_line(distribution: Any) -> Text:
    """Return a bracket below a range, or a stem below each choice; what lies beyond the drawing is left out."""
    at = [round(PER_DECADE * math.log10(rate / RATES[0])) for rate in extremes(distribution)]
    line = [" "] * len(RATES)
    if isinstance(distribution, Range):
        inside = slice(max(0, at[0]), max(0, at[1] + 1))
        line[inside] = "─" * len(line[inside])
    ends = "└┘" if isinstance(distribution, Range) and at[0] < at[1] else "╵" * len(at)
    for place, end in zip(at, ends, strict=True):
        if 0 <= place < len(line):
            line[place] = end
    return Text("".join(line).rstrip(), "dim")


def _block(height: float, full: float) -> str:
    share = min(1.0, height / full) if full > 0 else 1.0
    return BLOCKS[round(share * (len(BLOCKS) - 1))]
