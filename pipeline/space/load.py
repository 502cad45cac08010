"""Read search-space and config files: `load_space`, `load_config`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, create_model

from pipeline.errors import InvalidInput, Problem
from pipeline.files import strict_yaml
from pipeline.space import rules
from pipeline.space.config import (
    SETTINGS,
    WORKLOAD_CHOICES,
    WORKLOADS,
    Settings,
    TrialConfig,
)
from pipeline.space.confirm import Confirm
from pipeline.space.distributions import is_searched
from pipeline.space.enqueue import read_entry
from pipeline.space.file_format import (
    FORM,
    MAX_COUNT,
    check,
    fields_of,
    form_of,
    list_or_form,
    named_union,
    one_or_list,
    one_or_more,
    one_or_several,
    own_form,
)
from pipeline.space.limits import Share
from pipeline.space.optimizers import OPTIMIZERS, OwnOptimizer
from pipeline.space.overrides import Overrides, override, source_of
from pipeline.space.own_code import SHARED, is_own, load_own
from pipeline.space.param_groups import ParameterRule, ParamGroup, numbered_layers
from pipeline.space.pruners import PRUNERS, Pruner
from pipeline.space.schedules import SCHEDULERS, OwnScheduler, scheduler_class
from pipeline.space.search_space import Objective, Sampler, SearchSpace, WarmStart
from pipeline.space.shares import has_shares_of_run, resolve_lengths


def schema_text() -> str:
    """Return the JSON Schema of a search-space file, the text of `search_spaces/schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **file_form().model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"


FOUND = "found"
"""Key of a config file for the results that a search records; not part of the config."""

_OWN_CLASSES = {"optimizer": OwnOptimizer, "scheduler": OwnScheduler}
"""Section of a file to the class of a person's own."""


def load_space(path: Path, overrides: Overrides = MappingProxyType({}), *, searching: bool = True) -> SearchSpace:
    """Read a search-space file, load the code that it names, and check everything that needs no model.

    Args:
        path: The file.
        overrides: Changes to the content.
        searching: Whether the space must leave something to choose.

    Raises:
        InvalidInput: With every problem of the file.
    """
    data = override(strict_yaml.load(path), overrides)
    return build_space(data, source=source_of(path, overrides), name=path.stem, searching=searching)


def build_space(data: Mapping[str, Any], *, source: str, name: str, searching: bool = True) -> SearchSpace:
    """Build a search space from the content of a file, and load the code that the content names.

    Args:
        data: The content, which a person wrote: never that of a stored study.
        source: Names the space in messages.
        name: Names the studies, in the letters that `--study` takes.
        searching: Whether the space must leave something to choose.

    Raises:
        InvalidInput: With every problem of the data.
    """
    if FOUND in data:
        message = "makes this file a config of one trial, which `python -m pipeline.train` trains; name a search space"
        raise InvalidInput(source, [Problem(FOUND, message)])
    space, problems = _read(data, name=study_name(name), load_code=True)
    if searching and space is not None and not problems and not any(map(is_searched, space.parameters().values())):
        problems.append(Problem("", "nothing is searched; give a `low` and `high`, `choices`, or a second optimizer"))
    if problems or space is None:
        raise InvalidInput(source, problems)
    return space


def study_name(text: str) -> str:
    """Return a text with other letters than those that `--study` takes replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:80] or "space"


def space_from_document(document: Mapping[str, Any], *, name: str) -> SearchSpace:
    """Rebuild a space from the document that a study stores; load no code that the document names.

    Raises:
        InvalidInput: The document is not in the format of this version.
    """
    space, problems = _read(document, name=name, load_code=False)
    if problems or space is None:
        raise InvalidInput(f"the space of study {name}", problems)
    return space


def with_steps(space: SearchSpace, samples: int) -> SearchSpace:
    """Resolve the shares of schedules that move every step, once the data says how many steps an epoch has.

    Args:
        space: The search space.
        samples: Number of training samples.

    Raises:
        InvalidInput: The space was made for another number of steps.
    """
    return with_steps_per_epoch(space, {size: -(-samples // (size * space.accumulate)) for size in space.batch_sizes})


def with_steps_per_epoch(space: SearchSpace, steps: Mapping[int, int]) -> SearchSpace:
    """Resolve the shares of schedules that move every step.

    Args:
        space: The search space.
        steps: Each batch size to the optimizer steps of an epoch.

    Raises:
        InvalidInput: The space was made for another number of steps.
    """
    noted = list(steps.values()) if len(steps) > 1 else steps[space.batch_sizes[0]]
    if space.steps_per_epoch not in (None, steps):
        message = f"must be {noted}, as data and batch_size say, got {space.document['steps_per_epoch']}; "
        message += "remove it, or restore the data and batch_size that it was noted for"
        raise InvalidInput(space.name, [Problem("steps_per_epoch", message)])
    in_steps = {name: values for name, values in space.schedulers.items() if values["interval"] == "step"}
    if not any(has_shares_of_run(scheduler_class(name), values) for name, values in in_steps.items()):
        return space
    return space_from_document({**space.document, "steps_per_epoch": noted}, name=space.name)


def with_layers(space: SearchSpace, names: Iterable[str]) -> SearchSpace:
    """Resolve layers that a file numbers, `blocks.{n}.*`, once the model says which numbers there are.

    Args:
        space: The search space.
        names: Names of the model's parameters that are trained.

    Raises:
        InvalidInput: A rule does not hold for the layers that the model has.
    """
    names = list(names)

    def numbered(groups: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: {**group, "layers": numbered_layers(group["layers"], names)} if "layers" in group else group
            for name, group in groups.items()
        }

    document = {**space.document, "param_groups": numbered(space.document["param_groups"])}
    if space.warm_start is None:
        document["enqueue"] = [
            {**entry, "param_groups": numbered(entry["param_groups"])} if "param_groups" in entry else entry
            for entry in space.document["enqueue"]
        ]
    return space if document == space.document else space_from_document(document, name=space.name)


def with_enqueued(space: SearchSpace, entries: Sequence[Mapping[str, Any]]) -> SearchSpace:
    """Return a space with the configs that its warm start became.

    Args:
        space: The search space.
        entries: The configs in a file's words, as `entry_of` makes them.
    """
    resolved = space_from_document({**space.document, "enqueue": list(entries)}, name=space.name)
    return dataclasses.replace(resolved, warm_start=space.warm_start)


def load_config(
    path: Path, overrides: Overrides = MappingProxyType({})
) -> tuple[SearchSpace, TrialConfig, dict[str, Any]]:
    """Read a config file, such as best.yaml, and load the code that it names.

    Returns:
        The config as a space of one point, the config, and what a search recorded with it.

    Raises:
        InvalidInput: With every problem of the file.
    """
    data = override(strict_yaml.load(path), overrides)
    return build_config(data, source=source_of(path, overrides), name=path.stem)


def build_config(
    data: Mapping[str, Any], *, source: str, name: str, load_code: bool = True
) -> tuple[SearchSpace, TrialConfig, dict[str, Any]]:
    """Build a config from the content of a file.

    Args:
        data: The content.
        source: Names the config in messages.
        name: Names the space.
        load_code: Whether to load the code that the content names: only if a person wrote the content.

    Returns:
        The config as a space of one point, the config, and what a search recorded with it.

    Raises:
        InvalidInput: With every problem of the data.
    """
    found = data.get(FOUND, {})
    space, problems = _read({key: value for key, value in data.items() if key != FOUND}, name=name, load_code=load_code)
    if space is not None:
        message = "must be one value in a config, got a choice; search it with `python -m pipeline.search --space`"
        problems += [Problem(place, message) for place in _searched_places(space)]
        if not isinstance(found, dict):
            problems.append(Problem(FOUND, f"must be a mapping, got {found!r}"))
    if problems or space is None:
        raise InvalidInput(source, problems)
    return space, space.example(), found


@functools.cache
def file_form() -> type[BaseModel]:
    """Return the form of a search-space file; built once, which takes pydantic half a second."""
    group_name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=64)]
    no_pruner: Any = Field(default_factory=lambda: {"name": "none"}, validate_default=True)
    defaults: Any = Field(default_factory=dict, validate_default=True)
    fields: dict[str, Any] = {
        "workload": (named_union(*WORKLOAD_CHOICES), ...),
        **fields_of(Settings, searchable=False),
        "steps_per_epoch": (
            one_or_several(Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]) | None,
            Field(None, description="A search notes it in its study if a share needs it, for each batch size."),
        ),
        "objective": (form_of(Objective, searchable=False), defaults),
        "optimizer": (one_or_more("Optimizers", OPTIMIZERS), ...),
        "scheduler": (one_or_more("Schedulers", SCHEDULERS), ...),
        "param_groups": (dict[group_name, form_of(ParamGroup, searchable=True)], Field(min_length=1)),  # type: ignore[misc]
        "no_weight_decay": (
            one_or_list(form_of(ParameterRule, searchable=False)) | None,
            Field(None, description="Parameters without weight decay, whatever their group."),
        ),
        "sampler": (form_of(Sampler, searchable=False), defaults),
        "pruner": (named_union(*PRUNERS.values()), no_pruner),
        "confirm": (form_of(Confirm, searchable=False), defaults),
        "enqueue": (
            list_or_form(dict[str, Any], form_of(WarmStart, searchable=False)),
            Field(default=[], description="Configs to try first: a list of them, or the best of an earlier study."),
        ),
    }
    return create_model("SearchSpace", __config__=FORM, **fields)


def _read(data: Mapping[str, Any], *, name: str, load_code: bool) -> tuple[SearchSpace | None, list[Problem]]:
    """Check data against the form, then against the rules that connect several fields.

    Args:
        data: Content of a file.
        name: Name of the space.
        load_code: Whether to load the code that the data name: only if a person named the file.
    """
    built_in, own = _without_own(data)
    form, problems = check(file_form(), built_in)
    own_forms = {kind: _own_forms(kind, named, load_code=load_code, problems=problems) for kind, named in own.items()}
    if form is None or problems:
        return None, problems
    values: Any = form
    own_values = {kind: {key: _own_values(form) for key, form in forms.items()} for kind, forms in own_forms.items()}
    document = form.model_dump(mode="json", exclude_none=True)
    for kind, forms in own_forms.items():
        document[kind] |= {key: form.model_dump(mode="json", exclude_none=True) for key, form in forms.items()}
    space = SearchSpace(
        name=name,
        workload=WORKLOADS[values.workload.name](**dict(values.workload)),
        settings={setting: getattr(values, setting) for setting in SETTINGS},
        steps_per_epoch=None,
        objective=Objective(**dict(values.objective)),
        optimizers=_present(values.optimizer) | own_values["optimizer"],
        schedulers=_present(values.scheduler) | own_values["scheduler"],
        param_groups={group: dict(domains) for group, domains in values.param_groups.items()},
        no_weight_decay=tuple(ParameterRule(**dict(rule)) for rule in values.no_weight_decay or ()),
        sampler=Sampler(**dict(values.sampler)),
        pruner=_pruner(dict(values.pruner), epochs=values.epochs),
        confirm=Confirm(**dict(values.confirm)),
        enqueue=(),
        warm_start=None,
        document=document,
    )
    space, problems = _with_noted_steps(space, values.steps_per_epoch)
    problems += rules.problems(space)
    if not isinstance(values.enqueue, list):
        return dataclasses.replace(space, warm_start=WarmStart(**dict(values.enqueue))), problems
    known = [dict(read_entry(space, entry, f"enqueue.{n}", problems)) for n, entry in enumerate(values.enqueue)]
    return dataclasses.replace(space, enqueue=tuple(known)), problems


def _pruner(values: Mapping[str, Any], *, epochs: int) -> Pruner:
    """Return a pruner with counts of epochs in place of shares; the last rung lies within its share, rounded down."""
    kind, last = PRUNERS[values["name"]], values.get("max_resource")
    counts = resolve_lengths(kind, values, total=epochs)
    if isinstance(last, Share):
        counts["max_resource"] = max(1, math.floor(last * epochs / 100))
    return kind(**counts)


def _without_own(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return data without optimizers and schedules of a person's own, and those, by section and name."""
    rest, own = dict(data), {}
    for kind in _OWN_CLASSES:
        section = data.get(kind)
        items = section.items() if isinstance(section, dict) else ()
        own[kind] = {name: values for name, values in items if is_own(name)}
        if own[kind]:
            rest[kind] = {name: values for name, values in items if not is_own(name)}
    return rest, own


def _own_forms(
    kind: str, named: Mapping[str, Any], *, load_code: bool, problems: list[Problem]
) -> dict[str, BaseModel]:
    """Check optimizers or schedules of a person's own; append their problems to `problems`."""
    forms = {}
    for name, values in named.items():
        try:
            code = load_own(kind, name) if load_code else None
        except InvalidInput as error:
            problems += error.problems
            continue
        written = values if isinstance(values, dict) else {}
        form, found = check(own_form(_OWN_CLASSES[kind], SHARED[kind], written, code), values)
        problems += [Problem(".".join(filter(None, (kind, name, one.place))), one.message) for one in found]
        if form is not None:
            forms[name] = form
    return forms


def _own_values(form: BaseModel) -> dict[str, Any]:
    """Return hyperparameters without those that have no value: the code's own default holds for these."""
    return {name: value for name, value in form if value is not None}


def _with_noted_steps(space: SearchSpace, noted: int | tuple[int, ...] | None) -> tuple[SearchSpace, list[Problem]]:
    """Add the steps per epoch that a file notes, and resolve the shares of the run whose length is the same for all."""
    steps = (noted,) if isinstance(noted, int) else noted or ()
    if steps and len(steps) != len(space.batch_sizes):
        message = f"must be one number for each batch_size, {len(space.batch_sizes)}, got {len(steps)}; remove it"
        return space, [Problem("steps_per_epoch", message)]
    if steps:
        space = dataclasses.replace(space, steps_per_epoch=dict(zip(space.batch_sizes, steps, strict=True)))
    schedulers = {
        name: resolve_lengths(scheduler_class(name), values, total=space.run_length(values["interval"]))
        for name, values in space.schedulers.items()
    }
    return dataclasses.replace(space, schedulers=schedulers), []


def _present(forms: BaseModel) -> dict[str, dict[str, Any]]:
    return {name: dict(form) for name, form in forms if form is not None}


def _searched_places(space: SearchSpace) -> Iterator[str]:
    """Yield the places of a file at which a space has something to search."""
    yield from (kind for kind in ("optimizer", "scheduler") if is_searched(space.parameters()[kind]))
    parts = {"optimizer": space.optimizers, "scheduler": space.schedulers, "param_groups": space.param_groups}
    for kind, options in parts.items():
        for owner, domains in options.items():
            yield from (f"{kind}.{owner}.{name}" for name, domain in domains.items() if is_searched(domain))
    yield from (name for name, domain in space.settings.items() if is_searched(domain))


if __name__ == "__main__":  # python -m pipeline.space.load > search_spaces/schema.json
    print(schema_text(), end="")
