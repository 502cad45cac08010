"""Warm start: the best configs of an earlier study become the configs that a new study tries first.

The new study stores the configs and does not look at the earlier study again. It stores the name too, by which the
same command finds the new study again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.app.answer import Answer
from pipeline.errors import MAX_PROBLEMS, InvalidInput, Problem, counted, did_you_mean, printable
from pipeline.space.config import SETTINGS, TrialConfig
from pipeline.space.distributions import is_searched
from pipeline.space.enqueue import entry_of
from pipeline.space.load import with_enqueued
from pipeline.space.search_space import SearchSpace, WarmStart
from pipeline.study.candidates import Candidate, finalists
from pipeline.study.store import Store
from pipeline.study.study import Study


def refuse_unknown(warm_start: WarmStart | None, store: Store, *, source: str) -> None:
    """Refuse an earlier study that does not exist, unless a study has begun from it: that one is continued.

    Raises:
        InvalidInput: There is no such study.
    """
    if warm_start is not None:
        begun = [header.warm_start for header in store.headers()]
        if dataclasses.asdict(warm_start) not in begun:
            _check_exists(warm_start.study, store, source)


def warm_started(
    space: SearchSpace, store: Store, *, source: str, say: Callable[[str], object] = lambda _: None
) -> SearchSpace:
    """Return a space with the best configs of the study that its warm start names, as far as they fit the space.

    Args:
        space: The search space, with its layers numbered and the shares of its run resolved.
        store: Has the earlier study.
        source: Names the space in messages.
        say: Takes lines that say which configs are tried first, and which are left out and why.

    Raises:
        InvalidInput: There is no such study, or none of its best configs fits.
    """
    if space.warm_start is None or isinstance(space.document["enqueue"], list):
        return space
    _check_exists(space.warm_start.study, store, source)
    study = store.open(space.warm_start.study)
    best = _best(study, space.warm_start.best)
    if not best:
        message = f"study {study.name} has no complete trial; name another study, or leave enqueue away"
        raise InvalidInput(source, [Problem("enqueue.study", message)])
    entries, left_out = _fitting(best, study, space)
    if not entries:
        remedy = f"none of the best of study {study.name} fits this space; name another study, or change the space"
        problems = [Problem(f"enqueue.study: {one.place}", one.message) for one in left_out]
        raise InvalidInput(source, problems, remedy=remedy)
    say(f"tried first   {counted(len(entries), 'config')} of study {study.name}: {', '.join(entries)}")
    if other := list(_other_settings(best[next(iter(entries))].config, space)):
        say(printable(f"              which had {', '.join(other)}"))
    for one in left_out[:MAX_PROBLEMS]:
        say(f"left out      {one}")
    if left_out[MAX_PROBLEMS:]:
        say(f"              … ({len(left_out) - MAX_PROBLEMS} more)")
    return with_enqueued(space, list(entries.values()))


def _check_exists(name: str, store: Store, source: str) -> None:
    known = [header.name for header in store.headers()]
    if name not in known:
        remedy = did_you_mean(name, known) if known else "no study has been made there"
        message = f"there is no study {name!r} in {store.place}; {remedy}"
        raise InvalidInput(source, [Problem("enqueue.study", message)])


def _best(study: Study, count: int) -> dict[str, Candidate]:
    """Return the best configs of a study by their labels: the confirmed winner, then the best by their late epochs."""
    winner = Answer.of(study).confirmation.winner
    best = {} if winner is None else {f"{winner.candidate.label} (confirmed)": winner.candidate}
    known = [candidate.config for candidate in best.values()]
    for trial in finalists(study.best(len(study.ended)), study.space, count=count):
        if trial.config not in known and len(best) < count:
            label = f"#{trial.number}"
            best[label] = Candidate(trial=trial.number, label=label, config=trial.config)
    return best


def _fitting(
    best: Mapping[str, Candidate], study: Study, space: SearchSpace
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Return the entries of the configs that fit a space by their labels, and one problem for each other config."""
    entries: dict[str, dict[str, Any]] = {}
    left_out: list[Problem] = []
    for label, candidate in best.items():
        params = None if candidate.trial is None else study.ended[candidate.trial].params
        entry, problems = entry_of(space, candidate.config, params=params, other=study.space)
        if problems:
            more = f" ({counted(len(problems) - 1, 'more problem')})" if problems[1:] else ""
            left_out.append(Problem(label, f"{problems[0]}{more}"))
        else:
            entries[label] = entry
    return entries, left_out


def _other_settings(config: TrialConfig, space: SearchSpace) -> Iterator[str]:
    """Yield in words the settings of an earlier run that a new run, which does not search them, has otherwise."""
    here = space.example()
    if config.workload != space.workload:
        same = config.workload.title == space.workload.title
        yield "another workload" if same else f"workload {config.workload.title} (here {space.workload.title})"
    for name in SETTINGS:
        before, now = getattr(config, name), getattr(here, name)
        if name != "seed" and before != now and not is_searched(space.settings[name]):
            yield f"{name} {_word(before)} (here {_word(now)})"
    if config.no_weight_decay != here.no_weight_decay:
        yield "other rules of no_weight_decay"


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
