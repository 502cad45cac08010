"""Transformers as people train them: layer-wise decay, no weight decay of biases and norms, cosine per step."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search import search_until
from tiny import BATCH, SAMPLES, STEPS_PER_EPOCH, on_device, tiny_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import pipeline.train
from pipeline.app.best_yaml import config_file
from pipeline.app.display import best_table, strategy_line
from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput
from pipeline.space.config import TrialConfig
from pipeline.space.load import load_config, load_space
from pipeline.space.optimizers import SGD, AdamW, Optimizer
from pipeline.space.param_groups import ParameterRule, ParamGroup
from pipeline.space.ready_made import find_space
from pipeline.space.schedules import Cosine
from pipeline.study.store import Store
from pipeline.tracking.record import epoch_points, trial_params
from pipeline.training.optim import group_parameters, replay_rates
from pipeline.training.plain import PlainTrial, PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.data import epoch_order
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TOKENS = 7


class Block(nn.Module):
    """Attention with one head, and two layers of 8 units."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12, bias=False)  # the bias of a key has no gradient but rounding
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, place, feature) to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Two blocks, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 4)
        self.pos = nn.Parameter(torch.zeros(5, 4))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, place) to logits (batch, token)."""
        x = self.embed(tokens) + self.pos
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)).mean(dim=1)
        return logits


def transformer() -> Workload:
    """Return a workload that asks for the first token of five."""
    tokens = torch.randint(0, TOKENS, (SAMPLES + 20, 5), generator=torch.Generator().manual_seed(0))
    train, val = (Split(part, part[:, 0].clone()) for part in tokens.split([SAMPLES, 20]))
    return Workload(
        name="transformer",
        build_model=Transformer,
        train=train,
        val=val,
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def layered(optimizer: Optimizer, layer_decay: float, **changes: Any) -> TrialConfig:
    groups = {
        "norm": ParamGroup(pattern=("norm.*",), lr_ratio=3.0),
        "body": ParamGroup(layers=(("embed.*", "pos"), ("blocks.0.*",), ("blocks.1.*",)), layer_decay=layer_decay),
    }
    schedule = Cosine(interval="step", warmup=3, eta_min=1e-4)
    return tiny_config(
        optimizer,
        schedule,
        param_groups=groups,
        no_weight_decay=(ParameterRule(dims=(1,)), ParameterRule(pattern=("pos",))),
        clip_grad_norm=1.0,
        **changes,
    )


CONFIGS = {
    0: layered(AdamW(base_lr=0.01, weight_decay=0.3), 0.5),
    1: layered(AdamW(base_lr=0.03, weight_decay=0.1), 0.75),
    2: layered(SGD(base_lr=0.1, momentum=0.9, weight_decay=0.05), 1.0),
}


def test_the_torch_optimizer_has_a_group_per_layer_and_decay() -> None:
    config = layered(AdamW(base_lr=0.25, weight_decay=0.1), 0.5)
    trial = PlainTrial(config, transformer(), device=CPU, dtype=torch.float32, draws=())
    (optimizer,) = trial.strategy.optimizers
    assert [(g["group"], g["initial_lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        ("norm.no_weight_decay", 0.75, 0.0, 2),
        ("body.0", 0.0625, 0.1, 1),
        ("body.0.no_weight_decay", 0.0625, 0.0, 1),
        ("body.1", 0.125, 0.1, 3),
        ("body.1.no_weight_decay", 0.125, 0.0, 6),
        ("body.2", 0.25, 0.1, 3),
        ("body.2.no_weight_decay", 0.25, 0.0, 6),
    ]
    names = [name for name, _ in group_parameters(config, trial.model)["body.1"]]
    assert names == ["blocks.0.qkv.weight", "blocks.0.up.weight", "blocks.0.down.weight"]


def test_a_pattern_of_the_tied_head_is_refused_with_the_name_under_which_it_is_listed() -> None:
    groups = {"head": {"pattern": "head.*"}, "all": {"pattern": "*"}}
    space = load_space(find_space(Path("transformer")), {"param_groups": groups})
    tied = "head.weight is tied to embed.weight, listed as embed.weight; use that name or remove it"
    with pytest.raises(InvalidInput, match=re.escape(f"param_groups.head: pattern 'head.*' takes nothing: {tied}")):
        prepare(space, source="mine", device="cpu", searching=True, workload=transformer())


def test_rows_with_layers_equal_plain_trials() -> None:
    workload = on_device(transformer(), device=CPU, dtype=torch.float64)
    rows, plain = (
        trainer(CONFIGS, workload, device=CPU, dtype=torch.float64) for trainer in (FusedTrials, PlainTrials)
    )
    for _ in range(3):
        found, expected = rows.train_epoch(), plain.train_epoch()
        for number in CONFIGS:
            assert found[number].metrics == pytest.approx(expected[number].metrics, rel=1e-9, abs=1e-12)
            assert found[number].lr == expected[number].lr
            assert list(found[number].lr) == ["norm", "body.0", "body.1", "body.2"]
    for number in CONFIGS:
        for name, value in plain.model_state(number).items():
            assert torch.allclose(rows.model_state(number)[name], value, rtol=1e-9, atol=1e-12), name


def test_a_trial_with_layers_equals_a_loop_by_hand() -> None:
    workload, config = transformer(), CONFIGS[1]
    assert isinstance(workload.train, Split)
    assert isinstance(workload.val, Split)
    trial = PlainTrials({0: config}, workload, device=CPU)
    torch.manual_seed(0)
    model = Transformer()
    model.load_state_dict(trial.model_state(0))

    def layer(name: str) -> int:
        block = re.match(r"blocks\.(\d+)\.", name)
        return 1 + int(block[1]) if block else 0

    groups = []
    for name, parameter in model.named_parameters():
        rate = 0.03 * (3.0 if name.startswith("norm.") else 0.75 ** (2 - layer(name)))
        decay = 0.0 if parameter.ndim <= 1 or name == "pos" else 0.1
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)
    ramp = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 4 * STEPS_PER_EPOCH - 3, eta_min=1e-4)
    schedule = lr_scheduler.SequentialLR(optimizer, [ramp, cosine], [3])
    for epoch in range(2):
        for batch in epoch_order(workload, seed=0, epoch=epoch).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(workload.train.inputs[batch]), workload.train.targets[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            loss = F.cross_entropy(model(workload.val.inputs), workload.val.targets)
        assert trial.train_epoch()[0].metrics["val/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_frozen_group_freezes_its_layers_and_records_rates_of_0() -> None:
    config = CONFIGS[0]
    frozen = dataclasses.replace(config.param_groups["body"], lr_ratio=0.0)
    config = dataclasses.replace(config, param_groups={**config.param_groups, "body": frozen})
    workload = on_device(transformer(), device=CPU)
    for trainer in (FusedTrials, PlainTrials):
        group = trainer({0: config}, workload, device=CPU)
        before = group.model_state(0)
        epoch = group.train_epoch()[0]
        assert [{rate for _, rate in epoch.lr[f"body.{layer}"]} for layer in range(3)] == [{0.0}] * 3
        after = group.model_state(0)
        assert {name for name in after if not torch.equal(after[name], before[name])} == {"norm.weight", "norm.bias"}


def test_the_rates_of_layers_are_recomputed_from_the_config() -> None:
    workload = on_device(transformer(), device=CPU)
    epochs = [PlainTrials({0: CONFIGS[0]}, workload, device=CPU).train_epoch()[0]]
    bare = [dataclasses.replace(epoch, lr={}) for epoch in epochs]
    assert replay_rates(CONFIGS[0], bare, directions=workload.directions) == tuple(epochs)


def test_a_search_of_the_ready_made_space_finds_one_layer_decay_and_records_every_layers_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {"layers": [["embed.*", "pos"], "blocks.{n}.*", "norm.*"], "layer_decay": {"low": 0.5, "high": 1.0}}
    workload = {"name": "own", "function": f"{__file__}:transformer"}
    overrides = {"workload": workload, "param_groups": {"all": layers}, "epochs": 2, "batch_size": BATCH}
    given = load_space(find_space(Path("transformer")), overrides)
    store = Store(tmp_path)
    space, executor = prepare(given, source="transformer", device="cpu", searching=True)
    study = store.create(space, name="layers", trials=4, rules=executor.rules)
    search_until(store, study, executor, epochs=None)
    assert store.choose(space, trials=4, name="layers") == ("layers", True)

    best = study.best()[0]
    decay = best.config.param_groups["all"].layer_decay
    assert decay is not None
    assert best.params["layer_decay.all"] == decay
    assert f"all layers ×{decay:.2g}" in strategy_line(best.config, space)
    table = best_table(study.best(), space)
    assert (table.columns[-1].header, next(iter(table.columns[-1].cells))) == ("all layer decay", f"{decay:.3g}")
    assert trial_params(best.config)["layer_decay.all"] == str(decay)
    points = epoch_points(best.epochs[0], epochs=best.config.epochs)
    first = {name: value for name, step, value in points if name.startswith("lr/") and step == 1}
    assert list(first) == ["lr/all.0", "lr/all.1", "lr/all.2", "lr/all.3"]
    ratios = [rate / best.config.optimizer.base_lr for rate in first.values()]
    assert ratios == pytest.approx([0.01 * decay**3, 0.01 * decay**2, 0.01 * decay, 0.01])

    path = tmp_path / "best.yaml"
    path.write_text(config_file(study, best))
    _, config, _ = load_config(path)
    assert config == best.config
    assert config.param_groups["all"].layers == (("embed.*", "pos"), ("blocks.0.*",), ("blocks.1.*",), ("norm.*",))
    assert config.no_weight_decay == (ParameterRule(dims=(1,)),)
    assert pipeline.train.main([str(path), "--device", "cpu", "--out", str(tmp_path / "model.pt")]) == 0
    assert "repeated      every metric of the search, to the last bit" in capsys.readouterr().out
