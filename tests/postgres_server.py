"""A private PostgreSQL server for tests and benchmarks, in a temporary folder, reached through a socket in it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
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


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Start a server with an empty database; yield the URI of the database; stop the server, and remove its files."""
    programs = binaries()
    assert programs is not None
    # Not below pytest's folder, which other users may not enter and whose path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        account: dict[str, Any] = {}
        if os.getuid() == 0:
            user = min((u for u in pwd.getpwall() if u.pw_name in USERS), key=lambda user: USERS.index(user.pw_name))
            os.chown(folder, user.pw_uid, user.pw_gid)
            account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

        def run(program: str, *arguments: str) -> None:
            subprocess.run(
                [programs / program, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL, **account
            )

        data = f"{folder}/data"
        run("initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync", "--encoding=UTF8", "--locale=C")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-D", data, "-l", f"{folder}/log", "-o", options, "-w", "start")
        try:
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
