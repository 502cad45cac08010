"""Optimizers and schedules of a person's own: `optimizer: {"my_file.py:Lion": {base_lr: 1e-4}}`.

An optimizer is a subclass of `torch.optim.Optimizer`. A schedule is a function (step, total, …) that returns a factor
of the base rate. The hyperparameters are the other arguments of the class or function.

Code is loaded only by `load_own`, for a file that the person names. A config or a stored study holds names and values,
so both are read without the code.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from pipeline.errors import InvalidInput, Problem, did_you_mean
from pipeline.files.code import load_module

SHARED = {"optimizer": "base_lr", "scheduler": "interval"}
"""Section of a file to the key that each of its optimizers, or schedules, has."""


class FactorError(ValueError):
    """A schedule of a person's own returned a factor that no rate can be multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """An argument of a person's optimizer or schedule."""

    kind: Any
    """The type that the annotation or the default says: bool, int, float or str; None if they leave it open."""
    required: bool
    default: Any = None
    """None if there is no default, or one that a file cannot hold: the argument is not passed then."""


@dataclass(frozen=True, kw_only=True)
class OwnCode:
    """An optimizer's class or a schedule's function, loaded, with the hyperparameters of its signature."""

    target: Callable[..., Any]
    hyperparameters: Mapping[str, Hyperparameter]
    takes_any: bool
    """Whether there is a `**` argument, so that the signature does not name every hyperparameter."""


_LOADED: dict[str, OwnCode] = {}
"""Name in a file to the code that was last loaded for it, in this process and its forks."""


def is_own(name: str) -> bool:
    """Say whether the name of an optimizer or a schedule is that of a person's own."""
    return ":" in name


def is_plain(value: Any) -> bool:
    """Say whether a file can hold a value."""
    if isinstance(value, tuple | list):
        return bool(value) and all(is_plain(item) and not isinstance(item, tuple | list) for item in value)
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def recorded_name(kind: str, owner: str, field: str) -> str:
    """Return a hyperparameter's name among all of a trial's: `gamma`; of a person's own, `noam.gamma`."""
    return f"{short_name(owner)}.{field}" if is_own(owner) and field != SHARED[kind] else field


def short_name(name: str) -> str:
    """Return the name of a class or function without its module."""
    return name.rpartition(":")[2]


def load_own(kind: str, name: str) -> OwnCode:
    """Load an optimizer or a schedule that the person names, and keep it for training.

    Args:
        kind: "optimizer" or "scheduler".
        name: `path/to/file.py:name` or `package.module:name`.

    Raises:
        InvalidInput: There is no such class or function, or its signature does not suit.
    """
    place = f"{kind}.{name}"
    fits: Callable[[Any], bool] = _is_optimizer if kind == "optimizer" else inspect.isfunction
    wanted = {"optimizer": "a subclass of torch.optim.Optimizer", "scheduler": "a function (step, total, …)"}[kind]
    module, key = load_module(name, place=place, kind={"optimizer": "Class", "scheduler": "function"}[kind])
    if not hasattr(module, key):
        known = [other for other, value in vars(module).items() if fits(value)]
        hint = did_you_mean(key, known) if known else f"nothing there is {wanted}"
        _refuse(place, f"{name.rpartition(':')[0]} has no {key}; {hint}")
    target: Any = getattr(module, key)
    if not fits(target):
        got = f"the class {key}" if isinstance(target, type) else type(target).__name__
        _refuse(place, f"must be {wanted}, got {got}")
    _LOADED[name] = _read(target, kind, place)
    return _LOADED[name]


def loaded(name: str) -> Callable[..., Any]:
    """Return the class or function of a name that has been loaded.

    Raises:
        LookupError: The name comes from a stored trial alone.
    """
    if name not in _LOADED:
        raise LookupError(f"{name} is code that is loaded only for a file that you name: a space, or a config")
    return _LOADED[name].target


def factor_of(name: str, *, total: int, hyperparameters: Mapping[str, Any]) -> Callable[[int], float]:
    """Return a schedule's factor of the base rate as a function of the step, for `LambdaLR`.

    Args:
        name: The schedule, which has been loaded.
        total: Length of the run in the schedule's `interval`. Steps count from 0 to total - 1. `LambdaLR` asks for one
            more after the last update, which gets the last factor.
        hyperparameters: Arguments of the schedule's function besides `step` and `total`.
    """
    function = loaded(name)

    def factor(step: int) -> float:
        step = min(step, total - 1)
        value = function(step, total, **hyperparameters)
        try:
            number = float(value)
        except Exception:
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            rule = "a factor must be a finite number of at least 0"
            raise FactorError(f"{name} returned {value!r:.60} at step {step} of {total}; {rule}")
        return number

    return factor


def _read(target: Any, kind: str, place: str) -> OwnCode:
    """Read the signature of a class or function."""
    parameters = list(inspect.signature(target).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name[0] != "_"]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [parameter.name for parameter in named]
    if kind == "optimizer":
        rest = [parameter for parameter in named[1:] if parameter.name != "lr"]
        hints = _hints(target.__init__)
        if "lr" not in names and not takes_any:
            _refuse(place, f"must take the argument lr, which base_lr becomes, got ({', '.join(names)})")
    else:
        rest, hints = named[2:], _hints(target)
        if names[:2] != ["step", "total"]:
            _refuse(place, f"must be a function (step, total, …), got ({', '.join(names)})")
    if SHARED[kind] in [parameter.name for parameter in rest]:
        _refuse(place, f"its argument {SHARED[kind]} has the name of a key that every {kind} has; rename it")
    found = {parameter.name: _hyperparameter(parameter, hints.get(parameter.name)) for parameter in rest}
    return OwnCode(target=target, hyperparameters=found, takes_any=takes_any)


def _hints(function: Any) -> Mapping[str, Any]:
    """Return the types that a function's annotations name; none if a name is known to type checkers only."""
    try:
        return get_type_hints(function)
    except Exception:
        return {}


def _hyperparameter(parameter: inspect.Parameter, hint: Any) -> Hyperparameter:
    required = parameter.default is parameter.empty
    default = parameter.default if not required and is_plain(parameter.default) else None
    default = tuple(default) if isinstance(default, list) else default
    if get_origin(hint) in (Union, types.UnionType):
        (hint, *more) = [argument for argument in get_args(hint) if argument is not types.NoneType]
        hint = None if more else hint
    if hint not in (bool, int, float, str):
        hint = type(default) if isinstance(default, bool | float) else None  # a default of 0 is often a float's
    return Hyperparameter(kind=hint, required=required, default=default)


def _is_optimizer(value: Any) -> bool:
    """Say whether a value is a subclass of torch's Optimizer, without importing torch."""
    bases = value.__mro__[1:] if isinstance(value, type) else ()
    return any((base.__module__, base.__name__) == ("torch.optim.optimizer", "Optimizer") for base in bases)


def _refuse(place: str, message: str) -> NoReturn:
    raise InvalidInput(place, [Problem(place, message)])
