"""How sure the answer is, in words that are computed: from strategies that were trained again, or from one seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pipeline.errors import counted
from pipeline.page.confirmed import Comparison, Confirmed
from pipeline.page.findings import Kind, at_bound, name_of
from pipeline.page.headline import with_spread
from pipeline.page.markup import escaped
from pipeline.page.noise import Noise, gap_text
from pipeline.page.results import StudyResults
from pipeline.page.sentence import optimizer_title, rate_text
from pipeline.space.own_code import short_name
from pipeline.space.trial import EndedTrial, TrialState


def how_sure(results: StudyResults, noise: Noise | None) -> list[str]:
    """Return the paragraphs of the section, as HTML."""
    if results.confirmed is not None and results.confirmed.winner is not None:
        return [*_confirmed(results, results.confirmed), _rates(results, noise), *_at_bound(results)]
    if results.searched_first is None:
        return _nothing(results)
    return [*_one_seed(results), _this_point(results, noise), *_choices(results, noise), *_at_bound(results)]


def _one_seed(results: StudyResults) -> list[str]:
    why = results.confirmed.reason if results.confirmed is not None else ""
    because = f"Unconfirmed: {escaped(why)}." if why else "Unconfirmed."
    luckiest = f", and the best of {len(results.trials)} is also the luckiest" if len(results.trials) > 1 else ""
    words = [f'<b class="warn">{because}</b> Each trial ran with one seed{luckiest}.']
    if results.confirm_command:
        words[0] += " This trains the best again with fresh seeds:"
        words.append(f'<pre class="command">{escaped(results.confirm_command)}</pre>')
    return [*words, *(_incomplete(results.confirmed) if results.confirmed is not None else ())]


def _this_point(results: StudyResults, noise: Noise | None) -> str:
    """Say how many complete trials cannot be told from the best, and at which rates."""
    count = len(results.ranking)
    if count == 1:
        return "<b>The point</b>: one trial is complete, so nothing says how much its score means."
    tied = sum(trial.value == results.ranking[0].value for trial in results.ranking)
    ties = f"{_share_of(tied, count)} complete trials tie at {results.ranking[0].score}. " if tied > 1 else ""
    if noise is None:
        return f"<b>The point</b>: {ties}Nothing says how much the scores of {count} complete trials differ by chance."
    near = len(noise.trials)
    words = f"{_share_of(near, count)} complete trials lie within noise of the best"
    if near == 1:
        words = f"no other of the {count} complete trials lies within noise of the best"
    words = words[0].upper() + words[1:] if ties else words
    return f"<b>The point</b>: {ties}{words} ({noise.source}). {_range(noise)}"


def _share_of(some: int, count: int) -> str:
    """Return a part of several: `both`, `all 5`, `3 of 5`."""
    whole = "both" if count == 2 else f"all {count}"
    return whole if some == count else f"{some} of {count}"


def _rates(results: StudyResults, noise: Noise | None) -> str:
    """Return the range of base rates that did as well in the search; empty unless there is one."""
    return f"<b>The rate</b>: in the search, {words}" if noise is not None and (words := _range(noise)) else ""


def _range(noise: Noise) -> str:
    low, high = (rate_text(rate) for rate in noise.rates)
    if low == high:
        return ""
    title = escaped(optimizer_title(noise.winner.config.optimizer.name))
    return f"{title} did as well at base rates from {low} to {high}."


def _choices(results: StudyResults, noise: Noise | None) -> Iterator[str]:
    """Say whether the search tells the optimizers apart, and the schedules if it searched several."""
    assert results.searched_first is not None
    if len(results.space.optimizers) == 1:
        title = escaped(optimizer_title(results.searched_first.config.optimizer.name))
        yield f"<b>The optimizer</b>: only {title} was searched."
    else:
        yield f"<b>The optimizer</b>: {_told_apart(results, noise, 'optimizer')}"
    if len(results.space.schedulers) > 1:
        yield f"<b>The schedule</b>: {_told_apart(results, noise, 'scheduler')}"


def _told_apart(results: StudyResults, noise: Noise | None, kind: Kind) -> str:
    """Compare the best of the first trial's optimizer, or schedule, with the best complete trial of another."""
    best = results.searched_first
    assert best is not None
    assert best.value is not None
    own = name_of(best, kind)
    rival = next((trial for trial in results.ranking if name_of(trial, kind) != own), None)
    if rival is None:
        count = len(results.ranking)
        those = "the complete trial uses" if count == 1 else f"{_share_of(count, count)} complete trials use"
        return f"{those} {_title(kind, own)}. {_ends_of_others(results, kind, own)}"
    assert rival.value is not None
    gap = results.better(best.value, rival.value)
    pair = f"the best with {_title(kind, name_of(rival, kind))}", f"the best with {_title(kind, own)}"
    if gap == 0:
        return f"{pair[0]} ties with {pair[1]}."
    return f"{pair[0]} is {gap_text(gap)} behind {pair[1]}{_beside(noise, rival)}."


def _beside(noise: Noise | None, rival: EndedTrial) -> str:
    """Say whether a trial is within noise of the first; where noise is a lower bound, more than it decides nothing."""
    if noise is None:
        return ""
    if rival in noise.trials:
        return ", which is within noise"
    more = "this lower bound of noise, but other seeds may reverse it" if noise.lower_bound else "noise"
    return f", which is more than {more}"


def _ends_of_others(results: StudyResults, kind: Kind, own: str) -> str:
    """Say at which epoch the last trial of every other optimizer, or schedule, ended, and how far behind."""
    words = []
    for name in results.space.optimizers if kind == "optimizer" else results.space.schedulers:
        trials = [trial for trial in results.trials if name_of(trial, kind) == name]
        if name == own:
            continue
        if not trials:
            words.append(f"{_title(kind, name)} was never tried")
            continue
        last = max(trials, key=lambda trial: len(trial.epochs))
        end = f"{_ended_as(last)} epoch {len(last.epochs)}{_behind(results, kind, own, last)}"
        words.append(f"the last with {_title(kind, name)} {end}")
    text = "; ".join(words)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _behind(results: StudyResults, kind: Kind, own: str, trial: EndedTrial) -> str:
    """Say how far a trial was behind the best of an optimizer or schedule when it ended."""
    epoch = len(trial.epochs)
    value = results.value_at(trial, epoch)
    others = [results.value_at(other, epoch) for other in results.trials if name_of(other, kind) == own]
    gaps = [results.better(other, value) for other in others if other is not None and value is not None]
    if not gaps:
        return ""
    side = "behind" if max(gaps) >= 0 else "ahead of"
    return f", {gap_text(abs(max(gaps)))} {side} the best with {_title(kind, own)} there"


def _title(kind: Kind, name: str) -> str:
    return escaped(optimizer_title(name) if kind == "optimizer" else short_name(name))


def _ended_as(trial: EndedTrial) -> str:
    return {TrialState.PRUNED: "was pruned at", TrialState.DIVERGED: "diverged at"}.get(trial.state, "failed at")


def _at_bound(results: StudyResults) -> Iterator[str]:
    trial = results.winning_trial
    if trial is not None and (bound := at_bound(trial, results.space)):
        place = escaped(f"optimizer.{trial.config.optimizer.name}.base_lr")
        rate = rate_text(trial.config.optimizer.base_lr)
        where = f"at the {bound} bound of what was searched"
        yield f"<b>The range</b>: the rate {rate} lies {where}; widen <code>{place}</code>."


def _nothing(results: StudyResults) -> list[str]:
    states = Counter(trial.state for trial in results.trials)
    if not states:
        return ["No trial has ended, so there is nothing to say yet."]
    words = " and ".join(f"{count} {state}" for state, count in states.most_common())
    left = results.planned - len(results.trials)
    more = f" {counted(left, 'trial')} of {results.planned} are still to come." if left > 0 else ""
    return [f"No trial trained for all {counted(results.space.epochs, 'epoch')}: {words}.{more}"]


def _confirmed(results: StudyResults, confirmed: Confirmed) -> Iterator[str]:
    winner = confirmed.winner
    assert winner is not None
    assert winner.mean is not None
    seeds = counted(len(winner.values), "fresh seed")
    spread = " (mean ± standard deviation)" if winner.std is not None else ""
    yield f"<b>Confirmed on {seeds}</b>: {with_spread(winner.mean, winner.std)}{spread}."
    if winner.trial is None:
        yield f"<b>A baseline won</b>: no finalist of the search has a better mean than {escaped(winner.label)}."
        yield "<b>What to do</b>: widen the ranges, or search more trials."
    yield from map(_compared, confirmed.comparisons)
    yield from _incomplete(confirmed)
    trial = results.winning_trial
    if trial is not None and trial.value is not None:
        gap = results.better(trial.value, winner.mean)
        off = f"{gap_text(abs(gap))} {'better' if gap > 0 else 'worse'} than" if gap else "the same as"
        lucky = ", so it was lucky" if gap > 0 else ""
        yield f"In the search, on one seed, it had {trial.score}: {off} with fresh seeds{lucky}."
    if confirmed.comparisons:
        yield "Intervals are of 95 %, and speak of seeds, not of other data."


def _compared(comparison: Comparison) -> str:
    interval = f"[{_signed(comparison.low)}, {_signed(comparison.high)}]"
    by_pair = ", by a paired t interval, since its runs vary otherwise" if comparison.paired else ""
    other = escaped(comparison.other)
    if not comparison.distinguishable:
        by = f"better by {gap_text(comparison.better_by)}"
        return f"Not distinguishable from {other}: {by}, and {interval} holds zero{by_pair}."
    return f"Better than {other} by {gap_text(comparison.better_by)} {interval}{by_pair}."


def _incomplete(confirmed: Confirmed) -> Iterator[str]:
    """Name every strategy with a run that diverged or failed, which therefore has no mean."""
    for strategy in confirmed.strategies:
        by_end: dict[str, list[str]] = {}
        for seed, end in strategy.incomplete.items():
            by_end.setdefault(end, []).append(str(seed))
        ends = [f"{end} with seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" for end, seeds in by_end.items()]
        if ends:
            yield f"{escaped(strategy.label)} {' and '.join(ends)}, so it has no mean."


def _signed(value: float) -> str:
    return f"−{gap_text(-value)}" if value < 0 else gap_text(value)
