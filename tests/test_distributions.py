from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.space.distributions import Choices, Range, contains, describe, extremes, is_searched, label, suggest

Floats = Range[float, float]
Ints = Range[int, int]


class Recorder:
    """A trial that notes what it is asked and answers with the lowest or first."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        self.asked.append((name, low, high, step, log))
        return low

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        self.asked.append((name, low, high, step, log))
        return low

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked.append((name, choices))
        return choices[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 0.9, "high": 0.1}, "`low <= high` must hold, got low=0.9, high=0.1"),
        ({"low": 0.0, "high": 1.0, "log": True}, "`low > 0` must hold with log, got low=0.0"),
        ({"low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "`log` and `step` exclude each other; remove one"),
        ({"low": 0.1, "high": 1.0, "step": 0.0}, "`step > 0` must hold, got step=0.0"),
        (
            {"low": 0.0, "high": 1.0, "step": 0.3},
            "`step` must divide the range, got low=0.0, high=1.0, step=0.3; the last step ends at 0.9",
        ),
    ],
)
def test_a_range_that_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Floats(**values)
    assert message in str(caught.value)


def test_a_step_that_divides_the_range_but_for_rounding_is_accepted() -> None:
    assert Floats(low=0.1, high=0.7, step=0.1).step == 0.1


def test_a_choice_may_stand_once() -> None:
    with pytest.raises(ValidationError, match=r"each choice may stand once, got 0\.5 twice; remove one"):
        Choices[float](choices=(0.5, 0.1, 0.5))


@pytest.mark.parametrize(
    "distribution", [0.1, True, None, (2, 4), Floats(low=0.3, high=0.3), Choices[str](choices=("a",))]
)
def test_a_distribution_of_one_value_is_a_constant_that_asks_nothing(distribution: Any) -> None:
    trial = Recorder()
    (value, *_) = extremes(distribution)
    assert not is_searched(distribution)
    assert suggest(trial, "name", distribution) == value
    assert trial.asked == []


@pytest.mark.parametrize(
    ("distribution", "asked", "value"),
    [
        (Floats(low=0.1, high=1.0, log=True), ("name", 0.1, 1.0, None, True), 0.1),
        (Floats(low=0.0, high=1.0, step=0.5), ("name", 0.0, 1.0, 0.5, False), 0.0),
        (Ints(low=2, high=10), ("name", 2, 10, 1, False), 2),
        (Ints(low=2, high=10, step=4), ("name", 2, 10, 4, False), 2),
        (Choices[bool](choices=(True, False)), ("name", [True, False]), False),
        (Choices[Any](choices=((2,), (2, 4))), ("name", ["[2]", "[2, 4]"]), (2, 4)),
    ],
)
def test_a_trial_is_asked_in_optunas_words(distribution: Any, asked: tuple[Any, ...], value: Any) -> None:
    trial = Recorder()
    assert suggest(trial, "name", distribution) == value
    assert trial.asked == [asked]


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (Floats(low=0.1, high=1.0), [0.1, 0.5, 1], [0.09, 1.01, True, "0.5", None, float("nan")]),
        (Floats(low=0.0, high=1.0, step=0.25), [0.0, 0.75, 1], [0.3]),
        (Ints(low=2, high=10, step=4), [2, 6, 10], [4, 6.0, 11, True]),
        (Choices[float](choices=(0.0, 1.0)), [0.0, 0, 1], [0.5, False, True]),
        (Choices[Any](choices=((2,), (2, 4))), [[2], [2, 4], (2,)], [[4], 2, "[2]"]),
        (1.0, [1.0, 1], [True, 2]),
        (True, [True], [1, False]),
        (None, [None], [0]),
        (("*",), [["*"]], ["*", ["fc.*"]]),
    ],
)
def test_contains_says_what_could_be_chosen(distribution: Any, inside: list[Any], outside: list[Any]) -> None:
    assert [value for value in inside if not contains(distribution, value)] == []
    assert [value for value in outside if contains(distribution, value)] == []


@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        (Floats(low=0.1, high=1.0), "within [0.1, 1.0]"),
        (Ints(low=2, high=10, step=4), "within [2, 10] in steps of 4"),
        (Choices[Any](choices=("cos", (2, 4), True)), 'one of "cos", [2, 4], true'),
        (None, "null"),
    ],
)
def test_a_distribution_describes_itself_in_words(distribution: Any, words: str) -> None:
    assert describe(distribution) == words


def test_a_list_is_stored_as_its_text_and_anything_else_as_it_is() -> None:
    assert [label((2, 4)), label([2, 4]), label("cos"), label(0.5)] == ["[2, 4]", "[2, 4]", "cos", 0.5]
