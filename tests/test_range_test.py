"""The range test: what curves suggest, and what it finds for the digits."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from tiny import BATCH, tiny_workload

from pipeline.app.prepare import prepare
from pipeline.app.range_picture import range_figure, range_png
from pipeline.app.range_table import range_table, rate_text
from pipeline.app.range_test import PER_DECADE, RATES, Bounds, EvenDraw, RateCurve, range_test
from pipeline.space.load import space_from_document
from pipeline.space.search_space import SearchSpace
from pipeline.training.executor import LocalExecutor
from pipeline.workloads.data import with_fewer_samples
from pipeline.workloads.streamed import Streamed
from pipeline.workloads.workload import Split

CPU = torch.device("cpu")
BEFORE = 2.0


def curve(**losses: float | None) -> RateCurve:
    """Return a curve that stays at `BEFORE` but for some rates, such as `at_0_1`."""
    run = [losses.get("at_" + f"{rate:g}".replace(".", "_"), BEFORE) for rate in RATES]
    return RateCurve((tuple(run),))


def digits_space(**optimizers: Any) -> SearchSpace:
    return space_from_document(
        {
            "workload": {"name": "digits", "model": "mlp"},
            "epochs": 20,
            "batch_size": 64,
            "optimizer": optimizers,
            "scheduler": {"step": {"step_size": {"low": 2, "high": 10}}},
            "param_groups": {
                "head": {"pattern": "fc.*", "lr_ratio": {"low": 0.1, "high": 10, "log": True}},
                "body": {"pattern": "*"},
            },
        },
        name="test",
    )


def tiny_space(**optimizers: Any) -> SearchSpace:
    """Return a space that fits the tiny workload."""
    groups = {"head": {"pattern": "head.*"}, "body": {"pattern": "*"}}
    document = {**digits_space(**optimizers).document, "batch_size": BATCH, "param_groups": groups}
    return space_from_document(document, name="test")


def test_rates_go_from_1e_7_to_10_in_equal_steps() -> None:
    assert RATES[:7] == (1e-7, 1.6e-7, 2.5e-7, 4e-7, 6.3e-7, 1e-6, 1.6e-6)
    assert RATES[-1] == 10
    assert len(RATES) == 8 * PER_DECADE + 1


def test_bounds_end_where_training_breaks_and_begin_two_decades_below() -> None:
    assert curve(at_0_04=0.5, at_0_063=0.1, at_0_1=0.4, at_0_16=1.8).bounds() == Bounds(0.0016, 0.16)
    assert curve(at_0_04=0.5, at_0_063=0.1, at_0_1=None, at_0_16=0.2).bounds() == Bounds(0.001, 0.1)


def test_bounds_end_with_the_rates_that_were_tried() -> None:
    assert curve(at_6_3=0.5, at_10=0.1).bounds() == Bounds(0.1, 10)
    very_low = {"at_1_6e-07": 0.1, "at_2_5e-07": 0.3}
    assert curve(**very_low).bounds() == Bounds(1e-7, 4e-7)


@pytest.mark.parametrize(
    "learns_nothing",
    [curve(), curve(at_0_1=1.99), curve(**{"at_1e-07": None}), RateCurve(((None,) * len(RATES),))],
)
def test_there_are_no_bounds_where_no_rate_learns(learns_nothing: RateCurve) -> None:
    assert learns_nothing.bounds() is None


def test_the_best_of_several_runs_at_a_rate_counts() -> None:
    one, other = curve(at_0_01=0.5, at_0_1=None).runs[0], curve(at_0_01=0.7, at_0_1=0.1).runs[0]
    losses = RateCurve((one, other)).losses
    assert losses[RATES.index(0.01)] == 0.5
    assert losses[RATES.index(0.1)] == 0.1


def test_the_rate_to_begin_with_is_the_middle_of_those_that_train_well() -> None:
    well = curve(at_0_004=1.5, at_0_01=0.5, at_0_016=0.2, at_0_025=0.1, at_0_04=0.3, at_0_063=0.4, at_0_1=1.8)
    assert well.begin_with() == 0.025
    assert curve(at_0_01=0.5, at_0_016=0.2, at_0_025=0.1, at_0_04=None, at_0_063=0.4).begin_with() == 0.016
    assert curve(at_10=0.1).begin_with() == 10


def between(low: float, high: float, loss: float | None) -> RateCurve:
    """Return a curve that has a loss at the rates within a range, and `BEFORE` elsewhere."""
    return RateCurve((tuple(loss if low <= rate <= high else BEFORE for rate in RATES),))


def test_the_rate_to_begin_with_trains_well_with_every_draw() -> None:
    with_momentum, without = between(0.004, 0.04, 0.2).runs[0], between(0.025, 0.25, 0.3).runs[0]
    assert RateCurve((with_momentum,)).begin_with() == 0.01
    both = RateCurve((with_momentum, without))
    assert both.bounds() == Bounds(0.004, 0.4)
    assert both.begin_with() == 0.025  # of 0.025 and 0.04


def test_the_rate_to_begin_with_trains_well_with_one_draw_if_none_does_with_all() -> None:
    apart = RateCurve((between(0.004, 0.01, 0.2).runs[0], between(0.016, 0.04, 0.3).runs[0]))
    assert apart.begin_with() == 0.01
    diverges = RateCurve((between(0.004, 0.04, 0.2).runs[0], between(1e-7, 10, None).runs[0]))
    assert diverges.highest_losses == (None,) * len(RATES)
    assert diverges.begin_with() == 0.01


def test_the_rate_to_begin_with_lies_within_the_bounds_of_a_wide_curve() -> None:
    wide = between(1e-6, 0.5, 0.1)
    assert wide.bounds() == Bounds(0.0063, 0.63)
    assert wide.begin_with() == 0.04


@pytest.mark.parametrize("learns_nothing", [curve(), RateCurve(((None,) * len(RATES),))])
def test_there_is_no_rate_to_begin_with_where_no_rate_learns(learns_nothing: RateCurve) -> None:
    assert learns_nothing.begin_with() is None


@pytest.mark.parametrize(
    ("optimizer", "hyperparameters", "best"),
    [
        ("sgd", {"momentum": {"choices": [0.0, 0.9]}}, [0.89, 0.79, 0.15, 0.13, 0.069]),
        ("adam", {}, [0.032, 0.031, 0.023, 0.0056, 0.0036]),
    ],
)
def test_bounds_hold_the_best_rates_of_200_random_trials(
    optimizer: str, hyperparameters: dict[str, Any], best: list[float]
) -> None:
    """Those that `benchmarks/lr_range_check.py` found for seed 0 of the mlp: training runs, hence the seconds."""
    space = digits_space(**{optimizer: {"base_lr": 0.1, **hyperparameters}})
    _, trainer = prepare(space, source="test", device="cpu", searching=False)
    bounds = range_test(space, optimizer, trainer).bounds()
    assert bounds is not None
    assert bounds.high / bounds.low == pytest.approx(100)
    assert [rate for rate in best if not bounds.low <= rate <= bounds.high] == []


def test_an_optimizer_that_cannot_be_a_row_is_tried_plain_once_per_rate() -> None:
    space = tiny_space(muon={"base_lr": 0.1}, sgd={"base_lr": 0.1})
    trainer = LocalExecutor(tiny_workload(), space.example(), device=CPU)
    assert len(range_test(space, "muon", trainer, steps=5).runs) == 1
    assert len(range_test(space, "sgd", trainer, steps=5).runs) == 2


def test_more_steps_train_further_and_the_trainer_stays_as_it_was() -> None:
    space = tiny_space(sgd={"base_lr": 0.1})
    trainer = LocalExecutor(tiny_workload(), space.example(), device=CPU)
    before = trainer.workload
    at = RATES.index(0.1)
    losses = [range_test(space, "sgd", trainer, steps=steps).runs[0] for steps in (2, 20)]
    assert losses[1][at] < losses[0][at] < losses[0][0]  # type: ignore[operator]
    assert trainer.workload is before


class Numbers:
    """A data set of ten numbers, read one by one."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index


@pytest.mark.parametrize("count", [4, 10])
def test_part_of_the_data_is_the_same_random_part_whether_in_memory_or_read(count: int) -> None:
    kept = Split(torch.arange(10.0).unsqueeze(1), torch.arange(10))
    all_samples: list[Any] = [kept, *(Streamed(data, device=CPU, dtype=torch.float32) for data in (Numbers(), kept))]
    workloads = [dataclasses.replace(tiny_workload(), train=samples, val=samples) for samples in all_samples]
    parts: list[Any] = [with_fewer_samples(workload, train=count, val=10, seed=0).train for workload in workloads]
    taken = [[batch.targets.tolist() for batch in part.batches([torch.arange(count)], seed=0)] for part in parts]
    assert [len(part) for part in parts] == [count] * 3
    assert taken[0] == taken[1] == taken[2]
    assert taken[0] != [[0, 1, 2, 3]]
    assert len(set(taken[0][0])) == count


def test_draws_cover_each_range_evenly() -> None:
    draws = [EvenDraw(index, of=4, seed=0) for index in range(4)]
    assert sorted(draw.suggest_categorical("a", ["x", "y"]) for draw in draws) == ["x", "x", "y", "y"]
    assert sorted(draw.suggest_float("b", 0.0, 8.0) for draw in draws) == [1.0, 3.0, 5.0, 7.0]
    assert sorted(draw.suggest_float("c", 1e-4, 1.0, log=True) for draw in draws) == pytest.approx(
        [10**-3.5, 10**-2.5, 10**-1.5, 10**-0.5]
    )
    assert sorted(draw.suggest_float("d", 0.0, 1.5, step=0.5) for draw in draws) == [0.0, 0.5, 1.0, 1.5]
    assert sorted(draw.suggest_int("e", 2, 9) for draw in draws) == [3, 5, 7, 9]
    assert sorted(draw.suggest_int("f", 10, 70, step=20) for draw in draws) == [10, 30, 50, 70]
    assert sorted(draw.suggest_int("g", 1, 10000, log=True) for draw in draws) == [3, 32, 316, 3162]


def test_a_single_draw_takes_the_middle() -> None:
    draw = EvenDraw(0, of=1, seed=0)
    assert draw.suggest_float("a", 0.1, 10.0, log=True) == pytest.approx(1.0)
    assert draw.suggest_categorical("b", [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1e-7, "1e-7"), (0.0016, "1.6e-3"), (0.063, "6.3e-2"), (0.16, "0.16"), (1.0, "1.0"), (10, "10.0")],
)
def test_a_rate_is_written_as_a_person_writes_it(rate: float, text: str) -> None:
    assert rate_text(rate) == text
    assert float(text) == rate


TRIED = curve(at_0_04=0.5, at_0_063=0.1, at_0_1=0.4, at_0_16=1.8, at_10=None)
PRESENT = {"low": 1e-3, "high": 1.0, "log": True}


def test_the_table_draws_the_proposed_and_the_present_bounds_below_the_losses() -> None:
    table = range_table(digits_space(sgd={"base_lr": PRESENT}), {"sgd": TRIED})
    names, drawings, words = ([*column.cells] for column in table.columns)
    assert names == ["sgd"]
    assert str(drawings[0]).splitlines() == [
        "█" * 28 + "▂▁▂▇████████×".ljust(13, "█"),
        " " * 21 + "└───────┴─┘",
        " " * 20 + "└──────────────┘",
    ]
    assert words == ["begin with 6.3e-2\nproposed 1.6e-3–0.16\npresent  1e-3–1.0"]
    axis = str(table.columns[1].header).splitlines()[1]
    assert axis == "1e-7 1e-6 1e-5 1e-4 1e-3 1e-2 0.1  1.0  10.0"
    assert {float(axis[at:].split()[0]) for at in range(0, len(RATES), PER_DECADE)} == {*RATES[::PER_DECADE]}


@pytest.mark.parametrize(
    ("present", "line", "words"),
    [
        (0.1, " " * 30 + "╵", "0.1"),
        ({"choices": [0.01, 0.1]}, " " * 25 + "╵    ╵", "1e-2–0.1, 2 choices"),
        ({"low": 1e-9, "high": 1e-3, "log": True}, "─" * 20 + "┘", "1e-9–1e-3"),
        ({"low": 1.0, "high": 1000.0}, " " * 35 + "└─────", "1.0–1e+03"),
        ({"low": 1e-12, "high": 1e-9}, "", "1e-12–1e-9"),
        ({"low": 0.1, "high": 0.1}, " " * 30 + "╵", "0.1"),
    ],
)
def test_the_table_draws_present_rates_of_every_kind(present: Any, line: str, words: str) -> None:
    table = range_table(digits_space(sgd={"base_lr": present}), {"sgd": curve()})
    assert str(next(iter(table.columns[1].cells))) == "█" * len(RATES) + "\n" + line
    assert [*table.columns[2].cells] == [f"no rate learns\npresent  {words}"]


FOUR = {"sgd": TRIED, "adam": curve(), "muon": RateCurve(((None,) * len(RATES),)), "asgd": TRIED}
FOUR_SPACE = tiny_space(**{name: {"base_lr": PRESENT} for name in FOUR})


def test_the_picture_shows_the_bounds_and_the_rate_to_begin_with() -> None:
    figure = range_figure(FOUR_SPACE, FOUR, title="digits $x")
    panels = [panel for panel in figure.axes if panel.axison]
    assert [panel.get_title(loc="left") for panel in panels[:2]] == [
        "sgd: begin with 6.3e-2\nproposed 1.6e-3–0.16, present 1e-3–1.0",
        "adam: no rate learns\npresent 1e-3–1.0",
    ]
    drawn = [dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True)) for panel in panels]
    (corner, size) = drawn[0]["proposed bounds"].get_extents().transformed(panels[0].transData.inverted()).get_points()
    assert [corner[0], size[0]] == pytest.approx([0.0016, 0.16])
    assert drawn[0]["rate to begin with"].get_xdata() == [0.063, 0.063]
    assert [[*panel["present bounds"].get_xdata()] for panel in drawn] == [[1e-3, 1.0]] * 4
    assert "proposed bounds" not in drawn[1]
    assert [[*panel.get_xticks()] for panel in panels] == [pytest.approx(panels[0].get_xticks())] * 4
    ticks = [tick for tick in panels[0].get_xticks() if RATES[0] / 2 < tick < RATES[-1] * 2]
    assert ticks == pytest.approx(RATES[::PER_DECADE])
    (legend,) = figure.legends
    words = ["lowest loss", "proposed bounds", "rate to begin with", "present bounds"]
    assert [text.get_text() for text in legend.get_texts()] == words


def test_the_picture_names_the_draws_only_where_they_differ() -> None:
    two = RateCurve((TRIED.runs[0], curve(at_0_04=0.3).runs[0]))
    words = [
        [text.get_text() for text in range_figure(FOUR_SPACE, {"sgd": shown}, title="digits").legends[0].get_texts()]
        for shown in (two, RateCurve(TRIED.runs * 2))
    ]
    assert words[0] == ["loss of one draw", *words[1]]


def is_written(artist: Any) -> bool:
    return isinstance(artist, Text) and bool(artist.get_text())


@pytest.mark.parametrize("names", [["sgd"], [*FOUR]])
def test_no_words_of_the_picture_overlap_or_are_cut_off(names: list[str]) -> None:
    other = curve(at_0_04=0.3).runs
    curves = {name: RateCurve(FOUR[name].runs + other) for name in names}
    figure = range_figure(FOUR_SPACE, curves, title="digits")
    figure.draw_without_rendering()
    panels = [panel for panel in figure.axes if panel.axison]
    texts: list[Any] = [figure.legends[0], *figure.texts]
    for panel in panels:
        texts += [panel.xaxis.label, panel.yaxis.label, *(text for text in panel.get_children() if is_written(text))]
        ticks = zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)
        texts += [label for rate, label in ticks if panel.get_xlim()[0] < rate < panel.get_xlim()[1]]
    assert len(texts) == 1 + 1 + len(names) * (2 + 1 + 9)
    boxes = [text.get_window_extent() for text in texts]
    assert [(a, b) for a, b in combinations(range(len(boxes)), 2) if boxes[a].overlaps(boxes[b])] == []
    assert [box for box in boxes if not (figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1))] == []


def test_the_picture_has_a_panel_for_each_of_many_optimizers() -> None:
    one, four = range_png(FOUR_SPACE, {"sgd": TRIED}, title="digits"), range_png(FOUR_SPACE, FOUR, title="digits")
    for png in (one, four):
        assert png.startswith(b"\x89PNG")
    width, height = ([int.from_bytes(png[at : at + 4], "big") for png in (one, four)] for at in (16, 20))
    assert width[1] == 3 * width[0]
    assert height[1] == 2 * height[0]
