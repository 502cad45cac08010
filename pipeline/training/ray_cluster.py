"""Ray: started on this machine, or a cluster that is joined; with a token, without a dashboard, listening to itself."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidInput, PipelineError, Problem, first_line

MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's environment variables of authentication, https://docs.ray.io/en/latest/ray-security/token-auth.html."""
DEFAULT_TOKEN_FILE = Path("~/.ray/auth_token")
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Has Ray listen on 127.0.0.1 alone, as it does on Windows and macOS by default."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # Ray would print each death of a worker, with its own log, to stdout
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray warns otherwise that this default will change
}
PRIORITY = {"RAY_worker_niceness": "0"}
"""Has workers run at the priority of the search; by default Ray's workers give way to everything else on a machine."""
SECRETS = ("PG", "MLFLOW_", "PIPELINE_STORAGE")
"""Beginnings of the names of environment variables that hold passwords, which no worker needs."""

LOCAL = "local"
"""Ray's address of a new cluster on this machine, also where another one runs."""
CONNECT_S = 10.0
"""Longest wait for the head of a cluster to answer."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster has."""

    gpus: int
    cpus: int
    """CPU cores of the node with the fewest."""
    nodes: int
    """Nodes with CPU cores or GPUs."""


@contextlib.contextmanager
def local_ray(*, cpus: int, gpus: int, code: Path | None) -> Iterator[Cluster]:
    """Run Ray on this machine, for this process and whoever has the token, which only this process and Ray know.

    Args:
        cpus: Number of cores that workers may take.
        gpus: Number of GPUs that workers may take.
        code: Folder with the person's own code, which becomes the working folder of workers.

    Raises:
        PipelineError: Ray cannot be started.
    """
    own = {MODE: "token"}
    if not _has_token():
        own[TOKEN] = secrets.token_hex(32)
    with (
        _environment({**PRIORITY, **own, **LOOPBACK, **QUIET}),
        _connected(
            code, LOCAL, num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _node_ip_address="127.0.0.1"
        ) as cluster,
    ):
        yield cluster


@contextlib.contextmanager
def joined_ray(address: str, *, code: Path | None) -> Iterator[Cluster]:
    """Join a cluster of which this machine is a node.

    Args:
        address: `host:port` of the cluster's head, or "auto".
        code: As `local_ray` takes it.

    Raises:
        InvalidInput: There is no such cluster, or no token and no word that the cluster has none.
    """
    if not _has_token() and os.environ.get(MODE, "token") == "token":
        remedy = (
            f"set {TOKEN_FILE}, or make {DEFAULT_TOKEN_FILE} with `ray get-auth-token --generate` before `ray start`"
        )
        open_cluster = f"for a cluster without one, which runs the code of anyone who reaches it, set {MODE}=disabled"
        raise InvalidInput("--ray", [Problem(address, f"needs the cluster's token; {remedy}; {open_cluster}")])
    if address != "auto":
        _refuse_unreachable(address)
    with _environment({MODE: os.environ.get(MODE, "token"), **QUIET}), _connected(code, address) as cluster:
        yield cluster


@contextlib.contextmanager
def _connected(code: Path | None, address: str, **options: Any) -> Iterator[Cluster]:
    import ray
    from ray import _raylet, exceptions

    if ray.is_initialized():
        raise InvalidInput("ray", [Problem("", "Ray runs in this process already; call ray.shutdown() first")])
    if code is not None:
        options["runtime_env"] = {"working_dir": str(code)}
    raylet: Any = _raylet
    raylet.Config.initialize("")  # Ray read the environment when it was imported
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    if address == LOCAL and raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        raise PipelineError(f"Ray would start without a token, since {MODE} is {os.environ.get(MODE)}; unset it")
    try:
        with _without_secrets():
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except (ConnectionError, ValueError, RuntimeError, exceptions.RayError, exceptions.AuthenticationError) as error:
        if address == LOCAL:
            raise PipelineError(f"Ray could not be started: {first_line(error)}") from error
        remedy = "this machine must be a node of the cluster, as after `ray start --head`, and have its token"
        problem = Problem(address, f"cannot be joined: {first_line(error)}; {remedy}")
        raise InvalidInput("--ray", [problem]) from None
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield Cluster(
            gpus=int(sum(node.get("GPU", 0) for node in nodes)),
            cpus=int(min((node["CPU"] for node in nodes if node.get("CPU")), default=1)),
            nodes=sum(1 for node in nodes if node.get("CPU") or node.get("GPU")),
        )
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Refuse an address at which nothing listens; Ray would try again for many minutes.

    Raises:
        InvalidInput: There is no connection.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        message = f"cannot be reached: {first_line(error)}; start the cluster with `ray start --head`"
        raise InvalidInput("--ray", [Problem(address, message)]) from None


def _has_token() -> bool:
    named = os.environ.get(TOKEN) or os.environ.get(TOKEN_FILE)
    return bool(named) or DEFAULT_TOKEN_FILE.expanduser().is_file()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_secrets() -> Iterator[None]:
    """Take passwords out of the environment while Ray's processes start, which inherit the environment."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(SECRETS)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
