"""The range test: what curves suggest, and what it finds for the digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import BATCH, tiny_workload

from pipeline.app.prepare import prepare
from pipeline.app.range_picture import range_png, range_table, rate_text
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


def test_the_table_draws_loss_against_rate_over_the_bounds() -> None:
    tried = curve(at_0_04=0.5, at_0_063=0.1, at_0_1=0.4, at_0_16=1.8, at_10=None)
    space = digits_space(sgd={"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}, adam={"base_lr": 0.1})
    table = range_table(space, {"sgd": tried, "adam": curve()})
    cells: list[Sequence[Any]] = [list(column.cells) for column in table.columns]
    assert cells[0] == ["sgd", "adam"]
    assert cells[1] == ["1e-3–1.0", "0.1"]
    assert cells[2] == ["1.6e-3–0.16", "no rate learns"]
    blocks, below = str(cells[3][0]).splitlines()
    assert blocks == "█" * 28 + "▂▁▂▇████████×".ljust(13, "█")
    assert below == " " * 21 + "└─────────┘"
    assert str(cells[3][1]) == "█" * len(RATES)


def test_the_picture_has_a_panel_for_each_of_many_optimizers() -> None:
    tried = curve(at_0_04=0.5, at_0_063=0.1, at_10=None)
    one = range_png("digits", {"sgd": tried})
    four = range_png(
        "digits", {"sgd": tried, "adam": curve(), "muon": RateCurve(((None,) * len(RATES),)), "asgd": tried}
    )
    for png in (one, four):
        assert png.startswith(b"\x89PNG")
    width, height = ([int.from_bytes(png[at : at + 4], "big") for png in (one, four)] for at in (16, 20))
    assert width[1] == 3 * width[0]
    assert height[1] == 2 * height[0]
