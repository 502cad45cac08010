"""Write the function that splits a model's parameters into the optimizer's groups."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable, Iterator, Mapping

from pipeline.app.code_layout import comprehension, entries, indented, listed, literal
from pipeline.space.config import TrialConfig
from pipeline.space.param_groups import ParameterRule, ParamGroup

UNDECAYED = "_undecayed"
"""Ends the name of a list of parameters without weight decay."""
NAMES = frozenset({"above", "layer", "lr", "model", "name", "parameter", "undecayed", "layer_of", "fnmatchcase"})
"""Names of the written function, which no list of parameters may have."""
LAYER_OF = '''
def layer_of(name, layers):
    """Return the number of the first layer that has a pattern for the name, or None."""
    for number, patterns in enumerate(layers):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return number
    return None
'''.strip()


def has_groups(config: TrialConfig) -> bool:
    """Say whether parameters differ in their rates or their weight decay."""
    return len(config.torch_groups()) > 1


def group_functions(config: TrialConfig) -> Iterator[str]:
    """Yield the function `param_groups(model, lr)`, and what it needs, if the config has more than one group."""
    if not has_groups(config):
        return
    if any(_is_layered(group) for group in config.param_groups.values()):
        yield LAYER_OF
    yield "\n".join(["def param_groups(model, lr):", *(indented(part) for part in _body(config))])


def _body(config: TrialConfig) -> Iterator[str]:
    groups = dict(zip(_identifiers(config.param_groups), config.param_groups.values(), strict=True))
    undecayed = bool(config.no_weight_decay)
    yield '"""Give each parameter to the first group that takes it."""'
    yield from _declarations(groups, undecayed=undecayed)
    yield "for name, parameter in model.named_parameters():"
    if undecayed:
        yield indented(f"undecayed = {_any(map(_condition, config.no_weight_decay))}")
    yield from _branches(groups, undecayed=undecayed)
    made = [entry for name, group in groups.items() for entry in _entries(name, group, undecayed=undecayed)]
    yield f"return {listed(made, indent=11)}"


def _identifiers(names: Iterable[str]) -> Iterator[str]:
    """Yield a different variable for each group."""
    taken = set(NAMES)
    for name in names:
        variable = re.sub(r"\W", "_", name, flags=re.ASCII)
        if keyword.iskeyword(variable) or hasattr(builtins, variable):
            variable = f"{variable}_parameters"
        if not variable.isidentifier():  # begins with a digit
            variable = f"group_{variable}"
        while taken & {variable, variable + UNDECAYED, f"{variable}_layers"}:
            variable += "_"
        taken |= {variable, variable + UNDECAYED, f"{variable}_layers"}
        yield variable


def _is_layered(group: ParamGroup) -> bool:
    """Say whether the layers of a group have rates of their own."""
    return group.layers is not None and group.lr_ratio != 0


def _declarations(groups: Mapping[str, ParamGroup], *, undecayed: bool) -> Iterator[str]:
    """Yield the statements that make the lists of parameters."""
    plain = [name for name, group in groups.items() if group.lr_ratio != 0 and not _is_layered(group)]
    names = [part for name in plain for part in ([name, name + UNDECAYED] if undecayed else [name])]
    if names:
        yield f"{', '.join(names)} = {', '.join(['[]'] * len(names))}"
    for name, group in groups.items():
        if _is_layered(group):
            patterns = [literal(list(patterns)) for patterns in group.layers or ()]
            yield f"{name}_layers = {listed(patterns, indent=14 + len(name))}"
            for part in [name, name + UNDECAYED] if undecayed else [name]:
                yield f"{part} = [[] for _ in {name}_layers]"


def _branches(groups: Mapping[str, ParamGroup], *, undecayed: bool) -> Iterator[str]:
    """Yield the branches that choose a parameter's group: the first match wins."""
    word = "if"
    for name, group in groups.items():
        test = _condition(group)
        if _is_layered(group):
            layer = f"(layer := layer_of(name, {name}_layers)) is not None"
            test = " and ".join([layer, *_dims(group)])
        action = _action(name, group, undecayed=undecayed)
        if test == "True":
            yield indented(action if word == "if" else f"else:\n{indented(action)}")
            return
        yield indented(f"{word} {test}:\n{indented(action)}")
        word = "elif"
    yield indented('else:\n    raise ValueError(f"no group takes {name}")')


def _action(name: str, group: ParamGroup, *, undecayed: bool) -> str:
    if group.lr_ratio == 0:
        return "parameter.requires_grad_(False)"
    chosen = f"({name}{UNDECAYED} if undecayed else {name})" if undecayed else name
    return f"{chosen}{'[layer]' if _is_layered(group) else ''}.append(parameter)"


def _entries(name: str, group: ParamGroup, *, undecayed: bool) -> Iterator[str]:
    """Yield what gives the optimizer its groups of a group."""
    if group.lr_ratio == 0:
        return
    for part in [name, name + UNDECAYED] if undecayed else [name]:
        decay = 0.0 if part != name else group.weight_decay
        decayed = [] if decay is None else [f'"weight_decay": {decay!r}']
        factors = [] if group.lr_ratio == 1 else [repr(group.lr_ratio)]
        if _is_layered(group):
            rate = " * ".join([*factors, f"{group.layer_decay!r}**above", "lr"])
            entry = entries(['"params": layer', f'"lr": {rate}', *decayed], indent=12)
            loop = f"for above, layer in enumerate(reversed({part}))"
            yield "*" + comprehension(entry, loop, brackets="()", indent=10)
        else:
            rates = [f'"lr": {" * ".join([*factors, "lr"])}'] if factors else []
            yield entries([f'"params": {part}', *rates, *decayed], indent=9)


def _condition(rule: ParameterRule) -> str:
    """Return the test whether a rule takes a parameter; `True` if it takes every one."""
    patterns = rule.pattern or ()
    if isinstance(rule, ParamGroup) and rule.layers is not None:
        patterns = tuple(pattern for layer in rule.layers for pattern in layer)
    name = _any(_matches(patterns)) if patterns and "*" not in patterns else ""
    dims = _dims(rule)
    if name and dims and " or " in name:
        name = f"({name})"
    return " and ".join([*([name] if name else []), *dims]) or "True"


def _any(tests: Iterable[str]) -> str:
    tests = list(dict.fromkeys(tests))
    several = len(tests) > 1
    return " or ".join(f"({test})" if several and " and " in test else test for test in tests)


def _dims(rule: ParameterRule) -> list[str]:
    if rule.dims is None:
        return []
    return [f"parameter.ndim == {rule.dims[0]}" if len(rule.dims) == 1 else f"parameter.ndim in {literal(rule.dims)}"]


def _matches(patterns: Iterable[str]) -> Iterator[str]:
    """Yield the tests of which one must hold for a name that a pattern matches, as simple as the patterns allow."""
    starts: list[str] = []
    for pattern in patterns:
        text = pattern.removeprefix("*").removesuffix("*")
        start, end = pattern.startswith("*"), pattern.endswith("*")
        if re.search(r"[*?[]", text) or not text:
            yield f"fnmatchcase(name, {literal(pattern)})"
        elif end and not start:
            starts.append(text)
        elif end:
            yield f"{literal(text)} in name"
        else:
            yield f"name.endswith({literal(text)})" if start else f"name == {literal(text)}"
    if starts:
        yield f"name.startswith({literal(starts[0] if len(starts) == 1 else tuple(starts))})"
