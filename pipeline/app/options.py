"""What a search is asked to do, by a command line or from Python, and the search space that it comes to."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem
from pipeline.space.config import Own
from pipeline.space.overrides import Overrides, override, source_of
from pipeline.space.ready_made import find_space

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace
    from pipeline.study.store import StudyHeader
    from pipeline.workloads.workload import Workload


DEFAULT_TRIALS = 50


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a search is asked to do, read but not yet checked against anything."""

    space: Path | Mapping[str, Any] | None = None
    overrides: Overrides = field(default_factory=dict)
    workload: Workload | None = None
    """In place of the one that the space names."""
    trials: int | None = None
    timeout: float | None = None
    """In minutes."""
    study: str | None = None
    root: Path = Path()
    device: str = "auto"
    rows: int | None = None


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options of a command line."""
    names = {field.name for field in dataclasses.fields(Options)} & vars(arguments).keys() - {"workload"}
    return Options(**{name: getattr(arguments, name) for name in names}, overrides=cli.overrides_of(arguments))


def checked_options(*, space: Path | str | Mapping[str, Any] | None, root: Path | str, **others: Any) -> Options:
    """Return the options that were given from Python, if they are such as a command line takes.

    Raises:
        InvalidInput: With every one that is not.
    """
    readers: dict[str, Callable[[str], Any]] = {
        "trials": cli.whole_number(1),
        "timeout": cli.positive_number,
        "study": cli.study_name,
        "device": cli.device_name,
        "rows": cli.whole_number(1),
        "root": cli.folder,
    }
    problems = []
    read: dict[str, Any] = {}
    for name, value in {**others, "root": root}.items():
        try:
            if value is not None:
                read[name] = readers[name](str(value))
        except argparse.ArgumentTypeError as error:
            problems.append(Problem(name, str(error)))
    if not (space is None or isinstance(space, str | Path | Mapping)):
        problems.append(Problem("space", f"must be a file or a mapping, got {type(space).__name__}"))
    if problems:
        raise InvalidInput("search", problems)
    return Options(space=Path(space) if isinstance(space, str) else space, **read)


def with_workload(
    options: Options, workload: Callable[[], Workload] | Workload | str | None, overrides: Overrides
) -> Options:
    """Return options with a workload that was given from Python, and the changes to the space."""
    if not isinstance(overrides, Mapping) or not all(isinstance(place, str) for place in overrides):
        raise InvalidInput("overrides", [Problem("", "must be a mapping from places, such as epochs, to values")])
    if workload is None or isinstance(workload, str):
        chosen = {"workload": cli.workload_choice(workload)} if workload is not None else {}
        return dataclasses.replace(options, overrides={**chosen, **overrides})
    from pipeline.workloads import custom

    place = _place_of(workload)
    made = custom.call(workload, place or "workload") if callable(workload) else custom.check_form(workload, "workload")
    chosen = {"workload": {"name": "own", "function": place or f"python:{made.name}"}}
    return dataclasses.replace(options, overrides={**chosen, **overrides}, workload=made)


def _place_of(workload: Any) -> str | None:
    """Return where a function is found again, as `--workload` takes it; None for others, told apart by their names."""
    module, name = getattr(workload, "__module__", None), getattr(workload, "__qualname__", "")
    if not module or not name.isidentifier():
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return f"{os.path.relpath(file)}:{name}" if file else None
    return f"{module}:{name}"


def read_space(options: Options) -> tuple[SearchSpace, int]:
    """Read the space and the number of trials: from the options, else a named study's own, else the defaults."""
    from pipeline.space import rules
    from pipeline.space.load import build_space

    header = None
    if options.study is not None and (options.root / "mlruns" / "optuna.db").exists():
        from pipeline.study.store import Store

        header = next((h for h in Store(options.root).headers() if h.name == options.study), None)
    if options.space is None and header is not None:
        document = override(header.document, _agreed_overrides(header, options))
        space = build_space(document, source=source_of(f"--study {header.name}", options.overrides), name=header.space)
    else:
        space = _given_space(options)
    for warning in rules.warnings(space):
        cli.warn(warning)
    return space, options.trials or (header.trials if header else DEFAULT_TRIALS)


def source(options: Options) -> str:
    """Return what messages call the search space."""
    file = (
        "space"
        if isinstance(options.space, Mapping)
        else find_space(options.space, with_workload="workload" in options.overrides)
    )
    return source_of(file, options.overrides)


def command(options: Options, space: SearchSpace, *, study: str, trials: int) -> str:
    """Return the command that goes on with a search that was stopped."""
    own = space.workload
    if isinstance(own, Own) and own.function.startswith("python:"):
        return f"pipeline.search.search(study={study!r}, trials={trials}, workload=…), with the workload that it had"
    workload = f" --workload {cli.quoted(Path(own.function))}" if isinstance(own, Own) else ""
    root = "" if options.root == Path() else f" --root {cli.quoted(options.root)}"
    device = "" if options.device == "auto" else f" --device {options.device}"
    rows = "" if options.rows is None else f" --rows {options.rows}"
    return f"python -m pipeline.search --study {study} --trials {trials}{workload}{root}{device}{rows}"


def _agreed_overrides(header: StudyHeader, options: Options) -> Overrides:
    """Return the changes to a stored space, whose own code a person must name.

    A database may come from anyone, so it does not say which code is run. A function that is named as it is stored
    keeps the arguments that are stored.
    """
    stored, named = header.document["workload"], options.overrides.get("workload")
    if stored["name"] != "own":
        return options.overrides
    if named is None:
        message = f"trains {stored['function']}, code that is run only when you name it: add --workload"
        raise InvalidInput("--study", [Problem(header.name, f"{message} {stored['function']}")])
    same = named.get("function") == stored["function"]
    return {place: value for place, value in options.overrides.items() if not (same and place == "workload")}


def _given_space(options: Options) -> SearchSpace:
    from pipeline.space.load import build_space, load_space, study_name

    if isinstance(options.space, Mapping):
        return build_space(override(options.space, options.overrides), source=source(options), name="search")
    space = load_space(find_space(options.space, with_workload="workload" in options.overrides), options.overrides)
    if options.space is None and "workload" in options.overrides:
        space = dataclasses.replace(space, name=study_name(space.workload.title))
    return space
