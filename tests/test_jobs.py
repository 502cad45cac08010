"""Training jobs as people have them: checked and trained as in a search; the table of docs/jobs.md is made from them.

`python tests/test_jobs.py` writes the table.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import own_optimizers
import pytest
import torch
from jobs_with_images import (
    contrastive,
    detection,
    elbo,
    label_smoothing,
    mixed,
    mixup,
    mnist_example,
    segmentation,
    siamese,
    vae,
)
from jobs_with_sequences import (
    GruLanguageModel,
    TimeFirst,
    ctc_loss,
    gpt,
    lstm_language_model,
    packed,
    packed_sequences,
    speech,
    text_classifier,
    time_series,
    transformer_encoder,
    truncated_backpropagation,
)
from jobs_with_tables import (
    ForwardDerivative,
    RealSpectral,
    StochasticDepth,
    class_weights,
    graph_list,
    graph_nodes,
    layer_drop,
    multi_task,
    multi_task_loss,
    numpy_layer_drop,
    numpy_table,
    physics_informed,
    rare_labels,
    regression,
    spectral,
    tabular,
    weighted_sampler,
)
from tiny import ONE_GROUP, on_device, tiny_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pipeline.train
from pipeline.app.prepare import prepare
from pipeline.search import search
from pipeline.space.config import derive_seed
from pipeline.space.load import build_space
from pipeline.space.optimizers import Adam
from pipeline.space.placement import Placement
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.probe import probe
from pipeline.workloads.custom import check_form
from pipeline.workloads.data import epoch_order
from pipeline.workloads.random_state import random_states
from pipeline.workloads.workload import Workload

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule for "
        "aten..(_scaled_dot_product_flash_attention|_transformer_encoder_layer_fwd|ctc_loss|_thnn_fused_gru_cell|gru_cell)",
        "ignore:.torch.jit.script. is deprecated:FutureWarning",  # by PyTorch's own forward derivatives
        "ignore:This DataLoader will create:UserWarning",  # more workers than cores
    ),
]

PAGE = Path(__file__).parent.parent / "docs" / "jobs.md"
CPU = torch.device("cpu")
EPOCHS, BATCH = 2, 8
RATE = 0.01
SPACE: dict[str, Any] = {
    "workload": {"name": "own", "function": "jobs:job"},
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {"adam": {"base_lr": {"low": 1e-3, "high": 1e-2, "log": True}}},
    "scheduler": {"constant": {}},
    "param_groups": {"all": {"pattern": "*"}},
}
ADAMW = {"adamw": {"base_lr": {"low": 1e-3, "high": 1e-2, "log": True}, "weight_decay": 0.1}}
WITHOUT_DECAY: dict[str, Any] = {
    "optimizer": ADAMW,
    "scheduler": {"cosine": {"warmup": 2, "interval": "step"}},
    "no_weight_decay": {"dims": 1},
    "clip_grad_norm": 1.0,
}
LAYERS = [["embedding.*", "position.*"], "blocks.{n}.*", "norm.*"]
LAYER_DECAY: dict[str, Any] = {
    "optimizer": ADAMW,
    "param_groups": {"all": {"layers": LAYERS, "layer_decay": {"low": 0.5, "high": 1.0}}},
}
LION = "own_optimizers:Lion"
OWN_OPTIMIZER: dict[str, Any] = {
    "optimizer": {LION: {"base_lr": {"low": 1e-4, "high": 1e-3, "log": True}, "betas": [0.9, 0.99]}},
    "scheduler": {"own_optimizers:noam": {"warmup_steps": 4, "interval": "step"}},
}


@dataclass(frozen=True)
class Job:
    """A training job, and whether its trials are rows."""

    name: str
    """The job, for people."""
    workload: Callable[[], Workload]
    given: str
    """What the person gives."""
    plain_because: str = ""
    """A part of the reason why its trials train plain; empty for rows."""
    remedy: str = ""
    """What would make its trials rows."""
    remedied: Callable[[], nn.Module] | None = None
    """Builds such a model."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """Sections of the search space that differ."""


LSTM = "PyTorch's vmap has no rule for lstm"

JOBS = [
    Job("PyTorch's MNIST example", mnist_example, "a `TensorDataset`; a model with dropout; `F.nll_loss`"),
    Job("VAE", vae, "`Split(images)` without targets; a model that returns a tuple; the loss gets the images"),
    Job("Siamese network", siamese, "a data set of (image, image, target); the model's forward has two arguments"),
    Job("Segmentation", segmentation, "a target per pixel, `ignore_index`; mean IoU over the whole split"),
    Job("Detection", detection, "`collate` makes lists of images and targets; the model returns a dict of losses"),
    Job("Label smoothing", label_smoothing, "`nn.CrossEntropyLoss(label_smoothing=0.1)`"),
    Job("Mixup", mixup, "`augment(inputs, targets, generator)` returns both"),
    Job("Contrastive learning", contrastive, "a data set of dicts with two random views, and no targets; NT-Xent"),
    Job(
        "LSTM language model",
        lstm_language_model,
        "a model that returns (logits, hidden state); perplexity as a metric with `per_batch=True`",
        LSTM,
        "a loop over `nn.GRUCell`",
        GruLanguageModel,
    ),
    Job(
        "Truncated backpropagation through time",
        truncated_backpropagation,
        "`order` is sequential; the model keeps its hidden state",
        "its hidden changes in training and is no buffer",
    ),
    Job(
        "GPT",
        gpt,
        "tied weights; `no_weight_decay: {dims: 1}`; warm-up and cosine per step; clipping",
        space=WITHOUT_DECAY,
    ),
    Job("Layer-wise decay", gpt, "`layers` and a searched `layer_decay`", space=LAYER_DECAY),
    Job(
        "`nn.TransformerEncoder`",
        transformer_encoder,
        "a causal mask as a buffer, dropout",
        "as rows it trains to other numbers",
        "`batch_first=False`: PyTorch draws the mask of a transposed tensor in another order",
        TimeFirst,
    ),
    Job(
        "Sequences of unlike length",
        packed_sequences,
        "`collate` makes a `PackedSequence`",
        LSTM,
    ),
    Job("Speech with CTC", speech, "targets are a dict of characters and lengths; the loss knows the time axis"),
    Job(
        "Text classifier of transformers",
        text_classifier,
        "a data set of dicts, labels included; the output is a dataclass that holds loss and logits",
    ),
    Job("Tabular data", tabular, "a `TensorDataset(categorical, continuous, target)`; embeddings"),
    Job(
        "Regression with R²", regression, "a metric with `update`, `compute` and `reset`; a metric that returns a float"
    ),
    Job("Rare labels", rare_labels, "`nn.BCEWithLogitsLoss(pos_weight=…)`"),
    Job("Class weights", class_weights, "`nn.CrossEntropyLoss(weight=…)`"),
    Job("Weighted sampler", weighted_sampler, "`order` returns a `WeightedRandomSampler`"),
    Job("Graph network on nodes", graph_nodes, "the graph is in buffers of the model; the inputs are node numbers"),
    Job("Graph network on a list of graphs", graph_list, "`collate` joins graphs; a dict of inputs"),
    Job(
        "Physics-informed network",
        physics_informed,
        "derivatives by the input within `torch.enable_grad()`; no targets",
        "You are attempting to call Tensor.requires_grad_()",
        "`torch.func.jvp` in place of `torch.autograd.grad`",
        ForwardDerivative,
    ),
    Job("Multi-task learning", multi_task, "outputs and targets are dicts"),
    Job("Data set of NumPy arrays", numpy_table, "samples in double precision, which become single precision"),
    Job(
        "Spectral layer",
        spectral,
        "complex parameters",
        "the parameter spectral is torch.complex64",
        "a real parameter of shape (…, 2) and `torch.complex`",
        RealSpectral,
    ),
    Job(
        "Layer drop",
        layer_drop,
        "the model draws from Python's `random` or NumPy's",
        "random numbers of Python may choose what a step computes",
        "`torchvision.ops.stochastic_depth`",
        StochasticDepth,
    ),
    Job("Time series in double precision", time_series, "`precision: fp64`", space={"precision": "fp64"}),
    Job("Accumulated gradients", class_weights, "`accumulate: 2`", space={"accumulate": 2}),
    Job("Averaged weights", class_weights, "`ema: 0.9`", space={"ema": 0.9}),
    Job(
        "Optimizer and schedule of one's own",
        class_weights,
        '`optimizer: {"own_optimizers:Lion": …}`, `scheduler: {"own_optimizers:noam": …}`',
        "no update rule",
        space=OWN_OPTIMIZER,
    ),
]


def table() -> str:
    """Return the table of the page."""
    lines = ["| job | given as | trains as | what would make it rows |", "|---|---|---|---|"]
    for job in JOBS:
        trains = f"plain: {job.plain_because}" if job.plain_because else "rows"
        lines.append(f"| {job.name} | {job.given} | {trains} | {job.remedy} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return the page with its table made anew."""
    made = f"<!-- table: jobs -->\n{table()}\n<!-- end -->"
    return re.sub(r"<!-- table: jobs -->\n.*?<!-- end -->", lambda match: made, text, flags=re.DOTALL)


def test_the_table_of_jobs_says_what_is_tested_here() -> None:
    assert filled(PAGE.read_text()) == PAGE.read_text(), "run python tests/test_jobs.py"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_job_passes_the_checks_of_a_search_and_trains(job: Job) -> None:
    space = build_space({**SPACE, **job.space}, source="space", name="space")
    workload = check_form(job.workload(), job.name)
    space, executor = prepare(space, source="space", device="cpu", searching=True, workload=workload)
    assert (job.plain_because or "None") in str(executor.why_plain(space.example()))
    group = executor.build(dict.fromkeys(range(2), space.example()))
    history = [group.train_epoch() for _ in range(EPOCHS)]
    executor.close()
    for metrics in history:
        assert [(epoch.failed, epoch.diverged) for epoch in metrics.values()] == [(None, None)] * 2
        assert metrics[0].metrics.keys() == workload.directions.keys()
        assert metrics[0].placement is not None
        assert metrics[0].placement.rows == (None if job.plain_because else 2)
    assert history[1][0].metrics["train/loss"] != history[0][0].metrics["train/loss"]


@pytest.mark.parametrize("job", [job for job in JOBS if job.remedied], ids=lambda job: job.name)
def test_a_job_with_its_remedy_trains_as_rows(job: Job) -> None:
    assert job.remedied is not None
    workload = dataclasses.replace(job.workload(), build_model=job.remedied)
    config = tiny_config(param_groups=ONE_GROUP)
    assert probe(workload, config, device=CPU, dtype=torch.float32).plain_because is None


Step = Callable[[nn.Module, Any, torch.Generator | None], tuple[Tensor, dict[str, float]]]
"""(model, batch, generator of the augmentation, None in validation) -> loss, and metrics by name."""


def vae_step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    (pictures,) = batch
    return elbo(model(pictures), pictures), {}


def mixup_step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    pictures, labels = batch
    if noise is not None:
        pictures, shares = mixed(pictures, labels, noise)
        return F.cross_entropy(model(pictures), shares), {}
    logits = model(pictures)
    return F.cross_entropy(logits, labels), {"accuracy": hits(logits, labels)}


def classifying(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return a step of a classifier."""

    def step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = batch
        logits = model(inputs)
        return loss(logits, labels), {"accuracy": hits(logits, labels)}

    return step


def dict_step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    output = model(**batch)
    return output.loss, {"accuracy": hits(output.logits, batch["labels"])}


def ctc_step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    sound, characters, lengths = batch
    return ctc_loss(model(sound), {"characters": characters, "lengths": lengths}), {}


def multi_task_step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    inputs, labels, prices = batch
    outputs = model(inputs)
    mae = (outputs["price"] - prices).abs().mean().item()
    loss = multi_task_loss(outputs, {"label": labels, "price": prices})
    return loss, {"accuracy": hits(outputs["label"], labels), "mae": mae}


def tabular_step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    categorical, continuous, prices = batch
    return F.mse_loss(model(categorical, continuous), prices), {}


def regression_step(model: nn.Module, batch: Any, noise: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets), {}


def hits(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def as_dataset(split: Any) -> Dataset[Any]:
    """Return a split's tensors as a person's own loop has them."""
    if not hasattr(split, "inputs"):
        dataset: Dataset[Any] = split
        return dataset
    targets = split.targets.values() if isinstance(split.targets, dict) else [split.targets]
    return TensorDataset(split.inputs, *(tensor for tensor in targets if tensor is not None))


ADAM = functools.partial(torch.optim.Adam, lr=RATE)


@dataclass(frozen=True)
class ByHand:
    """A job, and how a loop written by hand trains it."""

    job: Callable[[], Workload]
    step: Step
    collate: Callable[[list[Any]], Any] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = ADAM
    accumulate: int = 1
    ema: float | None = None
    dtype: torch.dtype = torch.float32
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs in the config."""


WEIGHTED = classifying(nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 1.0])))
ENTROPY = classifying(F.cross_entropy)
BY_HAND = {
    "VAE": ByHand(vae, vae_step),
    "mixup": ByHand(mixup, mixup_step),
    "class weights": ByHand(class_weights, WEIGHTED),
    "weighted sampler": ByHand(weighted_sampler, ENTROPY),
    "packed sequences": ByHand(packed_sequences, ENTROPY, packed),
    "dict batch": ByHand(text_classifier, dict_step),
    "CTC": ByHand(speech, ctc_step),
    "multi-task": ByHand(multi_task, multi_task_step),
    "tabular": ByHand(tabular, tabular_step),
    "MNIST example": ByHand(mnist_example, classifying(F.nll_loss)),
    "spectral layer": ByHand(spectral, ENTROPY),
    "layer drop by Python": ByHand(layer_drop, ENTROPY),
    "layer drop by NumPy": ByHand(numpy_layer_drop, ENTROPY),
    "double precision": ByHand(time_series, regression_step, dtype=torch.float64, config={"precision": "fp64"}),
    "accumulation": ByHand(class_weights, WEIGHTED, accumulate=2, config={"accumulate": 2}),
    "averaged weights": ByHand(class_weights, WEIGHTED, ema=0.9, config={"ema": 0.9}),
    "own optimizer": ByHand(
        class_weights,
        WEIGHTED,
        optimizer=functools.partial(own_optimizers.Lion, lr=RATE, weight_decay=0.1),
        config={"optimizer": {LION: {"base_lr": RATE, "weight_decay": 0.1}}},
    ),
}


def seed_all(*purpose: str | int) -> None:
    """Seed every random state as the pipeline does for a purpose."""
    seed = derive_seed(0, *purpose)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def trained_by_hand(by_hand: ByHand) -> tuple[list[dict[str, float]], nn.Module]:
    """Train as a script does: a model, an optimizer, two loops over `DataLoader`s."""
    workload, step, collate = by_hand.job(), by_hand.step, by_hand.collate
    seed_all("weights")
    model = workload.build_model()
    if by_hand.dtype == torch.float64:
        model = model.double()
    optimizer = by_hand.optimizer(model.parameters())
    average = None
    preprocess = workload.preprocess or (lambda inputs: inputs)
    val = DataLoader(as_dataset(workload.val), batch_size=len(workload.val), collate_fn=collate)
    history = []
    for epoch in range(EPOCHS):
        order = epoch_order(workload, seed=0, epoch=epoch)
        batches = [indices.tolist() for indices in order.split(BATCH)]
        total = 0.0
        model.train()
        for n, batch in enumerate(DataLoader(as_dataset(workload.train), batch_sampler=batches, collate_fn=collate)):
            noise = torch.Generator().manual_seed(derive_seed(0, "augment", epoch, n))
            seed_all("step", epoch, n)
            loss, _ = step(model, _prepared(batch, preprocess, by_hand.dtype), noise)
            together = batches[n - n % by_hand.accumulate :][: by_hand.accumulate]
            (loss * (len(batches[n]) / sum(map(len, together)))).backward()
            if batches[n] is together[-1]:
                optimizer.step()
                optimizer.zero_grad()
                if by_hand.ema is not None:
                    average = average or AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(by_hand.ema))
                    average.update_parameters(model)
            total += loss.item() * len(batches[n])
        evaluated = model if average is None else average.module
        evaluated.eval()
        with torch.no_grad():
            (batch,) = val
            seed_all("evaluation", epoch, 0)
            loss, metrics = step(evaluated, _prepared(batch, preprocess, by_hand.dtype), None)
        measured = {f"val/{name}": value for name, value in metrics.items()}
        history.append({"train/loss": total / len(order), "val/loss": loss.item(), **measured})
    return history, evaluated


def _prepared(batch: Any, preprocess: Callable[[Any], Any], dtype: torch.dtype) -> Any:
    if not isinstance(batch, Sequence):
        return batch
    parts = [preprocess(batch[0]), *batch[1:]]
    return [part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part for part in parts]


def trained_here(
    workload: Workload, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[list[dict[str, float]], PlainTrials]:
    document = {**SPACE, "optimizer": {"adam": {"base_lr": RATE}}, **changes}
    config = build_space(document, source="space", name="space", searching=False).example()
    trials = PlainTrials({0: config}, on_device(workload, device=CPU, dtype=dtype), device=CPU, dtype=dtype)
    return [dict(trials.train_epoch()[0].metrics) for _ in range(EPOCHS)], trials


@pytest.mark.parametrize("name", BY_HAND)
def test_a_job_has_the_numbers_of_a_loop_written_by_hand(name: str) -> None:
    by_hand = BY_HAND[name]
    theirs, model = trained_by_hand(by_hand)
    ours, trials = trained_here(by_hand.job(), dtype=by_hand.dtype, **by_hand.config)
    assert ours == theirs
    for key, value in model.state_dict().items():
        assert torch.equal(trials.model_state(0)[key], value)


def test_complex_parameters_stay_complex() -> None:
    def trials(dtype: torch.dtype) -> PlainTrials:
        return PlainTrials({0: config}, on_device(spectral(), device=CPU, dtype=dtype), device=CPU, dtype=dtype)

    config = tiny_config(param_groups=ONE_GROUP)
    group = LocalExecutor(spectral(), config, device=CPU).build({0: config, 1: config})
    for metrics in (group.train_epoch(), group.train_epoch()):
        assert metrics[0].finished
    before, after = trials(torch.float32).model_state(0)["spectral"], group.model_state(1)["spectral"]
    assert before.dtype == after.dtype == torch.complex64
    assert not torch.equal(after.imag, before.imag)
    assert trials(torch.float64).model_state(0)["spectral"].dtype == torch.complex128


@pytest.mark.parametrize("job", [layer_drop, numpy_layer_drop])
def test_what_a_model_draws_from_python_or_numpy_repeats(job: Callable[[], Workload]) -> None:
    config = tiny_config(Adam(base_lr=RATE), param_groups=ONE_GROUP)
    histories, placements = [], list[Placement]()
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        states = random_states()
        executor = LocalExecutor(job(), config, device=CPU)
        if placements:  # as `pipeline.train` trains a trial again
            group = executor.build({1: config}, placement=placements)
        else:
            group = executor.build({0: config, 1: config})
        history = [group.train_epoch()[1] for _ in range(EPOCHS)]
        histories.append(history)
        if seed == 1:
            placements = [epoch.placement for epoch in history if epoch.placement is not None]
        assert random_states() == states
    assert histories[0] == histories[1] == histories[2]


def test_two_searches_and_a_winner_trained_again_repeat_what_numpy_draws(
    tmp_path: Path, mlflow_tables: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shutil.copy(mlflow_tables, tmp_path / name)
    space = {**SPACE, "workload": {"name": "own", "function": "jobs_with_tables:numpy_layer_drop"}}
    first, second = (
        search(space, trials=2, root=tmp_path / name, device="cpu", quiet=True) for name in ("first", "second")
    )
    assert [trial.metrics for trial in first.trials] == [trial.metrics for trial in second.trials]
    assert first.trials[0].metrics != first.trials[1].metrics
    assert pipeline.train.main([str(first.config_file), "--device", "cpu", "--out", str(tmp_path / "model.pt")]) == 0
    assert "repeated      every metric of the search, to the last bit" in capsys.readouterr().out


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
