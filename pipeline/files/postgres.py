"""The URL of a PostgreSQL database: read without a password, which every user of the machine could see."""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import masked

STORAGE = "PIPELINE_STORAGE"
"""Environment variable that stands for `--storage`."""
INSTALL = "pip install 'psycopg[binary]'"
"""The command that installs the driver."""
FORM = "postgresql://user@host:5432/database"
"""How a URL is written."""
DEFAULTS = {
    "connect_timeout": "10",
    # A network that is cut is noticed after half a minute, not after hours.
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "30000",
}
"""Parameters of a connection that the URL does not name."""


def read_url(text: str) -> str:
    """Return the URL of a PostgreSQL database as libpq takes it; SQLAlchemy's name of a driver is left out.

    Raises:
        ValueError: The URL cannot be used. The message has no part of the URL that may be a password.
    """
    scheme = re.match(r"postgres(ql)?(\+[a-z0-9_]+)?://", text)
    if scheme is None:
        raise ValueError(f"must be the URL of a PostgreSQL database, {FORM}")
    url = f"postgresql://{text[scheme.end() :]}"
    remedy = "leave the password away, and set PGPASSWORD or write it into ~/.pgpass"
    refusal = f"has a password, which other users of this machine can see in the list of processes; {remedy}"
    if masked(url) != url:
        raise ValueError(refusal)
    try:
        parameters = connection_parameters(url)
    except ImportError:
        raise ValueError(f"needs the package psycopg, which is not installed; run {INSTALL}") from None
    except ValueError:
        raise ValueError(f"cannot be read; write {FORM}, and %XX for special characters") from None
    if any("password" in name or "secret" in name for name in parameters) or ":" in parameters.get("user", ""):
        raise ValueError(refusal)
    return url


def connection_parameters(url: str) -> dict[str, Any]:
    """Return the parameters that a URL names, by libpq's names.

    Raises:
        ImportError: The driver is not installed.
        ValueError: libpq cannot read the URL.
    """
    import psycopg.conninfo

    try:
        parameters: dict[str, Any] = psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error as error:
        raise ValueError(str(error)) from None
    if not re.fullmatch(r"[0-9,]*", parameters.get("port", "")):  # which libpq reads only as it connects
        raise ValueError("the port is no number")
    return parameters
