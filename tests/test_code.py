"""Exported code trains as the project does, without the project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import Net, recorded
from test_optim import HYPERPARAMETERS
from tiny import tiny_config
from torch.nn import functional as F

from pipeline.app.code import python_code
from pipeline.space import own_code
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import OPTIMIZERS, SGD, Adam, AdamW, Muon, Optimizer, OwnOptimizer
from pipeline.space.param_groups import ParameterRule, ParamGroup
from pipeline.space.schedules import (
    Constant,
    Cosine,
    CosineWarmRestarts,
    Cyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    OwnScheduler,
    Plateau,
    Polynomial,
    Step,
)
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import dtype_of, precision
from pipeline.workloads.build import built_model
from pipeline.workloads.data import to_device, training_batches
from pipeline.workloads.workload import Metric, Split, Workload

TESTS = Path(__file__).parent
OWN = str(TESTS / "own_optimizers.py")
CPU = torch.device("cpu")
DIRECTIONS = {"val/accuracy": "maximize"}
EPOCHS, BATCH = 4, 19
"""A batch of 19 and one of 18, so 8 steps."""
ACCURACIES = (0.5, 0.4, 0.6, 0.55)
"""What validation is said to give after each epoch."""
ONE = {"all": ParamGroup(pattern=("*",))}
TWO = {"head": ParamGroup(pattern=("head.*",), lr_ratio=2.41), "body": ParamGroup(pattern=("*",))}
LAYERS = (("conv.*", "norm.*"), ("blocks.0.*",), ("blocks.1.*",))
GROUPS: dict[str, dict[str, Any]] = {
    "no decay of vectors": {"param_groups": TWO, "no_weight_decay": (ParameterRule(dims=(0, 1)),)},
    "no decay by name or dims": {
        "param_groups": ONE,
        "no_weight_decay": (ParameterRule(pattern=("norm.*", "*.bias"), dims=(1,)), ParameterRule(dims=(4,))),
    },
    "a frozen group": {
        "clip_grad_norm": 0.05,  # of the gradients of the others
        "param_groups": {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)},
    },
    "own weight decay": {
        "param_groups": {
            "lambda": ParamGroup(pattern=("head.*",), weight_decay=0.3),
            "4 d": ParamGroup(dims=(4,), lr_ratio=0.5),
            "blocks": ParamGroup(pattern=("*s.0.*", "blocks.[1-9].*"), dims=(1, 2), weight_decay=0.0),
            "rest": ParamGroup(pattern=("*norm*", "conv.bias")),
        }
    },
    "layers": {
        "param_groups": {
            "head": ParamGroup(pattern=("head.*",), lr_ratio=3.0),
            "body": ParamGroup(layers=LAYERS, layer_decay=0.7, lr_ratio=1.3),
        },
        "no_weight_decay": (ParameterRule(dims=(1,)),),
    },
    "frozen layers": {
        "param_groups": {
            "body": ParamGroup(layers=LAYERS, layer_decay=0.7, lr_ratio=0.0),
            "head": ParamGroup(pattern=("*",), weight_decay=0.1),
        }
    },
    "one group with a ratio": {"param_groups": {"all": ParamGroup(pattern=("*",), lr_ratio=0.3, weight_decay=0.2)}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"clip_grad_norm": 0.05, "param_groups": TWO},
    "accumulated": {"accumulate": 2},
    "accumulated and clipped": {"accumulate": 2, "clip_grad_norm": 0.1},
    "averaged": {"ema": 0.8, "accumulate": 3},
    "bf16": {"precision": "bf16"},
    "fp64": {"precision": "fp64"},
    "channels_last": {"channels_last": True},
    "deterministic": {"deterministic": True},
}


def schedules() -> Iterator[Any]:
    yield Constant()
    yield OneCycle(interval="epoch")
    yield OneCycle(cycle_momentum=True, three_phase=True)
    yield Cyclic(max_lr_ratio=3.0, step_size_up=3, step_size_down=2, mode="triangular2")
    yield Cyclic(max_lr_ratio=3.0, step_size_up=1, interval="epoch", cycle_momentum=True)
    for metric in ("train/loss", "val/loss", "val/accuracy"):
        yield Plateau(metric=metric, factor=0.3, patience=0, threshold=0.0, threshold_mode="abs", min_lr=1e-3)
    for interval, length, warmup in (("epoch", 1, 0), ("epoch", 1, 2), ("step", 2, 0), ("step", 2, 3)):
        shared: dict[str, Any] = {"interval": interval, "warmup": warmup, "warmup_start_factor": 0.21}
        if warmup:
            yield Constant(**shared)
        yield Step(step_size=length, gamma=0.3, **shared)
        yield MultiStep(milestones=(length, length, 2 * length), **shared)
        yield Exponential(gamma=0.9, **shared)
        yield Polynomial(power=2.0, **shared)
        yield Polynomial(total_iters=length + 1, **shared)
        yield Cosine(**shared)
        yield Cosine(T_max=length + 1, eta_min=1e-3, **shared)
        yield CosineWarmRestarts(T_0=length, T_mult=2, **shared)
        yield Linear(**shared)
        yield Linear(start_factor=0.3, end_factor=1.0, total_iters=length + 1, **shared)
    yield OwnScheduler(name=f"{OWN}:below", interval="epoch", hyperparameters={"floor": 0.1})
    yield OwnScheduler(name=f"{OWN}:noam", interval="step", hyperparameters={"warmup_steps": 5})


def cases() -> Iterator[tuple[str, TrialConfig]]:
    for schedule in schedules():
        momentum = 0.9 if getattr(schedule, "cycle_momentum", False) else 0.0
        sgd = SGD(base_lr=0.0123, momentum=momentum)
        yield f"{schedule}", tiny_config(sgd, schedule, epochs=EPOCHS, batch_size=BATCH, param_groups=TWO)
    for schedule in (OneCycle(), Cyclic(max_lr_ratio=3.0, step_size_up=3), Polynomial(interval="step", warmup=2)):
        yield f"{schedule}, one group", tiny_config(scheduler=schedule, batch_size=BATCH, param_groups=ONE)
    for optimizer, _, _ in HYPERPARAMETERS.values():
        for each in (optimizer, OPTIMIZERS[optimizer.name](base_lr=0.01)):
            yield f"{each.name}", tiny_config(each, epochs=1, batch_size=BATCH, param_groups=ONE)
    lion = OwnOptimizer(name=f"{OWN}:Lion", base_lr=0.01, hyperparameters={"betas": (0.9, 0.98), "weight_decay": 0.1})
    yield "own optimizer", tiny_config(lion, Step(step_size=1), epochs=2, batch_size=BATCH, param_groups=TWO)
    muon = Muon(base_lr=0.01)
    for name, changes in GROUPS.items():
        for chosen in (AdamW(base_lr=0.01), SGD(base_lr=0.01, weight_decay=0.1), muon):
            yield f"{name}, {chosen.name}", tiny_config(chosen, OneCycle(), epochs=2, batch_size=BATCH, **changes)
    yield (
        "muon, plateau",
        tiny_config(
            muon, Plateau(metric="val/accuracy", patience=0), epochs=EPOCHS, batch_size=BATCH, param_groups=TWO
        ),
    )
    for name, changes in SETTINGS.items():
        for schedule in (Linear(interval="step"), Plateau(metric="train/loss", patience=0)):
            yield name, tiny_config(SGD(base_lr=0.1), schedule, **{"epochs": 3, "param_groups": ONE, **changes})


CASES = list(cases())


def workload() -> Workload:
    generator = torch.Generator().manual_seed(0)

    def split(samples: int) -> Split:
        inputs = torch.randn(samples, 1, 4, 4, generator=generator)
        return Split(inputs, inputs.sum(dim=(1, 2, 3)).clamp(-1, 1).round().long() + 1)

    accuracies = iter(ACCURACIES)
    metrics = {"accuracy": Metric(lambda outputs, targets: torch.tensor(next(accuracies)), "maximize")}
    return Workload(name="tiny", build_model=Net, train=split(37), val=split(20), loss=F.cross_entropy, metrics=metrics)


def trained(config: TrialConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what exported code needs to train the same, and what the project's reference trainer does."""
    dtype = dtype_of(config.precision)
    placed = to_device(workload(), device=CPU, dtype=dtype)
    model = built_model(placed, seed=config.seed, device=CPU, dtype=dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    epochs = [
        [
            (batch.inputs.clone(), batch.targets)
            for batch in training_batches(placed, config, epoch=n, device=CPU, dtype=dtype)
        ]
        for n in range(config.epochs)
    ]
    with precision(config, CPU), recorded() as (models, updates):
        group = PlainTrials({0: config}, placed, device=CPU, dtype=dtype)
        models.append(group._trials[0].model)
        history = [group.train_epoch()[0] for _ in range(config.epochs)]
    assert all(epoch.finished for epoch in history)
    metric = getattr(config.scheduler, "metric", "train/loss")
    metrics = [] if metric == "train/loss" else [epoch.metrics[metric] for epoch in history]
    case = {"state": state, "epochs": epochs, "metrics": metrics}
    return case, {"updates": json.dumps(updates), "state": group.model_state(0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Train every case by the project, and by its exported code in one interpreter that cannot import the project."""
    own_code.load_own("optimizer", f"{OWN}:Lion")
    for name in ("below", "noam"):
        own_code.load_own("scheduler", f"{OWN}:{name}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, given = [], []
    for name, config in CASES:
        case, result = trained(config)
        code = python_code(config, directions=DIRECTIONS, comment=name)
        given.append({**case, "name": name, "code": code})
        ours.append(result)
    torch.set_num_threads(threads)
    torch.save(given, folder / "cases")
    files = [TESTS / "exported.py", folder / "cases", folder / "results"]
    command = [sys.executable, "-I", "-W", "error", *map(str, files)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(zip(ours, torch.load(folder / "results", weights_only=True), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[name for name, _ in CASES])
def test_exported_code_has_the_projects_rates_and_hyperparameters_and_trains_the_same(number: int, both: Any) -> None:
    ours, theirs = both[number]
    assert json.loads(theirs["updates"]) == json.loads(ours["updates"])
    for name, value in ours["state"].items():
        torch.testing.assert_close(theirs["state"][name], value, rtol=1e-5, atol=1e-6)


SIMPLE = '''
# Trial 31

import torch
from torch.optim import lr_scheduler


def train(model, loader, loss_function):
    """Train a model on a loader of (inputs, targets), 64 samples a batch."""
    epochs = 20
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0031)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=6, gamma=0.21)
    for epoch in range(epochs):
        model.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            optimizer.step()
        scheduler.step()
'''.lstrip()


def test_a_simple_config_is_code_as_a_person_writes_it() -> None:
    schedule = Step(step_size=6, gamma=0.21)
    config = tiny_config(Adam(base_lr=0.0031), schedule, epochs=20, batch_size=64, param_groups=ONE)
    assert python_code(config, directions={}, comment="Trial 31") == SIMPLE


def test_code_is_laid_out_as_a_formatter_does_it(tmp_path: Path) -> None:
    for number, (name, config) in enumerate(CASES):
        if not name.startswith(("own weight decay", "no decay by name or dims")):  # long conditions stay on one line
            (tmp_path / f"code_{number}.py").write_text(python_code(config, directions=DIRECTIONS, comment=name))
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--no-cache", "--diff", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def code_of(optimizer: Optimizer | None = None, **changes: Any) -> str:
    return python_code(tiny_config(optimizer, **changes), directions=DIRECTIONS, comment="")


@pytest.mark.parametrize(
    ("pattern", "test"),
    [
        (("fc.*",), 'name.startswith("fc.")'),
        (("fc.*", "head.*"), 'name.startswith(("fc.", "head."))'),
        (("*.bias",), 'name.endswith(".bias")'),
        (("*norm*",), '"norm" in name'),
        (("head.weight",), 'name == "head.weight"'),
        (("blocks.?.*",), 'fnmatchcase(name, "blocks.?.*")'),
        (("fc.*", "*norm*"), '"norm" in name or name.startswith("fc.")'),
    ],
)
def test_a_pattern_is_the_simplest_test_of_a_name(pattern: tuple[str, ...], test: str) -> None:
    groups = {"head": ParamGroup(pattern=pattern, lr_ratio=2.0), "body": ParamGroup(pattern=("*",))}
    assert f"        if {test}:\n            head.append(parameter)\n        else:\n" in code_of(param_groups=groups)


def test_a_parameter_that_no_group_takes_is_an_error_of_the_code() -> None:
    groups = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("blocks.*",))}
    namespace: dict[str, Any] = {}
    exec(code_of(param_groups=groups), namespace)
    with pytest.raises(ValueError, match=r"^no group takes conv\.weight$"):
        namespace["param_groups"](Net(), 0.1)


def test_the_direction_of_a_metric_that_is_not_known_has_to_be_filled_in() -> None:
    code = code_of(scheduler=Plateau(metric="val/f1"), param_groups=ONE)
    assert 'mode = ...  # "min" if a smaller val/f1 is better, "max" if a larger one is\n' in code
    assert "ReduceLROnPlateau(optimizer, mode=mode)" in code
    assert 'mode="max"' in code_of(scheduler=Plateau(metric="val/accuracy"))
    assert "ReduceLROnPlateau(optimizer)" in code_of(scheduler=Plateau())


def test_own_code_is_imported_from_its_file_under_a_name_of_its_own() -> None:
    own = OwnOptimizer(name="code/mine.py:optimizer", base_lr=0.1, hyperparameters={"name": "x"})
    code = code_of(own, scheduler=OwnScheduler(name="my-file.py:noam", hyperparameters={}), param_groups=ONE)
    assert 'sys.path.append("code")\nfrom mine import optimizer as own_optimizer\n' in code
    assert 'noam = runpy.run_path("my-file.py")["noam"]\n' in code
    assert "import runpy\nimport sys\n" in code
    assert 'optimizer = own_optimizer(model.parameters(), lr=0.1, name="x")\n' in code
    package = OwnOptimizer(name="timm.optim:Lamb", base_lr=0.1, hyperparameters={})
    assert "from timm.optim import Lamb\n" in code_of(package)


def test_arithmetic_on_cuda_is_that_of_the_search() -> None:
    config = tiny_config(param_groups=ONE)
    assert "allow_tf32" not in python_code(config, directions={}, comment="")
    assert "cudnn.allow_tf32 = False" in python_code(config, directions={}, comment="", cuda=True)
    assert "cuda.matmul.allow_tf32 = True" in code_of(precision="tf32")
