"""Run a function on a CUDA device as one graph: captured once, then launched as a whole.

A step of a small network is bound by the launches of its kernels. A graph launches them all at once:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import first_line
from pipeline.workloads.trees import leaves, map_tensors, tensors

MAX_GRAPHS = 8
"""Most graphs of a function; batches of further shapes are computed operation by operation."""

Capture = Callable[[Callable[[], Any], torch.device], Callable[[], Any]]
"""Takes a function without arguments, and computes nothing; returns a function that repeats the operations and returns
their value, in the same tensors each time."""


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], Any]
    inputs: list[Tensor]
    """The tensors that the operations read."""


class Captured:
    """A function of a tree of tensors; from its second call of each shape on, its operations run as one graph.

    The first call of a shape runs as usual, to find out whether the host waits for the device, which a graph cannot do.
    The function may change other tensors in place. These are part of the graph: call `clear` when they are replaced.

    Args:
        function: Takes a tree of tensors and returns one. Python runs the function only while it is captured.
        device: Where the function computes.
        capture: Captures operations; None: the function always runs as usual.
    """

    def __init__(self, function: Callable[[Any], Any], device: torch.device, capture: Capture | None) -> None:
        self._function = function
        self._device = device
        self._capture = capture
        self._graphs: dict[Hashable, _Graph | None] = {}
        """Shape of the arguments to the graph; None before the second call."""
        self.eager_because: str | None = None
        """Why the function runs operation by operation; None if it does not."""

    def __call__(self, tree: Any, *, key: Hashable = None) -> Any:
        """Return the value of the function, in new tensors.

        Args:
            tree: The function's argument; a graph is captured of a tree of nothing but tensors.
            key: What else the operations depend on.
        """
        eager = self._capture is None or self.eager_because is not None
        if eager or not all(isinstance(leaf, Tensor | None) for leaf in leaves(tree)):
            return self._function(tree)
        arguments = tensors(tree)
        shape = (key, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in arguments))
        if shape not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                return self._function(tree)
            self._graphs[shape] = None
            return self._tried(tree)
        graph = self._graphs[shape] or self._captured(tree)
        if graph is None:
            return self._function(tree)
        self._graphs[shape] = graph
        for static, tensor in zip(graph.inputs, arguments, strict=True):
            static.copy_(tensor)
        return map_tensors(torch.clone, graph.replay())

    def clear(self) -> None:
        """Forget the graphs: tensors that they change have been replaced."""
        self._graphs = {}

    def _tried(self, tree: Any) -> Any:
        """Return the value of the function, and note whether the host waits for the device or draws random numbers."""
        before = torch.get_rng_state()
        with _waits_noted(self._device) as waits:
            value = self._function(tree)
        if waits:
            self.eager_because = "the host waits for the device within a step"
        elif self._device.type != "cpu" and not torch.equal(before, torch.get_rng_state()):
            self.eager_because = "random numbers are drawn on the CPU"
        return value

    def _captured(self, tree: Any) -> _Graph | None:
        assert self._capture is not None
        try:
            static = map_tensors(torch.clone, tree)
            replay = self._capture(lambda: self._function(static), self._device)
        except Exception as error:  # nothing was computed
            self.eager_because = f"{type(error).__name__}, {first_line(error)}"
            return None
        return _Graph(replay, tensors(static))


def capture_graph(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Capture the operations of a function as a CUDA graph; see `Capture`."""
    if torch.cuda.mem_get_info(device)[0] < torch.cuda.memory_reserved(device):
        torch.cuda.empty_cache()  # a graph takes memory of its own
    graph, (stream, pool) = torch.cuda.CUDAGraph(), _stream_and_pool(device)
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            value = function()
        finally:
            graph.capture_end()

    def replay() -> Any:
        graph.replay()
        return value

    return replay


def capture_on(device: torch.device) -> Capture | None:
    """Return what captures steps on a device; None where steps run operation by operation."""
    return capture_graph if device.type == "cuda" else None


@functools.cache
def _stream_and_pool(device: torch.device) -> tuple[torch.cuda.Stream, Any]:
    """Return where graphs of a device are captured; graphs that run one after another share their memory."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


@contextmanager
def _waits_noted(device: torch.device) -> Iterator[list[str]]:
    """Yield a list of the operations for which the host waits for the device."""
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            waits.append(str(warning.message))
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
