"""Draw a figure as inline SVG: axes, ticks, points, rings, lines, steps, bands.

A figure's colours are CSS classes of the page (`pipeline.page.style`), so that they follow the light or dark scheme.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.page.markup import escaped
from pipeline.page.scales import Scale, Tick

CHARACTER = 7.0
"""Width of a character of a tick's label, in the figure's units, in the widest of common fonts."""
LINE = 15
"""Height of a line of text."""
DOT, RING = 3.6, 3.2
"""Radii of points."""

SMALL, WIDE = (340, 232), (420, 250)
"""Width and height of figures of which three, or two, stand side by side in a wide window."""

Mark = tuple[float, float, str]
"""x, y, and the text that is shown while the pointer rests on the mark."""


@dataclass(kw_only=True)
class Plot:
    """A figure with two axes; marks are added, then `render` gives the SVG.

    Units are pixels of a figure that is shown at its own size.
    """

    x: Scale
    y: Scale
    label: str
    """What the figure shows, for those who cannot see it."""
    size: tuple[int, int] = SMALL
    """Width and height."""
    x_title: str = ""
    downwards: bool = False
    """Whether the lower end of `y` is at the top."""
    above: int = 0
    """Lines of text above the plot."""
    beside: float = 0
    """Width of the text to the right of the plot."""
    _marks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.width, self.height = self.size
        self.top = 10 + self.above * LINE
        self.bottom = self.height - (22 if not self.x_title else 22 + LINE)
        self._y_ticks = self.y.ticks(max(2, (self.bottom - self.top) // 26))
        self.left = 10 + max((text_width(label) for _, label in self._y_ticks), default=0)
        self.right = self.width - max(12, self.beside)

    def px(self, value: float) -> float:
        """Return the horizontal place of a value."""
        return self.left + self.x.at(value) * (self.right - self.left)

    def py(self, value: float) -> float:
        """Return the vertical place of a value; 0 is the top of the figure."""
        return self._vertical(self.y.at(value))

    def dots(self, marks: Iterable[Mark], css: str, *, radius: float = DOT) -> None:
        """Draw filled points."""
        self._points(marks, f"dot {css}", radius)

    def rings(self, marks: Iterable[Mark], css: str, *, radius: float = RING) -> None:
        """Draw hollow points."""
        self._points(marks, f"ring {css}", radius)

    def line(self, points: Iterable[tuple[float, float]], css: str, title: str = "") -> None:
        """Draw a line through points."""
        self._path([(self.px(x), self.py(y)) for x, y in points], css, title)

    def steps(self, points: Sequence[tuple[float, float]], css: str, *, start: float, title: str = "") -> None:
        """Draw a line that holds each y from the x before, of the first from `start`, to its own x."""
        before = [start, *(x for x, _ in points)]
        corners = [(place, y) for (x, y), last in zip(points, before, strict=False) for place in (last, x)]
        self.line((corner for corner, _ in itertools.groupby(corners)), css, title)

    def band(self, low: float, high: float, css: str = "band") -> None:
        """Shade the range of x from `low` to `high`, at least as wide as a point."""
        left, right = self.px(low) - DOT - 1, self.px(high) + DOT + 1
        left, right = max(left, self.left), min(right, self.right)
        self.box(left, self.top, right - left, self.bottom - self.top, css)

    def level(self, value: float, css: str = "level") -> None:
        """Draw a line across the plot at a y."""
        self._marks.append(f'<path class="{css}" d="M{_n(self.left)} {_n(self.py(value))}H{_n(self.right)}"/>')

    def rule(self, value: float, label: str = "", css: str = "rule") -> None:
        """Draw a line from top to bottom at an x, with a label above the plot."""
        self._marks.append(f'<path class="{css}" d="M{_n(self.px(value))} {_n(self.top)}V{_n(self.bottom)}"/>')
        if label:
            x = self._within(self.px(value), label)
            self._marks.append(f'<text class="mid" x="{_n(x)}" y="{_n(self.top - 5)}">{escaped(label)}</text>')

    def box(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        """Draw a rectangle, in the figure's units."""
        shape = f'<rect class="{css}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        self._marks.append(f"{shape}/>" if not title else f"{shape}><title>{escaped(title)}</title></rect>")

    def beside_text(self, lines: Sequence[tuple[float, Sequence[str], str]]) -> None:
        """Write texts to the right of the plot, each near a y; texts that would overlap move apart.

        Args:
            lines: y, the lines of the text, and its CSS class.
        """
        ordered = sorted(lines, key=lambda line: self.py(line[0]))
        heights = [len(texts) * LINE for _, texts, _ in ordered]
        wanted = [self.py(value) - height / 2 for (value, _, _), height in zip(ordered, heights, strict=True)]
        for y, (_, texts, css) in zip(apart(wanted, heights, low=2, high=self.bottom), ordered, strict=True):
            for index, text in enumerate(texts):
                place = f'x="{_n(self.right + 6)}" y="{_n(y + (index + 0.8) * LINE)}"'
                self._marks.append(f'<text class="{css}" {place}>{escaped(text)}</text>')

    def render(self) -> str:
        """Return the figure as an `svg` element."""
        size = f'viewBox="0 0 {self.width} {self.height}" style="max-width:{round(1.35 * self.width)}px"'
        title = ""
        if self.x_title:
            x = self._within((self.left + self.right) / 2, self.x_title)
            title = f'<text class="mid axis" x="{_n(x)}" y="{self.height - 4}">{escaped(self.x_title)}</text>'
        parts = [*self._horizontal_axis(), *self._vertical_axis(), *self._marks, title]
        return f'<svg {size} role="img" aria-label="{escaped(self.label)}">{"".join(parts)}</svg>'

    def _horizontal_axis(self) -> Iterable[str]:
        for place, label in self._fitting():
            x = self.left + place * (self.right - self.left)
            yield f'<path class="grid" d="M{_n(x)} {_n(self.top)}V{_n(self.bottom)}"/>'
            label_at = f'x="{_n(self._within(x, label))}" y="{_n(self.bottom + LINE)}"'
            yield f'<text class="mid tick" {label_at}>{escaped(label)}</text>'

    def _vertical_axis(self) -> Iterable[str]:
        for place, label in self._y_ticks:
            y = self._vertical(place)
            yield f'<path class="grid" d="M{_n(self.left)} {_n(y)}H{_n(self.right)}"/>'
            yield f'<text class="end tick" x="{_n(self.left - 6)}" y="{_n(y + 4)}">{escaped(label)}</text>'

    def _fitting(self) -> list[Tick]:
        """Return the most ticks of x whose labels do not touch."""
        width = self.right - self.left
        for most in range(12, 1, -1):
            ticks = self.x.ticks(most)
            spans = [(self._within(self.left + p * width, label), text_width(label)) for p, label in ticks]
            if all(b - a >= (v + w) / 2 + CHARACTER for (a, v), (b, w) in itertools.pairwise(spans)):
                return ticks
        return self.x.ticks(1)

    def _vertical(self, place: float) -> float:
        height = self.bottom - self.top
        return self.top + height * (place if self.downwards else 1 - place)

    def _within(self, x: float, label: str) -> float:
        """Return the middle of a label near `x` that leaves the label inside the figure."""
        half = text_width(label) / 2 + 1
        return min(max(x, half), self.width - half)

    def _points(self, marks: Iterable[Mark], css: str, radius: float) -> None:
        circles = []
        for x, y, title in marks:
            shape = f'<circle cx="{_n(self.px(x))}" cy="{_n(self.py(y))}" r="{_n(radius)}"'
            circles.append(f"{shape}><title>{escaped(title)}</title></circle>" if title else f"{shape}/>")
        if circles:
            self._marks.append(f'<g class="{css}">{"".join(circles)}</g>')

    def _path(self, points: Sequence[tuple[float, float]], css: str, title: str) -> None:
        if points:
            path = f'<path class="{css}" d="M{" ".join(f"{_n(x)} {_n(y)}" for x, y in points)}"'
            self._marks.append(f"{path}><title>{escaped(title)}</title></path>" if title else f"{path}/>")


def text_width(text: str) -> float:
    """Return about how wide a label is, in the figure's units."""
    return len(text) * CHARACTER


def apart(wanted: Sequence[float], heights: Sequence[float], *, low: float, high: float) -> list[float]:
    """Return places near the wanted ones at which texts do not overlap.

    Args:
        wanted: Wanted upper edges, ascending.
        heights: Height of each text.
        low: Least upper edge.
        high: Greatest lower edge; too many texts go beyond it.
    """
    places = []
    free = low
    for place, height in zip(wanted, heights, strict=True):
        places.append(max(place, free))
        free = places[-1] + height
    free = max(high, low + sum(heights))
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], free - heights[index])
        free = places[index]
    return places


def _n(value: float) -> str:
    """Return a coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")
