"""A private PostgreSQL server for tests and benchmarks, in a temporary folder, reached through a socket in it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

USERS = ("postgres", "nobody")
"""Users that the server may run as where the caller is root, whom PostgreSQL refuses."""


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs; None if it is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if folders:
        return folders[-1]
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class Server:
    """A server that can be stopped and started.

    Args:
        folder: Holds the data and the socket; its owner runs the server.
        account: The owner, for `subprocess`, if it is not the caller.
        fsync: Whether what is committed outlives a power failure too.
    """

    def __init__(self, folder: str, account: Mapping[str, Any], *, fsync: bool) -> None:
        self.folder = folder
        self.uri = f"postgresql://tester@/postgres?host={folder}"
        """URI of the empty database."""
        self._account = account
        self._fsync = fsync

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs on the server's data."""
        programs = binaries()
        assert programs is not None
        command = [str(programs / program), "-D", f"{self.folder}/data", *arguments]
        subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, **self._account)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-k {self.folder} -c listen_addresses='' -c fsync={'on' if self._fsync else 'off'}"
        self.run("pg_ctl", "-l", f"{self.folder}/log", "-o", options, "-w", "start")

    def kill(self) -> None:
        """End the server as a crash does: what its clients have not committed is lost."""
        self.run("pg_ctl", "-m", "immediate", "-w", "stop")


@contextlib.contextmanager
def server(*, password: str | None = None, fsync: bool = False) -> Iterator[Server]:
    """Start a server with an empty database, stop it at the end of the block, and remove its files.

    Args:
        password: The password that the server asks for; None: the server trusts everyone.
        fsync: Whether what is committed outlives a power failure too.
    """
    # Not below pytest's folder, which other users may not enter and whose path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        account: dict[str, Any] = {}
        if os.getuid() == 0:
            user = min((u for u in pwd.getpwall() if u.pw_name in USERS), key=lambda user: USERS.index(user.pw_name))
            account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        found = Server(folder, account, fsync=fsync)
        asks = ["-A", "trust"]
        if password is not None:
            file = Path(folder, "password")
            file.write_text(password)
            file.chmod(0o644)
            asks = ["-A", "scram-sha-256", "--pwfile", str(file)]
        found.run("initdb", *asks, "-U", "tester", "--no-sync", "--encoding=UTF8", "--locale=C")
        found.start()
        try:
            yield found
        finally:
            found.kill()


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Start a server that trusts everyone; yield the URI of its empty database."""
    with server() as found:
        yield found.uri
