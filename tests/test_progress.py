from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_study import EPOCHS, Curves, ended_trial, epoch_metrics, space_with
from tiny import RULES

from pipeline.app.curves import sparkline
from pipeline.app.display import duration, print_best, say
from pipeline.app.progress import Progress
from pipeline.app.time_left import TimeLeft
from pipeline.files.signals import Interrupts
from pipeline.space.trial import BegunTrial, EndedTrial, TrialState
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.loop import run_group
from pipeline.study.store import Store
from pipeline.study.study import Study

TRIALS = 12


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    store = Store(tmp_path)
    yield store.create(space_with(), name="small-1", trials=TRIALS, rules=RULES)
    store.close()


def console(width: int, *, terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=40, force_terminal=terminal, color_system=None, highlight=False
    )


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\b\d+ (s|min)\b", r"N \1", console.file.getvalue())  # times are a machine's own
    return [line.rstrip() for line in text.splitlines()]


def searched(study: Study, console: Console, look: Callable[[Progress], Any] = lambda _: None) -> None:
    """Search as a command does, and look at the progress after each epoch; a terminal's thread draws, too."""
    with Progress(study, trials=TRIALS, console=console, interrupts=Interrupts(None)) as progress:

        def on_epoch(metrics: Any) -> None:
            progress.epoch(metrics)
            look(progress)

        while proposals := study.next_group(TRIALS):
            for trials in run_group(
                Curves(proposals),
                proposals,
                study,
                checkpoints=Checkpoints(Path("nowhere"), warn=pytest.fail, share=1e-9),
                environment={"device": "curves"},
                on_epoch=on_epoch,
                interrupted=lambda: False,
                rules=lambda: study.rules,
                on_begin=progress.begin,
                on_end=progress.end,
            ):
                study.add(*trials)
            progress.group_ended()


def test_in_a_pipe_each_group_is_a_line_that_says_how_far_and_how_long(study: Study) -> None:
    pipe = console(80, terminal=False)
    searched(study, pipe)
    lines = printed(pipe)
    assert [line.split("   ")[0] for line in lines] == ["3/12 trials", "6/12 trials", "9/12 trials", "12/12 trials"]
    assert lines[0].split("   ")[1] == "N s, about N s left if as many are pruned as so far"
    assert lines[-1].split("   ")[1] == "N s"
    for line in lines:
        assert "epochs/s   best 0." in line


@pytest.mark.parametrize("width", [60, 100])
def test_a_terminal_shows_the_best_trials_with_their_curves_and_what_is_being_done(study: Study, width: int) -> None:
    screens: list[list[str]] = []

    def look(progress: Progress) -> None:
        screen = console(width)
        screen.print(progress.rendered())
        screens.append(printed(screen))

    terminal = console(width)
    searched(study, terminal, look)
    first = screens[0]
    assert first[0].endswith("0/12 trials")
    assert first[1] == "  N s, up to N s left, less when trials are pruned"
    assert first[2].startswith("  running 3, epoch 2 of 4")
    assert first[-4].split() == ["#", "val/accuracy", "epoch"]
    assert [line.split()[3] for line in first[-3:]] == ["1/4"] * 3
    assert {line.split()[2][1:] for line in first[-3:]} == {"···"}
    last = screens[-1]
    assert [line.split()[1] for line in last[-5:]] == sorted((line.split()[1] for line in last[-5:]), reverse=True)
    assert "4/4" in {line.split()[3] for line in last[-5:]}
    assert max(len(line) for screen in screens for line in screen) <= width
    assert any("12/12 trials" in line for line in printed(terminal))


def test_a_curve_has_one_character_per_epoch_or_per_several_and_dots_for_those_to_come() -> None:
    rising = {epoch: float(epoch) for epoch in range(1, 9)}
    assert sparkline(rising, 8, low=1, high=8, width=20) == "▁▂▃▄▅▆▇█"
    assert sparkline(rising, 16, low=1, high=8, width=4) == "▄█··"
    assert sparkline({1: 1.0, 2: 8.0, 3: 4.5}, 8, low=1, high=8, width=4) == "█▅··"
    assert sparkline({1: 0.5, 3: 0.5}, 4, low=0.5, high=0.5, width=4) == "▁·▁·"


def test_the_time_left_counts_epochs_as_trials_before_were_pruned() -> None:
    now = [100.0]
    estimate = TimeLeft(20, prunes=True, clock=lambda: now[0])
    assert estimate.words([0, 0], ahead=8) == ""
    estimate.epochs(10)
    now[0] += 5
    assert estimate.words([5, 5], ahead=8) == "up to 1 min 35 s left, less when trials are pruned"
    lengths = [4, 4, 8, 20]
    estimate.group_ended([ended_trial(epochs=tuple(epoch_metrics(1, 0.5, 1.0) for _ in range(n))) for n in lengths])
    assert [estimate.expected(trained) for trained in (0, 4, 8, 20)] == [9, 10, 12, 0]
    assert estimate.words([4], ahead=2) == "about 14 s left if as many are pruned as so far"
    assert estimate.speed() == "2 epochs/s"


def test_without_a_pruner_the_time_left_has_no_condition() -> None:
    now = [0.0]
    estimate = TimeLeft(20, prunes=False, clock=lambda: now[0])
    estimate.epochs(20)
    now[0] = 40.0
    assert estimate.words([20], ahead=180) == "about 2 h 0 min left"


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_a_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_line_too_long_for_a_terminal_becomes_a_line_per_part_and_a_command_stays_whole() -> None:
    narrow, pipe = console(20), console(20, terminal=False)
    for target in (narrow, pipe):
        say(target, "best config", "mlruns/best.yaml", "python -m pipeline.train best.yaml", command=True)
        say(target, "a sentence of several words")
        say(target, "time limit    it ends after that")
    assert printed(narrow) == [
        "best config",
        "  mlruns/best.yaml",
        "  python -m pipeline.train best.yaml",
        "a sentence of",
        "several words",
        "time limit    it",
        "              ends",
        "              after",
        "              that",
    ]
    assert printed(pipe) == [
        "best config   mlruns/best.yaml   python -m pipeline.train best.yaml",
        "a sentence of several words",
        "time limit    it ends after that",
    ]


def test_the_best_trials_are_a_table_and_on_a_narrow_terminal_a_few_words_each(study: Study) -> None:
    ranking: list[EndedTrial] = [ended_trial()]
    wide, narrow = console(100), console(60)
    for target in (wide, narrow):
        print_best(target, ranking, study.space)
    assert printed(wide)[0].split() == ["#", "val/accuracy", "optimizer", "base_lr", "schedule", "head", "ratio"]
    assert printed(narrow) == ["val/accuracy with one seed", "#0  0.6667  adamw 3.3e-02, step 2 × 0.23, head ×3.3"]


def test_trials_that_go_on_from_a_checkpoint_keep_their_curves(study: Study) -> None:
    trial = ended_trial(state=TrialState.PRUNED)
    begun = BegunTrial(number=0, config=trial.config, started=0.0, epochs=trial.epochs)
    screen = console(60)
    with Progress(study, trials=TRIALS, console=console(60), interrupts=Interrupts(None)) as progress:
        progress.begin(begun)
        screen.print(progress.rendered())
    assert printed(screen)[2] == f"  running 1, epoch 3 of {EPOCHS}"
    assert printed(screen)[-1].split()[:4] == ["0", "0.6667", "▁█··", f"2/{EPOCHS}"]
