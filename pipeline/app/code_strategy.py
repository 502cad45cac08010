"""Write the statements that build the optimizer and the schedule of a config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

from pipeline.app.code_groups import has_groups
from pipeline.app.code_layout import call, comprehension, listed, literal
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import Muon, Optimizer, OwnOptimizer
from pipeline.space.own_code import is_own, short_name
from pipeline.space.schedules import (
    Constant,
    Cyclic,
    OneCycle,
    OwnScheduler,
    Plateau,
    Scheduler,
    Training,
    WarmedScheduler,
)

NOT_TORCHS = frozenset({"adjust_lr_fn", "cycle_momentum", "start_factor", "end_factor"})
"""Arguments whose defaults are not PyTorch's; every other argument is left out where it has its default."""
NAMES = """
adamw average batches embeddings epoch epochs group groups hidden inputs layer_of loader loss loss_function losses lr
lr_scheduler math matrices metric mode model muon nn optimizer optimizers param_groups runpy samples scheduler
schedulers step steps sys targets torch total train validate
"""
"""Names of the written code; a person's class or function of such a name is imported under another."""
IN_FUNCTION, IN_LIST, IN_LIST_OF_CALL = 4, 8, 12
"""Columns before the statements of a function, the items of a list there, and the items of a list within a call."""


def own_name(name: str) -> str:
    """Return the name that the code gives to a person's class or function."""
    short = short_name(name)
    return f"own_{short}" if short in NAMES.split() else short


def has_two_optimizers(config: TrialConfig) -> bool:
    """Say whether the code has lists of optimizers and schedulers."""
    return isinstance(config.optimizer, Muon)


def has_scheduler(config: TrialConfig) -> bool:
    """Say whether the rate changes."""
    return not isinstance(config.scheduler, Constant) or config.scheduler.warmup > 0


def strategy_statements(config: TrialConfig, *, directions: Mapping[str, str]) -> Iterator[str]:
    """Yield the statements that build the optimizer and the schedule, or two of each.

    Args:
        config: The config.
        directions: Metric name to "minimize" or "maximize", for ReduceLROnPlateau; of a metric that is absent, the
            code leaves the direction to be filled in.
    """
    if _names_rate(config):
        yield f"lr = {_base_lr(config, config.optimizer)!r}"
    if isinstance(config.optimizer, Muon):
        yield from _muon(config, config.optimizer)
    else:
        parameters = "param_groups(model, lr)" if has_groups(config) else "model.parameters()"
        yield f"optimizer = {_optimizer(config, config.optimizer, parameters, indent=IN_FUNCTION + 12)}"
    if not has_scheduler(config):
        return
    scheduler = _scheduler(config, directions, indent=IN_LIST if has_two_optimizers(config) else IN_FUNCTION + 12)
    if metric := _unknown_direction(config, directions):
        yield f'mode = ...  # "min" if a smaller {metric} is better, "max" if a larger one is'
    if re.search(r"\bsteps\b", scheduler):
        batches = "len(loader)" if config.accumulate == 1 else f"math.ceil(len(loader) / {config.accumulate})"
        yield f"steps = epochs * {batches}"
    if has_two_optimizers(config):
        yield f"schedulers = {comprehension(scheduler, 'for optimizer in optimizers', indent=IN_FUNCTION + 13)}"
    else:
        yield f"scheduler = {scheduler}"


def _names_rate(config: TrialConfig) -> bool:
    """Say whether the code needs the rate in several places."""
    return has_groups(config) or has_two_optimizers(config) or isinstance(config.scheduler, OneCycle | Cyclic)


def _base_lr(config: TrialConfig, optimizer: Optimizer) -> float:
    """Return the rate of which groups have multiples; of a single group, its rate."""
    if has_groups(config):
        return optimizer.base_lr
    (group,) = config.param_groups.values()
    return optimizer.base_lr * group.lr_ratio


def _muon(config: TrialConfig, muon: Muon) -> Iterator[str]:
    """Yield the statements that build Muon for the hidden matrices, and AdamW for the other parameters."""
    embeddings = "p\n    for module in model.modules()\n    if isinstance(module, nn.Embedding)"
    yield f"embeddings = {{\n    {embeddings}\n    for p in module.parameters()\n}}"
    yield "matrices = [p for p in model.parameters() if p.ndim == 2 and p not in embeddings]"
    yield "hidden = set(matrices[:-1])  # the last matrix is the output layer"
    if has_groups(config):
        yield "groups = param_groups(model, lr)"
    yield "optimizers = " + listed(
        [
            _optimizer(config, part, _filtered(config, test), indent=IN_LIST)
            for part, test in ((muon, "in"), (muon.adamw(), "not in"))
        ],
        indent=IN_FUNCTION,
    )


def _filtered(config: TrialConfig, test: str) -> str:
    """Return the parameters of one of two optimizers, as an argument of its class."""
    chosen = f"[p for p in {{}} if p {test} hidden]"
    if not has_groups(config):
        return chosen.format("model.parameters()")
    parameters = chosen.format('group["params"]')
    return comprehension(f'{{**group, "params": {parameters}}}', "for group in groups", indent=IN_LIST_OF_CALL)


def _optimizer(config: TrialConfig, optimizer: Optimizer, parameters: str, *, indent: int) -> str:
    """Return the call that builds an optimizer."""
    arguments = _optimizer_arguments(config, optimizer)
    arguments["lr"] = "lr" if _names_rate(config) else repr(_base_lr(config, optimizer))
    named = [f"{name}={value}" for name, value in arguments.items()]
    if is_own(optimizer.name):
        function = own_name(optimizer.name)
    else:
        function = optimizer.torch_class if "." in optimizer.torch_class else f"torch.optim.{optimizer.torch_class}"
    return call(function, [parameters, *named], indent=indent)


def _optimizer_arguments(config: TrialConfig, optimizer: Optimizer) -> dict[str, str]:
    """Return the arguments of an optimizer's class as code, the rate first, without those that have their default."""
    arguments = {"lr": None, **optimizer.arguments()}
    if not isinstance(optimizer, OwnOptimizer):
        default = type(optimizer)(base_lr=optimizer.base_lr).arguments()
        kept = {"lr", *NOT_TORCHS}
        arguments = {name: value for name, value in arguments.items() if name in kept or value != default[name]}
    if not has_groups(config):
        (group,) = config.param_groups.values()
        arguments |= {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
    return {name: literal(value) for name, value in arguments.items()}


def _scheduler(config: TrialConfig, directions: Mapping[str, str], *, indent: int) -> str:
    """Return the call that builds the scheduler of `optimizer`."""
    schedule = config.scheduler
    warmup = schedule.warmup if isinstance(schedule, WarmedScheduler) else 0
    torch_class = schedule.torch_class
    function = torch_class if "." in torch_class else f"lr_scheduler.{torch_class}"
    arguments = ["optimizer", *_schedule_arguments(config, directions, warmup=warmup)]
    if not isinstance(schedule, WarmedScheduler) or not warmup:
        return call(function, arguments, indent=indent)
    start = f"start_factor={literal(schedule.warmup_start_factor)}"
    ramp = call("lr_scheduler.LinearLR", ["optimizer", start, f"total_iters={warmup}"], indent=IN_LIST_OF_CALL)
    parts = listed([ramp, call(function, arguments, indent=IN_LIST_OF_CALL)], indent=100)  # one a line
    return call("lr_scheduler.SequentialLR", ["optimizer", parts, f"milestones=[{warmup}]"], indent=indent)


def _schedule_arguments(config: TrialConfig, directions: Mapping[str, str], *, warmup: int) -> Iterator[str]:
    """Yield the arguments of a schedule's class as code, without those that have their default."""
    schedule = config.scheduler
    total = ("steps" if schedule.interval == "step" else "epochs") + (f" - {warmup}" if warmup else "")
    if isinstance(schedule, OwnScheduler):
        yield _factor(schedule, total)
        return
    unknown = _unknown_direction(config, directions) is not None
    known = {schedule.metric: "", **directions} if isinstance(schedule, Plateau) else directions
    arguments = schedule.arguments(Training(total=1, base_lrs=[1.0], directions=known))
    depend = _dependent_arguments(config, schedule, total)
    defaults = {field.name: field.default for field in dataclasses.fields(schedule)} | {"mode": "min"}
    for name, value in sorted(arguments.items(), key=lambda argument: argument[0] not in depend):
        if name == "mode" and unknown:
            yield "mode=mode"
        elif name in depend:
            yield f"{name}={depend[name]}"
        elif name in NOT_TORCHS or name not in defaults or value != defaults[name]:
            yield f"{name}={literal(value)}"


def _unknown_direction(config: TrialConfig, directions: Mapping[str, str]) -> str | None:
    """Return the metric that the schedule reads, if its direction is not known."""
    schedule = config.scheduler
    return schedule.metric if isinstance(schedule, Plateau) and schedule.metric not in directions else None


def _dependent_arguments(config: TrialConfig, schedule: Scheduler, total: str) -> dict[str, str]:
    """Return the arguments that depend on the length of the run or on the groups' rates, as code."""
    rates = '[group["lr"] for group in optimizer.param_groups]' if has_groups(config) else "lr"
    if isinstance(schedule, OneCycle):
        return {"max_lr": rates, "total_steps": total}
    if isinstance(schedule, Cyclic):
        factor = f"{schedule.max_lr_ratio!r} * "
        highest = rates.replace("[group", f"[{factor}group", 1) if has_groups(config) else factor + rates
        return {"base_lr": rates, "max_lr": highest}
    return {name: total for name in ("T_max", "total_iters") if getattr(schedule, name, 0) is None}


def _factor(schedule: OwnScheduler, total: str) -> str:
    """Return a person's schedule as the function of LambdaLR, which asks once more after the last step."""
    given = [f"{name}={literal(value)}" for name, value in schedule.hyperparameters.items()]
    function = f"{own_name(schedule.name)}({', '.join([f'min(step, {total} - 1)', total, *given])})"
    return f"lambda step: float({function})"
