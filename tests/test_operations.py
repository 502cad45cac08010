"""Operations of rows on a device equal the operations of each row."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from pipeline.training.rows.operations import OfRows

ROWS, SAMPLES, CHANNELS = 3, 5, 4
LAYERS = {
    "of images": (nn.BatchNorm2d(CHANNELS), (6, 6)),
    "of vectors": (nn.BatchNorm1d(CHANNELS), ()),
    "of sequences": (nn.BatchNorm1d(CHANNELS), (7,)),
    "of volumes": (nn.BatchNorm3d(CHANNELS), (2, 3, 2)),
    "without weights": (nn.BatchNorm2d(CHANNELS, affine=False), (3, 3)),
    "without statistics": (nn.BatchNorm2d(CHANNELS, track_running_stats=False), (3, 3)),
}


def computed(layer: nn.Module, inputs: Tensor, state: dict[str, Tensor], *, in_dim: int | None, context: Any) -> Any:
    """Return outputs, gradients and the state afterwards, of all rows."""
    state = {name: value.clone() for name, value in state.items()}
    trained = {name: state[name].requires_grad_() for name, _ in layer.named_parameters()}
    inputs = inputs.clone().requires_grad_()

    def one(inputs: Tensor, state: dict[str, Tensor]) -> Tensor:
        with context:
            outputs: Tensor = functional_call(layer, state, (inputs,))
        return outputs

    outputs = vmap(one, in_dims=(in_dim, 0))(inputs, state)
    weights = torch.arange(outputs.numel(), dtype=outputs.dtype).view(outputs.shape).cos()
    return [outputs, *torch.autograd.grad((outputs * weights).sum(), [inputs, *trained.values()]), *state.values()]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("in_dim", [0, 1, None], ids=["rows first", "rows second", "shared inputs"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_batch_norm_of_all_rows_equals_batch_norm_of_each_row(name: str, in_dim: int | None, training: bool) -> None:
    layer, size = LAYERS[name]
    layer.double().train(training)
    generator = torch.Generator().manual_seed(0)
    shape = [SAMPLES, CHANNELS, *size]
    if in_dim is not None:
        shape.insert(in_dim, ROWS)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    state = {
        key: (1 + torch.rand(ROWS, *value.shape, generator=generator)).to(value.dtype)
        for key, value in layer.state_dict().items()
    }
    expected = computed(layer, inputs, state, in_dim=in_dim, context=nullcontext())
    found = computed(layer, inputs, state, in_dim=in_dim, context=OfRows())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_inputs_in_bfloat16_keep_statistics_in_float32() -> None:
    layer = nn.BatchNorm2d(CHANNELS)
    state = {key: value.repeat(ROWS, *[1] * value.ndim) for key, value in layer.state_dict().items()}
    inputs = torch.randn(ROWS, SAMPLES, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0))
    outputs, *_, mean, _, _ = computed(layer, inputs.bfloat16(), state, in_dim=0, context=OfRows())
    assert (outputs.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(mean, 0.1 * inputs.bfloat16().float().mean(dim=(1, 3, 4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("in_dim", [0, 1, None], ids=["rows first", "rows second", "shared inputs"])
def test_every_row_drops_out_what_a_model_alone_drops_out(dtype: torch.dtype, in_dim: int | None) -> None:
    shape = [SAMPLES, CHANNELS]
    if in_dim is not None:
        shape.insert(in_dim, ROWS)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs.requires_grad_(in_dim is not None)  # what all rows share is data
    weights = torch.arange(1.0, 1 + ROWS, dtype=dtype)

    def one(inputs: Tensor, weight: Tensor) -> Tensor:
        with OfRows():
            return F.dropout(inputs, 0.4) * weight

    torch.manual_seed(1)
    outputs = vmap(one, in_dims=(in_dim, 0), randomness="same")(inputs, weights)
    gradients = torch.autograd.grad(outputs.sum(), inputs) if inputs.requires_grad else ()
    for row in range(ROWS):
        own = inputs.detach() if in_dim is None else inputs.detach().select(in_dim, row)
        torch.manual_seed(1)
        expected = F.dropout(own, 0.4)
        torch.testing.assert_close(outputs[row], expected * weights[row])
        for gradient in gradients:
            assert torch.equal(gradient.select(in_dim or 0, row) != 0, expected != 0)


def test_dropout_in_evaluation_changes_nothing() -> None:
    inputs = torch.randn(ROWS, 4)
    with OfRows():
        outputs = vmap(lambda row: F.dropout(row, 0.5, training=False), randomness="error")(inputs)
    assert torch.equal(outputs, inputs)
