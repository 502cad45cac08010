"""The format of a search-space file: pydantic models, derived from the dataclasses of optimizers and schedules.

Each hyperparameter accepts a value, `{choices: […]}` or `{low: …, high: …}` in its legal interval. `check` turns each
error of pydantic's into one line. `model_json_schema` tells an editor the same rules.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from pipeline.errors import Problem, did_you_mean, nearest
from pipeline.space.distributions import Choices, Range
from pipeline.space.limits import Interval, OrOne, Share, ShareOf
from pipeline.space.own_code import OwnCode, is_plain

FORM = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
NOT_SEARCHED = ("interval", "metric", "cycle_momentum", "pattern", "dims", "layers")
"""Fields that no search varies: they say what a strategy is, not how large a number is."""

_OWN = {"optimizer": "path/to/file.py:Class", "scheduler": "path/to/file.py:function"}
"""Choice to how a file names a person's own."""

MAX_COUNT = 10**9
"""Largest count. A larger one is a typing error, and samplers fail beyond the integers that floats hold."""

_KINDS = (_VALUE, _SHARE, _CHOICES, _RANGE, _SHARES) = ("<value>", "<share>", "<choices>", "<range>", "<shares>")
"""Tags of the forms that a searchable field accepts; spelt unlike any key of a file."""

Model = TypeVar("Model", bound=BaseModel)


def form_of(cls: type[Any], *, searchable: bool) -> type[BaseModel]:
    """Derive the pydantic model of a dataclass; its fields accept distributions if `searchable`."""
    return create_model(cls.__name__, __config__=FORM, __doc__=cls.__doc__, **fields_of(cls, searchable=searchable))


def fields_of(cls: type[Any], *, searchable: bool) -> dict[str, Any]:
    """Derive pydantic's fields from those of a dataclass: types, legal intervals, defaults and descriptions.

    Args:
        cls: The dataclass.
        searchable: Whether fields accept distributions, unless `NOT_SEARCHED` has them or their metadata says so.
    """
    fields: dict[str, Any] = {}
    hints, texts = get_type_hints(cls, include_extras=True), _descriptions(cls)
    for field in dataclasses.fields(cls):
        open_to_search = field.metadata.get("searchable", searchable and field.name not in NOT_SEARCHED)
        annotation = distribution_of(hints[field.name]) if open_to_search else _strict(hints[field.name])
        fields[field.name] = (annotation, Field(**_default(field), description=texts.get(field.name)))
    return fields


def one_or_more(name: str, classes: Mapping[str, type[Any]]) -> type[BaseModel]:
    """Derive the pydantic model of a mapping from a class's name to its fields, for classes such as optimizers.

    The schema allows a person's own too, by the colon of their names; `own_form` checks those.
    """
    own: Any = {"type": "object", "description": "A class or function of one's own, with its hyperparameters."}
    config = ConfigDict(**FORM, json_schema_extra={"patternProperties": {":": own}})
    fields: dict[str, Any] = {key: (form_of(cls, searchable=True), None) for key, cls in classes.items()}
    return create_model(name, __config__=config, **fields)


def own_form(cls: type[Any], shared: str, values: Mapping[str, Any], code: OwnCode | None) -> type[BaseModel]:
    """Derive the pydantic model of an optimizer or a schedule of a person's own.

    Args:
        cls: Declares the field that all of them share.
        shared: Name of that field.
        values: Content of the file. It says what a range is of where the code does not: of whole numbers, if both
            ends are.
        code: Hyperparameters of the signature; None: the code was not loaded, so that each of `values` is one.
    """
    known = code.hyperparameters if code else {}
    fields = {shared: fields_of(cls, searchable=True)[shared]}
    if code is None or code.takes_any:
        free = {name: (_as_written(value), ...) for name, value in values.items() if _is_argument(name)}
        fields = free | fields
    for name, hyperparameter in known.items():
        kind = distribution_of(hyperparameter.kind) if hyperparameter.kind else _as_written(values.get(name))
        fields[name] = (kind, ... if hyperparameter.required else hyperparameter.default)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a hyperparameter such as `copy`, which pydantic's models have
        return create_model(cls.__name__, __config__=FORM, **fields)


def check(form: type[Model], data: Any) -> tuple[Model | None, list[Problem]]:
    """Validate data; return the model's value, or every problem of the data."""
    try:
        return form.model_validate(data), []
    except ValidationError as error:
        # Pydantic calls a list with a wrong item too short besides.
        found = [item for item in error.errors() if item["type"] != "too_short" or not item["input"]]
        return None, list(_listing_once(_problem(form, details) for details in found))


def _listing_once(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Yield problems, of which those of unknown names list the known ones only the first time."""
    listed: set[str] = set()
    for problem in problems:
        message, known, names = problem.message.partition("; known: ")
        yield Problem(problem.place, f"{message}; known: as above") if names in listed else problem
        listed |= {names} if known else set()


def one_or_list(form: type[BaseModel]) -> Any:
    """Return the type of a list of mappings, which a file may write as its one mapping."""
    return _strict(Annotated[tuple[form, ...], OrOne()])  # type: ignore[valid-type]


@functools.cache
def distribution_of(annotation: Any) -> Any:
    """Return the type of a searchable field: a value, choices, or a range; made once, as `_share_type` is."""
    value = _strict(annotation)
    element = _strict(_without_none(annotation))
    kinds: list[Any] = [Annotated[value, Tag(_VALUE)], Annotated[Choices[element], Tag(_CHOICES)]]  # type: ignore[valid-type]
    number = _without_annotations(_without_none(annotation))
    if number not in (int, float):
        return Annotated[Union[tuple(kinds)], Discriminator(_word_kind)]  # noqa: UP007 - built at run time
    if share := _share_of(_without_none(annotation)):
        element = _strict(_without_share(_without_none(annotation)))
        kinds.append(Annotated[Range[share, None], Tag(_SHARES)])  # type: ignore[valid-type]
    kinds.append(Annotated[Range[element, _strict(number)], Tag(_RANGE)])  # type: ignore[misc, valid-type]
    return Annotated[Union[tuple(kinds)], Discriminator(_share_kind if share else _number_kind)]  # noqa: UP007


def one_or_several(element: Any) -> Any:
    """Return the type of a value, or of a list of such values."""
    several = Annotated[tuple[element, ...], Field(min_length=1), Tag(_CHOICES)]
    kind = Discriminator(lambda data: _CHOICES if isinstance(data, list | tuple) else _VALUE)
    return Annotated[Annotated[element, Tag(_VALUE)] | several, kind]


def named_union(*classes: type[Any]) -> Any:
    """Return the type of a mapping with the fields of one of the classes, which their `name` tells apart."""
    union: Any = Union[tuple(form_of(cls, searchable=False) for cls in classes)]  # noqa: UP007 - built at run time
    return Annotated[union, Field(discriminator="name")]


def _as_written(data: Any) -> Any:
    """Return the type of a hyperparameter of which nothing is known but what a file has for it."""
    if not isinstance(data, dict) or "choices" in data:
        return distribution_of(_FREE)
    return distribution_of(int if all(type(data.get(end)) is int for end in ("low", "high")) else float)


def _is_argument(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _read_free(value: Any) -> Any:
    if not is_plain(value):
        raise ValueError(f"must be a finite number, true, false, text, or a list of these, got {_shown(value)}")
    return tuple(value) if isinstance(value, list) else value


_FREE = Annotated[Any, PlainValidator(_read_free)]
"""The type of a value that may be any that a file can hold."""


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default_factory is not dataclasses.MISSING:
        return {"default_factory": field.default_factory}
    if isinstance(field.default, Share):  # as a file has it, since JSON has no shares
        return {"default": str(field.default), "validate_default": True}
    return {} if field.default is dataclasses.MISSING else {"default": field.default}


def _descriptions(cls: type[Any]) -> dict[str, str]:
    """Return the text that stands under each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= _texts_under_fields(base.__module__).get(base.__name__, {})
    return found


@functools.cache
def _texts_under_fields(module: str) -> dict[str, dict[str, str]]:
    """Return class name to field name to text, read from the module's source, since Python does not keep the texts."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for field, text in itertools.pairwise(node.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                        texts[name] = " ".join(words.split())
    return found


def _number_kind(data: Any) -> str:
    if isinstance(data, dict):
        return _CHOICES if "choices" in data else _RANGE
    return _CHOICES if isinstance(data, Choices) else _RANGE if isinstance(data, Range) else _VALUE


def _share_kind(data: Any) -> str:
    """Tell a range in percent by either of its ends."""
    if isinstance(data, Range):
        return _SHARES if isinstance(data.low, Share) else _RANGE
    in_percent = isinstance(data, dict) and _SHARE in (_end_kind(data.get("low")), _end_kind(data.get("high")))
    return _SHARES if in_percent and "choices" not in data else _number_kind(data)


def in_percent(value: Any) -> bool:
    """Say whether a value, or an item of a list, is written in percent, legal or not."""
    return any(map(in_percent, value)) if isinstance(value, list) else isinstance(value, str) and "%" in value


def _end_kind(data: Any) -> str:
    return _SHARE if isinstance(data, Share) or (isinstance(data, str) and "%" in data) else _VALUE


def _word_kind(data: Any) -> str:
    return _CHOICES if isinstance(data, dict | Choices) else _VALUE


def _strict(annotation: Any) -> Any:
    """Return an annotation for pydantic: intervals as constraints, text is no number, a boolean is no count."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated and (share := _share_of(annotation)):
        number = _strict(_without_share(annotation))
        kinds = Annotated[number, Tag(_VALUE)] | Annotated[share, Tag(_SHARE)]  # type: ignore[valid-type]
        return Annotated[kinds, Discriminator(_end_kind)]
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *(_constraint(item, arguments[0]) for item in arguments[1:]))]
    if origin in (types.UnionType, Union):
        return Union[tuple(_strict(argument) for argument in arguments)]  # noqa: UP007
    if origin is tuple:
        return Annotated[tuple[_strict(arguments[0]), ...], Field(min_length=1)]  # type: ignore[misc]
    if annotation is float:
        return Annotated[float, Field(strict=True, allow_inf_nan=False)]
    if annotation is int:
        return Annotated[int, Field(strict=True, le=MAX_COUNT)]
    return Annotated[annotation, Field(strict=True)] if annotation in (bool, str) else annotation


def _share_of(annotation: Any) -> Any:
    """Return the type of a number in percent, if a field may be written so; else None."""
    whole = next((item.whole for item in get_args(annotation)[1:] if isinstance(item, ShareOf)), None)
    may_be_zero = any(isinstance(item, Interval) and item.ge == 0 for item in get_args(annotation))
    may_be_whole = all(item.may_be_whole for item in get_args(annotation)[1:] if isinstance(item, ShareOf))
    return _share_type(whole, may_be_zero=may_be_zero, may_be_whole=may_be_whole) if whole else None


@functools.cache
def _share_type(whole: str, *, may_be_zero: bool, may_be_whole: bool) -> Any:
    """Return the pydantic type of a share; made once, so that the schema says it once."""
    pattern = r"(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)%" if may_be_whole else r"[0-9]{1,2}(\.[0-9]+)?%"
    pattern = ("" if may_be_zero else r"(?!0+(\.0+)?%)") + pattern
    of, limits = {"run": "run", "rate": "smallest rate"}[whole], "from 0%" if may_be_zero else "above 0%"
    limits += " to 100%" if may_be_whole else " to below 100%"

    def read(value: Any) -> Share:
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return Share(value.removesuffix("%"))
        both = "" if isinstance(value, str) else "; write both ends of a range in percent, or neither"
        raise ValueError(f"must be a share of the {of} such as 10%, {limits}, got {_shown(value)}{both}")

    schema_type = Annotated[str, Field(pattern=f"^{pattern}$")]
    return Annotated[Share, PlainValidator(read, json_schema_input_type=schema_type), PlainSerializer(str)]


def _without_share(annotation: Any) -> Any:
    number, *rest = get_args(annotation)
    return Annotated[(number, *(item for item in rest if not isinstance(item, ShareOf)))]


def _constraint(mark: Any, annotation: Any) -> Any:
    """Return a mark of an annotation for pydantic."""
    match mark:
        case Interval():
            return Field(**_bounds(mark))
        case OrOne():
            item = _strict(get_args(annotation)[0])
            several = Annotated[list[item], Field(min_length=1)]  # type: ignore[valid-type]
            return BeforeValidator(_listed, json_schema_input_type=item | several)
    return mark


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _bounds(interval: Interval) -> dict[str, Any]:
    return {name: bound for name, bound in dataclasses.asdict(interval).items() if bound is not None}


def _without_none(annotation: Any) -> Any:
    rest = [argument for argument in get_args(annotation) if argument is not types.NoneType]
    optional = get_origin(annotation) in (types.UnionType, Union) and len(rest) == 1
    return rest[0] if optional else annotation


def _without_annotations(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _problem(form: type[BaseModel], details: ErrorDetails) -> Problem:
    """Turn an error of pydantic's into a problem: place, rule, value, remedy."""
    place = _place(details["loc"])
    got, context = details["input"], details.get("ctx", {})
    kind = details["type"]
    match kind:
        case "extra_forbidden":
            message = _unknown(place, _known_keys(form, details["loc"][:-1]))
        case "missing":
            message = "is missing and has no default; add it"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}[kind]
            message = f"must be {sign} {next(iter(context.values())):.10g}, got {_shown(got)}"
        case "int_type" | "int_from_float":
            message = f"must be a whole number, got {_shown(got)}"
        case "float_type" | "finite_number":
            message = f"must be a finite number, got {_shown(got)}"
        case "bool_type":
            message = f"must be true or false, got {_shown(got)}"
        case "string_type":
            message = f"must be text, got {_shown(got)}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            message = f"must be one of {', '.join(known)}, got {_shown(got)}{_hint(got, known)}"
        case "union_tag_invalid":
            known = re.findall(r"'([^']*)'", context["expected_tags"])
            place.append("name")
            message = f"must be one of {', '.join(known)}, got {_shown(context['tag'])}{_hint(context['tag'], known)}"
        case "union_tag_not_found":
            message = "must have a `name`"
        case "string_pattern_mismatch":
            message = f"must be letters, digits, '_' and '-', got {_shown(got)}"
        case "value_error":
            message = str(context["error"])
        case "none_required":
            message = f"must be absent from a range in percent, got {_shown(got)}; remove it"
        case "tuple_type" | "list_type" | "model_type" | "model_attributes_type" | "dict_type":
            wanted = "a list" if kind in ("tuple_type", "list_type") else "a mapping, `key: value`"
            message = f"must be {wanted}, got {_shown(got)}"
        case "too_short":
            message = "must hold at least one value, got none"
        case _:
            message = f"{details['msg'][0].lower()}{details['msg'][1:]}, got {_shown(got)}"
    if kind not in ("extra_forbidden", "missing", "value_error"):
        message += _choice_hint(got, details["loc"])
    return Problem(".".join(str(part) for part in place), message)


def _place(loc: tuple[int | str, ...]) -> list[int | str]:
    """Return the keys that lead to a problem; pydantic's location also holds the tags of unions, which are no keys."""
    tagged = loc[:1] in (("pruner",), ("workload",))
    return [part for index, part in enumerate(loc) if part not in (*_KINDS, "[key]") and not (tagged and index == 1)]


def _unknown(place: list[Any], known: list[str]) -> str:
    """Return what to say of an unknown key."""
    key = str(place[-1])
    kind = str(place[0]) if len(place) == 2 and place[0] in _OWN else "key"
    if key == "lr" and "base_lr" in known:
        return "unknown key; lr is base_lr here"
    own = "" if kind == "key" or nearest(key, known) else f"; one of your own is {_OWN[kind]}"
    return f"unknown {kind}; {did_you_mean(key, known)}{own}"


def _hint(got: Any, known: list[str]) -> str:
    near = nearest(got, known) if isinstance(got, str) else None
    return f"; did you mean {near}?" if near else ""


def _choice_hint(got: Any, loc: tuple[int | str, ...]) -> str:
    """Return the remedy for several values where one is wanted."""
    if isinstance(got, list):
        return f"; for a choice write {{choices: {_shown(got)}}}" if _VALUE in loc else ""
    is_distribution = isinstance(got, dict) and {"choices", "low"} & got.keys()
    return "; cannot be searched, give one value" if is_distribution and not {*_KINDS} & {*loc} else ""


def _shown(value: Any) -> str:
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "…"
    return f"the text {shown}" if isinstance(value, str) else shown


def _known_keys(form: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Return the legal keys at a place within a model."""
    candidates: list[Any] = [form]
    for part in loc:
        following: list[Any] = []
        for model in candidates:
            if part in model.model_fields:
                following += _models_in(model.model_fields[part].annotation)
                for item in model.model_fields[part].metadata:
                    following += _models_in(item)
        if following:
            candidates = following
        elif part in _KINDS:
            wanted = {_CHOICES: "Choices", _RANGE: "Range", _SHARES: "Range"}.get(str(part), "")
            candidates = [model for model in candidates if model.__name__.startswith(wanted)] or candidates
        else:
            candidates = [model for model in candidates if part in _names_of(model)] or candidates
    return [name for model in candidates for name in model.model_fields]


def _names_of(form: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(form.model_fields["name"].annotation) if "name" in form.model_fields else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
