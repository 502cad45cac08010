"""Training jobs with sequences, as people have them; the sequences are tiny."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jobs_with_images import generator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import Dataset

from pipeline.workloads.workload import Metric, Split, Workload, accuracy

WORDS, LENGTH = 12, 6
"""Size of the vocabulary, and words per sequence."""


def text(samples: int, *, seed: int) -> Split:
    """Return sequences (sample, position) and, as targets, the same sequences moved by a word."""
    words = torch.randint(WORDS, (samples, LENGTH + 1), generator=generator(seed)).cumsum(dim=1) % WORDS
    return Split(words[:, :-1], words[:, 1:])


def next_word_loss(outputs: Any, targets: Tensor) -> Tensor:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def perplexity(outputs: Any, targets: Tensor) -> Tensor:
    return next_word_loss(outputs, targets).exp()


class LanguageModel(nn.Module):
    """PyTorch's word-language-model example: an LSTM that returns its hidden state too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, words: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        features, hidden = self.lstm(self.embedding(words), hidden)
        return self.decoder(features), hidden


def lstm_language_model() -> Workload:
    return Workload(
        name="LSTM language model",
        build_model=LanguageModel,
        train=text(40, seed=0),
        val=text(20, seed=1),
        loss=next_word_loss,
        metrics={"perplexity": Metric(perplexity, "minimize", per_batch=True)},
    )


class GruLanguageModel(nn.Module):
    """The same with a cell that is called for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
        self.cell = nn.GRUCell(8, 8)

    def forward(self, words: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Any]:
        features = []
        for word in self.embedding(words).unbind(dim=1):
            hidden = self.cell(word, hidden)
            features.append(hidden)
        return self.decoder(torch.stack(features, dim=1)), hidden


class Carried(LanguageModel):
    """Goes on from the hidden state of the batch before, whose gradient is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: tuple[Tensor, Tensor] | None = None

    def forward(self, words: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        if self.hidden is not None and self.hidden[0].shape[1] == len(words):
            hidden = self.hidden
        logits, (h, c) = super().forward(words, hidden)
        self.hidden = h.detach(), c.detach()
        return logits, None


def truncated_backpropagation() -> Workload:
    """Read eight long texts side by side, a piece of each per step: sample n continues sample n - 8."""
    return Workload(
        name="truncated backpropagation through time",
        build_model=Carried,
        train=text(40, seed=0),
        val=text(16, seed=1),
        loss=next_word_loss,
        order=lambda epoch, generator: range(40),
    )


class Attention(nn.Module):
    """Causal self-attention with two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        added: Tensor = x + self.mlp(self.norm_2(x))
        return added


class Gpt(nn.Module):
    """A causal transformer whose output layer shares the weights of its embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        positions = self.position(torch.arange(words.shape[1], device=words.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(words) + positions)))
        return logits


def gpt() -> Workload:
    return Workload(name="GPT", build_model=Gpt, train=text(40, seed=0), val=text(20, seed=1), loss=next_word_loss)


class Encoder(nn.Module):
    """PyTorch's transformer, with a causal mask and dropout."""

    mask: Tensor

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, dropout=0.1, batch_first=batch_first)
        self.embedding, self.decoder = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, words: Tensor) -> Tensor:
        scaled = self.embedding(words) * math.sqrt(8)
        logits: Tensor = self.decoder(self.encoder(scaled, mask=self.mask, is_causal=True))
        return logits


class TimeFirst(Encoder):
    """The same with sequences of shape (position, sample) inside."""

    def __init__(self) -> None:
        super().__init__(batch_first=False)

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words.T).transpose(0, 1)


def transformer_encoder() -> Workload:
    return Workload(
        name="transformer encoder",
        build_model=Encoder,
        train=text(24, seed=0),
        val=text(12, seed=1),
        loss=next_word_loss,
        metrics={"perplexity": Metric(perplexity, "minimize", per_batch=True)},
    )


class Walks(Dataset[tuple[Tensor, int]]):
    """Random walks of unlike length, and whether they end above their beginning."""

    def __init__(self, samples: int, *, seed: int) -> None:
        made = generator(seed)
        self.walks = [torch.randn(3 + n % 4, 2, generator=made).cumsum(dim=0) for n in range(samples)]

    def __len__(self) -> int:
        return len(self.walks)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        walk = self.walks[index]
        return walk, int(walk[-1, 0] > walk[0, 0])


def packed(samples: list[tuple[Tensor, int]]) -> tuple[PackedSequence, Tensor]:
    """Return walks as a packed sequence, and their labels."""
    walks, labels = zip(*samples, strict=True)
    return pack_sequence(list(walks), enforce_sorted=False), torch.tensor(labels)


class PackedLstm(nn.Module):
    """A bidirectional LSTM over sequences of unlike length."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 6, bidirectional=True), nn.Linear(12, 2)

    def forward(self, walks: PackedSequence) -> Tensor:
        features, lengths = pad_packed_sequence(self.lstm(walks)[0], batch_first=True)
        mean = features.sum(dim=1) / lengths.to(features.device).unsqueeze(1)
        logits: Tensor = self.head(mean)
        return logits


def packed_sequences() -> Workload:
    return Workload(
        name="packed sequences",
        build_model=PackedLstm,
        train=Walks(40, seed=0),
        val=Walks(20, seed=1),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        collate=packed,
    )


class Speech(nn.Module):
    """Convolutions over time; log-probabilities (time, sample, character)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 5, 3, padding=1))

    def forward(self, sound: Tensor) -> Tensor:
        probabilities: Tensor = self.body(sound).permute(2, 0, 1).log_softmax(dim=-1)
        return probabilities


def ctc_loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    lengths = torch.full((outputs.shape[1],), outputs.shape[0], device=outputs.device)
    return F.ctc_loss(outputs, targets["characters"], lengths, targets["lengths"])


def speech() -> Workload:
    def split(samples: int, *, seed: int) -> Split:
        made = generator(seed)
        characters = torch.randint(1, 5, (samples, 3), generator=made)
        lengths = torch.randint(1, 4, (samples,), generator=made)
        sound = torch.randn(samples, 3, 10, generator=made)
        return Split(sound, {"characters": characters, "lengths": lengths})

    return Workload(
        name="speech, CTC", build_model=Speech, train=split(24, seed=0), val=split(12, seed=1), loss=ctc_loss
    )


class Sentences(Dataset[dict[str, Tensor]]):
    """Tokenised sentences with their labels, as a tokenizer of transformers makes them."""

    def __init__(self, samples: int, *, seed: int) -> None:
        self.words = torch.randint(1, WORDS, (samples, LENGTH), generator=generator(seed))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = (torch.arange(LENGTH) < 3 + index % 4).long()
        words = self.words[index] * mask
        return {"input_ids": words, "attention_mask": mask, "labels": words.sum() % 2}


@dataclass
class ClassifierOutput:
    """Output of a model of transformers."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Classifier(nn.Module):
    """A classifier with the interface of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dense, self.classifier = nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> ClassifierOutput:
        mask = attention_mask.unsqueeze(-1).to(self.dense.weight.dtype)
        pooled = (self.embedding(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)
        logits = self.classifier(torch.tanh(self.dense(pooled)))
        return ClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def text_classifier() -> Workload:
    return Workload(
        name="text classifier",
        build_model=Classifier,
        train=Sentences(40, seed=0),
        val=Sentences(20, seed=1),
        loss=lambda outputs, batch: outputs.loss,
        metrics={"accuracy": Metric(lambda outputs, batch: accuracy(outputs.logits, batch["labels"]), "maximize")},
    )


class Oscillation(Dataset[tuple[Any, Any]]):
    """Windows of a damped oscillation on a large offset, and the value that follows, in double precision."""

    def __init__(self, samples: int, *, begin: int) -> None:
        time = np.arange(begin, begin + samples + 8) / 5
        self.values = 1e6 + np.exp(-time / 50) * np.sin(time)

    def __len__(self) -> int:
        return len(self.values) - 8

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.values[index : index + 8], self.values[index + 8 : index + 9]


class Autoregression(nn.Module):
    """Predicts how far the next value lies from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, window: Tensor) -> Tensor:
        following: Tensor = window[:, -1:] + self.net(window.diff(dim=1))
        return following


def time_series() -> Workload:
    return Workload(
        name="time series",
        build_model=Autoregression,
        train=Oscillation(40, begin=0),
        val=Oscillation(20, begin=40),
        loss=F.mse_loss,
    )
