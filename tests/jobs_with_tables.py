"""Training jobs with tables, graphs and physics, and models with unusual layers, as people have them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jobs_with_images import generator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset, WeightedRandomSampler
from torchvision.ops import stochastic_depth

from pipeline.workloads.workload import Metric, Split, Workload, accuracy


def table(samples: int, *, seed: int) -> Tensor:
    """Return features (sample, 6)."""
    return torch.randn(samples, 6, generator=generator(seed))


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))


class Tabular(nn.Module):
    """Embeddings of categories beside continuous features."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(categories, 3) for categories in (4, 5))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, categorical: Tensor, continuous: Tensor) -> Tensor:
        embedded = [embedding(categorical[:, n]) for n, embedding in enumerate(self.embeddings)]
        price: Tensor = self.head(torch.cat([*embedded, self.norm(continuous)], dim=1))
        return price


def tabular() -> Workload:
    def dataset(samples: int, *, seed: int) -> TensorDataset:
        continuous = table(samples, seed=seed)
        categorical = torch.stack([torch.arange(samples) % 4, torch.arange(samples) % 5], dim=1)
        return TensorDataset(categorical, continuous, continuous[:, :1] + categorical[:, :1])

    return Workload(
        name="tabular",
        build_model=Tabular,
        train=dataset(40, seed=0),
        val=dataset(20, seed=1),
        loss=nn.MSELoss(),
    )


class R2Score:
    """The coefficient of determination, with the interface of torchmetrics."""

    def __init__(self) -> None:
        self.residual, self.sum, self.squares, self.count = 0.0, 0.0, 0.0, 0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.residual += float((predictions - targets).square().sum())
        self.sum, self.squares = self.sum + float(targets.sum()), self.squares + float(targets.square().sum())
        self.count += targets.numel()

    def compute(self) -> Tensor:
        return torch.tensor(1 - self.residual / (self.squares - self.sum**2 / self.count))

    def reset(self) -> None:
        self.residual, self.sum, self.squares, self.count = 0.0, 0.0, 0.0, 0


def largest_error(outputs: Tensor, targets: Tensor) -> float:
    return (outputs - targets).abs().max().item()


def regression() -> Workload:
    train, val = table(40, seed=0), table(20, seed=1)
    return Workload(
        name="regression",
        build_model=lambda: mlp(1),
        train=Split(train, train[:, :2].sum(dim=1, keepdim=True)),
        val=Split(val, val[:, :2].sum(dim=1, keepdim=True)),
        loss=F.mse_loss,
        metrics={"r2": Metric(R2Score(), "maximize"), "largest_error": Metric(largest_error, "minimize")},
    )


def rare_labels() -> Workload:
    train, val = table(40, seed=0), table(20, seed=1)
    return Workload(
        name="rare labels",
        build_model=lambda: mlp(3),
        train=Split(train, (train[:, :3] > 1).float()),
        val=Split(val, (val[:, :3] > 1).float()),
        loss=nn.BCEWithLogitsLoss(pos_weight=torch.tensor([4.0, 5.0, 6.0])),
    )


def classes(inputs: Tensor) -> Tensor:
    """Return labels (sample,) of three classes, of which one is frequent."""
    return (inputs[:, 0] > 0.5).long() + (inputs[:, 0] > 1).long()


def class_weights() -> Workload:
    train, val = table(40, seed=0), table(20, seed=1)
    return Workload(
        name="class weights",
        build_model=lambda: mlp(3),
        train=Split(train, classes(train)),
        val=Split(val, classes(val)),
        loss=nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 1.0])),
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def weighted_sampler() -> Workload:
    train, val = table(40, seed=0), table(20, seed=1)
    weights = 1 / classes(train).bincount()[classes(train)]
    return Workload(
        name="weighted sampler",
        build_model=lambda: mlp(3),
        train=TensorDataset(train, classes(train)),
        val=TensorDataset(val, classes(val)),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        order=lambda epoch, generator: WeightedRandomSampler(weights.tolist(), 32, generator=generator),
    )


class Citations(nn.Module):
    """A graph convolution over all nodes, of which some are asked for; Kipf and Welling (2017)."""

    features: Tensor
    adjacency: Tensor

    def __init__(self, features: Tensor, adjacency: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("adjacency", adjacency / adjacency.sum(dim=1, keepdim=True))
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, nodes: Tensor) -> Tensor:
        hidden = F.relu(self.adjacency @ self.first(self.features))
        logits: Tensor = (self.adjacency @ self.second(hidden))[nodes]
        return logits


def graph_nodes() -> Workload:
    features = table(30, seed=0)
    links = (torch.rand(30, 30, generator=generator(1)) < 0.1).float()
    adjacency = ((links + links.T + torch.eye(30)) > 0).float()
    every = torch.arange(30)
    train, val = every[every % 3 != 2], every[every % 3 == 2]
    return Workload(
        name="graph, nodes",
        build_model=lambda: Citations(features.clone(), adjacency),
        train=Split(train, classes(features)[train]),
        val=Split(val, classes(features)[val]),
        loss=nn.CrossEntropyLoss(),
    )


class Molecules(Dataset[dict[str, Tensor]]):
    """Rings of unlike size, and a property of each."""

    def __init__(self, samples: int, *, seed: int) -> None:
        made = generator(seed)
        self.atoms = [torch.randn(3 + n % 3, 4, generator=made) for n in range(samples)]

    def __len__(self) -> int:
        return len(self.atoms)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        atoms = self.atoms[index]
        ring = torch.arange(len(atoms))
        return {"x": atoms, "edge_index": torch.stack([ring, ring.roll(1)]), "y": atoms.mean().view(1, 1)}


def batch_of_graphs(graphs: list[dict[str, Tensor]]) -> tuple[dict[str, Any], Tensor]:
    """Return some graphs as one, as PyTorch Geometric batches them, and their targets."""
    sizes = torch.tensor([len(graph["x"]) for graph in graphs])
    starts = sizes.cumsum(dim=0) - sizes
    inputs = {
        "x": torch.cat([graph["x"] for graph in graphs]),
        "edge_index": torch.cat([graph["edge_index"] + start for graph, start in zip(graphs, starts, strict=True)], 1),
        "batch": torch.arange(len(graphs)).repeat_interleave(sizes),
        "graphs": len(graphs),
    }
    return inputs, torch.cat([graph["y"] for graph in graphs])


class GraphNetwork(nn.Module):
    """Messages along edges, then the sum over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.others, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, graphs: int) -> Tensor:
        source, target = edge_index.unbind()
        messages = torch.zeros_like(x).index_add(0, target, x[source])
        hidden = F.relu(self.own(x) + self.others(messages))
        pooled = hidden.new_zeros(graphs, 8).index_add(0, batch, hidden)
        value: Tensor = self.head(pooled)
        return value


def graph_list() -> Workload:
    return Workload(
        name="graphs in a list",
        build_model=GraphNetwork,
        train=Molecules(24, seed=0),
        val=Molecules(12, seed=1),
        loss=F.mse_loss,
        collate=batch_of_graphs,
    )


class Decay(nn.Module):
    """A physics-informed network for du/dt = -u; Raissi et al. (2019), https://doi.org/10.1016/j.jcp.2018.10.045."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            u = self.net(t)
            (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        start: Tensor = self.net(torch.zeros_like(t[:1]))
        return slope + u, start - 1


class ForwardDerivative(Decay):
    """The same with a forward derivative."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        derivative: Any = torch.func.jvp(self.net, (t,), (torch.ones_like(t),))
        u, slope = derivative
        start: Tensor = self.net(torch.zeros_like(t[:1]))
        return slope + u, start - 1


def physics_informed() -> Workload:
    return Workload(
        name="physics-informed",
        build_model=Decay,
        train=Split(torch.linspace(0, 2, 40).unsqueeze(1)),
        val=Split(torch.linspace(0.01, 1.99, 20).unsqueeze(1)),
        loss=lambda residuals, _: sum(residual.square().mean() for residual in residuals),
    )


class MultiTask(nn.Module):
    """A class and a number from the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.price = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.body(x))
        return {"label": self.label(hidden), "price": self.price(hidden).squeeze(1)}


def multi_task_loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    entropy = F.cross_entropy(outputs["label"], targets["label"])
    return entropy + 0.5 * F.mse_loss(outputs["price"], targets["price"])


def multi_task() -> Workload:
    def split(samples: int, *, seed: int) -> Split:
        inputs = table(samples, seed=seed)
        return Split(inputs, {"label": classes(inputs), "price": inputs[:, 1]})

    return Workload(
        name="multi-task",
        build_model=MultiTask,
        train=split(40, seed=0),
        val=split(20, seed=1),
        loss=multi_task_loss,
        metrics={
            "accuracy": Metric(lambda outputs, targets: accuracy(outputs["label"], targets["label"]), "maximize"),
            "mae": Metric(lambda outputs, targets: (outputs["price"] - targets["price"]).abs().mean(), "minimize"),
        },
    )


class NumPyTable:
    """Rows of NumPy arrays in double precision."""

    def __init__(self, samples: int, *, seed: int) -> None:
        self.features = np.random.default_rng(seed).normal(size=(samples, 6))
        self.targets = self.features[:, 0] - self.features[:, 1]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.features[index], self.targets[index]


class Regressor(nn.Module):
    """Returns a number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1)

    def forward(self, x: Tensor) -> Tensor:
        number: Tensor = self.net(x).squeeze(1)
        return number


def numpy_table() -> Workload:
    return Workload(
        name="NumPy table",
        build_model=Regressor,
        train=NumPyTable(40, seed=0),
        val=NumPyTable(20, seed=1),
        loss=F.mse_loss,
    )


class Spectral(nn.Module):
    """A layer with complex weights for the frequencies of its input; Li et al. (2021), Fourier neural operators."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.Parameter(torch.randn(5, dtype=torch.cfloat) * 0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.weights(), n=8, dim=1)
        logits: Tensor = self.head(waves)
        return logits

    def weights(self) -> Tensor:
        return self.spectral


class RealSpectral(Spectral):
    """The same with a real parameter that holds real and imaginary parts."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.Parameter(torch.view_as_real(self.spectral.detach()))

    def weights(self) -> Tensor:
        return torch.complex(*self.spectral.unbind(dim=-1))


def spectral() -> Workload:
    def split(samples: int, *, seed: int) -> Split:
        waves = torch.randn(samples, 8, generator=generator(seed))
        return Split(waves, classes(waves))

    return Workload(
        name="spectral layer",
        build_model=Spectral,
        train=split(40, seed=0),
        val=split(20, seed=1),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


class LayerDrop(nn.Module):
    """Leaves out layers by Python's random numbers; Fan et al. (2020), https://arxiv.org/abs/1909.11556."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def drawn(self) -> float:
        return random.random()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or self.drawn() < 0.5:
                x = x + torch.tanh(layer(x))
        logits: Tensor = self.head(x)
        return logits


class NumPyLayerDrop(LayerDrop):
    """The same by NumPy's random numbers, from which the first weights come too."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.data = torch.from_numpy(np.random.normal(scale=0.3, size=parameter.shape)).float()

    def drawn(self) -> float:
        return float(np.random.rand())


class StochasticDepth(LayerDrop):
    """The same by torchvision, which multiplies with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + stochastic_depth(torch.tanh(layer(x)), 0.5, "batch", self.training)
        logits: Tensor = self.head(x)
        return logits


def layer_drop(build_model: Callable[[], nn.Module] = LayerDrop) -> Workload:
    train, val = table(40, seed=0), table(20, seed=1)
    return Workload(
        name="layer drop",
        build_model=build_model,
        train=Split(train, classes(train)),
        val=Split(val, classes(val)),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def numpy_layer_drop() -> Workload:
    return layer_drop(NumPyLayerDrop)
