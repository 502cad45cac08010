from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.page.scales import Categories, Linear, Log, Scale
from pipeline.page.sentence import rate_text
from pipeline.page.svg import LINE, Plot, apart, text_width


def labels(scale: Scale, most: int) -> list[str]:
    return [label for _, label in scale.ticks(most)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 20, ["0", "5", "10", "15", "20"]),
        (0, 4, ["0", "1", "2", "3", "4"]),
        (0, 1, ["0", "0.25", "0.5", "0.75", "1"]),
        (-3, 3, ["−2", "0", "2"]),
        (1e-7, 5e-7, ["1e-7", "2e-7", "3e-7", "4e-7", "5e-7"]),
        (2, 2, ["2"]),
    ],
)
def test_the_ticks_of_a_linear_axis_are_round_numbers(low: float, high: float, expected: list[str]) -> None:
    assert labels(Linear(low=low, high=high), 5) == expected


def test_an_axis_of_epochs_has_whole_numbers_alone() -> None:
    assert labels(Linear(low=0, high=3, whole=True), 9) == ["0", "1", "2", "3"]
    assert [labels(Linear(low=0, high=1, whole=True), most) for most in (2, 9, 12, 40)] == [["0", "1"]] * 4
    assert labels(Linear(low=0, high=300, whole=True), 7) == ["0", "50", "100", "150", "200", "250", "300"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1e-4, 1e-1, ["1e-4", "1e-3", "1e-2", "0.1"]),
        (1e-2, 1, ["1e-2", "3e-2", "0.1", "0.3", "1"]),
        (1e-8, 1, ["1e-8", "1e-6", "1e-4", "1e-2", "1"]),
        (3e-3, 4e-2, ["5e-3", "1e-2", "2e-2"]),
        (3e-3, 4.5e-3, ["3e-3", "4e-3"]),
        (0.61, 0.64, ["0.61", "0.62", "0.63", "0.64"]),
    ],
)
def test_the_ticks_of_a_logarithmic_axis_are_the_densest_that_fit(low: float, high: float, expected: list[str]) -> None:
    assert labels(Log(low=low, high=high, text=rate_text), 5) == expected


def test_a_logarithmic_axis_has_a_place_for_zero_where_asked_for() -> None:
    scale = Log(low=1e-3, high=1, zero=True)
    assert scale.ticks(5)[0] == (0.0, "0")
    assert scale.at(0) == 0
    assert 0 < scale.at(1e-2) < scale.at(1e-1) < scale.at(1) == 1


@pytest.mark.parametrize("scale", [Linear(low=1, high=2), Log(low=1, high=2)])
def test_a_value_beyond_an_end_is_put_at_the_end(scale: Scale) -> None:
    assert (scale.at(0.5), scale.at(1), scale.at(2), scale.at(1e9)) == (0, 0, 1, 1)


def drawn(plot: Plot) -> ElementTree.Element:
    return ElementTree.fromstring(plot.render())


def plot_of(**changes: Any) -> Plot:
    values: dict[str, Any] = {"x": Linear(low=0, high=10), "y": Linear(low=0, high=1), "label": "a figure"}
    return Plot(**{**values, **changes})


def test_points_are_where_their_values_are() -> None:
    plot = plot_of(x=Log(low=1e-3, high=1e-1))
    plot.dots([(1e-3, 0, "first"), (1e-2, 0.5, "middle"), (1e-1, 1, "last")], "c0")
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn(plot).iter("circle")]
    middle = (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2
    expected = [(plot.left, plot.bottom), middle, (plot.right, plot.top)]
    assert circles == [pytest.approx(point, abs=0.06) for point in expected]
    assert [title.text for title in drawn(plot).iter("title")] == ["first", "middle", "last"]


def test_an_axis_that_is_turned_round_has_its_lower_end_at_the_top() -> None:
    plot = plot_of(downwards=True)
    assert (plot.py(0), plot.py(1)) == (plot.top, plot.bottom)


def test_steps_hold_a_value_up_to_its_own_x() -> None:
    plot = plot_of()
    plot.steps([(1, 1.0), (2, 1.0), (3, 0.5)], "curve", start=0)
    (path,) = [p.attrib["d"] for p in drawn(plot).iter("path") if p.attrib["class"] == "curve"]
    points = [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path)]
    corners = [(0, 1.0), (1, 1.0), (2, 1.0), (2, 0.5), (3, 0.5)]
    assert points == [pytest.approx((plot.px(x), plot.py(y)), abs=0.06) for x, y in corners]


def test_a_band_is_at_least_as_wide_as_a_point_and_stays_inside() -> None:
    plot = plot_of()
    plot.band(10, 10)
    (band,) = [rect.attrib for rect in drawn(plot).iter("rect")]
    assert float(band["width"]) > 4
    assert float(band["x"]) + float(band["width"]) <= plot.right


scales = st.one_of(
    st.builds(lambda low, span: Linear(low=low, high=low + span), st.floats(-1e4, 1e4), st.floats(1e-3, 1e5)),
    st.builds(lambda low, ratio: Log(low=low, high=low * ratio), st.floats(1e-9, 1e3), st.floats(1.01, 1e8)),
    st.builds(lambda names: Categories(names=names), st.lists(st.text("abc[] ", max_size=24), min_size=1, max_size=9)),
)


@given(x=scales, y=scales, downwards=st.booleans())
def test_no_tick_is_cut_off_and_no_labels_touch(x: Scale, y: Scale, downwards: bool) -> None:
    plot = plot_of(x=x, y=y, downwards=downwards, x_title="base rate")
    texts = list(drawn(plot).iter("text"))
    rows: dict[float, list[tuple[float, float]]] = {}
    for text in texts:
        at, width = float(text.attrib["x"]), text_width(text.text or "")
        left = at - width if "end" in text.attrib["class"] else at - width / 2
        if width <= plot.width:
            assert left >= -1e-9
            assert left + width <= plot.width
        assert LINE / 2 < float(text.attrib["y"]) <= plot.height
        if "mid" in text.attrib["class"]:
            rows.setdefault(float(text.attrib["y"]), []).append((left, left + width))
    for spans in rows.values():
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans) if len(spans) > 1)


def test_texts_that_would_overlap_move_apart_and_stay_inside() -> None:
    places = apart([50, 52, 54, 90], [15, 15, 15, 15], low=0, high=100)
    assert all(b - a >= 15 for a, b in itertools.pairwise(places))
    assert places[0] >= 0
    assert places[-1] + 15 <= 100
    assert apart([10, 60], [15, 15], low=0, high=100) == [10, 60]


def test_names_are_escaped_in_a_figure() -> None:
    plot = plot_of(x=Categories(names=["<b>&\"'", "b"]), label='a "label" <i>')
    plot.beside_text([(0.5, ["<script>"], "strong")])
    svg = plot.render()
    assert "<script>" not in svg
    assert [text.text for text in ElementTree.fromstring(svg).iter("text")][:2] == ["<b>&\"'", "b"]
