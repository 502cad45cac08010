"""Run a function on a CUDA device as one graph: captured once, then launched as a whole.

A step of a small network is bound by the launches of its kernels. A graph launches them all at once:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import functools
import warnings
import weakref
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

Function = Callable[[Any], Any]
"""Takes a tree of tensors, and returns one."""
Capture = Callable[[Callable[[], Any], torch.device], Callable[[], Any]]
"""Takes a function without arguments, and computes nothing; returns a function that repeats the operations and returns
their value, in the same tensors each time."""


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], Any]
    inputs: list[Tensor]
    """The tensors that the operations read."""


class Captured:
    """Calls a function of a tree of tensors; from the second call of each shape on, its operations run as one graph.

    The first call of a shape runs as usual, to find out whether the host waits for the device, which a graph cannot do.
    The function may change other tensors in place. These are part of the graph: call `clear` when they are replaced.

    Args:
        device: Where the function computes.
        capture: Captures operations; None: the function always runs as usual.
    """

    def __init__(self, device: torch.device, capture: Capture | None) -> None:
        self._device = device
        self._capture = capture
        self._graphs: dict[Hashable, _Graph | None] = {}
        """Shape of the arguments to the graph; None before the second call."""
        self.eager_because: str | None = None
        """Why the function runs operation by operation; None if it does not."""

    def __call__(self, function: Function, tree: Any, *, key: Hashable = None) -> Any:
        """Return the value of a function, in new tensors.

        Args:
            function: The same in every call; Python runs the function only while it is captured.
            tree: The function's argument; a graph is captured of a tree of nothing but tensors.
            key: What else the operations depend on.
        """
        eager = self._capture is None or self.eager_because is not None
        if eager or not all(isinstance(leaf, Tensor | None) for leaf in leaves(tree)):
            return function(tree)
        arguments = tensors(tree)
        shape = (key, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in arguments))
        if shape not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                return function(tree)
            self._graphs[shape] = None
            return self._tried(function, tree)
        graph = self._graphs[shape] or self._captured(function, tree)
        if graph is None:
            return function(tree)
        self._graphs[shape] = graph
        for static, tensor in zip(graph.inputs, arguments, strict=True):
            static.copy_(tensor)
        return map_tensors(torch.clone, graph.replay())

    def clear(self) -> None:
        """Forget the graphs: tensors that they change have been replaced."""
        self._graphs = {}

    def _tried(self, function: Function, tree: Any) -> Any:
        """Return the value of the function, and note whether the host waits for the device or draws random numbers."""
        before = torch.get_rng_state()
        with _waits_noted(self._device) as waits:
            value = function(tree)
        if waits:
            self.eager_because = "the host waits for the device within a step"
        elif self._device.type != "cpu" and not torch.equal(before, torch.get_rng_state()):
            self.eager_because = "random numbers are drawn on the CPU"
        return value

    def _captured(self, function: Function, tree: Any) -> _Graph | None:
        assert self._capture is not None
        try:
            static = map_tensors(torch.clone, tree)
            replay = self._capture(lambda: function(static), self._device)
        except Exception as error:  # nothing was computed
            cause = error.__context__ or error  # the end of a capture that has failed raises too
            self.eager_because = f"{type(cause).__name__}, {first_line(cause)}"
            return None
        return _Graph(replay, tensors(static))


def capture_graph(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Capture the operations of a function as a CUDA graph; see `Capture`."""
    if torch.cuda.mem_get_info(device)[0] < torch.cuda.memory_reserved(device):
        torch.cuda.empty_cache()  # a graph takes memory of its own
    graph, place = torch.cuda.CUDAGraph(), _place(device)
    pool, random_state = place.pool(), place.generator.get_state()
    with torch.cuda.stream(place.stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            value = function()
        finally:
            try:
                graph.capture_end()
            except Exception:  # PyTorch leaves its random state and its allocator as in a capture
                place.generator.graphsafe_set_state(torch.Generator(device).set_state(random_state))
                torch._C._cuda_endAllocateToPool(place.index, pool)
                torch._C._cuda_releasePool(place.index, pool)
                raise
    place.graphs.add(graph)

    def replay() -> Any:
        graph.replay()
        return value

    return replay


def capture_on(device: torch.device) -> Capture | None:
    """Return what captures steps on a device; None where steps run operation by operation."""
    return capture_graph if device.type == "cuda" else None


class _Place:
    """Where the graphs of a device are captured. The graphs run one after another and share their memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.index: int = torch.cuda.current_device() if device.index is None else device.index
        self.generator = torch.cuda.default_generators[self.index]
        self.graphs = weakref.WeakSet[torch.cuda.CUDAGraph]()
        self._pool: Any = None

    def pool(self) -> Any:
        """Return the pool of memory of the graphs; a pool ends with its last graph."""
        if not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


@functools.cache
def _place(device: torch.device) -> _Place:
    return _Place(device)


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
