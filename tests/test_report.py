from __future__ import annotations

import dataclasses
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from study_results import results_of, space_with, trial
from tiny import RULES

from pipeline import report
from pipeline.app.answer import Answer
from pipeline.app.report import write_report
from pipeline.page.charts import errors_by_rate, slices
from pipeline.page.confirmed import Comparison, Confirmed, ConfirmedStrategy
from pipeline.page.findings import at_bound, contenders, mishaps
from pipeline.page.headline import headline, rest_line, score_line
from pipeline.page.how_sure import how_sure
from pipeline.page.metric import MetricAxis
from pipeline.page.noise import noise_of, wilson
from pipeline.page.page import build_page
from pipeline.page.results import Importance, StudyResults
from pipeline.page.scales import Linear, Log
from pipeline.page.sentence import rate_text, schedule_words, strategy_sentence
from pipeline.page.timeline import Clock
from pipeline.space.load import load_space
from pipeline.space.schedules import make_scheduler
from pipeline.space.trial import EndedTrial, TrialState
from pipeline.space.trial import number as number_text
from pipeline.study.candidates import plan
from pipeline.study.certainty import residual_deviation
from pipeline.study.confirmation import Confirmation
from pipeline.study.importance import importances
from pipeline.study.store import Store

SPACE = space_with()
ADAMW = {"optimizer": "adamw", "adamw.base_lr": 1e-2, "step.step_size": 4, "step.gamma": 0.7, "lr_ratio.head": 1.84}
SGD = {"optimizer": "sgd", "sgd.base_lr": 0.1, "sgd.momentum": 0.9}
NASTY = "<script>alert(1)</script>\"'&\x07"


def rising(last: float, epochs: int = 8) -> list[float]:
    """Return values of an accuracy that counts 100 samples."""
    return [round(last * (n + 1) / epochs, 2) for n in range(epochs)]


def typical(**changes: Any) -> StudyResults:
    """Return a study with complete, pruned, diverged and failed trials."""
    trials = [
        trial(SPACE, 0, rising(0.97), params=ADAMW),
        trial(SPACE, 1, rising(0.96), params={**ADAMW, "adamw.base_lr": 3e-3}),
        trial(SPACE, 2, rising(0.5), params={**ADAMW, "adamw.base_lr": 1e-4}),
        trial(SPACE, 3, rising(0.9)[:4], params=SGD),
        trial(SPACE, 4, rising(0.8)[:2], params={**SGD, "sgd.base_lr": 0.01}),
        trial(
            SPACE,
            5,
            [0.1],
            params={**SGD, "sgd.base_lr": 0.9},
            state=TrialState.DIVERGED,
            reason="loss became inf at step 41, in epoch 2",
        ),
        trial(SPACE, 6, [], params=SGD, state=TrialState.FAILED, reason="RuntimeError: no\nmemory"),
    ]
    return results_of(SPACE, trials, **{"val_samples": 100, **changes})


def text_of(markup: str) -> str:
    """Return HTML without its elements."""
    return re.sub(r"<[^>]*>", "", markup)


def said(results: StudyResults) -> str:
    return text_of("\n".join(how_sure(results, noise_of(results))))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("constant", {}, "constant"),
        ("constant", {"warmup": 2}, "constant, after 2 epochs of warm-up"),
        ("step", {"step_size": 8, "gamma": 0.7}, "× 0.70 every 8 epochs"),
        ("step", {"step_size": 1, "gamma": 0.05}, "× 0.05 every epoch"),
        ("multistep", {"milestones": (5, 8), "gamma": 0.1}, "× 0.10 after epoch 5 and 8"),
        ("exponential", {"gamma": 0.95}, "× 0.95 every epoch"),
        ("polynomial", {"power": 2.0}, "polynomial of power 2 to 0 by the end"),
        ("cosine", {"warmup": 1}, "cosine to 0 by the end, after 1 epoch of warm-up"),
        ("cosine", {"T_max": 50, "interval": "step", "eta_min": 1e-5}, "cosine to 1e-5 over 50 steps"),
        ("cosine_warm_restarts", {"T_0": 5, "T_mult": 2}, "cosine that restarts every 5 epochs, each period × 2"),
        ("linear", {"total_iters": 3}, "linear from × 1 to × 0 over 3 epochs"),
        ("onecycle", {}, "one cycle with its peak after 30 % of the run"),
        ("cyclic", {"max_lr_ratio": 4.0, "step_size_up": 20}, "cycles up to × 4, rising over 20 steps"),
        ("plateau", {"patience": 2}, "× 0.10 when val/loss has not improved for over 2 epochs"),
        ("my_file.py:noam", {"interval": "step", "power": 0.5}, "noam power 0.5"),
    ],
)
def test_every_schedule_has_words(name: str, values: dict[str, Any], expected: str) -> None:
    assert schedule_words(make_scheduler(name, values)) == expected


def test_a_strategy_is_one_sentence() -> None:
    sentence = "AdamW, base rate 1e-2, × 0.70 every 4 epochs, head at 1.84 ×"
    assert strategy_sentence(typical().trials[0].config) == sentence
    assert headline(typical()) == f"Use {sentence}"
    assert headline(typical(planned=20)) == f"Best so far: {sentence}"
    layers = {"layers": [["conv1.*"], ["*"]], "layer_decay": 0.8}
    space = space_with(param_groups={"x": {"pattern": "b", "lr_ratio": 0}, "all": layers})
    config = trial(space, 0, [0.5], params=SGD).config
    assert strategy_sentence(config).startswith("SGD with momentum 0.9, base rate 0.1, ")
    assert strategy_sentence(config).endswith(", x frozen, each layer of all at 0.8 × the next")


@pytest.mark.parametrize(
    ("rate", "words"), [(1.07e-2, "1.07e-2"), (1e-3, "1e-3"), (0.371, "0.371"), (1.0, "1"), (9.999e-2, "0.1"), (0, "0")]
)
def test_a_rate_has_three_digits(rate: float, words: str) -> None:
    assert rate_text(rate) == words


def test_the_score_says_how_many_samples_are_wrong() -> None:
    first = "Unconfirmed, one seed: val/accuracy 0.9700"
    assert text_of(score_line(typical())) == f"{first}: 3 of 100 validation samples wrong. Trial #0."
    assert text_of(score_line(typical(val_samples=None))) == f"{first}. Trial #0."
    assert text_of(score_line(typical(val_samples=270))) == f"{first}. Trial #0."  # which counts none of 270
    assert rest_line(typical()) == "batch size 64, 8 epochs"
    space = space_with(optimizer={**SPACE.document["optimizer"], "adam": {"base_lr": 1e-3, "beta1": 0.8}})
    assert rest_line(results_of(space, [trial(space, 0, rising(0.9), params=SGD)])) == "batch size 64, 8 epochs"
    adam = trial(space, 0, rising(0.9), params={"optimizer": "adam"})
    assert rest_line(results_of(space, [adam])) == "batch size 64, 8 epochs, beta1 0.8"


def test_without_confirmation_it_is_said_that_one_seed_was_tried() -> None:
    words = said(typical())
    assert "Unconfirmed. Each trial ran with one seed, and the best of 7 is also the luckiest." in words
    assert "python -m pipeline.confirm --study small-1" in words
    low, high = wilson(0.97, 100)
    assert (round(low, 3), round(high, 3)) == (0.915, 0.990)
    assert "2 of 3 complete trials lie within noise of the best (95 % of 0.9700 on 100 samples: 0.915–0.990)." in words
    assert "AdamW did as well at base rates from 3e-3 to 1e-2." in words
    assert "The optimizer: all 3 complete trials use AdamW." in words
    assert "The last with SGD was pruned at epoch 4, 0.0300 behind the best with AdamW there." in words
    call = "confirm('small-1', workload=<lambda>)"
    assert html.escape(call) in said(typical(confirm_command=call))
    assert "fresh seeds:" not in said(typical(confirm_command=""))


def test_a_study_without_trials_has_a_page() -> None:
    empty = results_of(SPACE, [], planned=50, groups=[])
    assert headline(empty) == "Nothing to use yet: no trial has ended"
    assert said(empty) == "No trial has ended, so there is nothing to say yet."
    assert "0 of 50 trials" in build_page(empty)


def test_without_a_complete_trial_the_one_that_came_furthest_is_named() -> None:
    trials = [trial(SPACE, 0, rising(0.9)[:2], params=SGD), trial(SPACE, 1, rising(0.8)[:4], params=ADAMW)]
    results = results_of(SPACE, trials, planned=4)
    assert headline(results) == "Nothing to use yet: none of 2 trials is complete"
    assert headline(results_of(SPACE, trials)) == "Nothing to use: none of 2 trials is complete"
    assert headline(results_of(SPACE, trials[:1])) == "Nothing to use: the one trial is not complete"
    assert text_of(score_line(results)) == "Trial #1 came furthest: val/accuracy 0.4000 after 4 epochs."
    assert said(results) == "No trial trained for all 8 epochs: 2 pruned. 2 trials of 4 are still to come."
    assert "Validation error by base rate" in build_page(results)


def test_one_complete_trial_alone_is_compared_with_nothing() -> None:
    results = results_of(SPACE, [trial(SPACE, 0, rising(0.9), params=ADAMW)], val_samples=100)
    words = said(results)
    assert "Each trial ran with one seed. This trains the best again with fresh seeds:" in words
    assert "The point: one trial is complete, so nothing says how much its score means." in words
    assert "The optimizer: the complete trial uses AdamW. SGD was never tried." in words
    assert "SGD</b>" in build_page(results)


def test_ties_and_optimizers_that_cannot_be_told_apart_are_said() -> None:
    trials = [trial(SPACE, 0, rising(0.9), params=ADAMW), trial(SPACE, 1, rising(0.9), params=SGD)]
    words = said(results_of(SPACE, trials, val_samples=100))
    assert "both complete trials tie at 0.9000. Both complete trials lie within noise of the best" in words
    assert "The optimizer: the best with SGD ties with the best with AdamW." in words
    trials[1] = trial(SPACE, 1, rising(0.4), params=SGD)
    words = said(results_of(SPACE, trials, val_samples=100))
    assert "the best with SGD is 0.5000 behind the best with AdamW, which is more than noise." in words
    assert "no other of the 2 complete trials lies within noise of the best" in words


def test_noise_of_the_last_epochs_is_said_to_be_a_lower_bound() -> None:
    trials = [trial(SPACE, 0, rising(0.9), params=ADAMW), trial(SPACE, 1, rising(0.2), params=SGD)]
    results = results_of(SPACE, trials)
    words = said(results)
    assert "still move in their last three epochs: a lower bound, since other seeds differ more" in words
    assert "which is more than this lower bound of noise, but other seeds may reverse it." in words
    assert "more than noise" not in words
    assert "dotted: the limit of noise, a lower bound" in build_page(results)


def test_one_optimizer_alone_is_said_to_be_the_only_one() -> None:
    space = space_with(optimizer={"sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}})
    words = said(results_of(space, [trial(space, 0, rising(0.9)), trial(space, 1, rising(0.8))]))
    assert "The optimizer: only SGD was searched." in words
    assert "the rate 1e-3 lies at the lower bound of what was searched; widen optimizer.sgd.base_lr." in words


def test_a_rate_near_a_bound_of_its_range_is_at_the_bound() -> None:
    def bound(rate: float) -> str | None:
        return at_bound(trial(SPACE, 0, [0.5], params={**ADAMW, "adamw.base_lr": rate}), SPACE)

    assert [bound(rate) for rate in (1e-4, 1.3e-4, 1e-2, 8e-2, 1e-1)] == ["lower", "lower", None, "upper", "upper"]


def test_the_best_of_each_optimizer_are_compared_at_the_same_epochs() -> None:
    first, second = contenders(typical(), "optimizer")
    assert (first.name, second.name) == ("adamw", "sgd")
    assert [(s.value, s.left) if s else None for s in first.standings] == [(0.24, 3), (0.48, 3), (0.97, 3)]
    assert [(s.value, s.left) if s else None for s in second.standings] == [(0.23, 2), (0.45, 1), None]
    assert first.cautions == []
    assert second.cautions == ["only 1 of 4 got past epoch 2"]
    trials = [trial(SPACE, n, rising(0.9), params={**ADAMW, "adamw.base_lr": 0.1}) for n in range(3)]
    cautions = contenders(results_of(SPACE, trials), "optimizer")[0].cautions
    assert cautions == ["its best, #0, has a rate at the upper bound: 0.1"]


def test_reasons_that_differ_in_their_step_alone_are_one() -> None:
    diverged = {"state": TrialState.DIVERGED, "params": SGD}
    trials = [trial(SPACE, n, [0.1], reason=f"loss became inf at step {n}", **diverged) for n in range(3)]
    assert [(reason, len(own)) for reason, own in mishaps(results_of(SPACE, trials))] == [
        ("loss became inf at step 0", 3)
    ]
    page = text_of(build_page(typical()))
    assert "Diverged, by optimizer: SGD: 1 of 1 with a base rate of 0.9 or more." in page
    assert "RuntimeError: no" in page


def confirmed_with(**changes: Any) -> Confirmed:
    def strategy(label: str, number: int | None, values: list[float]) -> ConfirmedStrategy:
        config = typical().trials[number or 0].config
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
        return ConfirmedStrategy(
            label=label, config=config, trial=number, values=dict(enumerate(values, 1)), mean=mean, std=std
        )

    strategies = [strategy("#1", 1, [0.95, 0.96, 0.97]), strategy("#0", 0, [0.95, 0.95, 0.96])]
    strategies.append(strategy("Adam's default", None, [0.91, 0.92, 0.93]))
    comparisons = [
        Comparison(other="#0", better_by=0.0067, low=-0.003, high=0.016),
        Comparison(other="Adam's default", better_by=0.04, low=0.03, high=0.05),
    ]
    values: dict[str, Any] = {
        "seeds": (1, 2, 3),
        "strategies": strategies,
        "comparisons": comparisons,
        "test": {"test/accuracy": 0.94},
    }
    values["residual"] = residual_deviation([list(strategy.values.values()) for strategy in strategies])
    return Confirmed(**{**values, **changes})


def test_what_was_trained_again_is_said_with_its_interval() -> None:
    results = typical(confirmed=confirmed_with())
    assert headline(results) == "Use AdamW, base rate 3e-3, × 0.70 every 4 epochs, head at 1.84 ×"
    score = "val/accuracy 0.9600 ± 0.0100 over 3 fresh seeds; test/accuracy 0.9400. Trial #1."
    assert text_of(score_line(results)) == score
    words = said(results)
    assert "Confirmed on 3 fresh seeds: 0.9600 ± 0.0100 (mean ± standard deviation)." in words
    assert "Not distinguishable from #0: better by 0.0067, and [−0.0030, 0.0160] holds zero." in words
    assert "Better than Adam&#x27;s default by 0.0400 [0.0300, 0.0500]." in words
    assert "In the search, on one seed, it had 0.9600: the same as with fresh seeds." in words
    assert "speak of seeds, not of other data" in words
    assert "Unconfirmed" not in words
    paired = confirmed_with(comparisons=[Comparison(other="#0", better_by=0.1, low=0.05, high=0.15, paired=True)])
    words = said(typical(confirmed=paired))
    assert "Better than #0 by 0.1000 [0.0500, 0.1500], by a paired t interval, since its runs vary otherwise." in words
    noise = noise_of(results)
    assert noise is not None
    assert noise.source == "± 0.0092, from how fresh seeds disagree"
    assert [trial.number for trial in noise.trials] == [0, 1]


@pytest.mark.parametrize(
    ("mean", "words"),
    [(0.95, "0.0100 better than with fresh seeds, so it was lucky."), (0.97, "0.0100 worse than with fresh seeds.")],
)
def test_the_luck_of_the_search_is_said_in_words(mean: float, words: str) -> None:
    confirmed = confirmed_with()
    first = dataclasses.replace(confirmed.strategies[0], mean=mean)
    results = typical(confirmed=dataclasses.replace(confirmed, strategies=[first, *confirmed.strategies[1:]]))
    assert f"In the search, on one seed, it had 0.9600: {words}" in said(results)


def test_noise_is_that_of_the_confirmed_trial_and_not_of_the_searched_first() -> None:
    trials = [trial(SPACE, n, rising(0.97 - n / 100), params={**ADAMW, "adamw.base_lr": 10**-n}) for n in (1, 2, 3, 4)]
    results = results_of(SPACE, [typical().trials[0], *trials], confirmed=confirmed_with())
    noise = noise_of(results)
    assert noise is not None
    assert (noise.winner.number, results.searched_first) == (1, results.trials[0])
    assert noise.limit == pytest.approx(0.96 - 0.0092, abs=1e-4)
    assert "The rate: in the search, AdamW did as well at base rates from 1e-2 to 0.1." in said(results)
    page = build_page(results)
    assert "shaded: rates within noise of #1, dotted: the limit of noise<" in page
    assert "--trial " not in page


def test_a_strategy_that_diverged_with_a_fresh_seed_is_named() -> None:
    confirmed = confirmed_with()
    ends = {1: "diverged", 2: "failed", 3: "diverged"}
    gone = dataclasses.replace(confirmed.strategies[2], values={}, mean=None, std=None, incomplete=ends)
    strategies = [*confirmed.strategies[:2], gone]
    sentence = "Adam&#x27;s default diverged with seeds 1, 3 and failed with seed 2, so it has no mean."
    assert sentence in said(typical(confirmed=dataclasses.replace(confirmed, strategies=strategies)))
    nothing = Confirmed(seeds=(1, 2, 3), strategies=[gone], reason="no candidate trained to its end with every seed")
    assert sentence in said(typical(confirmed=nothing))


def test_a_baseline_that_wins_is_used() -> None:
    confirmed = confirmed_with()
    baseline = dataclasses.replace(confirmed.strategies[2], mean=0.99)
    results = typical(confirmed=dataclasses.replace(confirmed, strategies=[baseline, *confirmed.strategies[:2]]))
    words = said(results)
    assert "A baseline won: no finalist of the search has a better mean than Adam&#x27;s default." in words
    assert "What to do: widen the ranges, or search more trials." in words
    assert "The rate" not in words
    assert "Adam&#x27;s default." in score_line(results)
    assert noise_of(results) is None
    page = build_page(results)
    assert "at its last epoch; dotted: the mean of Adam&#x27;s default on fresh seeds<" in page
    assert "shaded" not in page
    assert 'class="curve bold' not in page
    run = dataclasses.replace(with_rates(typical().trials[1], "head"), confirms="Adam's default")
    page = build_page(dataclasses.replace(results, with_rates=[run]))
    assert "; bold: Adam&#x27;s default, with a fresh seed<" in page
    assert page.count('class="curve bold') == 2


def test_an_unfinished_confirmation_leaves_the_answer_unconfirmed() -> None:
    assert "Unconfirmed. Each trial" in said(typical(confirmed=confirmed_with(complete=False)))
    why = Confirmed(seeds=(), strategies=(), reason="too few trials")
    assert "Unconfirmed: too few trials. Each trial ran" in said(typical(confirmed=why))


def axis_of(values: list[list[float]], direction: str, metric: str = "val/score") -> MetricAxis:
    space = space_with(objective={"metric": metric, "direction": direction})
    return MetricAxis(results_of(space, [trial(space, n, v, params=ADAMW) for n, v in enumerate(values)]))


def test_an_accuracy_is_drawn_as_its_error_on_a_logarithmic_axis() -> None:
    axis = axis_of([[0.1, 0.9, 0.99]], "maximize", "val/accuracy")
    assert (axis.name, axis.drawn(0.75)) == ("validation error", 0.25)
    assert axis.title == "validation error (1 − accuracy), log axis, better is up"
    assert axis.note == "1 − accuracy, log axis, better is up"
    assert isinstance(axis.scale, Log)
    assert axis.downwards
    perfect = axis_of([[0.5, 1.0]], "maximize").scale
    assert isinstance(perfect, Log)
    assert perfect.zero
    assert axis_of([[0.5, 1.0]], "maximize").title == "1 − val/score, log axis, better is up"
    assert axis_of([[0.2, 1.3]], "maximize").note == "better is up"


def test_a_loss_is_drawn_on_a_logarithmic_axis_while_it_is_positive() -> None:
    axis = axis_of([[3.0, 0.3], [2.0, 0.1]], "minimize", "val/loss")
    assert (axis.name, axis.note, axis.downwards) == ("val/loss", "log axis, better is down", False)
    assert isinstance(axis.scale, Log)
    assert isinstance(axis_of([[3.0, -0.3]], "minimize", "val/loss").scale, Linear)
    assert isinstance(axis_of([[-300.0, -0.3]], "maximize").scale, Linear)
    assert isinstance(axis_of([[0.2, 1.3]], "maximize").scale, Linear)


def test_values_far_worse_than_the_others_do_not_stretch_the_axis() -> None:
    assert axis_of([[1.0], [0.5], [0.1], [1e9]], "minimize", "val/loss").scale.at(1.0) > 0.2
    assert axis_of([[1.0], [0.9], [0.8], [0.7], [-1e9]], "maximize").scale.at(0.7) <= 0.5


class Elements(HTMLParser):
    """Collects what a page would load, its tags and its visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data", "action")]


def elements_of(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    return elements


def test_a_page_loads_nothing_and_forbids_itself_to() -> None:
    page = build_page(typical())
    elements = elements_of(page)
    assert elements.loads == []
    assert {"link", "iframe", "img"} & set(elements.tags) == set()
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_a_page_has_its_sections_in_order() -> None:
    importance = Importance(shares={"optimizer": 0.9, "step.gamma": 0.1}, epoch=2)
    page = build_page(typical(importance=importance, code="import torch\nx = 1 < 2\n", confirmed=confirmed_with()))
    sections = [
        "How sure?",
        "Best of each optimizer at the same epoch",
        "Validation error by base rate",
        "Validation error by epoch",
        "Where trials were pruned",
        "Other hyperparameters",
        "What mattered",
        "Time",
        "What diverged or failed",
        "In your own script",
        "All trials",
        "To repeat it",
    ]
    assert re.findall(r"<h2>(.*?)(?: <small>.*?)?</h2>", page) == sections
    assert "<pre>import torch\nx = 1 &lt; 2</pre>" in page


@pytest.mark.parametrize("results", [typical(), typical(confirmed=confirmed_with()), results_of(SPACE, [])])
def test_every_figure_is_well_formed(results: StudyResults) -> None:
    for svg in re.findall(r"<svg.*?</svg>", build_page(results), re.DOTALL):
        ElementTree.fromstring(svg)


def test_pruned_trials_are_rings_and_complete_ones_dots() -> None:
    results = typical()
    figures = dict(errors_by_rate(results, MetricAxis(results), noise_of(results)))
    (adamw,), (sgd,) = (
        [ElementTree.fromstring(s) for h, s in figures.items() if name in h] for name in ("AdamW", "SGD")
    )

    def count(svg: ElementTree.Element, css: str) -> int:
        return sum(len(list(g)) for g in svg.iter("g") if css in g.attrib["class"].split())

    assert (count(adamw, "dot"), count(adamw, "ring"), count(adamw, "winner")) == (3, 1, 1)
    assert (count(sgd, "dot"), count(sgd, "ring"), count(sgd, "winner")) == (0, 3, 0)
    assert [len(list(svg.iter("rect"))) for svg in (adamw, sgd)] == [1, 0]


def test_learning_curves_say_how_many_trials_a_rung_passed() -> None:
    page = build_page(typical())
    assert "5→4" in page  # the trial that diverged before had no score there
    assert "4→3" in page


def test_names_of_users_are_escaped_everywhere() -> None:
    space = space_with(
        workload={"name": "own", "function": f"{NASTY}.py:f{NASTY}"},
        objective={"metric": f"val/{NASTY}", "direction": "maximize"},
        optimizer={f"{NASTY}.py:{NASTY}": {"base_lr": {"low": 1e-3, "high": 1.0}, "beta": {"choices": [NASTY, "b"]}}},
        scheduler={f"{NASTY}.py:{NASTY}": {"power": {"low": 0.1, "high": 1.0}}},
        param_groups={"a": {"pattern": "fc.*", "lr_ratio": {"low": 0.1, "high": 10}}, "b": {"pattern": "*"}},
    )
    trials = [trial(space, n, rising(0.9 - n / 10), params={"lr_ratio.a": 2.0}) for n in range(2)]
    trials.append(trial(space, 2, [0.1], state=TrialState.FAILED, reason=NASTY, environment={NASTY: NASTY}))
    drawn = [with_rates(trials[n], "a") for n in range(2)]
    importance = Importance(shares={NASTY: 1.0}, epoch=8)
    page = build_page(
        results_of(space, trials, with_rates=drawn, importance=importance, code=NASTY, options=f" {NASTY}")
    )
    assert "<script>alert" not in page
    assert "\x07" not in page
    assert elements_of(page).tags.count("script") == 1
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def with_rates(trial: EndedTrial, group: str) -> EndedTrial:
    """Return a trial whose epochs have rates: falling in one group, 0 in the others."""
    epochs = tuple(
        dataclasses.replace(
            epoch,
            lr={
                name: ((epoch.step, 0.1 / epoch.epoch if name == group else 0.0),) for name in trial.config.group_names
            },
        )
        for epoch in trial.epochs
    )
    return dataclasses.replace(trial, epochs=epochs)


def test_rates_of_groups_are_steps_and_a_frozen_group_has_none() -> None:
    trials = typical().trials
    page = build_page(typical(with_rates=[with_rates(trials[0], "head"), with_rates(trials[1], "head")]))
    assert "winner, and faintly 1 other of the best" in page
    assert "0.1→1.3e-2" in page
    assert len(re.findall(r'<path class="curve bold c[34]"', page)) == 1
    assert len(re.findall(r'<path class="curve faint c[34]"', page)) == 1


@pytest.mark.parametrize(("count", "limit"), [(50, 200_000), (1_000, 2_000_000)])
def test_a_page_is_small(count: int, limit: int) -> None:
    space = space_with(epochs=20, pruner={"name": "none"})
    scores = [0.9 + 0.0001 * (n % 97) for n in range(count)]
    trials = [trial(space, n, rising(score, 20), params=ADAMW) for n, score in enumerate(scores)]
    assert len(build_page(results_of(space, trials)).encode()) < limit


def test_hyperparameters_of_absent_optimizers_have_no_figure() -> None:
    results = results_of(SPACE, [trial(SPACE, 0, rising(0.9), params=ADAMW)])
    heads = [text_of(head) for head, _ in slices(results, MetricAxis(results), None)]
    assert heads == ["lr_ratio.head", "step.gamma", "step.step_size"]


def test_pauses_between_groups_are_left_out_of_the_clock() -> None:
    def at(number: int, start: float, end: float) -> EndedTrial:
        return trial(SPACE, number, [0.5], params=SGD, started=start, ended=end)

    trials = [at(0, 100, 110), at(1, 100, 104), at(2, 5000, 5020)]
    clock = Clock(results_of(SPACE, trials, groups=[range(2), range(2, 4)]))
    assert (clock.total, clock.pauses) == (30, 4890)
    assert [clock.at(moment) for moment in (100, 104, 110, 5000, 5020)] == [0, 4, 10, 10, 30]


def test_importance_finds_what_decides_also_in_pruned_trials() -> None:
    space = space_with(optimizer={"sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}})
    trials = []
    for n in range(40):
        params = {"sgd.base_lr": 10 ** (-3 + 3 * n / 40), "step.gamma": 0.1 + 0.8 * ((7 * n) % 40) / 40}
        params |= {"lr_ratio.head": 0.1 + ((11 * n) % 40) / 10, "step.step_size": 1 + n % 4}
        score = 1 - abs(math.log10(params["sgd.base_lr"]) + 1) / 3
        trials.append(trial(space, n, [score / 2, score], params=params))
    shares = importances(space, trials, epoch=2)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=lambda name: shares[name]) == "sgd.base_lr"
    assert shares["sgd.base_lr"] > 0.5
    assert importances(space, trials[:9], epoch=2) == {}
    lone = [trial(SPACE, n, rising(0.9), params=SGD if n else ADAMW) for n in range(12)]
    assert sum(importances(SPACE, lone, epoch=2).values()) == pytest.approx(1)  # without a warning
    assert importances(space, trials, epoch=3) == {}


def test_the_command_writes_the_report_of_a_stored_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = space_with(scheduler={"cosine": {"warmup": 1, "interval": "step"}})
    store = Store(tmp_path)
    fingerprint = {"val": "100 samples of (1, 8, 8), 0123"}
    study = store.create(space, name="small-1", trials=3, rules=RULES, fingerprint=fingerprint)
    assert study.next_group(3)
    for number, score in enumerate((0.9, 0.8)):
        study.add(trial(space, number, rising(score), params=ADAMW))
    store.close()
    assert report.main(["--root", str(tmp_path)]) == 0
    path = tmp_path / "mlruns" / "studies" / "small-1" / "report.html"
    assert capsys.readouterr().out == f"report   {path}\n"
    page = path.read_text()
    assert "Best so far: AdamW, base rate" in page
    assert "10 of 100 validation samples wrong" in page
    assert "Learning rate per group" in page
    assert "lr_scheduler.CosineAnnealingLR(" in page
    assert f"--study small-1 --root {tmp_path}" in page
    assert f"python -m pipeline.confirm --study small-1 --root {tmp_path}</pre>" in page
    (tmp_path / "small.yaml").write_text(html.unescape(page.rpartition("<pre>")[2].partition("</pre>")[0]))
    assert load_space(tmp_path / "small.yaml").document == space.document
    assert report.main(["--root", str(tmp_path), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == page


@pytest.mark.parametrize(
    ("function", "command"),
    [
        ("my task.py:sine", "python -m pipeline.confirm --study small-1 --workload 'my task.py:sine' --root {root}"),
        ("python:sine", "from Python: confirm('small-1', workload=...)"),
    ],
)
def test_a_study_of_a_persons_own_workload_is_confirmed_by_naming_it(
    tmp_path: Path, function: str, command: str
) -> None:
    space = space_with(workload={"name": "own", "function": function})
    store = Store(tmp_path)
    study = store.create(space, name="small-1", trials=1, rules=RULES)
    study.add(trial(space, 0, rising(0.9), params=ADAMW))
    write_report(Answer.of(study), store, path := tmp_path / "report.html")
    assert f">{html.escape(command.format(root=tmp_path))}</pre>" in path.read_text()
    write_report(Answer.of(study), store, path, confirm_command="confirm('small-1', workload=sine)")
    assert html.escape("confirm('small-1', workload=sine)") in path.read_text()
    store.close()


@pytest.mark.parametrize(
    ("scores", "winner"), [({"#0": 0.9, "#1": 0.8}, "Trial #0"), ({"Adam's default": 0.9}, "Adam&#x27;s default")]
)
def test_the_report_of_a_confirmed_study_repeats_its_answer(
    tmp_path: Path, scores: dict[str, float], winner: str
) -> None:
    space = space_with(confirm={"share": 1.0, "finalists": 2})
    store = Store(tmp_path)
    study = store.create(space, name="small-1", trials=2, rules=RULES)
    for number in range(2):
        study.add(trial(space, number, rising(0.9 - number / 10), params={**ADAMW, "step.gamma": 0.5 + number / 10}))
    confirmation = Confirmation(study, plan(study, space.confirm))
    while group := confirmation.next_group():
        for number, (config, _) in group.items():
            run = confirmation.marked(trial(space, number, rising(0.5), params=ADAMW, config=config))
            score = scores.get(run.confirms, 0.3) + config.seed / 100
            confirmation.add(with_last(run, score), test={"test/accuracy": 0.77})
    confirmation.keep()
    answer = Answer.of(study)
    write_report(answer, store, path := tmp_path / "report.html")
    page = path.read_text()
    store.close()
    found = answer.confirmation.winner
    assert found is not None
    assert found.mean is not None
    assert f"<b>{number_text(found.mean)} ± {found.std:.4f}</b> over 3 fresh seeds" in page
    assert f"test/accuracy <b>0.7700</b>. {winner}." in page
    assert answer.rivals
    for rival in answer.rivals:
        difference = answer.difference(rival)
        assert difference is not None
        other = html.escape(rival.candidate.label)
        assert f"{other} by {difference.mean:.4f} [{difference.low:.4f}, {difference.high:.4f}]" in page
    assert "Learning rate per group" in page
    assert (f"Use {strategy_sentence(found.candidate.config)}</h1>") in re.sub("</?span[^>]*>", "", page)


def with_last(run: EndedTrial, value: float) -> EndedTrial:
    """Return a run whose last epoch has another accuracy."""
    last = dataclasses.replace(run.epochs[-1], metrics={**run.epochs[-1].metrics, "val/accuracy": value})
    return dataclasses.replace(run, epochs=(*run.epochs[:-1], last), value=value, environment={"placement": []})
