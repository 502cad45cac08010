"""Load a person's own code: a name in a Python file, or in an installed module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from pipeline.errors import InvalidInput, Problem

_LIBRARIES = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_PIPELINE = Path(__file__).resolve().parent.parent


def load_module(named: str, *, place: str, kind: str = "function") -> tuple[ModuleType, str]:
    """Import the module of `path/to/file.py:name` or `package.module:name`; a file is executed anew each time.

    Args:
        named: The name with its module.
        place: Where `named` stands, for messages.
        kind: Kind of the named thing, for messages.

    Returns:
        The module, and the name in the module, which may not exist.

    Raises:
        InvalidInput: `named` has another form, there is no such module, or the module raises.
    """
    module, colon, name = named.rpartition(":")
    if not colon or not module or not name.isidentifier():
        _refuse(place, f"must be path/to/file.py:{kind} or package.module:{kind}, got {named!r}")
    if module.endswith(".py"):
        return _load_file(Path(module), place), name
    return _load_installed(module, place, kind), name


def where(error: BaseException) -> str:
    """Return an error's message and the last line of the person's own code in its traceback."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    if isinstance(error, SyntaxError):
        return f"{text}, in {error.filename}, line {error.lineno}"
    return ", ".join([text, *own_line(error)])


def own_line(error: BaseException) -> list[str]:
    """Return the last line of the person's own code in an error's traceback, as one text; nothing if there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if not (file.startswith("<frozen ") or is_installed(Path(file)))]
    return [f"in {own[-1][0]}, line {own[-1][1]}"] if own else []


def is_installed(path: Path) -> bool:
    """Say whether a file is of Python, of an installed package or of this one, so not the person's own."""
    path = path.resolve()
    return "site-packages" in path.parts or any(path.is_relative_to(folder) for folder in (*_LIBRARIES, _PIPELINE))


def _load_file(path: Path, place: str) -> ModuleType:
    if not path.is_file():
        _refuse(place, f"there is no file {path}; a path is relative to the working folder")
    name = f"custom_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        _refuse(place, f"{path} raised {where(error)}")
    return module


def _load_installed(name: str, place: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            _refuse(place, f"there is no module {name}; install it, or name a file, path/to/file.py:{kind}")
        _refuse(place, f"{name} raised {where(error)}")
    except (Exception, SystemExit) as error:
        _refuse(place, f"{name} raised {where(error)}")


def _refuse(place: str, message: str) -> NoReturn:
    raise InvalidInput(place, [Problem(place, message)])
