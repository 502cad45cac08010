"""What a careful command line refuses: exit status 2, the place, the value and the remedy, and nothing written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
import torch
from tiny import RULES

from pipeline import confirm, export, lr_range, report, search, train
from pipeline.app import cli
from pipeline.errors import InvalidInput
from pipeline.space.config import Digits, TrialConfig
from pipeline.space.load import load_space
from pipeline.space.optimizers import SGD
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant
from pipeline.space.search_space import Objective
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.store import Store
from pipeline.tracking.mlflow import MLflowTracker

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "search": search.main,
    "train": train.main,
    "export": export.main,
    "lr_range": lr_range.main,
    "confirm": confirm.main,
    "report": report.main,
}

SPACE = """\
workload: {name: digits, model: mlp}
epochs: 4
batch_size: 64
optimizer:
  sgd: {base_lr: {low: 1e-3, high: 1.0, log: true}}
scheduler:
  constant: {}
param_groups:
  all: {pattern: "*"}
"""
CONFIG = SPACE.replace("{low: 1e-3, high: 1.0, log: true}", "0.1")


@dataclass(frozen=True)
class Refused:
    """A command line that is refused, and words that its message must have."""

    command: str
    words: tuple[str, ...]
    content: str | bytes = SPACE
    """Of the file `mine.yaml`, which lies in the working folder."""

    def __str__(self) -> str:
        return f"{self.command[:60]}: {max(self.words, key=len)}"


def option(command: str, *words: str) -> Refused:
    return Refused(command, words)


def space(old: str, new: str, *words: str) -> Refused:
    """Refuse a search of the file in which `old` is replaced."""
    assert SPACE.count(old) == 1
    return Refused("search --space mine.yaml --trials 1", ("mine.yaml: 1 problem", *words), SPACE.replace(old, new))


def config(old: str, new: str, *words: str) -> Refused:
    assert CONFIG.count(old) == 1
    return Refused("train mine.yaml", ("mine.yaml: 1 problem", *words), CONFIG.replace(old, new))


def content(data: str | bytes, *words: str) -> Refused:
    return Refused("search --space mine.yaml", ("mine.yaml: 1 problem", *words), data)


RANGE = "{low: 1e-3, high: 1.0, log: true}"


def own_optimizer(name: str, values: str, *words: str) -> Refused:
    """Refuse a search with an optimizer of the person's own, whose code is `own_optimizers.py` as `own.py`."""
    return space(f"sgd: {{base_lr: {RANGE}}}", f"'{name}': {{base_lr: {RANGE}{values}}}", *words)


def own_schedule(name: str, values: str, *words: str) -> Refused:
    return space("constant: {}", f"'{name}': {{{values}}}", *words)


NAME_RULE = "argument --study: must be 1 to 100 letters, digits, '_', '-' and '.'"
NO_STUDY = "holds no study; run `python -m pipeline.search`, or name another --root"

REFUSED = [
    # The command line itself.
    option("search --trials 0", "argument --trials: must be a whole number from 1 to 1000000000, got '0'"),
    option("search --trials -1", "argument --trials: must be a whole number from 1 to 1000000000, got '-1'"),
    option("search --trials 3.5", "argument --trials: must be a whole number from 1 to 1000000000, got '3.5'"),
    option("search --trials ten", "argument --trials: must be a whole number from 1 to 1000000000, got 'ten'"),
    option("search --seed -1", "argument --seed: must be a whole number from 0 to 4294967295, got '-1'"),
    option("search --timeout 0", "argument --timeout: must be a number above 0, got '0'"),
    option("search --timeout nan", "argument --timeout: must be a number above 0, got 'nan'"),
    option("search --workers 0", "argument --workers: must be a whole number from 1 to 4096, got '0'"),
    option("search --ray ray://head:10001", "argument --ray: must be auto, or host:port of the head of a cluster"),
    option(
        "search --cpus-per-worker 2 --root new", "--cpus-per-worker: needs --workers or --ray, got 2 without either"
    ),
    option("search --workers 2 --device mps --root new", "--device: workers have a device each, got mps; leave --dev"),
    option("search --ray 127.0.0.1:1 --space mine.yaml", "127.0.0.1:1: needs the cluster's token; set RAY_AUTH_TOKEN"),
    option("search --study ../x", NAME_RULE, "got '../x'"),
    option("search --study=", NAME_RULE, "got ''"),
    option(f"search --study {'a' * 600}", NAME_RULE, "got 'aaa"),
    option("search --root mine.yaml", "--root: must be a folder, got the file 'mine.yaml'; name another"),
    option("search --root mine.yaml/x", "--root: 1 problem", "mine.yaml/x/mlruns/optuna.db: cannot be written: Not a "),
    option(f"search --root {'x' * 5000}", "--root: must be a folder, got 'xxx", "': File name too long"),
    option(
        "search --root ~nobody-of-that-name/x", "--root: there is no such home folder, got '~nobody-of-that-name/x'"
    ),
    option("search --root new --space mine.yaml --set batch_size=1258", "must be at most the 1257 training samples"),
    option("lr_range --root new --space mine.yaml --set batch_size=1258", "must be at most the 1257 training samples"),
    option("export --root new", "--root: 1 problem", f"new: {NO_STUDY}"),
    option(
        "search --storage sqlite:///x.db", "argument --storage: must be the URL of a PostgreSQL database, postgresql"
    ),
    option("report --storage postgresql://me:secret@host/db", "--storage: has a password, which", "set PGPASSWORD or "),
    option("export --storage postgresql://me:se/c@ret@host/db", "--storage: has a password", "~/.pgpass"),
    option("confirm --storage postgresql://me@host/db?password=secret", "--storage: has a password"),
    option("search --delete x --storage postgresql://me%3Asecret@host/db", "--storage: has a password"),
    option(
        "search --storage postgresql://me@host:secret/db", "--storage: cannot be read; write postgresql://user@host"
    ),
    option("search --storage postgresql://me@host/db?foo=1", "--storage: cannot be read; write postgresql://user@"),
    option("search --study x --storage postgresql://me@127.0.0.1:1/db", "127.0.0.1:1/db: ", "; start the server, or"),
    option(
        "train mine.yaml --storage postgresql://me:secret@host/db",
        "unrecognized arguments: --storage postgresql://***@host/db",
    ),
    option("search --device tpu", "argument --device: must be auto, cpu, mps, cuda or cuda:N, got 'tpu'"),
    option("search --device cuda:99", "--device: 1 problem", "cuda:99: there", "use --device cpu, or auto"),
    option("search --trails 5", "unrecognized arguments: --trails 5"),
    option("search --space decya", "decya: 1 problem", "no search space of that name; did you mean decay?"),
    option("search --space decay.yaml", "there is no such file, and no search space of that name; did you mean decay?"),
    option("lr_range --space decay --write", "--write: 1 problem", "decay: is a ready-made search space, "),
    option(
        "lr_range --space mine.yaml --write --set optimizer.nadam.base_lr=0.1 --set optimizer.adam.base_lr=0.1",
        "--write: 2 problems",
        "optimizer.adam.base_lr: comes from --set, not from mine.yaml; put it into the file",
        "optimizer.nadam.base_lr: comes from --set, not from mine.yaml; put it into the file",
    ),
    option("search --space .", "cannot be read: Is a directory"),
    Refused(
        "search --space mine.yaml --trials 1 --device cpu",
        ("precision: tf32 needs a CUDA device, and trials train on cpu; set precision to fp32 or bf16",),
        SPACE + "precision: tf32\n",
    ),
    # The file as a file.
    content("", "got an empty file"),
    content(SPACE + "---\na: 1\n", "line 10, column 1: must be one document, got a second one"),
    content("epochs:\n\tmany: 1\n", "line 2, column 1: a tab cannot indent YAML; use blanks"),
    content("epochs: 1\0\n", "line 1: must be text, got the character '\\x00'"),
    content("# caf\xe9\n".encode("latin-1"), "must be UTF-8 text, got byte 0xe9 at offset 5; save it as UTF-8"),
    content(SPACE + "epochs: 5\n", "line 10: key 'epochs' is already set on line 2; keep one of them"),
    content(SPACE + "epoch: 5\n", "epoch: unknown key; did you mean epochs?"),
    # Search space.
    space(RANGE, "{low: 1, high: 0.5}", "optimizer.sgd.base_lr: `low <= high` must hold, got low=1.0, high=0.5"),
    space(RANGE, "{low: 0.1, high: 0.1}", "nothing is searched; give a `low` and `high`"),
    space("low: 1e-3", "low: 0", "optimizer.sgd.base_lr.low: must be > 0, got 0"),
    space("low: 1e-3", "low: .nan", "optimizer.sgd.base_lr.low: must be a finite number, got nan"),
    space("high: 1.0", "high: .inf", "optimizer.sgd.base_lr.high: must be a finite number, got inf"),
    space("high: 1.0", "high: 1e999", "optimizer.sgd.base_lr.high: must be a finite number, got inf"),
    space("low: 1e-3", "low: '1e-3'", "optimizer.sgd.base_lr.low: must be a finite number, got the text '1e-3'"),
    space("low: 1e-3", "low: true", "optimizer.sgd.base_lr.low: must be a finite number, got True"),
    space("log: true", "log: true, step: 0.1", "optimizer.sgd.base_lr: `log` and `step` exclude each other"),
    space(RANGE, "{low: 0.1, high: 1.0, step: 0.4}", "`step` must divide the range", "the last step ends at 0.9"),
    space(RANGE, "{choices: []}", "optimizer.sgd.base_lr.choices: must hold at least one value, got none"),
    space(RANGE, "{choices: [.nan]}", "optimizer.sgd.base_lr.choices.0: must be a finite number, got nan"),
    space(RANGE, "{choices: [{a: 1}]}", "optimizer.sgd.base_lr.choices.0: must be a finite number, got {'a': 1}"),
    space("constant: {}", "step: {step_size: {low: 1.5, high: 3}}", "step_size.low: must be a whole number, got 1.5"),
    space("sgd:", "sdg:", "optimizer.sdg: unknown optimizer; did you mean sgd?"),
    space("constant: {}", "cosin: {}", "scheduler.cosin: unknown scheduler; did you mean cosine?"),
    space(
        "sgd:", "lion:", "optimizer.lion: unknown optimizer; known: sgd", "; one of your own is path/to/file.py:Class"
    ),
    space(RANGE, f"{RANGE}, lr: 0.1", "optimizer.sgd.lr: unknown key; lr is base_lr here"),
    space("size: 64", "size: [32, 64]", "must be a whole number, got [32, 64]; for a choice write {choices: [32, 64]}"),
    space("epochs: 4", "epochs: {low: 1, high: 4}", "epochs: must be a whole number", "; cannot be searched, give one"),
    space("constant: {}", "constant:", "scheduler.constant: must be a mapping, `key: value`, got None"),
    # Strategy.
    space(RANGE, "0", "optimizer.sgd.base_lr: must be > 0, got 0"),
    space(RANGE, f"{RANGE}, beta1: 0.9", "optimizer.sgd.beta1: unknown key; known: base_lr", "momentum"),
    space(RANGE, f"{RANGE}, momentum: 1", "optimizer.sgd.momentum: must be < 1, got 1"),
    space("constant: {}", "exponential: {gamma: 0}", "scheduler.exponential.gamma: must be > 0, got 0"),
    space("constant: {}", "exponential: {gamma: 1.1}", "scheduler.exponential.gamma: must be <= 1, got 1.1"),
    space("constant: {}", "step: {step_size: 0}", "scheduler.step.step_size: must be >= 1, got 0"),
    space("constant: {}", "step: {step_size: 9}", "scheduler.step.step_size: must be at most the 4 epochs", "got 9"),
    space("constant: {}", "multistep: {milestones: [2, 1]}", "milestones: must not decrease, got [2, 1]"),
    space("constant: {}", "constant: {warmup: 4}", "warmup: must be shorter than the run of 4 epochs, got 4"),
    space("constant: {}", "cosine_warm_restarts: {T_0: 0}", "T_0: must be >= 1, got 0"),
    space("constant: {}", "cosine: {eta_min: 0.1}", "eta_min: must be at most the smallest rate, 0.001 of sgd"),
    space("constant: {}", "plateau: {metric: loss}", "unknown metric 'loss'; did you mean val/loss?"),
    space("constant: {}", "onecycle: {pct_start: 0.01}", "pct_start: must be above 0.0125", "got 0.01"),
    # Optimizers and schedules of one's own.
    own_optimizer("own.py:Lino", "", "optimizer.own.py:Lino: own.py has no Lino; did you mean Lion?"),
    own_optimizer("own.py:", "", "must be path/to/file.py:Class or package.module:Class, got 'own.py:'"),
    own_optimizer("absent.py:Lion", "", "there is no file absent.py; a path is relative to the working folder"),
    own_optimizer("lion_pytroch:Lion", "", "there is no module lion_pytroch; install it, or name a file, path/to/"),
    own_optimizer(
        "broken.py:Lion", "", "broken.py raised ZeroDivisionError: division by zero, in /", "broken.py, line 1"
    ),
    own_optimizer("own.py:noam", "", "must be a subclass of torch.optim.Optimizer, got function"),
    own_optimizer("torch:Tensor", "", "must be a subclass of torch.optim.Optimizer, got the class Tensor"),
    own_optimizer("own.py:Fixed", "", "must take the argument lr, which base_lr becomes, got (params, momentum)"),
    own_optimizer("own.py:Lion", ", beta1: 0.9", "optimizer.own.py:Lion.beta1: unknown key; did you mean betas?"),
    own_optimizer("own.py:Lion", ", lr: 0.1", "optimizer.own.py:Lion.lr: unknown key; lr is base_lr here"),
    own_optimizer("own.py:Lion", ", betas: [1.5, 0.9]", "raised ValueError: betas must be below 1, got (1.5, 0.9), in"),
    own_optimizer("own.py:Counts", "", "keeps state outside its state_dict", "put it into self.state or param_groups"),
    own_optimizer("own.py:Arrays", "", "its state_dict cannot be loaded", "numbers and texts into it, got ndarray"),
    own_optimizer("own.py:NeedsClosure", "", "raised TypeError: ", "missing 1 required positional argument: 'closure'"),
    own_schedule("own.py:naom", "", "scheduler.own.py:naom: own.py has no naom; did you mean noam?"),
    own_schedule("own.py:STEPS", "", "must be a function (step, total, …), got int"),
    own_schedule("own.py:Lion", "", "must be a function (step, total, …), got the class Lion"),
    own_schedule("own.py:turned", "", "must be a function (step, total, …), got (total, step)"),
    own_schedule("shutil:rmtree", "", "must be a function (step, total, …), got (path, ignore_errors, onerror"),
    own_schedule("own.py:taken", "", "its argument interval has the name of a key that every scheduler has; rename it"),
    own_schedule("own.py:noam", "", "scheduler.own.py:noam.warmup_steps: is missing and has no default; add it"),
    own_schedule("own.py:noam", "warmup_steps: 2.5", "noam.warmup_steps: must be a whole number, got 2.5"),
    own_schedule("own.py:noam", "warmup_stesp: 3, warmup_steps: 3", "unknown key; did you mean warmup_steps?"),
    own_schedule(
        "own.py:below", "floor: -1.0", "scheduler.own.py:below: returned -0.5 at step 3 of 4; a factor must be"
    ),
    own_schedule("own.py:below", "floor: -1.0", "finite number of at least 0, with floor -1.0"),
    own_schedule("own.py:nothing", "", "scheduler.own.py:nothing: returned None at step 0 of 4; a factor must be a"),
    own_schedule("own.py:divides", "", "raised ZeroDivisionError: ", "own.py, line ", ", at step 2 of 4"),
    own_schedule("own.py:a b", "", "must be path/to/file.py:function or package.module:function, got 'own.py:a b'"),
    # Groups.
    space('all: {pattern: "*"}', 'head: {pattern: "fc.*"}', "no group takes hidden1.weight", "pattern '*'"),
    space(
        "all:", 'head: {pattern: "head*"}\n  all:', "pattern 'head*' matches no parameter; the model has hidden1.weight"
    ),
    space('"*"', '"*", lr_ratio: -1', "param_groups.all.lr_ratio: must be >= 0, got -1"),
    space('"*"', '"*", lr_ratio: 0', "param_groups: every group can be frozen (lr_ratio 0) at once"),
    space('pattern: "*"', "lr_ratio: 2", "param_groups.all: needs a pattern, dims or layers", "such as pattern: '*'"),
    space('"*"', '"*", dims: -1', "param_groups.all.dims.0: must be >= 0, got -1"),
    space('"*"', '"*", dims: {low: 1, high: 2}', "param_groups.all.dims.0: must be a whole number, got {'low': 1"),
    space(
        "all:", "norms: {dims: 3}\n  all:", "param_groups.norms: dims 3 matches no parameter; the model has hidden1."
    ),
    space(
        "all:", "norms: {dims: 1}\n  biases: {pattern: '*bias'}\n  all:", "param_groups.biases: pattern '*bias' is left"
    ),
    space(
        'pattern: "*"', "dims: 1", "no group takes hidden1.weight (dims 2), hidden2.weight (dims 2), fc.weight (dims 2)"
    ),
    space('pattern: "*"', 'layers: ["*"]', "param_groups.all.layer_decay: is missing, and layers need it"),
    space('"*"', '"*", layer_decay: 0.75', "param_groups.all.layer_decay: needs layers"),
    space('"*"', '"*", layers: [a], layer_decay: 0.75', "param_groups.all.layers: stand in place of a pattern"),
    space('pattern: "*"', 'layers: ["*"], layer_decay: 1.5', "param_groups.all.layer_decay: must be <= 1, got 1.5"),
    space('pattern: "*"', 'layers: "*", layer_decay: 1', "param_groups.all.layers: must be a list, got the text '*'"),
    space('pattern: "*"', 'layers: ["*", 3], layer_decay: 1', "param_groups.all.layers.1.0: must be text, got 3"),
    space(
        'pattern: "*"',
        'layers: ["hidden.{n}.*", "*"], layer_decay: 0.75',
        "param_groups.all.layers: pattern 'hidden.{n}.*' matches no parameter; the model has hidden1.weight",
    ),
    space(
        'pattern: "*"',
        'layers: ["hidden{n}.*"], layer_decay: 0.75',
        "param_groups: no group takes fc.weight",
    ),
    space("epochs: 4", "epochs: 4\nno_weight_decay: {}", "no_weight_decay: needs a pattern or dims in each rule"),
    space("epochs: 4", "epochs: 4\nno_weight_decay: []", "no_weight_decay: must hold at least one value"),
    space(
        "epochs: 4", "epochs: 4\nno_weight_decay: {dim: 1}", "no_weight_decay.0.dim: unknown key; did you mean dims?"
    ),
    space(
        "epochs: 4", "epochs: 4\nno_weight_decay: [{dims: 1}, {pattern: norm*}]", "no_weight_decay: pattern 'norm*' "
    ),
    space("all:", "a.b:", "param_groups.a.b: must be letters, digits, '_' and '-'"),
    # Data, model, objective.
    space(
        "name: digits",
        "name: digit",
        "image_folder, own, got the text 'digit'; did you mean digits?",
    ),
    space("model: mlp", "model: mpl", "workload.model: must be one of cnn, mlp, got the text 'mpl'; did you mean mlp?"),
    space("epochs: 4", "epochs: 0", "epochs: must be >= 1, got 0"),
    space("batch_size: 64", "batch_size: 1258", "batch_size: must be at most the 1257 training samples, got 1258"),
    space("size: 64", "size: 64\naccumulate: 21", "accumulate: must be at most the 20 batches of an epoch, got 21"),
    space("size: 64", "size: 64\naccumulate: 0", "accumulate: must be >= 1, got 0"),
    space("size: 64", "size: 64\nema: 1.0", "ema: must be < 1, got 1.0"),
    space("size: 64", "size: 64\nema: 0", "ema: must be > 0, got 0"),
    space(
        "size: 64", "size: 64\nprecision: fp16", "precision: must be one of fp32, tf32, bf16, fp64, got the text 'fp16'"
    ),
    space("size: 64", "size: {choices: [64, 1258]}", "batch_size: must be at most the 1257 training samples, got 1258"),
    space("size: 64", "size: {low: 8, high: 64}", "batch_size: must be one value or `{choices: […]}`, got a range"),
    space("size: 64", "size: {choices: [64, 0]}", "batch_size.choices.1: must be >= 1, got 0"),
    space(
        "size: 64",
        "size: {choices: [64, 32]}\nenqueue: [{batch_size: 16}]",
        "enqueue.0.batch_size: must be one of 64, 32, as in this space, got 16",
    ),
    space(
        "size: 64", "size: {choices: [64, 32]}\nsteps_per_epoch: 20", "must be one number for each batch_size, 2, got 1"
    ),
    space(
        "name: digits, model: mlp",
        "name: own, function: a.py:f, arguments: {width: {choices: [8, 16]}}",
        "workload.arguments.width: arguments of a workload cannot be searched, got {'choices': [8, 16]}",
    ),
    space(
        "name: digits, model: mlp",
        "name: own, function: a.py:f, arguments: {net: {width: {low: 8, high: 16}}}",
        "workload.arguments.net.width: arguments of a workload cannot be searched, got {'low': 8, 'high': 16}",
    ),
    space("epochs: 4", "epochs: 4\nobjective: {of: bets}", "objective.of: must be one of last, best", "mean best?"),
    space("epochs: 4", "epochs: 4\nobjective: {metric: val/acuracy}", "unknown metric", "did you mean val/accuracy?"),
    space(
        "epochs: 4", "epochs: 4\nobjective: {metric: val/loss}", "objective.direction: must be minimize for val/loss"
    ),
    # Data sets of torchvision's, image folders.
    space("{name: digits, model: mlp}", "{name: cifar10}", "workload.folder: CIFAR10 needs files", "data_batch_1, "),
    space("{name: digits, model: mlp}", "{name: mnist, modell: resnet9}", "workload.modell: unknown", "model?"),
    space("{name: digits, model: mlp}", "{name: image_folder, folder: photos}", "there is no folder 'photos'"),
    space("{name: digits, model: mlp}", "{name: image_folder}", "workload.folder: is missing"),
    space("{name: digits, model: mlp}", '{name: image_folder, folder: "\\e]0;x\\a"}', "is no folder '\\x1b]0;x\\x07';"),
    space("{name: digits, model: mlp}", "{name: image_folder, folder: a, image_size: 4}", "must be >= 8, got 4"),
    # A config to train.
    option("train", "the following arguments are required: CONFIG"),
    option(
        "train missing.yaml",
        "missing.yaml: 1 problem",
        "there is no such file; a path is relative to the working folder",
    ),
    option(
        "train mine.yaml --out nowhere/model.pt", "--out: 1 problem", "there is no folder", "nowhere; make it first"
    ),
    option(
        "train mine.yaml --set epochs=x --set seed=1",
        "mine.yaml with --set epochs --set seed: 1 problem",
        "epochs: must be",
    ),
    option("search --set \x1b[31m=[", "argument --set: \\x1b[31m: expected the node", "got '['"),
    option("search --set \x1b[31m=1", "default.yaml with --set \\x1b[31m: 1 problem", "\\x1b[31m: unknown key"),
    option(f"search --set {'x' * 9999}=1", "default.yaml with --set xxx", "xxx… (9799 more) …xxx", "xxx: unknown key"),
    option("search --workload task.py", "--workload: must name a function, task.py:function, got 'task.py'"),
    option("search --workload own", "argument --workload: unknown workload 'own'; known: digits, "),
    option("search --set workload=mnist", "own.yaml with --set workload: 1 problem", "workload: must be a mapping"),
    option("search --set seed=x", "default.yaml with --set seed: 1 problem", "seed: must be a whole number"),
    option("train mine.yaml --out=", "argument --out: must be the path of a file, got ''"),
    option("search --workload mnst", "argument --workload: unknown workload 'mnst'; did you mean mnist?"),
    option(
        "search --workload line",
        "unknown workload 'line'; known: digits, ",
        "one of your own is path/to/file.py:function",
    ),
    option("train mine.yaml", "optimizer.sgd.base_lr: must be one value in a config, got a choice"),
    config(
        "model: mlp", "model: mpl", "workload.model: must be one of cnn, mlp, got the text 'mpl'; did you mean mlp?"
    ),
    config("batch_size: 64", "batch_size: 1258", "batch_size: must be at most the 1257 training samples, got 1258"),
    config("size: 64", "size: {choices: [64, 32]}", "batch_size: must be one value in a config, got a choice"),
    config(
        "epochs: 4", "epochs: 4\nobjective: {metric: val/f1, of: best}", "objective.metric: unknown metric 'val/f1'"
    ),
    config("epochs: 4", "epochs: 4\nfound: lost", "found: must be a mapping, got 'lost'"),
    config(
        "{name: digits, model: mlp}",
        "{name: own, function: 'python:sine'}",
        "workload.function: python:sine was made in Python; train it there, with train(…, workload=…)",
    ),
    Refused("train mine.yaml", ("mine.yaml: 1 problem", "line 4, column 9: could not find expected ':'"), CONFIG[:70]),
    Refused("train mine.yaml", ("mine.yaml: 1 problem", "must be UTF-8 text, got byte 0x80"), bytes(range(256))),
    # No study.
    option("export", "--root: 1 problem", NO_STUDY),
    option("export --study default-1", "--root: 1 problem", NO_STUDY),
    option("export --format mlflow", "--out: 1 problem\n  is missing: a model is a folder; add --out DIR"),
    option("export --format mlflow --out mine.yaml", "mine.yaml: exists already; name another, or remove it"),
    option("export --format mlflow --out new/model", "there is no folder"),
    option("export --format xml", "argument --format: invalid choice: 'xml' (choose from"),
    option("export mine.yaml --trial 1", "CONFIG is a config by itself; leave --study, --trial and --seed away"),
    option("export none.yaml", "none.yaml: 1 problem\n  there is no such file"),
    option("export --trial -1", "argument --trial: must be a whole number from 0 to 1000000000, got '-1'"),
]


def refuse(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must refuse, and return what it says."""
    name, *arguments = command.split(" ")
    before = listing()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: COMMANDS[name](arguments))
    output = capsys.readouterr()
    assert caught.value.code == 2, output.err
    assert "Traceback" not in output.err
    assert output.out == ""
    assert listing() == before
    return output.err


def listing() -> dict[Path, bytes | None]:
    """Return all that is below the working folder, but for what SQLite and Python do with files that are read."""
    paths = [path for path in Path().rglob("*") if not path.name.endswith(("-wal", "-shm", ".pyc", "__pycache__"))]
    return {path: path.read_bytes() if path.is_file() and path.suffix != ".db" else None for path in paths}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_bad_input_is_refused_in_plain_words_and_nothing_is_written(
    case: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which the folder of own code is added
    shutil.copy(Path(__file__).parent / "own_optimizers.py", "own.py")
    Path("broken.py").write_text("1 / 0\n")
    Path("mine.yaml").write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    said = refuse(case.command, capsys)
    assert [word for word in case.words if word not in said] == [], said
    assert "secret" not in said


@pytest.mark.parametrize(
    "content",
    [
        SPACE + "".join(f"key{n}: 1\n" for n in range(3000)),
        SPACE + "a" * 50_000 + ": 1\n",
        SPACE.replace("name: digits", f"name: {'d' * 50_000}"),
        SPACE.replace(RANGE, f"{{choices: [{', '.join('a' for _ in range(9000))}]}}"),
        SPACE + f"objective: {{metric: {'loss' * 9000}}}\n",
    ],
    ids=["many keys", "a long key", "a long name", "many choices", "a long metric"],
)
def test_a_message_is_short_however_long_the_values_are(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(content)
    said = refuse("search --space mine.yaml", capsys)
    assert "mine.yaml: " in said
    assert len(said) < 5000  # 20 problems, each with at most some 250 characters


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cuda: there is no CUDA device; use --device cpu, or auto" in refuse("search --device cuda", capsys)


def test_a_database_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SPACE)
    Path("mlruns").mkdir()
    Path("mlruns/optuna.db").write_text("not a database " * 100)
    for command in ("search --space mine.yaml", "search --study mine-1", "export"):
        said = refuse(command, capsys)
        assert "mlruns/optuna.db: 1 problem" in said
        assert "cannot be used as Optuna's database" in said
        assert "file is not a database; move it away, or name another --root" in said
    Path("mlruns/optuna.db").unlink()
    Path("mlflow.db").write_text("not a database " * 100)
    said = refuse("search --space mine.yaml", capsys)
    assert "mlflow.db: 1 problem\n  cannot be used as MLflow's database: file is not a database; move it away" in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    MLflowTracker(Path())  # which is not used then


def test_a_link_below_the_root_is_refused_rather_than_followed_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SPACE)
    Path("mlruns").mkdir()
    Path("elsewhere").mkdir()
    for name in ("mlflow.db", "mlruns/optuna.db", "mlruns/artifacts", "mlruns/lr_range-mine.png"):
        for target in (Path("unmounted/file").absolute(), Path("elsewhere").absolute()):
            Path(name).symlink_to(target)
            command = "lr_range" if name.endswith("png") else "search"
            said = refuse(f"{command} --space mine.yaml", capsys)
            assert "--root: 1 problem\n" in said
            assert f"{name}: is a link to {target}; links below a root are not followed" in said
            assert Path(name).is_symlink()
            Path(name).unlink()


@pytest.mark.parametrize("command", ["train mine.yaml", "export"])
def test_what_is_no_file_is_not_replaced_by_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIG)
    os.mkfifo("pipe")
    assert "pipe: cannot be written: Not a regular file; name another" in refuse(f"{command} --out pipe", capsys)
    assert Path("pipe").is_fifo()


def test_a_database_that_another_process_holds_is_not_taken_for_a_broken_one(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("BEGIN EXCLUSIVE")
        MLflowTracker(tmp_path)


def test_a_database_in_which_a_kill_cut_a_transaction_short_is_none_that_is_broken(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "killed.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("INSERT INTO t VALUES ('before')")
        database.execute("PRAGMA cache_size = 1")  # pages: whatever is more goes into the file before its time
        database.execute("BEGIN")
        database.executemany("INSERT INTO t VALUES (?)", [("after" * 500,)] * 100)
        for left in ("", "-journal"):
            shutil.copy(tmp_path / f"killed.db{left}", tmp_path / f"mlflow.db{left}")
    MLflowTracker(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("SELECT x FROM t").fetchall() == [("before",)]


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a study of two trials, one without trials, and one that another program made."""
    root = tmp_path_factory.mktemp("studies")
    (root / "mine.yaml").write_text(SPACE)
    space = load_space(root / "mine.yaml")
    study = Store(root).create(space, name="mine-1", trials=2, rules=RULES)
    for number in range(2):
        study.add(pruned_trial(number))
    Store(root).create(space, name="mine-2", trials=2, rules=RULES)
    optuna.create_study(study_name="theirs", storage=f"sqlite:///{root}/mlruns/optuna.db")
    return root


def pruned_trial(number: int) -> EndedTrial:
    config = TrialConfig(
        workload=Digits(model="mlp"),
        epochs=4,
        batch_size=64,
        seed=0,
        optimizer=SGD(base_lr=0.1),
        scheduler=Constant(),
        param_groups={"all": ParamGroup(pattern=("*",))},
    )
    metrics = {"train/loss": 1.0, "val/loss": 1.0, "val/accuracy": 0.5}
    return EndedTrial(
        number=number,
        config=config,
        params={"sgd.base_lr": 0.1},
        state=TrialState.PRUNED,
        objective=Objective(),
        reason="worse than half",
        value=None,
        epochs=(EpochMetrics(epoch=1, step=20, metrics=metrics, lr={}),),
        started=1.0,
        ended=2.0,
        environment={},
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "search --study mine-1 --seed 3",
            [
                "--study mine-1",
                "seed: the study has 0, this search 3",
                "keeps its seed; choose another --study, or --seed 0",
            ],
        ),
        (
            "search --study mine-1 --space other.yaml",
            [
                "batch_size: the study has 64, this search 32",
                "optimizer.sgd.base_lr.high: the study has 1.0, this search 0.5",
            ],
        ),
        ("search --study theirs --space mine.yaml", ["--study", "theirs: was made by another program"]),
        ("export --study mine1", ["mine1: there is no such study; did you mean mine-1?"]),
        ("export --study theirs", ["theirs: there is no such study; known: mine-1, mine-2"]),
        ("export --study mine-1", ["mine-1: no trial is complete", "name one with --trial"]),
        ("export --study mine-1 --trial 2", ["--trial", "2: there is no such trial; the last of mine-1 is 1"]),
        ("export --study mine-2 --trial 0", ["--trial", "0: there is no such trial; mine-2 has none yet"]),
        ("export --study mine-1 --trial 0 --out mine.yaml/x", ["--out", "mine.yaml/x: there is no folder"]),
        ("export --study mine-1 --trial 0 --out mlruns", ["--out", "mlruns: cannot be written: Is a directory"]),
    ],
)
def test_what_does_not_fit_the_studies_is_refused(
    command: str,
    words: Sequence[str],
    studies: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(studies)
    Path("other.yaml").write_text(SPACE.replace("batch_size: 64", "batch_size: 32").replace("high: 1.0", "high: 0.5"))
    said = refuse(command, capsys)
    assert [word for word in words if word not in said] == [], said


def test_a_folder_may_have_the_signs_of_urls_in_its_name(tmp_path: Path) -> None:
    root = tmp_path / "a?b#c%20d é"
    root.mkdir()
    (root / "mine.yaml").write_text(SPACE)
    Store(root).create(load_space(root / "mine.yaml"), name="mine-1", trials=2, rules=RULES)
    assert [header.name for header in Store(root).headers()] == ["mine-1"]
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


def test_a_terminal_that_lacks_a_character_shows_its_code() -> None:
    code = "from pipeline.app import cli; cli.run(lambda: print('8×8') or 0)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "8\\xd78\n"


def test_a_root_may_be_given_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.folder("~/runs") == tmp_path / "runs"
    assert cli.folder("runs/~") == Path("runs/~")


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("search", ["--trials", "0"], "argument --trials: must be a whole number from 1 to 1000000000, got '0'"),
        ("search", ["--space", "mine.yaml"], "optimizer.sdg: unknown optimizer; did you mean sgd?"),
        ("train", ["mine.yaml"], "optimizer.sdg: unknown optimizer; did you mean sgd?"),
        ("export", [], NO_STUDY),
    ],
)
def test_a_real_process_refuses_alike(module: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SPACE.replace("sgd:", "sdg:"))
    command = [sys.executable, "-m", f"pipeline.{module}", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("module", "arguments", "status"),
    [
        ("search", ["--help"], 0),
        ("search", ["--trials", "0"], 2),
        ("search", ["--space", "mine.yaml"], 2),
        ("search", ["--root", "mine.yaml/x"], 2),
        ("lr_range", ["--space", "mine.yaml"], 2),
        ("lr_range", ["--space", "decay", "--write"], 2),
        ("train", ["mine.yaml"], 2),
        ("export", ["--help"], 0),
    ],
)
def test_help_and_form_errors_do_not_wait_for_torch(
    module: str, arguments: list[str], status: int, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(SPACE.replace("sgd:", "sdg:"))
    code = f"""
import sys
from pipeline import {module}
from pipeline.app import cli
from pipeline.errors import InvalidInput
try:
    cli.run(lambda: {module}.main({arguments!r}))
except SystemExit as ended:
    print(ended.code, *{{"torch", "optuna", "mlflow", "sklearn"}} & sys.modules.keys(), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == str(status)


def test_a_password_is_refused_wherever_the_storage_is_named_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("postgresql://me:secret@host/db", Path("postgresql://me:secret@host/db"), 3, b"me:secret@host"):
        for call in (search.search, confirm.confirm):
            with pytest.raises(InvalidInput) as refused:
                call(storage=url)  # type: ignore[arg-type]
            assert re.search(r": 1 problem\n  storage: (has a password|must be the URL of)", str(refused.value))
            assert "secret" not in str(refused.value)
    monkeypatch.setenv("PIPELINE_STORAGE", "postgresql://me:secret@host/db")
    for command in ("search", "confirm", "report", "export", "search --delete x"):
        said = refuse(command, capsys)
        assert said.startswith("PIPELINE_STORAGE: 1 problem\n  ")
        assert "secret" not in said


def test_a_storage_without_its_driver_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    said = refuse("search --storage postgresql://me@host/db", capsys)
    assert "needs the package psycopg, which is not installed; run pip install 'psycopg[binary]'" in said


STORES = {
    "file:///data/runs": "MLflow no longer writes to folders of files; unset it to use --root, or set it to a "
    "database, such as sqlite:///ROOT/mlflow.db; `mlflow migrate-filestore --source /data/runs ",
    "mlruns": "MLflow no longer writes to folders of files; ",
    "foo://host": "MLflow has no store of the scheme 'foo'; unset it",
    "ftp://me:secret@host/x?token=abc": "MLflow has no store of the scheme 'ftp'; unset it",
    "https://": "names no server; write https://host:port, or unset it",
    "sqlite://": "is a database in memory, which ends with its process; unset it",
    "sqlite:///:memory:": "is a database in memory, which ends with its process; unset it",
    "postgresql+foo://me:secret@host/runs?password=secret": "cannot be read: Can't load plugin: ",
    "postgresql://me:secret@host:port/runs": "cannot be read: ",
}


@pytest.mark.parametrize("uri", STORES)
def test_a_uri_that_is_no_store_of_mlflows_is_refused_at_once_with_the_remedy(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InvalidInput) as refused:
        MLflowTracker(tmp_path)
    said = str(refused.value)
    assert said.startswith("MLFLOW_TRACKING_URI: 1 problem\n  ")
    assert STORES[uri].replace("ROOT", str(tmp_path)) in said
    assert "sqlite:///" in said
    assert not {"secret", "abc"} & {*re.split(r"\W+", said)}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(
    ("version", "words"),
    [
        (
            "cfd24bdc0731",
            "is of an earlier version of MLflow; copy the file, then run `mlflow db upgrade sqlite:///FILE`",
        ),
        (
            "v3.2.0.a",
            "is of schema v3.2.0.a, which the installed MLflow does not know; install the MLflow that made it",
        ),
    ],
)
def test_a_database_of_another_mlflow_is_refused_at_once_with_the_remedy(
    version: str, words: str, chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    if chosen:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num)")
        database.execute("INSERT INTO alembic_version VALUES (?)", [version])
    before = file.read_bytes()
    with pytest.raises(InvalidInput) as refused:
        MLflowTracker(tmp_path / "elsewhere" if chosen else tmp_path)
    assert words.replace("FILE", str(file)) in str(refused.value)
    assert str(refused.value).endswith("or set MLFLOW_TRACKING_URI to another" if chosen else "or name another --root")
    assert file.read_bytes() == before


def test_workers_without_ray_name_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"--workers: needs Ray: pip install 'lr-strategy-search\[ray\]'$"):
        search.main(["--workers", "2"])
    assert list(tmp_path.iterdir()) == []
