"""The workers of a search: this process, or Ray's, on this machine or in a cluster."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.app.device import environment
from pipeline.app.options import SearchOptions
from pipeline.app.prepare import prepare
from pipeline.app.run_trials import Worker
from pipeline.errors import InvalidInput, Problem, counted
from pipeline.space.config import Own
from pipeline.space.load import build_space
from pipeline.training.executor import LocalExecutor
from pipeline.training.ray_cluster import Cluster, joined_ray, local_ray
from pipeline.training.ray_worker import RayWorker, check_sendable
from pipeline.workloads.loop import Loop
from pipeline.workloads.workload import Workload


@contextlib.contextmanager
def workers_of(options: SearchOptions, executor: LocalExecutor) -> Iterator[list[Worker]]:
    """Yield the workers that the options ask for; without `--workers` and `--ray`, this process alone.

    Raises:
        InvalidInput: This machine has too few GPUs, the cluster cannot be joined, or the workload cannot be sent.
    """
    if options.workers is None and options.ray is None:
        with contextlib.closing(executor):
            yield [Worker(executor, functools.partial(environment, executor))]
        return
    executor.close()
    with _shipped_code(options) as code, _cluster(options, code) as cluster:
        if options.workload is not None:
            check_sendable(options.workload)
        found: list[RayWorker] = []

        def make_room() -> None:
            for worker in found:
                if worker.is_idle:
                    worker.close()

        count, resources, threads = _shares(options, cluster)
        start = functools.partial(
            start_executor,
            options.space.document,
            name=options.space.name,
            source=options.source,
            device="auto" if "num_gpus" in resources else "cpu",
            rows=options.rows,
            workload=options.workload,
        )
        for _ in range(count):
            found.append(RayWorker(start, resources=resources, threads=threads, make_room=make_room))
            found[-1].begin()
        try:
            yield [Worker(worker, functools.partial(_environment_of, worker)) for worker in found]
        finally:
            for worker in found:
                worker.close()


def start_executor(
    document: Mapping[str, Any],
    *,
    name: str,
    source: str,
    device: str,
    rows: int | None,
    workload: Workload | Loop | None,
) -> tuple[LocalExecutor, Mapping[str, Any]]:
    """Build a worker's executor, in the worker's process: load data and model, as the search itself has done."""
    space = build_space(document, source=source, name=name)
    _, executor = prepare(space, source=source, device=device, searching=True, rows=rows, workload=workload)
    return executor, environment(executor)


def _environment_of(worker: RayWorker) -> Mapping[str, Any]:
    return worker.environment


@contextlib.contextmanager
def _cluster(options: SearchOptions, code: Path | None) -> Iterator[Cluster]:
    """Yield the cluster that the options name, or Ray on this machine."""
    if options.ray is not None:
        with joined_ray(options.ray, code=code) as cluster:
            yield cluster
        return
    assert options.workers is not None
    gpus = gpus_of(options)
    if 0 < gpus < options.workers:
        message = f"this machine has {counted(gpus, 'GPU')}, one for each worker; take --workers {gpus} or --device cpu"
        raise InvalidInput("--workers", [Problem(str(options.workers), message)])
    cpus = options.workers * _cores_each(options, torch.get_num_threads())
    with local_ray(cpus=cpus, gpus=gpus, code=code) as cluster:
        yield cluster


def _shares(options: SearchOptions, cluster: Cluster) -> tuple[int, dict[str, float], int]:
    """Return the number of workers, what each takes of its node, and the number of its threads."""
    if cluster.gpus and options.device == "auto":
        cores = {} if options.cpus_per_worker is None else {"num_cpus": float(options.cpus_per_worker)}
        return options.workers or cluster.gpus, {"num_gpus": 1.0, **cores}, options.cpus_per_worker or 1
    if options.ray is None:
        assert options.workers is not None
        count, cores_each = options.workers, _cores_each(options, torch.get_num_threads())
    else:
        count = options.workers or cluster.nodes
        cores_each = _cores_each(options, cluster.cpus, workers=-(-count // cluster.nodes))
    return count, {"num_cpus": float(cores_each)}, cores_each


def _cores_each(options: SearchOptions, cores: int, *, workers: int | None = None) -> int:
    """Return the number of cores of a worker: as asked for, or all cores divided by the workers."""
    return options.cpus_per_worker or max(1, cores // (workers or options.workers or 1))


def gpus_of(options: SearchOptions) -> int:
    """Return the number of GPUs of this machine that the search may use."""
    return torch.cuda.device_count() if options.device == "auto" and torch.cuda.is_available() else 0


@contextlib.contextmanager
def _shipped_code(options: SearchOptions) -> Iterator[Path | None]:
    """Yield a folder with a copy of the person's own code below the working folder; None if there is none.

    A file is copied with the Python files beside it, which it may import, and with the packages beside it.
    """
    names = list(options.space.own_code())
    if options.workload is None and isinstance(options.space.workload, Own):
        names.append(options.space.workload.function)
    with tempfile.TemporaryDirectory(prefix="own-code-") as folder:
        for name in names:
            _copy_code(name.rpartition(":")[0], Path.cwd(), Path(folder))
        yield Path(folder) if any(Path(folder).iterdir()) else None


def _copy_code(module: str, here: Path, there: Path) -> None:
    """Copy a file that is named by its path, or a module, from one folder to another, if it is in the first."""
    if not module.endswith(".py"):
        top = module.partition(".")[0]
        place = here / top if (here / top).is_dir() else here / f"{top}.py"
        if str(here) in (str(Path(entry or ".").absolute()) for entry in sys.path):
            _copy(place, there / place.name)
        return
    path = (here / module).absolute()
    if path.is_relative_to(here) and ".." not in Path(module).parts and not Path(module).is_absolute():
        for place in path.parent.iterdir():
            if place.suffix == ".py" or (place / "__init__.py").is_file():
                _copy(place, there / place.relative_to(here))


def _copy(place: Path, target: Path) -> None:
    """Copy a Python file, or a package without anything but its Python files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if place.is_file():
        shutil.copyfile(place, target)
    elif place.is_dir():
        for file in place.rglob("*.py"):
            (target / file.relative_to(place)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(place))
