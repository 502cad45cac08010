"""Read pretrained weights: torchvision's by name, or a state dict from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InvalidInput, Problem, first_line, listed

PLACE = "workload.weights"
NAMES_SHOWN = 3
"""Names of tensors that a message lists."""


def read_pretrained(model: str, weights: str) -> dict[str, Tensor]:
    """Return a state dict.

    Args:
        model: The name of a model; torchvision may have weights for it.
        weights: A name of torchvision's, such as `DEFAULT` or `IMAGENET1K_V1`, or the path of a file that `torch.save`
            wrote. A file of torchvision's is looked for in torch hub's folder, and downloaded if it is missing.

    Raises:
        InvalidInput: The weights are not available.
    """
    named = _torchvision_weights(model)
    if weights in named:
        return _read_named(model, named[weights])
    path = Path(weights).expanduser()
    if os.path.isfile(path):  # noqa: PTH113 - also False for a text that cannot be a path
        return _read_file(path)
    names = f"{' or '.join(named)}, or " if named else ""
    raise _refusal(f"no file {weights!r}; must be {names}the path of a state dict")


def fit(state: Mapping[str, Tensor], model: nn.Module, *, source: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict that fit a model: all of them, without a last layer of another shape.

    Raises:
        InvalidInput: Tensors are missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    head = _last_layer(model)
    if any(name not in state or state[name].shape != wanted[name].shape for name in head):
        state = {name: tensor for name, tensor in state.items() if name not in head}
        wanted = {name: tensor for name, tensor in wanted.items() if name not in head}
    # Files from before torch 0.4.1 lack BatchNorm's counters, which only a momentum of None uses.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted]
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    named = {"missing": missing, "unknown": unknown, "of another shape": other}
    wrong = "; ".join(f"{what}: {listed(names, show=NAMES_SHOWN)}" for what, names in named.items() if names)
    if wrong:
        raise _refusal(f"{source} does not fit the model; {wrong}")
    return dict(state)


def _torchvision_weights(model: str) -> Mapping[str, Any]:
    """Return torchvision's weights of a model by name; empty if torchvision does not have the model."""
    from torchvision import models

    known = model in models.list_models(module=models)
    return dict(models.get_model_weights(model).__members__) if known else {}


def _read_named(model: str, weights: Any) -> dict[str, Tensor]:
    """Have torchvision read weights; torchvision may download them, and adapts old files to its present model."""
    from torchvision import models

    try:
        state: dict[str, Tensor] = models.get_model(model, weights=weights).state_dict()
    except Exception as error:  # from the network, the file system or a damaged file
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise _refusal(
            f"{weights.name} of {model} cannot be read ({first_line(error)}); put {weights.url} into {folder}, "
            "or give the path of a state dict"
        ) from None
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a wrong file raises exceptions of many classes
        raise _refusal(f"{path} is no state dict that torch.save wrote ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f" with {listed([str(key) for key in state], show=NAMES_SHOWN)}" if isinstance(state, dict) else ""
        raise _refusal(f"{path} holds a {type(state).__name__}{keys}; must be a state dict, name to tensor")
    return dict(state)


def _last_layer(model: nn.Module) -> list[str]:
    """Return the names of the parameters of a model's last layer."""
    layers = [
        [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
        for prefix, module in model.named_modules()
    ]
    return [names for names in layers if names][-1]


def _refusal(message: str) -> InvalidInput:
    return InvalidInput("workload", [Problem(PLACE, message)])
