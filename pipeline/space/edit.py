"""Write bounds of base rates into a search-space file; the rest of the file stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidInput, Problem
from pipeline.files import strict_yaml
from pipeline.files.atomic import write_atomic
from pipeline.space.load import space_from_document


def write_bounds(path: Path, bounds: Mapping[str, tuple[str, str]]) -> bool:
    """Set the `base_lr` of optimizers to logarithmic ranges.

    Comments and layout stay, except within a `base_lr` that is not a logarithmic range yet.

    Args:
        path: The file.
        bounds: Optimizer name to (low, high), as they shall be written.

    Returns:
        Whether the file changed.

    Raises:
        InvalidInput: The file cannot be written, or another part of the file does not allow these bounds.
    """
    text = _read(path)
    data = strict_yaml.loads(text, source=str(path))
    edited = strict_yaml.replace(text, dict(_replacements(data, bounds)))
    now = strict_yaml.loads(edited, source=str(path))
    for name, (low, high) in bounds.items():
        data["optimizer"][name]["base_lr"] = {"low": float(low), "high": float(high), "log": True}
    assert now == data, "an edit changed more than it should"
    try:
        space_from_document(now, name=path.stem)
    except InvalidInput as error:
        raise InvalidInput(f"{path} with the proposed bounds, not written", error.problems) from None
    if edited != text:
        _write(path, edited)
    return edited != text


def _replacements(
    data: Mapping[str, Any], bounds: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (keys from the file's root to a value, new text of the value)."""
    for name, (low, high) in bounds.items():
        place = ("optimizer", name, "base_lr")
        present = data["optimizer"][name]["base_lr"]
        if isinstance(present, dict) and present.keys() == {"low", "high", "log"} and present["log"] is True:
            yield (*place, "low"), low
            yield (*place, "high"), high
        else:
            yield place, f"{{low: {low}, high: {high}, log: true}}"


def _read(path: Path) -> str:
    if not path.is_file():
        raise InvalidInput("--write", [Problem(str(path), "must be a regular file to be written to; write it to one")])
    try:
        return path.read_bytes().decode()  # not `read_text`, which would change the ends of lines
    except OSError as error:
        raise InvalidInput("--write", [Problem(str(path), f"cannot be read: {error.strerror}")]) from None


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path.resolve(), text)  # a link stays one
    except OSError as error:
        message = f"cannot be written: {error.strerror}; put the bounds in by hand, or copy the file"
        raise InvalidInput("--write", [Problem(str(path), message)]) from None
