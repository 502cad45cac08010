"""Changes to a file's settings from the command line: `--set optimizer.sgd.base_lr.high=0.5`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidInput, Problem
from pipeline.files.strict_yaml import loads

Overrides = Mapping[str, Any]
"""Dotted place in a file to its new value; None removes the key."""


def parse_override(text: str) -> tuple[str, Any]:
    """Read `place=value` from a command line, the value in YAML."""
    place, equals, value = text.partition("=")
    if not equals or not all(_keys(place)):
        raise argparse.ArgumentTypeError(f"must be PLACE=VALUE, such as batch_size=32, got {text[:120]!r}")
    try:
        data = loads(f"value: {value}", source=place)
    except InvalidInput as error:
        problem = Problem(place, f"{error.problems[0].message}, got {value[:120]!r}")
        raise argparse.ArgumentTypeError(str(problem)) from None
    if data.keys() != {"value"}:
        raise argparse.ArgumentTypeError(str(Problem(place, f"must be one value, got {value[:120]!r}")))
    return place, data["value"]


def override(data: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return a file's data with values replaced, in the order given; a new key is added.

    Raises:
        InvalidInput: A place lies below a value that is not a mapping.
    """
    changed = dict(data)
    for place, value in overrides.items():
        *above, key = _keys(place)
        inner = changed
        for depth, name in enumerate(above, 1):
            child = inner.get(name, {})
            if not isinstance(child, Mapping):
                message = (
                    f"cannot be set, since {'.'.join(above[:depth])} is {child!r} and no mapping; set that instead"
                )
                raise InvalidInput("--set", [Problem(place, message)])
            inner[name] = dict(child)
            inner = inner[name]
        inner.pop(key, None) if value is None else inner.update({key: value})
    return changed


def _keys(place: str) -> list[str]:
    """Return the keys of a place; the second may be the name of a person's own, such as `my_file.py:Lion`."""
    own = re.fullmatch(r"([^.:]+)\.([^:]+:[^.:]+)(?:\.(.*))?", place)
    if own is None:
        return place.split(".")
    section, name, below = own.groups()
    return [section, name, *(below.split(".") if below is not None else ())]


def source_of(file: Path | str, overrides: Overrides) -> str:
    """Return the name of a file with its changes for messages: `own.yaml with --workload mnist --set epochs`."""
    workload = overrides.get("workload")
    chosen = [f"--workload {workload.get('function', workload.get('name'))}"] if isinstance(workload, Mapping) else []
    said = [*chosen, *(f"--set {place}" for place in overrides if not (chosen and place == "workload"))]
    return " ".join([str(file), "with", *said]) if said else str(file)
