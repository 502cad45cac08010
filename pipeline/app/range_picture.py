"""Show a range test: loss against rate per optimizer, as a table with block characters and as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from pipeline.app.range_test import RATES, Bounds, RateCurve
from pipeline.space.distributions import extremes
from pipeline.space.search_space import SearchSpace

BLOCKS = "▁▂▃▄▅▆▇█"
DIVERGED = "×"
PANEL = (4.2, 3.2)
"""Width and height of the panel of one optimizer, in inches."""
COLUMNS = 3


def range_table(space: SearchSpace, curves: Mapping[str, RateCurve]) -> Table:
    """Return a table of present bounds, proposed bounds, and loss against rate."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("optimizer", "present", "proposed", f"val/loss at {RATES[0]:.0e} to {RATES[-1]:g}"):
        table.add_column(column, no_wrap=True)
    for name, curve in curves.items():
        present, proposed = extremes(space.optimizers[name]["base_lr"]), curve.bounds()
        bounds = range_text(proposed.low, proposed.high) if proposed else "no rate learns"
        table.add_row(name, range_text(min(present), max(present)), bounds, _drawing(curve, proposed))
    return table


def range_png(title: str, curves: Mapping[str, RateCurve]) -> bytes:
    """Return a PNG file that shows loss against rate, with a panel per optimizer."""
    columns = min(COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel, (name, curve) in zip(panels.flat, curves.items(), strict=False):
        losses = [loss for loss in curve.losses if loss is not None]
        before = curve.losses[0] if curve.losses[0] is not None else max(losses, default=1.0)
        for run in curve.runs:
            panel.plot(RATES, _gaps(run), color="tab:gray", linewidth=0.8, alpha=0.6)
        panel.plot(RATES, _gaps(curve.losses), color="tab:blue", linewidth=2)
        if bounds := curve.bounds():
            panel.axvspan(bounds.low, bounds.high, color="tab:green", alpha=0.15)
        low = min(losses, default=0.0)
        margin = 0.1 * (before - low) or 1.0
        panel.set(xscale="log", xlabel="base_lr", ylabel="val/loss", ylim=(low - margin, before + 3 * margin))
        panel.set_title(f"{name}   {range_text(bounds.low, bounds.high) if bounds else 'no rate learns'}", fontsize=10)
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


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


def _drawing(curve: RateCurve, bounds: Bounds | None) -> Text:
    """Return one block per rate, as high as the loss, above a line that marks the bounds."""
    losses = [loss for loss in curve.losses if loss is not None]
    low, before = min(losses, default=0.0), curve.losses[0] or max(losses, default=1.0)
    blocks = "".join(DIVERGED if loss is None else _block(loss - low, before - low) for loss in curve.losses)
    if bounds is None:
        return Text(blocks)
    first, last = RATES.index(bounds.low), RATES.index(bounds.high)
    return Text.assemble(
        blocks[:first],
        (blocks[first : last + 1], "green"),
        blocks[last + 1 :],
        "\n" + " " * first,
        "└" + "─" * (last - first - 1) + "┘",
    )


def _block(height: float, full: float) -> str:
    share = min(1.0, height / full) if full > 0 else 1.0
    return BLOCKS[round(share * (len(BLOCKS) - 1))]


def _gaps(losses: tuple[float | None, ...]) -> list[float]:
    return [math.nan if loss is None else loss for loss in losses]
