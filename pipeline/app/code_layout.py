"""Lay out Python expressions on one line if they fit, else with one argument a line, as formatters do."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 88
"""Columns of a line."""


def call(function: str, arguments: Sequence[str], *, indent: int) -> str:
    """Return a call as text, to be written after `indent` columns."""
    return _enclosed(f"{function}(", arguments, ")", indent=indent)


def listed(items: Sequence[str], *, indent: int) -> str:
    """Return a list as text, to be written after `indent` columns."""
    return _enclosed("[", items, "]", indent=indent)


def entries(items: Sequence[str], *, indent: int) -> str:
    """Return a dict of `key: value` items as text, to be written after `indent` columns."""
    return _enclosed("{", items, "}", indent=indent)


def comprehension(item: str, loop: str, *, indent: int, brackets: str = "[]") -> str:
    """Return a comprehension as text, to be written after `indent` columns."""
    line = f"{brackets[0]}{item} {loop}{brackets[1]}"
    if "\n" not in line and indent + len(line) <= WIDTH:
        return line
    return f"{brackets[0]}\n{indented(item)}\n{indented(loop)}\n{brackets[1]}"


def literal(value: Any) -> str:
    """Return a plain value as Python writes it, with text in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        items = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items}{',' if len(value) == 1 else ''})"
    return repr(value)


def indented(text: str, levels: int = 1) -> str:
    """Return lines moved to the right by a number of levels."""
    return textwrap.indent(text, "    " * levels)


def _enclosed(opening: str, items: Sequence[str], closing: str, *, indent: int) -> str:
    line = f"{opening}{', '.join(items)}{closing}"
    if "\n" not in line and indent + len(line) <= WIDTH:
        return line
    inner = "".join(indented(f"{item},\n") for item in items)
    return f"{opening}\n{inner}{closing}"
