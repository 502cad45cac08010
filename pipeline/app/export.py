"""Write a trial or a config: as YAML, as JSON, as plain PyTorch code, or as a trained model."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.app import cli
from pipeline.app.best_yaml import choose_trial, config_comment, config_content, trial_name
from pipeline.app.code import python_code
from pipeline.app.code_layout import WIDTH as CODE_WIDTH
from pipeline.app.found import Found
from pipeline.errors import InvalidInput, Problem
from pipeline.files import strict_yaml
from pipeline.files.atomic import write_atomic
from pipeline.space.config import Own, TrialConfig
from pipeline.space.load import build_config
from pipeline.space.own_code import is_own
from pipeline.space.param_groups import is_numbered
from pipeline.space.search_space import SearchSpace
from pipeline.space.shares import has_shares_of_run
from pipeline.space.trial import EndedTrial
from pipeline.study.store import Store
from pipeline.study.study import Study

CUDA_ONLY = "fp32_precision"
"""A key of the environment of trials that were trained on a CUDA device."""


@dataclass(frozen=True)
class Source:
    """A config, as plain values."""

    name: str
    """Names the config in messages."""
    content: Mapping[str, Any]
    comment: str
    """Says which trial it is, and how good."""
    file: Path | None
    """The file of a person; None: a study's trial."""


def export(
    config: Path | None,
    *,
    root: Path,
    storage: str | None,
    study: str | None,
    trial: int | str | None,
    seed: int | None,
    format: str,
    out: Path | None,
    device: str,
) -> int:
    """Write a trial or a config to a file or a folder, or to the terminal; return the exit status.

    Args:
        config: A config's file; None: a trial.
        root: Folder that holds `mlruns/`.
        storage: URL of the PostgreSQL database that holds the trials; None: PIPELINE_STORAGE, or else `optuna.db`.
        study: None: the newest.
        trial: Number of the trial, or the name of a baseline; None: the winner.
        seed: Seed of a run of the confirmation; None: the trial itself.
        format: "yaml", "json", "python", or "mlflow", which trains the config.
        out: None: the terminal.
        device: Where to train, as `--device` takes it.

    Raises:
        InvalidInput: There is no such study or trial, or it cannot be written so.
        TrainingEnded: The config diverged, or its model, loss or metric raised.
    """
    if format == "mlflow":
        from pipeline.app.export_model import checked_folder, export_model

        folder = checked_folder(out)
        source = _read(config, root=root, storage=storage, study=study, trial=trial, seed=seed)
        _refuse_unnamed_code(source)
        assert out is not None
        return export_model(source.content, source.file, folder=folder, shown=out, device=device)
    file = None if out is None else cli.writable_out(out)
    if file is not None and config is not None and file == config.resolve():
        raise InvalidInput("--out", [Problem(str(out), "is the config itself; name another file")])
    text = _written(_read(config, root=root, storage=storage, study=study, trial=trial, seed=seed), format)
    if file is None:
        sys.stdout.write(text)
        return 0
    try:
        write_atomic(file, text)
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(out), f"cannot be written: {error.strerror}")]) from None
    hint = "" if format == "python" else f"   train it: python -m pipeline.train {cli.quoted(out or file)}"
    print(f"{out}{hint}")
    return 0


def trial_code(study: Study, trial: EndedTrial) -> str:
    """Return a trial, or a run of the confirmation, as plain PyTorch code."""
    return _python(_source_of(study, trial))


def _read(
    config: Path | None,
    *,
    root: Path,
    storage: str | None,
    study: str | None,
    trial: int | str | None,
    seed: int | None,
) -> Source:
    if config is not None:
        content = strict_yaml.load(config)
        _, _, found = build_config(content, source=str(config), name="config", load_code=False)
        Found.read(found, source=str(config))
        return Source(str(config), content, _comment_of(config), config)
    with contextlib.closing(Store(root, cli.chosen_storage(storage), warn=cli.warn)) as store:
        opened = store.open(study)
        return _source_of(opened, choose_trial(opened, trial, seed))


def _source_of(study: Study, trial: EndedTrial) -> Source:
    name = f"{trial_name(trial)} of study {study.name}"
    return Source(name, config_content(study, trial), config_comment(study, trial), None)


def _comment_of(config: Path) -> str:
    """Return the comment at the head of a file."""
    lines = config.read_text(encoding="utf-8-sig").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#").strip() for line in head if "yaml-language-server" not in line)


def _written(source: Source, format: str) -> str:
    if format == "yaml":
        return strict_yaml.dumps(source.content, comment=source.comment)
    return _json(source.content) if format == "json" else _python(source)


def _json(content: Mapping[str, Any]) -> str:
    """Return content as JSON that is YAML too, without numbers that are not finite: JSON has no such numbers."""
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"
    shown = (c if c.isprintable() or c == "\n" or ord(c) > 0xFFFF else f"\\u{ord(c):04x}" for c in text)
    return "".join(shown)  # YAML reads some characters that JSON allows as line breaks


def _finite(value: Any) -> Any:
    """Return plain values without the entries of mappings that are infinite or not a number."""
    if not isinstance(value, Mapping):
        return value
    infinite = [name for name, item in value.items() if isinstance(item, float) and not math.isfinite(item)]
    return {name: _finite(item) for name, item in value.items() if name not in infinite}


def _python(source: Source) -> str:
    space, config, found = build_config(source.content, source=source.name, name="config", load_code=False)
    if problems := list(_unresolved(config)):
        raise InvalidInput(source.name, problems)
    objective = space.objective
    directions = {objective.metric: objective.direction}
    if not isinstance(config.workload, Own):
        directions["val/accuracy"] = "maximize"
    cuda = CUDA_ONLY in found.get("environment", {})
    comment = "\n".join(_code_comment(source, space, found))
    return python_code(config, directions=directions, comment=comment, cuda=cuda)


def _unresolved(config: TrialConfig) -> Iterator[Problem]:
    """Yield a problem for each value that depends on a model or on data; a search's trial has none."""
    schedule = config.scheduler
    if has_shares_of_run(type(schedule), schedule.values()):
        message = "a share of the steps depends on the data; write the number of steps, or export a search's trial"
        yield Problem(f"scheduler.{schedule.name}", message)
    for name, group in config.param_groups.items():
        if is_numbered(group.layers or ()):
            message = "{n} depends on the model; write each layer, or export a search's trial"
            yield Problem(f"param_groups.{name}.layers", message)


def _code_comment(source: Source, space: SearchSpace, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that say where the code comes from."""
    comment = source.comment or f"Written from {source.name}."
    yield from textwrap.wrap(comment, width=CODE_WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    environment = found.get("environment", {})
    if "torch" in environment:
        yield f"Trained with torch {environment['torch']} on {environment.get('device')}, seed {space.seed}."
    if space.objective.of == "best":
        yield "The score is that of the best epoch: keep the model of the epoch that validates best."


def _refuse_unnamed_code(source: Source) -> None:
    """Refuse to run code that only a database names, which may come from anyone.

    Raises:
        InvalidInput: The trial of a study trains with a person's own code.
    """
    content = source.content
    own = [name for kind in ("optimizer", "scheduler") for name in content[kind] if is_own(name)]
    own += [content["workload"]["function"]] if content["workload"]["name"] == "own" else []
    if source.file is None and own:
        remedy = "write it with --format yaml --out config.yaml, then export config.yaml"
        message = f"trains with {' and '.join(own)}, code that is run only when you name its file: {remedy}"
        raise InvalidInput("--format mlflow", [Problem(source.name, message)])
