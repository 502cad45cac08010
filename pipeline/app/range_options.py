"""The options of a range test, and the commands that follow it."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.app import cli
from pipeline.app.options import FoundSpace, read_space
from pipeline.errors import InvalidInput, Problem
from pipeline.files import strict_yaml
from pipeline.space.config import Own
from pipeline.space.overrides import Overrides
from pipeline.space.search_space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class RangeTestOptions:
    """The options of a range test, checked as far as possible without data and model."""

    space: SearchSpace
    source: str
    """Names the space in messages."""
    device: str
    root: Path
    """As it was given, for messages."""
    picture: Path
    """File of the picture, absolute: own code may change the working folder."""
    picture_as_given: Path
    """The same as the user may see it, relative to the given root."""
    write: Path | None
    """The file that gets the proposed bounds, absolute, if any."""
    can_write: bool
    """Whether the space is a file of the user's that holds every optimizer."""
    space_as_given: Path | None
    overrides: Overrides
    """Changes to the space: `--workload`, `--seed` and `--set`."""

    def write_command(self) -> str:
        """Return the command that writes the proposed bounds into the file."""
        return f"python -m pipeline.lr_range{self._repeated(self.overrides)} --write"

    def search_command(self, bounds: Mapping[str, str | None]) -> str:
        """Return the command that searches the space.

        Args:
            bounds: Optimizer name to the `base_lr` that the command sets, in YAML; None: the `base_lr` of the file.
        """
        places = {f"optimizer.{name}.base_lr": text for name, text in bounds.items()}
        kept = {
            place: value
            for place, value in self.overrides.items()
            if not any(f"{place}.".startswith(f"{replaced}.") for replaced in places)
        }
        changes = [f" --set {shlex.quote(f'{place}={text}')}" for place, text in places.items() if text is not None]
        return f"python -m pipeline.search{self._repeated(kept)}{''.join(changes)}"

    def _repeated(self, overrides: Overrides) -> str:
        """Return the options that name the space, its changes, the root and the device."""
        options = [] if self.space_as_given is None else ["--space", str(self.space_as_given)]
        for place, value in overrides.items():
            match place, value:
                case "workload", {"name": "own", "function": function, **rest} if not rest:
                    options += ["--workload", function]
                case "workload", {"name": name, **rest} if not rest:
                    options += ["--workload", name]
                case "seed", int(seed):
                    options += ["--seed", str(seed)]
                case _:
                    options += ["--set", f"{place}={json.dumps(value)}"]
        options += [] if self.root == Path() else ["--root", str(self.root)]
        options += [] if self.device == "auto" else ["--device", self.device]
        return "".join(f" {shlex.quote(option)}" for option in options)


def read_range_test(arguments: argparse.Namespace) -> RangeTestOptions:
    """Read the options of a range test.

    Raises:
        InvalidInput: With every problem of the space, or a file cannot be written.
    """
    overrides = cli.overrides_of(arguments)
    found = read_space(arguments.space, overrides, searching=False)
    assert found.file is not None
    problems = [*_writing_problems(found, found.file, arguments.space, overrides)]
    if arguments.write and problems:
        raise InvalidInput("--write", problems)
    function = [found.space.workload.function.rpartition(":")[2]] if isinstance(found.space.workload, Own) else []
    name = f"mlruns/{'-'.join(['lr_range', found.space.name, *function])}.png"
    cli.refuse_root(arguments.root, name)
    picture = arguments.root / name
    if arguments.write:
        cli.refuse_unwritable(found.file.resolve(), "--write")
    return RangeTestOptions(
        space=found.space,
        source=found.source,
        device=arguments.device,
        root=arguments.root,
        picture=picture.absolute(),
        picture_as_given=picture,
        write=found.file.absolute() if arguments.write else None,
        can_write=not problems,
        space_as_given=arguments.space,
        overrides=overrides,
    )


def _writing_problems(found: FoundSpace, file: Path, given: Path | None, overrides: Overrides) -> Iterator[Problem]:
    """Yield what keeps the proposed bounds from being written into the file of the space."""
    if file != given:
        message = f"is a ready-made search space, {file}; copy that file, and name the copy"
        yield Problem(str(given), message)
        return
    data = strict_yaml.load(file)
    for name in found.space.optimizers:
        value: Any = data
        for key in ("optimizer", name, "base_lr"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None or {"optimizer", f"optimizer.{name}"} & overrides.keys():
            yield Problem(f"optimizer.{name}.base_lr", f"comes from --set, not from {file}; put it into the file")
