"""From options to a checked search space: the part of a command that needs neither torch nor MLflow.

Only `read_space` turns an option into a SearchSpace. `read_search` reads all options of a search, for the command line
and for Python.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import numbers
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem
from pipeline.files import strict_yaml
from pipeline.space import rules
from pipeline.space.config import Own
from pipeline.space.confirm import Confirm
from pipeline.space.load import build_space, study_name
from pipeline.space.overrides import Overrides, override, source_of
from pipeline.space.own_code import is_own
from pipeline.space.ready_made import find_space
from pipeline.space.search_space import SearchSpace

if TYPE_CHECKING:
    from pipeline.study.store import StudyHeader
    from pipeline.workloads.loop import Epochs, Loop
    from pipeline.workloads.workload import Workload

DEFAULT_TRIALS = 50
IN_PYTHON = "python:"
"""Begins the place of a workload that was made in Python and that no file has, such as `python:sine`."""
NO_NAME = "…"
"""Stands in messages for a value from Python whose name is not known."""
OPTIONS: Mapping[str, tuple[Any, str, Callable[[str], Any]]] = {
    "config": (str | Path | None, "a path", cli.file),
    "trials": (numbers.Integral | None, "a whole number", cli.whole_number(1)),
    "timeout": (numbers.Real | None, "a number", cli.positive_number),
    "study": (str | None, "a text", cli.study_name),
    "root": (str | Path, "a path", cli.folder),
    "storage": (object, "a URL", cli.storage_url),
    "device": (str, "a name", cli.device_name),
    "seeds": (numbers.Integral | None, "a whole number", cli.SEEDS),
    "finalists": (numbers.Integral | None, "a whole number", cli.FINALISTS),
    "rows": (numbers.Integral | None, "a whole number", cli.whole_number(1)),
    "workers": (numbers.Integral | None, "a whole number", cli.WORKERS),
    "ray": (str | None, "an address", cli.ray_address),
    "cpus_per_worker": (numbers.Integral | None, "a whole number", cli.CPUS),
}
"""Argument of a call from Python to its types, their name, and the reader of the same option of the command line."""


@dataclass(frozen=True, kw_only=True)
class FoundSpace:
    """A search space, and where it was found."""

    space: SearchSpace
    source: str
    """Names the space in messages: its file, and the changes to it."""
    file: Path | None
    """None: a mapping from Python, or the space of a stored study."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a search, checked as far as possible without data and model."""

    space: SearchSpace
    source: str
    """Names the space in messages."""
    workload: Workload | Loop | None
    """A workload from Python, in place of the one that the space names."""
    trials: int
    timeout: float | None
    """Minutes until the search stops; None: no limit."""
    study: str | None
    root: Path
    """As it was given, for messages."""
    folder: Path
    """The root, absolute: own code may change the working folder."""
    storage: str | None
    """URL of the PostgreSQL database that holds the ended trials; None: `mlruns/optuna.db`."""
    device: str
    rows: int | None
    workers: int | None = None
    """Number of Ray's workers; None: this process trains, or all of the cluster that `ray` names."""
    ray: str | None = None
    """Address of a Ray cluster; None: Ray is started on this machine if there are workers."""
    cpus_per_worker: int | None = None
    changed_code: bool
    """Whether a study goes on although its code, data or model has changed."""
    confirm: Confirm
    """Settings of the confirmation: the space's, with the changes that the options make for this time alone."""
    confirming: bool = False
    """Whether only the confirmation runs, and no trial."""
    from_python: bool
    """Whether the search was called from Python, so that messages name calls in place of commands."""
    workload_name: str | None
    """The workload from Python as source text, such as `sine`."""
    file: Path | None
    """The file of the space; None: a mapping from Python, or the space of a stored study."""
    overrides: Overrides
    """Changes to the space, besides a workload from Python."""

    def resume(self, study: str) -> str:
        """Return the command, or the call, that continues the search after a stop; it names the user's code again."""
        sizes = [name for name in ("seeds", "finalists") if self.confirming and self._differs(name)]
        skips = not self.confirming and self._differs("share") and self.confirm.share == 0
        if self.from_python:
            return _call(
                "confirm" if self.confirming else "search",
                study=repr(study),
                trials=None if self.confirming else repr(self.trials),
                **{name: repr(getattr(self.confirm, name)) for name in sizes},
                confirm="False" if skips else None,
                **self._code_from_python(),
                root=None if self.root == Path() else repr(str(self.root)),
                storage=None if self.storage is None else repr(self.storage),
                device=None if self.device == "auto" else repr(self.device),
                rows=None if self.rows is None or self.confirming else repr(self.rows),
                **{name: repr(value) for name, value in self._workers().items()},
            )
        root = cli.root_options(self.root, self.storage)
        device = "" if self.device == "auto" else f" --device {self.device}"
        workers = "".join(
            f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in self._workers().items()
        )
        if self.confirming:
            size = "".join(f" --{name} {getattr(self.confirm, name)}" for name in sizes)
            return f"python -m pipeline.confirm --study {study}{size}{self._code()}{root}{device}{workers}"
        rows = "" if self.rows is None else f" --rows {self.rows}"
        trials = f"{self.trials}{' --no-confirm' if skips else ''}"
        return f"python -m pipeline.search --study {study} --trials {trials}{self._code()}{root}{device}{rows}{workers}"

    def _workers(self) -> dict[str, int | str]:
        """Return the options that ask for workers, by the name of their argument."""
        given = {name: getattr(self, name) for name in ("workers", "ray", "cpus_per_worker")}
        return {name: value for name, value in given.items() if value is not None}

    def _differs(self, setting: str) -> bool:
        """Return whether a setting of the confirmation is not the space's."""
        return bool(getattr(self.confirm, setting) != getattr(self.space.confirm, setting))

    def _code_from_python(self) -> dict[str, str | None]:
        """Return the arguments that name the user's code: the space with its changes, or only the workload."""
        choice = self.space.workload
        if self.space.own_code():
            return {
                "space": NO_NAME if self.file is None else repr(str(self.file)),
                "workload": self.workload_name,
                "overrides": repr(dict(self.overrides)) if self.overrides else None,
            }
        return {"workload": self.workload_name or (repr(choice.function) if isinstance(choice, Own) else None)}

    def _code(self) -> str:
        """Return the options that name the user's code: the space with its changes, or only the workload."""
        if self.space.own_code():
            assert self.file is not None
            changes = [
                f" --set {shlex.quote(f'{place}={json.dumps(value)}')}" for place, value in self.overrides.items()
            ]
            return "".join([f" --space {cli.quoted(self.file)}", *changes])
        choice = self.space.workload
        return f" --workload {cli.quoted(Path(choice.function))}" if isinstance(choice, Own) else ""

    def confirm_again(self, study: str) -> str:
        """Return the command, or the call, that confirms a study."""
        return dataclasses.replace(self, confirming=True).resume(study)

    def train_again(self, config: Path) -> str:
        """Return the command, or the call, that trains a config of the search again."""
        if self.from_python:
            call = _call("train", repr(str(config)), workload=self.workload_name)
            return f"from pipeline.train import train; {call}"
        return f"python -m pipeline.train {cli.quoted(config)}"


def read_space(given: Path | Mapping[str, Any] | None, overrides: Overrides, *, searching: bool = True) -> FoundSpace:
    """Find a search space, apply the changes to it, check it and build it.

    Args:
        given: A file, the name of a ready-made space, the content of a file, or None for the default.
        overrides: Changes to the content.
        searching: Whether the space must leave something to choose.

    Raises:
        InvalidInput: There is no such space, or with every problem of its content.
    """
    if isinstance(given, Mapping):
        file, name, data = None, "search", given
    else:
        file = find_space(given, with_workload="workload" in overrides)
        name, data = file.stem, strict_yaml.load(file)
    source = source_of(file or "space", overrides)
    space = build_space(override(data, overrides), source=source, name=name, searching=searching)
    if given is None and "workload" in overrides:
        space = dataclasses.replace(space, name=study_name(space.workload.title))
    return FoundSpace(space=space, source=source, file=file)


def read_search(
    *,
    space: Path | str | Mapping[str, Any] | None,
    workload: Callable[..., Workload | Epochs] | Workload | str | None,
    overrides: Overrides,
    changed_code: bool,
    from_python: bool,
    confirm: Mapping[str, Any] = MappingProxyType({}),
    confirming: bool = False,
    **options: Any,
) -> SearchOptions:
    """Read the options of a search; `pipeline.search.search` describes each argument.

    Without a space, a study that exists continues with its own space and number of trials.

    Raises:
        InvalidInput: With every problem of the options, else of the workload or the space.
    """
    wrong: list[Problem] = []
    if not (space is None or isinstance(space, str | Path | Mapping)):
        wrong.append(Problem("space", f"must be a file or a mapping, got {type(space).__name__}"))
    read = read_options("search", options, workload=workload, overrides=overrides, problems=wrong)
    _check_workers(read)
    folder = read["root"].absolute()
    read["storage"] = cli.chosen_storage(read.get("storage"))
    stored = _stored_study(folder, read["storage"], read["study"])
    changes, made = with_workload(
        workload, overrides, stored=stored.document["workload"] if space is None and stored is not None else {}
    )
    if space is None and stored is not None:
        found = _stored_space(stored, changes)
    else:
        found = read_space(Path(space) if isinstance(space, str) else space, changes)
    for warning in rules.warnings(found.space):
        cli.warn(warning)
    read["trials"] = read["trials"] or (stored.trials if stored else DEFAULT_TRIALS)
    return SearchOptions(
        space=found.space,
        source=found.source,
        workload=made,
        folder=folder,
        changed_code=changed_code,
        from_python=from_python,
        confirm=dataclasses.replace(found.space.confirm, **confirm),
        confirming=confirming,
        workload_name=None if made is None else _name_of(workload),
        file=found.file,
        overrides=changes if made is None else overrides,
        **read,
    )


def read_options(
    call: str, options: Mapping[str, Any], *, workload: Any, overrides: Any, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Read the options of a call as the command line reads its own; a number must be a number, and no text.

    Args:
        call: Name of the function that was called, for messages.
        options: Arguments by name, each one of `OPTIONS`.
        workload: Checked if it is a name.
        overrides: Checked to be a mapping from places.
        problems: What is known to be wrong with other arguments.

    Raises:
        InvalidInput: With every problem.
    """
    problems = [*problems]
    read: dict[str, Any] = {}
    for name, value in options.items():
        types, wanted, reader = OPTIONS[name]
        if not isinstance(value, types) or isinstance(value, bool):
            problems.append(Problem(name, f"must be {wanted}, got {cli.shown(value)}"))
            continue
        try:
            read[name] = None if value is None else reader(str(value))
        except argparse.ArgumentTypeError as error:
            problems.append(Problem(name, str(error)))
    if isinstance(workload, str):
        try:
            cli.workload_choice(workload)
        except argparse.ArgumentTypeError as error:
            problems.append(Problem("workload", str(error)))
    if not isinstance(overrides, Mapping) or not all(isinstance(place, str) for place in overrides):
        problems.append(Problem("overrides", "must be a mapping from places, such as epochs, to values"))
    if problems:
        raise InvalidInput(call, problems)
    return read


def _check_workers(read: Mapping[str, Any]) -> None:
    """Refuse options of workers that do not go together, or a missing Ray.

    Raises:
        InvalidInput: With every problem.
    """
    workers, ray, cpus = (read.get(name) for name in ("workers", "ray", "cpus_per_worker"))
    problems = []
    if workers is None and ray is None:
        if cpus is not None:
            problems.append(Problem("--cpus-per-worker", f"needs --workers or --ray, got {cpus} without either"))
    else:
        if read["device"] not in ("auto", "cpu"):
            message = f"workers have a device each, got {read['device']}; leave --device away, or take cpu"
            problems.append(Problem("--device", message))
        if importlib.util.find_spec("ray") is None:
            option = "--workers" if ray is None else "--ray"
            problems.append(Problem(option, "needs Ray: pip install 'lr-strategy-search[ray]'"))
    if problems:
        raise InvalidInput("search", problems)


def with_workload(
    workload: Callable[..., Workload | Epochs] | Workload | str | None,
    overrides: Overrides,
    *,
    stored: Mapping[str, Any],
) -> tuple[Overrides, Workload | Loop | None]:
    """Return the changes to a file with the workload among them, and the workload if Python gave one.

    Args:
        workload: A workload, a function that returns one, a training loop, a name as `--workload` takes, or None.
        overrides: Other changes.
        stored: The workload that the file has; its function, given again, is called with its arguments.
    """
    if workload is None:
        return overrides, None
    if isinstance(workload, str):
        return {"workload": cli.workload_choice(workload), **overrides}, None
    from pipeline.workloads import custom  # imports torch, as has the caller who made a workload
    from pipeline.workloads.workload import Workload

    place = _place_of(workload)
    made: Workload | Loop
    if callable(workload):
        arguments = stored.get("arguments", {}) if place and place == stored.get("function") else {}
        made = custom.call(workload, place or "workload", **arguments)
    elif isinstance(workload, Workload):
        made = custom.check_form(workload, "workload")
    else:
        message = f"must be a Workload, a function that returns one, or a name, got {type(workload).__name__}"
        raise InvalidInput("workload", [Problem("workload", message)])
    return {"workload": {"name": "own", "function": place or f"{IN_PYTHON}{made.name}"}, **overrides}, made


def without_same_function(overrides: Overrides, stored: Mapping[str, Any]) -> Overrides:
    """Return changes without a workload whose function a file names already, with arguments of its own."""
    named = overrides.get("workload")
    if not isinstance(named, Mapping) or "function" not in named or named["function"] != stored.get("function"):
        return overrides
    return {place: value for place, value in overrides.items() if place != "workload"}


def _name_of(workload: Any) -> str:
    """Return the name of a function as the person's code has it; a workload does not know its name."""
    name: str = getattr(workload, "__qualname__", "")
    return name if name.isidentifier() else NO_NAME


def _call(function: str, *given: str, **options: str | None) -> str:
    """Return a call as source text, without the options that are None."""
    named = [f"{name}={value}" for name, value in options.items() if value is not None]
    return f"{function}({', '.join([*given, *named])})"


def _place_of(workload: Any) -> str | None:
    """Return the place of a function as `--workload` takes it; None for a workload, which its name identifies."""
    module, name = getattr(workload, "__module__", None), getattr(workload, "__qualname__", "")
    if not module or not name.isidentifier():
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return f"{os.path.relpath(file)}:{name}" if file else None
    return f"{module}:{name}"


def _stored_study(root: Path, storage: str | None, name: str | None) -> StudyHeader | None:
    """Return the header of a named study; None if no study is named or stored."""
    if name is None or (storage is None and not (root / "mlruns" / "optuna.db").exists()):
        return None
    from pipeline.study.store import Store  # imports Optuna, which only a study that may exist needs

    with contextlib.closing(Store(root, storage)) as store:
        return next((header for header in store.headers() if header.name == name), None)


def _stored_space(stored: StudyHeader, overrides: Overrides) -> FoundSpace:
    source = source_of(f"--study {stored.name}", overrides)
    document = stored.document
    if stored.warm_start is not None and any(place.startswith("enqueue.") for place in overrides):
        document = {**document, "enqueue": stored.warm_start}
    data = override(document, _agreed_overrides(stored, overrides))
    return FoundSpace(space=build_space(data, source=source, name=stored.space), source=source, file=None)


def _agreed_overrides(stored: StudyHeader, overrides: Overrides) -> Overrides:
    """Return the changes to a stored space; refuse to run code that only the database names.

    A database may come from anyone, so the user must name code again before it runs: a workload's function, or the file
    with optimizers and schedules. A function that is named as it is stored keeps its stored arguments.
    """
    choice, named = stored.document["workload"], overrides.get("workload")
    own = [name for kind in ("optimizer", "scheduler") for name in stored.document[kind] if is_own(name)]
    only = "code that is run only when you name it"
    if own:
        message = f"trains with {' and '.join(own)}, {only}: add --space FILE, its file, and the changes to it"
        raise InvalidInput("--study", [Problem(stored.name, message)])
    if choice["name"] != "own":
        return overrides
    if named is None:
        remedy = f"add --workload {choice['function']}"
        if choice["function"].startswith(IN_PYTHON):
            remedy = f"from Python, {_call('search', study=repr(stored.name), workload=NO_NAME)}"
        raise InvalidInput("--study", [Problem(stored.name, f"trains {choice['function']}, {only}: {remedy}")])
    return without_same_function(overrides, choice)
