"""Configs to try first: an entry of `enqueue`, read as values, and the config of another study as an entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import Problem, did_you_mean
from pipeline.space.config import SEARCHABLE_SETTINGS, TrialConfig
from pipeline.space.distributions import as_stored, contains, describe, extremes, from_stored, is_searched, label
from pipeline.space.file_format import check, fields_of, form_of, in_percent
from pipeline.space.limits import Share
from pipeline.space.param_groups import is_numbered
from pipeline.space.schedules import scheduler_class
from pipeline.space.search_space import Domains, SearchSpace
from pipeline.space.shares import resolve_lengths


def read_entry(
    space: SearchSpace, entry: Mapping[str, Any], place: str, problems: list[Problem]
) -> Iterator[tuple[str, Any]]:
    """Yield a config to try first as values by Optuna's parameter names; append its problems to `problems`."""
    parts = _parts(space)
    for key, value in entry.items():
        here = f"{place}.{key}"
        if key in SEARCHABLE_SETTINGS:
            yield from _read_value(key, space.settings[key], value, here, problems, got=repr(value))
        elif key not in parts:
            problems.append(Problem(here, f"unknown key; {did_you_mean(key, (*parts, *SEARCHABLE_SETTINGS))}"))
        elif not isinstance(value, dict) or (key != "param_groups" and len(value) != 1):
            problems.append(Problem(here, f"must be a mapping with one name as its key, got {value!r}"))
        else:
            for owner, values in value.items():
                yield from _read_part(space, key, owner, values, f"{here}.{owner}", problems)


def entry_of(
    space: SearchSpace, config: TrialConfig, *, params: Mapping[str, Any] | None, other: SearchSpace
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the entry of `enqueue` that makes a space try the config of another study first.

    The entry names what the space searches. What the config lacks and the space searches is sampled, such as the
    `weight_decay` of a group. A setting of the run that neither study searches, such as `batch_size`, is the space's.

    Args:
        space: The space of the new study, with its layers numbered and the shares of its run resolved.
        config: A config of the other study.
        params: What the other study's sampler chose for the config, by Optuna's parameter names; None if no sampler
            chose it, as for a baseline.
        other: The space of the other study.

    Returns:
        The entry, and why the space cannot draw the config: a problem for each place of a file; empty if it can.
    """
    entry = _in_words(space, config, params, other)
    problems: list[Problem] = []
    for _ in read_entry(space, entry, "", problems):
        pass
    problems = [Problem(problem.place.removeprefix("."), problem.message) for problem in problems]
    problems += _lacking(space, entry)
    return ({} if problems else _searched_part(space, entry)), problems


def _parts(space: SearchSpace) -> dict[str, Mapping[str, Domains]]:
    return {"optimizer": space.optimizers, "scheduler": space.schedulers, "param_groups": space.param_groups}


def _read_part(
    space: SearchSpace, key: str, owner: str, values: Any, place: str, problems: list[Problem]
) -> Iterator[tuple[str, Any]]:
    """Yield the values of an optimizer, a schedule or a group."""
    options = _parts(space)[key]
    if owner not in options:
        problems.append(Problem(place, f"is not in this space; {did_you_mean(owner, options)}"))
        return
    if not isinstance(values, dict):
        problems.append(Problem(place, f"must be a mapping, `key: value`, got {values!r}"))
        return
    if key != "param_groups" and len(options) > 1:
        yield key, owner
    shares, wrong = _shares(space, owner, values) if key == "scheduler" else ({}, [])
    problems += [Problem(f"{place}.{problem.place}", problem.message) for problem in wrong]
    if wrong:
        return
    if key == "param_groups":
        values = _with_lists(values, options[owner])
    for name, value in values.items():
        here = f"{place}.{name}"
        if name not in options[owner]:
            problems.append(Problem(here, f"unknown key; {did_you_mean(name, options[owner])}"))
            continue
        parameter = f"{name}.{owner}" if key == "param_groups" else f"{owner}.{name}"
        number = shares.get(name, value)
        got = f"{value}, which is {label(number)}" if name in shares else repr(value)
        yield from _read_value(parameter, options[owner][name], number, here, problems, got=got)


def _read_value(
    parameter: str, domain: Any, value: Any, place: str, problems: list[Problem], *, got: str
) -> Iterator[tuple[str, Any]]:
    if not contains(domain, value):
        problems.append(Problem(place, f"must be {describe(domain)}, as in this space, got {got}"))
    elif is_searched(domain):
        yield parameter, as_stored(domain, value)


def _shares(space: SearchSpace, schedule: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the numbers, in this space's epochs or steps, for what an enqueued schedule has in percent."""
    cls, distributions = scheduler_class(schedule), space.schedulers[schedule]
    fields = fields_of(cls, searchable=False)
    written = {name: value for name, value in values.items() if name in fields and in_percent(value)}
    form, problems = check(form_of(cls, searchable=False, only=written), written)
    shares = {name: getattr(form, name) for name in written} if form else {}
    warmup = max(extremes(distributions.get("warmup", 0))) if "warmup" in fields else 0
    total = space.run_length(distributions["interval"])
    return resolve_lengths(cls, shares, total=total, warmup=warmup), problems


def _with_lists(values: Mapping[str, Any], group: Domains) -> dict[str, Any]:
    """Return the values of an enqueued group with the lists that the form of a file makes of single items.

    Layers that the model has yet to number are left out, and checked when `with_layers` reads the space again.
    """
    made = dict(values)
    made |= {name: [value] for name, value in values.items() if name in ("pattern", "dims") and type(value) is not list}
    if group["layers"] is not None and is_numbered(group["layers"]):
        made.pop("layers", None)
    elif isinstance(values.get("layers"), list):
        made["layers"] = [[layer] if isinstance(layer, str) else layer for layer in values["layers"]]
    return made


def _in_words(
    space: SearchSpace, config: TrialConfig, params: Mapping[str, Any] | None, other: SearchSpace
) -> dict[str, Any]:
    """Return a config in the words of a file, as far as an entry of this space may name it.

    A config has numbers for shares. The entry has the share if both spaces fix the same one, or if the other study drew
    a share and this space draws shares.
    """
    written = config.to_dict()
    entry = {key: written[key] for key in _parts(space)}
    if params is not None:
        for owner, values in entry["scheduler"].items():
            values |= {name: share for name in values if (share := _common_share(space, other, params, owner, name))}
    settings = {name: (space.settings[name], other.settings[name]) for name in SEARCHABLE_SETTINGS if name in written}
    return entry | {name: written[name] for name, domains in settings.items() if any(map(is_searched, domains))}


def _common_share(space: SearchSpace, other: SearchSpace, params: Mapping[str, Any], schedule: str, name: str) -> Any:
    """Return what another study has for a field of a schedule if that is in percent in both spaces, else None."""
    fixed, here = (one.document["scheduler"].get(schedule, {}).get(name) for one in (other, space))
    if in_percent(fixed) and fixed == here:
        return fixed
    parameter = f"{schedule}.{name}"
    if parameter not in params:
        return None
    drawn = _plain(from_stored(other.parameters()[parameter], params[parameter]))
    domain = space.parameters().get(parameter)
    return drawn if in_percent(drawn) and any(in_percent(_plain(value)) for value in extremes(domain)) else None


def _plain(value: Any) -> Any:
    """Return a value in the words of a file: a share as text, a list for a tuple."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Share) else value


def _lacking(space: SearchSpace, entry: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what every config of a space has, and an entry lacks."""
    for key, options in _parts(space).items():
        for owner, domains in options.items():
            if owner not in entry[key]:
                if key == "param_groups":
                    yield Problem(f"{key}.{owner}", "is a group of this space, and the config has no such group")
                continue
            for name, domain in domains.items():
                if name not in entry[key][owner] and not is_searched(domain) and extremes(domain) != (None,):
                    message = f"must be {describe(domain)}, as in this space, got none"
                    yield Problem(f"{key}.{owner}.{name}", message)


def _searched_part(space: SearchSpace, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry without the values of which the space has but one."""
    kept: dict[str, Any] = {name: entry[name] for name in SEARCHABLE_SETTINGS if name in entry}
    kept = {name: value for name, value in kept.items() if is_searched(space.settings[name])}
    for key, options in _parts(space).items():
        for owner, values in entry[key].items():
            searched = {name: value for name, value in values.items() if is_searched(options[owner][name])}
            if searched or key != "param_groups":
                kept.setdefault(key, {})[owner] = searched
    return kept
