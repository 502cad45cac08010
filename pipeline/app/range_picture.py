"""Draw a range test: loss against rate, a panel per optimizer, with proposed and present bounds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from pipeline.app.range_table import present_text, range_text, rate_text
from pipeline.app.range_test import RATES, RateCurve
from pipeline.errors import printable
from pipeline.space.distributions import Range, extremes
from pipeline.space.search_space import SearchSpace

PANEL = (4.6, 3.4)
"""Width and height of the panel of one optimizer, in inches."""
COLUMNS = 3
BLUE, GRAY, GREEN, ORANGE = "#1f5fa8", "#8a8f98", "#2a8a4a", "#c8680a"
PRESENT_HEIGHT = 0.06
"""Where a panel draws the present bounds, as a share of its height."""


def range_png(space: SearchSpace, curves: Mapping[str, RateCurve], *, title: str) -> bytes:
    """Return the picture of a range test as a PNG file."""
    buffer = io.BytesIO()
    range_figure(space, curves, title=title).savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def range_figure(space: SearchSpace, curves: Mapping[str, RateCurve], *, title: str) -> Figure:
    """Return a figure with a panel per optimizer, and one legend below them."""
    columns = min(COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    figure.suptitle(printable(title), parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        present = space.optimizers[name]["base_lr"]
        _draw_losses(panel, curve)
        _draw_bounds(panel, curve, present)
        panel.set_title(_words(name, curve, present), fontsize=10, loc="left", parse_math=False)
        panel.set_xlabel("base_lr", fontsize=9)
        panel.set_ylabel("val/loss", fontsize=9)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    drawn = {artist.get_label(): artist for panel in panels for artist in panel.get_legend_handles_labels()[0]}
    ncols = len(drawn) if columns == COLUMNS else columns + 1
    figure.legend(handles=[*drawn.values()], loc="outside lower center", ncols=ncols, fontsize=9, frameon=False)
    return figure


def _draw_losses(panel: Axes, curve: RateCurve) -> None:
    """Draw the loss of each draw and the lowest, up to a little above the loss before training."""
    if len(set(curve.runs)) > 1:
        for index, run in enumerate(curve.runs):
            label = "loss of one draw" if index == 0 else None
            panel.plot(RATES, _gaps(run), color=GRAY, linewidth=0.9, alpha=0.7, label=label)
    panel.plot(RATES, _gaps(curve.losses), color=BLUE, linewidth=2, label="lowest loss")
    losses = [loss for loss in curve.losses if loss is not None]
    before = curve.losses[0] if curve.losses[0] is not None else max(losses, default=1.0)
    low = min(losses, default=0.0)
    margin = 0.1 * (before - low) or 1.0
    panel.set(xscale="log", xlim=(RATES[0] / 1.4, RATES[-1] * 1.4), ylim=(low - 2.5 * margin, before + 3 * margin))
    panel.xaxis.set_major_locator(LogLocator(numticks=len(RATES)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_bounds(panel: Axes, curve: RateCurve, present: Any) -> None:
    """Draw the proposed bounds as a band, the rate to begin with, and the present bounds as a bar below."""
    if (bounds := curve.bounds()) and (rate := curve.begin_with()):
        panel.axvspan(bounds.low, bounds.high, color=GREEN, alpha=0.14, linewidth=0, label="proposed bounds")
        panel.axvline(rate, color=GREEN, linestyle="--", linewidth=1.3, label="rate to begin with")
    rates = extremes(present)
    panel.plot(
        rates,
        [PRESENT_HEIGHT] * len(rates),
        transform=panel.get_xaxis_transform(),
        color=ORANGE,
        linestyle="-" if isinstance(present, Range) else "none",
        linewidth=2,
        marker="|",
        markersize=9,
        markeredgewidth=2,
        label="present bounds",
    )


def _words(name: str, curve: RateCurve, present: Any) -> str:
    bounds, rate = curve.bounds(), curve.begin_with()
    proposed = f"proposed {range_text(bounds.low, bounds.high)}, " if bounds else ""
    begin = f"begin with {rate_text(rate)}" if rate else "no rate learns"
    return f"{name}: {begin}\n{proposed}present {present_text(present)}"


def _gaps(losses: Sequence[float | None]) -> list[float]:
    return [math.nan if loss is None else loss for loss in losses]
