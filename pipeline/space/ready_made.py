"""Find a search-space file: by its path, by the name of a ready-made one, or the default."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import InvalidInput, Problem, did_you_mean

FOLDER = "search_spaces"
DEFAULT = "default"
"""Name of the space that is searched if neither a space nor a workload is named."""
DEFAULT_WITH_WORKLOAD = "own"
"""Name of the space that is searched if a workload is named and no space."""


def ready_made() -> dict[str, Path]:
    """Return the files of the ready-made spaces by name.

    An installed package holds the files in a folder of its own. In a checkout the folder lies beside the package.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / FOLDER
    folder = inside if inside.is_dir() else package.parent / FOLDER
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def summary(file: Path) -> str:
    """Return what a ready-made space is for: the comment on its second line."""
    return file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")


def find_space(given: Path | None, *, with_workload: bool = False) -> Path:
    """Return the file of a search space; a file in the working folder hides a ready-made space of the same name.

    Args:
        given: A path or a name; None: the default.
        with_workload: Whether a workload is named besides, for which there is another default.

    Raises:
        InvalidInput: No file and no ready-made space has that name.
    """
    known = ready_made()
    if given is None:
        return known[DEFAULT_WITH_WORKLOAD if with_workload else DEFAULT]
    if str(given) in known and not given.is_file():
        return known[str(given)]
    if not os.path.lexists(given):
        message = f"there is no such file, and no search space of that name; {did_you_mean(given.stem, known)}"
        raise InvalidInput(str(given), [Problem("", message)])
    return given
