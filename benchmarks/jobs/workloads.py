"""Training jobs with transformers, timm, torchmetrics and PyTorch Geometric, as people have them; data are random."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, SAGEConv, global_mean_pool
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from pipeline.workloads.workload import Metric, Split, Workload, accuracy

WORDS, LENGTH = 200, 16


def generator(seed: int) -> torch.Generator:
    """Return a generator that a seed decides."""
    return torch.Generator().manual_seed(seed)


class Sentences(Dataset[dict[str, Tensor]]):
    """Token sequences with a mask and a label, as a tokenizer makes them."""

    def __init__(self, samples: int, *, seed: int) -> None:
        self.words = torch.randint(1, WORDS, (samples, LENGTH), generator=generator(seed))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = (torch.arange(LENGTH) < 8 + index % 8).long()
        words = self.words[index] * mask
        return {"input_ids": words, "attention_mask": mask, "labels": (words[0] > WORDS // 2).long()}


def bert() -> BertForSequenceClassification:
    """Build a small BERT with fresh weights."""
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return BertForSequenceClassification(config)


def transformers_classifier() -> Workload:
    """Fine-tune BERT: a data set of dicts, an output object that holds the loss."""
    return Workload(
        name="transformers, BERT",
        build_model=bert,
        train=Sentences(256, seed=0),
        val=Sentences(64, seed=1),
        loss=lambda outputs, batch: outputs.loss,
        metrics={"accuracy": Metric(lambda outputs, batch: accuracy(outputs.logits, batch["labels"]), "maximize")},
    )


class Texts(Dataset[dict[str, Tensor]]):
    """Token sequences, which are their own labels."""

    def __init__(self, samples: int, *, seed: int) -> None:
        self.words = torch.randint(WORDS, (samples, LENGTH), generator=generator(seed)).cumsum(dim=1) % WORDS

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.words[index]}


def gpt2() -> GPT2LMHeadModel:
    """Build a small GPT-2 with fresh weights."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2))


def transformers_language_model() -> Workload:
    """Train GPT-2 from scratch; its output layer shares the weights of its embedding."""
    return Workload(
        name="transformers, GPT-2",
        build_model=gpt2,
        train=Texts(256, seed=0),
        val=Texts(64, seed=1),
        loss=lambda outputs, batch: outputs.loss,
        metrics={"perplexity": Metric(lambda outputs, batch: outputs.loss.exp(), "minimize", per_batch=True)},
    )


def pictures(samples: int, *, seed: int) -> TensorDataset:
    """Return random images in four classes of brightness."""
    images = torch.rand(samples, 3, 32, 32, generator=generator(seed))
    return TensorDataset(images, images.mean(dim=(1, 2, 3)).argsort().argsort() * 4 // samples)


def timm_vit() -> Workload:
    """Train a small vision transformer of timm, with label smoothing."""
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return Workload(
        name="timm, ViT",
        build_model=lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4, drop_path_rate=0.1, **options),
        train=pictures(128, seed=0),
        val=pictures(64, seed=1),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def timm_resnet() -> Workload:
    """Train a ResNet-18 of timm."""
    return Workload(
        name="timm, ResNet-18",
        build_model=lambda: timm.create_model("resnet18", num_classes=4),
        train=pictures(128, seed=0),
        val=pictures(64, seed=1),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def with_torchmetrics() -> Workload:
    """Measure a classifier by F1, AUROC and a calibration error, which are no means of batches."""

    def split(samples: int, *, seed: int) -> Split:
        inputs = torch.randn(samples, 10, generator=generator(seed))
        return Split(inputs, inputs[:, :3].argmax(dim=1))

    return Workload(
        name="torchmetrics, classifier",
        build_model=lambda: nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3)),
        train=split(512, seed=0),
        val=split(256, seed=1),
        loss=F.cross_entropy,
        metrics={
            "f1": Metric(torchmetrics.F1Score("multiclass", num_classes=3, average="macro"), "maximize"),
            "auroc": Metric(torchmetrics.AUROC("multiclass", num_classes=3), "maximize"),
            "calibration": Metric(torchmetrics.CalibrationError("multiclass", num_classes=3), "minimize"),
        },
    )


def torchmetrics_regression() -> Workload:
    """Measure a regression by R²."""

    def split(samples: int, *, seed: int) -> Split:
        inputs = torch.randn(samples, 10, generator=generator(seed))
        return Split(inputs, inputs[:, :1] * inputs[:, 1:2])

    return Workload(
        name="torchmetrics, R²",
        build_model=lambda: nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1)),
        train=split(512, seed=0),
        val=split(256, seed=1),
        loss=F.mse_loss,
        metrics={"r2": Metric(torchmetrics.R2Score(), "maximize")},
    )


class Gcn(nn.Module):
    """A graph convolutional network over one graph, which the model holds; the inputs are node numbers."""

    features: Tensor
    edges: Tensor

    def __init__(self, graph: Data) -> None:
        super().__init__()
        self.register_buffer("features", graph.x.clone())
        self.register_buffer("edges", graph.edge_index.clone())
        self.first, self.second = GCNConv(8, 16), GCNConv(16, 3)

    def forward(self, nodes: Tensor) -> Tensor:
        """Map node numbers to logits (node, class)."""
        hidden = F.dropout(self.first(self.features, self.edges).relu(), training=self.training)
        logits: Tensor = self.second(hidden, self.edges)[nodes]
        return logits


def geometric_nodes() -> Workload:
    """Classify the nodes of one graph, as Cora's."""
    made = generator(0)
    features = torch.randn(200, 8, generator=made)
    edges = torch.randint(200, (2, 800), generator=made)
    labels, nodes = features[:, :3].argmax(dim=1), torch.arange(200)
    graph = Data(x=features, edge_index=edges)
    return Workload(
        name="PyTorch Geometric, nodes",
        build_model=lambda: Gcn(graph),
        train=Split(nodes[:140], labels[:140]),
        val=Split(nodes[140:], labels[140:]),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


class GraphClassifier(nn.Module):
    """Takes a batch of graphs as one object."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = SAGEConv(4, 16), SAGEConv(16, 16), nn.Linear(16, 2)

    def forward(self, graphs: Batch) -> Tensor:
        """Map graphs to logits (graph, class)."""
        hidden = self.first(graphs.x, graphs.edge_index).relu()
        hidden = self.second(hidden, graphs.edge_index).relu()
        logits: Tensor = self.head(global_mean_pool(hidden, graphs.batch))
        return logits


def graphs(samples: int, *, seed: int) -> list[Data]:
    """Return random graphs in two classes."""
    made = generator(seed)
    found = []
    for index in range(samples):
        nodes = 5 + index % 6
        features = torch.randn(nodes, 4, generator=made)
        edges = torch.randint(nodes, (2, 3 * nodes), generator=made)
        found.append(Data(x=features, edge_index=edges, y=(features.mean() > 0).long().view(1)))
    return found


def batched(samples: list[Data]) -> tuple[Batch, Tensor]:
    """Return graphs as one object, and their labels."""
    batch = Batch.from_data_list(samples)
    return batch, batch.y


def geometric_graphs() -> Workload:
    """Classify graphs in a list."""
    return Workload(
        name="PyTorch Geometric, graphs",
        build_model=GraphClassifier,
        train=graphs(256, seed=0),
        val=graphs(64, seed=1),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        collate=batched,
    )
