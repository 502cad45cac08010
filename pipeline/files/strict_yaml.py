"""Read YAML strictly, and write it so that it reads back exactly.

PyYAML reads YAML 1.1, in which `1e-3` is text, `no` is false, `012` is ten and the last of two equal keys wins
silently. This module reads the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema) and refuses
features that a settings file does not need: equal keys, aliases, tags, several documents, files beyond 1 MiB or 32
levels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InvalidInput, Problem

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_SCALARS: list[tuple[str, str, list[str]]] = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class _CoreSchema:
    """The scalar rules of YAML 1.2, shared by loader and dumper, so that written text reads back exactly."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name


for _tag, _pattern, _first in _SCALARS:
    for _character in _first:
        _CoreSchema.yaml_implicit_resolvers.setdefault(_character, []).append((_tag, re.compile(f"^(?:{_pattern})$")))


def load(path: Path) -> dict[str, Any]:
    """Read a YAML file whose document is a mapping.

    Raises:
        InvalidInput: The file cannot be read, is not strict YAML, or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device that looks like a file may have no end
        if len(data) > MAX_BYTES:
            raise InvalidInput(str(path), [Problem("", f"must be at most {MAX_BYTES} bytes, got more")])
        text = data.decode("utf-8-sig")
    except OSError as error:
        missing = "there is no such file; a path is relative to the working folder"
        why = missing if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise InvalidInput(str(path), [Problem("", why)]) from None
    except UnicodeDecodeError as error:
        message = (
            f"must be UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset {error.start}; save it as UTF-8"
        )
        raise InvalidInput(str(path), [Problem("", message)]) from None
    return loads(text, source=str(path))


def loads(text: str, *, source: str) -> dict[str, Any]:
    """Read a YAML text whose document is a mapping; `source` names it in errors.

    Raises:
        InvalidInput: The text is not strict YAML, or is not a mapping.
    """
    problems: list[Problem] = []
    try:
        loader = _Loader(text, problems)
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InvalidInput(source, [Problem(place, _plain_words(error))]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"must be text, got the character {text[error.position]!r}; is this a YAML file?"
        raise InvalidInput(source, [Problem(f"line {line}", message)]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInput(source, [Problem("", f"is not YAML: {error}")]) from None
    if not problems and not isinstance(data, dict):
        found = "an empty file" if data is None else type(data).__name__
        problems.append(Problem("", f"must be a mapping of settings, `key: value`, got {found}"))
    if problems:
        raise InvalidInput(source, problems)
    assert isinstance(data, dict)
    return data


def dumps(data: Mapping[str, Any], *, comment: str | None = None) -> str:
    """Write a mapping as YAML that `loads` reads back exactly; short leaves stay on one line."""
    text: str = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    head = "".join(f"# {line}\n" for line in comment.splitlines()) if comment else ""
    return head + text


def replace(text: str, values: Mapping[tuple[str, ...], str]) -> str:
    """Replace values in a text that `loads` has read, and leave all other characters as they are.

    Args:
        text: YAML whose document is a mapping.
        values: Keys from the root to an existing value, and the new value as YAML on one line.
    """
    root = _Loader(text, []).get_single_node()
    spans = sorted(((*_span(root, keys), new) for keys, new in values.items()), reverse=True)
    for start, end, new in spans:
        text = text[:start] + new + text[end:]
    return text


def _span(node: Any, keys: tuple[str, ...]) -> tuple[int, int]:
    """Return where a value begins and ends in the text."""
    for key in keys:
        node = next(value for name, value in node.value if name.value == key)
    start = node.start_mark.index
    # PyYAML lets a block collection end where the next node begins, so the end is that of the last leaf.
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return start, node.end_mark.index


class _Loader(_CoreSchema, yaml.SafeLoader):
    """A safe loader with the refusals of this module; equal keys are collected and reported together."""

    def __init__(self, text: str, problems: list[Problem]) -> None:
        super().__init__(text)
        self.problems = problems
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are refused; write it out", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"tags ({event.tag}) are refused", event.start_mark)
        if self._depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"deeper than {MAX_DEPTH} levels", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Keep `<<` as an ordinary key: merging belongs to YAML 1.1."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(f"line {line}", "a key must be a word, got a list or a mapping"))
            elif not key.value.isprintable():
                self.problems.append(Problem(f"line {line}", f"a key must be printable, got {key.value!r}"))
            elif key.value in seen:
                message = f"key {key.value!r} is already set on line {seen[key.value]}; keep one of them"
                self.problems.append(Problem(f"line {line}", message))
            else:
                seen[key.value] = line
        return {
            key.value: self.construct_object(value, deep=True)
            for key, value in node.value
            if isinstance(key, yaml.ScalarNode)
        }


class _Dumper(_CoreSchema, yaml.SafeDumper):
    """A safe dumper that writes no aliases and keeps leaf mappings and lists of scalars on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flow = all(not isinstance(item, Mapping | list | tuple) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flow)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        nested = any(isinstance(value, Mapping) for value in mapping.values())
        return super().represent_mapping(tag, mapping, flow_style=not nested)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.lower()
    if len(text) > 400:  # beyond float, and Python refuses to parse numbers of thousands of digits
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, 16 if text.startswith("0x") else 8 if text.startswith("0o") else 10)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value) if math.isfinite(value) else {"inf": ".inf", "-inf": "-.inf"}.get(repr(value), ".nan")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Quote text with line breaks or control characters: PyYAML writes some of them bare and reads back blanks."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value))


def _plain_words(error: yaml.MarkedYAMLError) -> str:
    words = error.problem or "is not YAML"
    if "'\\t'" in words:
        return "a tab cannot indent YAML; use blanks"
    if "expected a single document" in (error.context or ""):
        return "must be one document, got a second one; remove the '---'"
    return words
