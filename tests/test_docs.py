"""The tables of docs/search-space.md, made from the classes they describe: `python tests/test_docs.py` writes them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from pipeline.space.config import WORKLOADS
from pipeline.space.confirm import Confirm
from pipeline.space.limits import Interval, OrOne, ShareOf
from pipeline.space.load import build_space, file_form
from pipeline.space.optimizers import OPTIMIZERS
from pipeline.space.param_groups import ParameterRule, ParamGroup
from pipeline.space.pruners import Median, NoPruner, SuccessiveHalving
from pipeline.space.schedules import SCHEDULERS
from pipeline.space.search_space import Objective, Sampler, WarmStart

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "search-space.md"
TABLES: dict[str, dict[str, type[Any]]] = {
    "workload": {"digits": WORKLOADS["digits"], "mnist, …": WORKLOADS["mnist"]}
    | {name: WORKLOADS[name] for name in ("image_folder", "own")},
    "objective": {"": Objective},
    "optimizer": dict(OPTIMIZERS),
    "scheduler": dict(SCHEDULERS),
    "param_groups": {"": ParamGroup},
    "no_weight_decay": {"": ParameterRule},
    "sampler": {"": Sampler},
    "confirm": {"": Confirm},
    "enqueue": {"": WarmStart},
    "pruner": {"successive_halving": SuccessiveHalving, "median": Median, "none": NoPruner},
}
"""Section of a file to the classes whose fields are its keys."""


def tables() -> dict[str, str]:
    """Return every table of the reference, by the name in its marker."""
    settings = [
        (name, "" if field.is_required() else field.default, field.description or "")
        for name, field in file_form().model_fields.items()
        if name not in TABLES
    ]
    rows = [f"| `{name}` | {_shown(default)} | {description} |" for name, default, description in settings]
    made = {"settings": "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])}
    for section, classes in TABLES.items():
        made[section] = "\n\n".join(_table(name, cls) for name, cls in classes.items())
    return made


def filled(text: str) -> str:
    """Return the reference with its tables made anew."""
    made = tables()
    return re.sub(
        r"<!-- table: (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def _table(name: str, cls: type[Any]) -> str:
    words = (inspect.getdoc(cls) or "").replace("\n", " ").strip()
    lines = [f"**`{name}`** {words}", ""] if name else []
    hints, meanings = get_type_hints(cls, include_extras=True), _meanings(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name != "name" or not name]
    if fields:
        lines += ["| key | legal values | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = "" if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        legal, meaning = ", ".join(_legal(hints[field.name])), meanings.get(field.name, "")
        lines.append(f"| `{field.name}` | {legal} | {_shown(default)} | {meaning} |")
    return "\n".join(lines).strip()


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Return the text under each field of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def _legal(annotation: Any) -> Iterator[str]:
    """Yield in words what values an annotation allows; None is a default and not a value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated and OrOne() in arguments:
        yield from _legal(get_args(arguments[0])[0])
        yield "or a list"
    elif origin is Annotated:
        yield from _legal(arguments[0])
        for interval in (item for item in arguments[1:] if isinstance(item, Interval)):
            signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
            bounds = dataclasses.asdict(interval).items()
            yield from (f"{signs[name]} {bound:g}" for name, bound in bounds if bound is not None)
        wholes = {"run": "the run", "rate": "the smallest rate"}
        for share in (item for item in arguments[1:] if isinstance(item, ShareOf)):
            yield f"or a share of {wholes[share.whole]}" + ("" if share.may_be_whole else " below 100%")
    elif origin is Literal:
        yield ", ".join(f"`{value}`" for value in arguments)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            if argument is not types.NoneType:
                yield from _legal(argument)
    elif origin is tuple:
        yield "list: " + ", ".join(_legal(arguments[0]))
    else:
        words = {float: "number", int: "whole number", bool: "true or false", str: "text"}
        yield words.get(annotation, "mapping")


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "" if value == "" else "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_the_tables_of_the_reference_say_what_the_code_says() -> None:
    text = REFERENCE.read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == tables().keys()
    assert filled(text) == text, "run python tests/test_docs.py"


@pytest.mark.parametrize("key", file_form().model_fields)
def test_the_reference_has_every_key_of_a_file(key: str) -> None:
    assert f"| `{key}` |" in REFERENCE.read_text() or f"## `{key}`" in REFERENCE.read_text()


@pytest.mark.parametrize("page", sorted(path.name for path in REFERENCE.parent.glob("*.md")))
def test_every_yaml_block_of_a_page_is_a_search_space_or_a_part_of_one(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.files.strict_yaml import loads

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for code in _blocks(REFERENCE.parent / page, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            Path(name[1]).write_text(code)
    example = next(block for block in _blocks(REFERENCE) if "epochs" in block)
    whole = loads(example, source="example")
    for block in _blocks(REFERENCE.parent / page):
        build_space({**whole, **loads(block, source=page)}, source=page, name="example")


def _blocks(page: Path, language: str = "yaml") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", sorted(path.name for path in REFERENCE.parent.glob("*.md")))
def test_a_file_that_a_page_names_exists(page: str) -> None:
    text = (REFERENCE.parent / page).read_text()
    named = set(re.findall(r"\b(?:benchmarks|search_spaces|pipeline|tests)/[\w/]+\.\w+", text))
    links = {f"docs/{link}" for link in re.findall(r"\]\(([\w-]+\.md)[)#]", text)}
    assert [path for path in sorted(named | links) if not (ROOT / path).exists()] == []


if __name__ == "__main__":
    REFERENCE.write_text(filled(REFERENCE.read_text()))
