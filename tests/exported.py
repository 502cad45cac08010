"""Run exported code where this package cannot be imported: `python -I exported.py CASES RESULTS`."""

from __future__ import annotations

import contextlib
import importlib.abc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Net(nn.Module):
    """Parameters of 1, 2 and 4 dimensions in several layers, for images (batch, 1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 1, 4, 4) to logits (batch, class)."""
        features = F.relu(self.norm(self.conv(inputs))).flatten(1)
        for block in self.blocks:
            features = features + torch.tanh(block(features))
        logits: Tensor = self.head(features)
        return logits


LEFT_OUT = ("params", "group", "initial_lr")
"""The project names groups, and has a scheduler even for a constant rate."""
Updates = list[dict[str, dict[str, Any]]]
"""For each update, parameter name to the options of its group, the rate among them."""


@contextlib.contextmanager
def recorded() -> Iterator[tuple[list[nn.Module], Updates]]:
    """Record the updates of all optimizers; the last module of the yielded list names the parameters."""
    models: list[nn.Module] = []
    updates: Updates = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        names = {id(parameter): name for name, parameter in models[-1].named_parameters()}
        options = {
            names[id(parameter)]: {name: value for name, value in group.items() if name not in LEFT_OUT}
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if options:  # Muon may have nothing to update
            updates.append(options)

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield models, updates
    finally:
        handle.remove()


class Loader:
    """Gives the recorded batches of one epoch after the other."""

    def __init__(self, epochs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
        self._epochs = iter(epochs)
        self._length = len(epochs[0])

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(next(self._epochs))


class Refused(importlib.abc.MetaPathFinder):
    """Lets nothing import this package."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "pipeline":
            raise ImportError(f"{name} is not for exported code")


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train with exported code; return the updates and the model's state."""
    namespace: dict[str, Any] = {}
    exec(compile(case["code"], case["name"], "exec"), namespace)
    model = Net()
    model.load_state_dict(case["state"])
    metrics = iter(case["metrics"])
    validate = [lambda model: next(metrics)] if case["metrics"] else []
    with recorded() as (models, updates):
        models.append(model)
        averaged = namespace["train"](model, Loader(case["epochs"]), F.cross_entropy, *validate)
    torch.use_deterministic_algorithms(False)
    return {"updates": json.dumps(updates), "state": (averaged or model).state_dict()}


if __name__ == "__main__":
    sys.meta_path.insert(0, Refused())
    torch.set_num_threads(1)
    torch.save([run(case) for case in torch.load(sys.argv[1], weights_only=True)], Path(sys.argv[2]))
