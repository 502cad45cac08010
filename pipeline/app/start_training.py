"""Train a config again: read it from whatever names it, then import PyTorch and train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.app import cli
from pipeline.app.found import Found, record
from pipeline.app.options import IN_PYTHON, read_options, with_workload, without_same_function
from pipeline.app.result import SearchResult
from pipeline.errors import InvalidInput, Problem
from pipeline.files import strict_yaml
from pipeline.space.config import Own, TrialConfig
from pipeline.space.load import FOUND, build_config
from pipeline.space.overrides import Overrides, override, source_of
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial

if TYPE_CHECKING:
    from pipeline.app.train_config import Trained
    from pipeline.workloads.loop import Epochs
    from pipeline.workloads.workload import Workload

Config = Path | str | Mapping[str, Any] | TrialConfig | EndedTrial | SearchResult
"""Whatever names a config: a file, its content, a config, a trial of a search, or a search, for its best trial."""


def start_training(
    config: Config,
    workload: Callable[..., Workload | Epochs] | Workload | str | None,
    *,
    overrides: Overrides,
    device: str,
    fast: bool,
    test: bool,
    say: Callable[[str], None],
) -> Trained:
    """Train a config; `pipeline.train.train` describes the arguments, `say` takes each line of the report."""
    wrong: list[Problem] = []
    if not isinstance(config, Path | str | Mapping | TrialConfig | EndedTrial | SearchResult):
        wanted = "a file, a mapping, a TrialConfig, a trial, or the result of a search"
        wrong.append(Problem("config", f"must be {wanted}, got {cli.shown(config)}"))
    path = config if isinstance(config, str | Path) else None
    options = {"config": path, "device": device}
    read = read_options("train", options, workload=workload, overrides=overrides, problems=wrong)
    content, source = _content(config if path is None else read["config"])
    named = content.get("workload")
    stored = named if isinstance(named, Mapping) else {}
    changes, made = with_workload(workload, overrides, stored=stored)
    changes = without_same_function(changes, stored)
    source = source_of(source, changes)
    written = path is not None or isinstance(config, Mapping)  # a trial may come from a study that someone else made
    space, _, found = build_config(override(content, changes), source=source, name="config", load_code=written)
    if made is None:
        _refuse_python(space, source=source)
        cli.say_own_code(space, say)
    recorded = None if changes else Found.read(found, source=source)  # a changed config has nothing to repeat
    if changes and found:
        say(f"note          {', '.join(changes)} given anew, so nothing is compared with the search")

    from pipeline.app.train_config import train_config

    return train_config(
        space, recorded, source=source, device=read["device"], fast=fast, test=test, say=say, workload=made
    )


def _refuse_python(space: SearchSpace, *, source: str) -> None:
    """Refuse a config whose workload was made in Python: no file has it."""
    if isinstance(space.workload, Own) and space.workload.function.startswith(IN_PYTHON):
        message = f"{space.workload.function} was made in Python; train it there, with train(…, workload=…)"
        raise InvalidInput(source, [Problem("workload.function", message)])


def _content(config: Config) -> tuple[Mapping[str, Any], str]:
    """Return the content of a config's file, and the config's name for messages."""
    if isinstance(config, SearchResult):
        if config.best is None:
            message = "no trial is complete; give one of `trials`"
            raise InvalidInput("config", [Problem(f"study {config.study}", message)])
        config = config.best
    if isinstance(config, EndedTrial):
        objective = dataclasses.asdict(config.objective)
        return {**config.config.to_dict(), "objective": objective, FOUND: record(config)}, f"trial {config.number}"
    if isinstance(config, TrialConfig):
        return config.to_dict(), "config"
    return (config, "config") if isinstance(config, Mapping) else (strict_yaml.load(Path(config)), str(config))
