"""Write a config as plain PyTorch code: parameter groups, optimizer, schedule, and the loop that steps them.

The code needs PyTorch alone, and holds what the config uses. With the same number of batches in an epoch its learning
rates equal the search's exactly: it builds the same objects of PyTorch with the same numbers, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath

from pipeline.app.code_groups import group_functions
from pipeline.app.code_layout import indented, literal
from pipeline.app.code_strategy import has_scheduler, has_two_optimizers, own_name, strategy_statements
from pipeline.space.config import TrialConfig
from pipeline.space.own_code import is_own
from pipeline.space.schedules import Plateau

STANDARD = {
    r"\bmath\.ceil\(": "import math",
    r"\brunpy\.": "import runpy",
    r"\bsys\.path\b": "import sys",
    r"\bfnmatchcase\(": "from fnmatch import fnmatchcase",
    r"\bislice\(": "from itertools import islice",
}
"""Pattern in the code to the import that it needs, of the standard library."""
TORCH = {
    "": "import torch",
    r"\bnn\.Embedding\b": "from torch import nn",
    r"\blr_scheduler\.": "from torch.optim import lr_scheduler",
    r"\bAveragedModel\(": "from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn",
}
"""The same of PyTorch."""
TRAIN_LOSS = "train/loss"
DIRECTIONS = {TRAIN_LOSS: "minimize", "val/loss": "minimize"}
"""What every workload measures."""


def python_code(config: TrialConfig, *, directions: Mapping[str, str], comment: str, cuda: bool = False) -> str:
    """Return a config as a Python module with the function `train(model, loader, loss_function)`.

    Args:
        config: What to write.
        directions: Metric name to "minimize" or "maximize", besides losses, for ReduceLROnPlateau. Of a metric that is
            absent, the code leaves the direction to be filled in.
        comment: Stands at the head of the code.
        cuda: Whether the config was trained on a CUDA device, whose convolutions PyTorch rounds by default.
    """
    body = "\n\n\n".join([*group_functions(config), "\n".join(_train(config, {**DIRECTIONS, **directions}, cuda=cuda))])
    own = "\n".join(_own_imports(config))
    imports = [[line for key, line in table.items() if re.search(key, own + body)] for table in (STANDARD, TORCH)]
    blocks = ["\n".join(f"# {line}".rstrip() for line in comment.splitlines())]
    blocks += ["\n".join(lines) for lines in imports if lines]
    return "\n\n".join([*blocks, *filter(None, [own]), f"\n{body}\n"])


def _own_imports(config: TrialConfig) -> Iterator[str]:
    """Yield the imports of a person's optimizer and schedule from their files."""
    for name in dict.fromkeys(filter(is_own, [config.optimizer.name, config.scheduler.name])):
        module, _, short = name.rpartition(":")
        renamed = "" if own_name(name) == short else f" as {own_name(name)}"
        path = PurePath(module)
        if not module.endswith(".py"):
            yield f"from {module} import {short}{renamed}"
        elif not path.stem.isidentifier():
            yield f"{own_name(name)} = runpy.run_path({literal(module)})[{literal(short)}]"
        else:
            if path.parent != PurePath():
                yield f"sys.path.append({literal(str(path.parent))})"
            yield f"from {path.stem} import {short}{renamed}"


def _train(config: TrialConfig, directions: Mapping[str, str], *, cuda: bool) -> Iterator[str]:
    """Yield the parts of the function that trains."""
    metric = _validated(config)
    yield f"def train(model, loader, loss_function{', validate' if metric else ''}):"
    strategy = strategy_statements(config, directions=directions)
    statements = [_docstring(config, metric), *_settings(config, cuda=cuda), f"epochs = {config.epochs}", *strategy]
    if config.ema is not None:
        statements.append(f"average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn({config.ema!r}))")
    statements += _loop(config)
    if config.ema is not None:
        statements.append("return average.module")
    yield from map(indented, statements)


def _validated(config: TrialConfig) -> str | None:
    """Return the metric of a validation that the schedule reads."""
    schedule = config.scheduler
    return schedule.metric if isinstance(schedule, Plateau) and schedule.metric != TRAIN_LOSS else None


def _docstring(config: TrialConfig, metric: str | None) -> str:
    double = " in float64" if config.precision == "fp64" else ""
    lines = [f'"""Train a model on a loader of (inputs, targets){double}, {config.batch_size} samples a batch.']
    if metric:
        lines += ["", f"`validate(model)` returns {literal(metric)} after an epoch."]
    if config.ema is not None:
        lines += ["", "Returns the model with the average of the parameters, which is the one to use."]
    return "\n".join(lines) + ("\n" if len(lines) > 1 else "") + '"""'


def _settings(config: TrialConfig, *, cuda: bool) -> Iterator[str]:
    """Yield the settings of arithmetic and memory that are not PyTorch's defaults."""
    if config.precision == "fp64":
        yield "model.double()"
    if config.precision == "tf32" or (cuda and config.precision == "fp32"):
        for products in ("cuda.matmul", "cudnn"):
            yield f"torch.backends.{products}.allow_tf32 = {config.precision == 'tf32'}"
    if config.channels_last:
        yield "model.to(memory_format=torch.channels_last)"
    if config.deterministic:
        comment = "  # on CUDA set CUBLAS_WORKSPACE_CONFIG=:4096:8" if cuda else ""
        yield f"torch.use_deterministic_algorithms(True){comment}"


def _loop(config: TrialConfig) -> Iterator[str]:
    """Yield the loop over epochs, which steps the schedule where the config says."""
    yield "for epoch in range(epochs):"
    yield indented("model.train()")
    if _reads_train_loss(config):
        yield indented("losses = []")
    if config.accumulate == 1:
        yield indented("for inputs, targets in loader:")
        yield from (indented(line, 2) for line in [_zero_grad(config), *_forward(config), *_update(config)])
    else:
        yield indented(f"batches = iter(loader)\nwhile step := list(islice(batches, {config.accumulate})):")
        yield indented(f"samples = sum(len(targets) for _, targets in step)\n{_zero_grad(config)}", 2)
        yield indented("for inputs, targets in step:", 2)
        yield from (indented(line, 3) for line in _forward(config))
        yield from (indented(line, 2) for line in _update(config))
    if has_scheduler(config) and config.scheduler.interval == "epoch":
        yield indented(_scheduler_step(config))


def _reads_train_loss(config: TrialConfig) -> bool:
    return isinstance(config.scheduler, Plateau) and config.scheduler.metric == TRAIN_LOSS


def _zero_grad(config: TrialConfig) -> str:
    return "model.zero_grad()" if has_two_optimizers(config) else "optimizer.zero_grad()"


def _forward(config: TrialConfig) -> Iterator[str]:
    """Yield the statements that compute the gradients of one batch."""
    if config.channels_last:
        yield "inputs = inputs.contiguous(memory_format=torch.channels_last)"
    loss = "loss = loss_function(model(inputs), targets)"
    if config.precision == "bf16":
        yield f"with torch.autocast(inputs.device.type, dtype=torch.bfloat16):\n{indented(loss)}"
    else:
        yield loss
    yield "loss.backward()" if config.accumulate == 1 else "(loss * (len(targets) / samples)).backward()"
    if _reads_train_loss(config):
        yield "losses.append((loss.item(), len(targets)))"


def _update(config: TrialConfig) -> Iterator[str]:
    """Yield the statements of one optimizer step."""
    if config.clip_grad_norm is not None:
        yield f"torch.nn.utils.clip_grad_norm_(model.parameters(), {config.clip_grad_norm!r})"
    yield "for optimizer in optimizers:\n    optimizer.step()" if has_two_optimizers(config) else "optimizer.step()"
    if has_scheduler(config) and config.scheduler.interval == "step":
        yield _scheduler_step(config)
    if config.ema is not None:
        yield "average.update_parameters(model)"


def _scheduler_step(config: TrialConfig) -> str:
    """Return the statements that step the schedule."""
    measure = ""
    if _reads_train_loss(config):
        measure = "total = sum(loss * size for loss, size in losses)\n"
        measure += "metric = total / sum(size for _, size in losses)\n"
    elif _validated(config):
        measure = f"metric = validate({'average.module' if config.ema is not None else 'model'})\n"
    step = f"scheduler.step({'metric' if measure else ''})"
    return measure + (f"for scheduler in schedulers:\n    {step}" if has_two_optimizers(config) else step)
