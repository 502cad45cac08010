"""Run a function on a CUDA device as one graph: captured once, then launched as a whole.

A step of a small network is bound by the launches of its kernels. A graph launches them all at once:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import first_line
from pipeline.workloads.trees import leaves, map_tensors, tensors

MAX_GRAPHS = 8
"""Most graphs of a function; batches of further shapes are computed operation by operation."""

Function = Callable[[Any], Any]
"""Takes a tree of tensors, and returns one."""


class Capture(Protocol):
    """Captures the operations of functions on one device."""

    failures: int
    """The number of captures that have failed; every failure makes the graphs before it useless."""

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Capture the operations of a function; nothing is computed.

        Returns:
            A function that repeats the operations and returns their value, in the same tensors each time.
        """
        ...


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], Any]
    inputs: list[Tensor]
    """The tensors that the operations read."""


class Captured:
    """Calls a function of a tree of tensors; from the second call of each shape on, its operations run as one graph.

    The first call of a shape runs as usual, to find out whether the host waits for the device, which a graph cannot do.
    The function may read and change other tensors in place, such as parameters: the graph holds their addresses. Call
    `clear` when such a tensor is replaced.

    Args:
        device: Where the function computes.
        capture: Captures operations; None: the function always runs as usual.
    """

    def __init__(self, device: torch.device, capture: Capture | None) -> None:
        self._device = device
        self._capture = capture
        self.clear()

    def clear(self) -> None:
        """Forget the graphs: tensors that they read or change have been replaced."""
        self._graphs: dict[Hashable, _Graph | None] = {}
        """Shape of the arguments to the graph; None before the second call."""
        self._failures = 0 if self._capture is None else self._capture.failures
        self.eager_because: str | None = None
        """Why the function runs operation by operation, although it was to be captured; None: it runs as graphs."""

    def __call__(self, function: Function, tree: Any, *, key: Hashable = None) -> Any:
        """Return the value of a function, in new tensors.

        Args:
            function: The same in every call. Python runs the function only while it is captured.
            tree: The function's argument; a graph is captured of a tree of nothing but tensors.
            key: What decides the operations besides shapes, strides and types of the tree's tensors.
        """
        if self._capture is None or self.eager_because or not all(isinstance(x, Tensor | None) for x in leaves(tree)):
            return function(tree)
        if self._failures != self._capture.failures:
            self.clear()
        arguments = tensors(tree)
        shape = (key, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in arguments))
        if shape not in self._graphs:
            return self._tried(function, tree, shape)
        graph = self._graphs[shape] or self._captured(self._capture, function, tree)
        if graph is None:
            return function(tree)
        self._graphs[shape] = graph
        for static, tensor in zip(graph.inputs, arguments, strict=True):
            static.copy_(tensor)
        return map_tensors(torch.clone, graph.replay())

    def _tried(self, function: Function, tree: Any, shape: Hashable) -> Any:
        """Return the value of the function, and note whether a graph can be captured."""
        if len(self._graphs) == MAX_GRAPHS:
            return function(tree)
        before = torch.get_rng_state()
        with _waits_noted(self._device) as waits:
            value = function(tree)
        self._graphs[shape] = None
        if waits:
            self.eager_because = "the host waits for the device within a step"
        elif self._device.type != "cpu" and not torch.equal(before, torch.get_rng_state()):
            self.eager_because = "random numbers are drawn on the CPU"
        return value

    def _captured(self, capture: Capture, function: Function, tree: Any) -> _Graph | None:
        try:
            static = map_tensors(torch.clone, tree)
            return _Graph(capture(lambda: function(static)), tensors(static))
        except Exception as error:  # nothing was computed
            self.eager_because = f"{type(error).__name__}, {first_line(error)}"
            return None


def capture_on(device: torch.device) -> Capture | None:
    """Return what captures steps on a device; None where steps run operation by operation."""
    return _cuda_graphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """Captures operations on a CUDA device as graphs. The graphs run one after another and share their memory."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()
        self.failures = 0
        self._device = device
        self._index: int = torch.cuda.current_device() if device.index is None else device.index
        self._generator = torch.cuda.default_generators[self._index]
        self._stream = torch.cuda.Stream(device)
        self._alive = weakref.WeakSet[torch.cuda.CUDAGraph]()
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """See `Capture`."""
        torch.cuda.synchronize(self._device)  # a capture writes the random seed that graphs in the queue may yet read
        if torch.cuda.mem_get_info(self._device)[0] < torch.cuda.memory_reserved(self._device):
            torch.cuda.empty_cache()  # a graph takes memory of its own
        if not self._alive:  # PyTorch gives up a pool of memory with the last graph that uses it
            self._pool = torch.cuda.graph_pool_handle()
        graph, random_state = torch.cuda.CUDAGraph(), self._generator.get_state()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                value = function()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._end(graph, random_state)
                raise
            self._end(graph, random_state)
        self._alive.add(graph)

        def replay() -> Any:
            graph.replay()
            return value

        return replay

    def _end(self, graph: torch.cuda.CUDAGraph, random_state: Tensor) -> None:
        """End a capture.

        Raises:
            RuntimeError: An operation has made the capture invalid.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            self.failures += 1
            with contextlib.suppress(RuntimeError):  # torch 2.11 leaves the allocator in a capture
                torch._C._cuda_endAllocateToPool(self._index, self._pool)
                torch._C._cuda_releasePool(self._index, self._pool)
            # The generator is left in a capture too. With another state, graphs of the former state are useless.
            self._generator.graphsafe_set_state(torch.Generator(self._device).set_state(random_state))
            raise


@functools.cache
def _cuda_graphs(device: torch.device) -> CudaGraphs:
    return CudaGraphs(device)


@contextlib.contextmanager
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
