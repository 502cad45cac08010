"""Imports only go down: who may import what, read from the source."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from pipeline.space.config import WORKLOAD_CHOICES, WorkloadChoice

ROOT = Path(__file__).parent.parent
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in sorted((ROOT / "pipeline").rglob("*.py"))
}
MAY_IMPORT = {
    "errors": (),
    "files": ("errors",),
    "space": ("errors", "files"),
    "workloads": ("errors", "files", "space"),
    "training": ("errors", "files", "space", "workloads"),
    "study": ("errors", "files", "space", "workloads", "training"),
    "tracking": ("errors", "files", "space"),
    "page": ("errors", "files", "space"),
    "app": ("errors", "files", "space", "workloads", "training", "study", "tracking", "page"),
}
"""Package, or module, of `pipeline` to those that its modules may import besides its own; commands may import all."""
OWNERS = {
    "mlflow": ("tracking.mlflow*",),
    "cloudpickle": ("tracking.mlflow_model",),
    "optuna": (
        "study.study",
        "study.stored_trial",
        "study.database",
        "study.sqlite",
        "study.postgres",
        "study.store",
        "study.samplers",
        "study.importance",
    ),
    "psycopg": ("files.postgres", "study.postgres"),
    "torch": (
        "training*",
        "workloads*",
        "app.device",
        "app.prepare",
        "app.range_test",
        "app.train_config",
        "app.workers",
        "train",
        "study.checkpoint",
        "study.models",
    ),
    "ray": ("training.ray_cluster", "training.ray_worker"),
    "sklearn": ("workloads*",),
    "yaml": ("files.strict_yaml",),
    "matplotlib": ("app.range_picture",),
    "pydantic": ("space.distributions", "space.file_format", "space.load"),
}
"""Library to the only modules that import it."""


def statements(tree: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Yield the nodes that run; what is imported for type checking alone does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef) and not inside_functions:
            continue
        yield node
        yield from statements(node, inside_functions=inside_functions)


def imports(module: str, *, inside_functions: bool) -> set[str]:
    """Return the modules that a module imports, ours and others', by full name."""
    found = set()
    for node in statements(TREES[module], inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & TREES.keys()
            found |= inner or {str(node.module)}
    return found


def reached(module: str) -> set[str]:
    """Return all that importing a module runs, and all that its functions may import."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports(waiting.pop(), inside_functions=True) - seen:
            seen.add(name)
            waiting += [name] if name in TREES else []
    return seen


def room_of(module: str) -> str:
    """Return the package of `pipeline` that a module lies in; of a module that lies in none, its name."""
    return [*module.split("."), ""][1]


def is_one_of(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, f"pipeline.{pattern}") for pattern in patterns)


def test_the_whole_program_is_reached_from_the_search() -> None:
    names = reached("pipeline.search")
    assert {"mlflow", "optuna", "torch", "yaml", "pydantic"} <= names
    assert {"pipeline.study.study", "pipeline.training.plain", "pipeline.tracking.mlflow"} <= names


@pytest.mark.parametrize("choice", WORKLOAD_CHOICES)
def test_a_workload_names_a_function_of_its_room_that_loads_it(choice: type[WorkloadChoice]) -> None:
    module, _, function = choice.loader.partition(":")
    assert room_of(module) == "workloads"
    assert callable(getattr(importlib.import_module(module), function))


def test_no_import_runs_in_a_circle() -> None:
    graph = {module: imports(module, inside_functions=False) & TREES.keys() for module in TREES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_by_its_owners_only(library: str) -> None:
    others = [
        module
        for module in TREES
        if not is_one_of(module, OWNERS[library])
        and library in {name.partition(".")[0] for name in imports(module, inside_functions=True)}
    ]
    assert others == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    allowed = {"", package, *MAY_IMPORT[package]}  # "": `pipeline` itself, which holds the version
    others = {
        f"{module} imports {name}"
        for module in TREES
        if room_of(module) == package
        for name in imports(module, inside_functions=True) & TREES.keys()
        if room_of(name) not in allowed
    }
    assert others == set()


def test_every_package_has_its_place_in_the_table() -> None:
    packages = {room_of(module) for module in TREES if module.count(".") > 1}
    assert packages <= MAY_IMPORT.keys()


@pytest.mark.parametrize("package", [path for path in sorted((ROOT / "pipeline").rglob("__init__.py"))])
def test_a_package_holds_a_docstring_alone(package: Path) -> None:
    names = [node for node in ast.parse(package.read_text()).body[1:]]
    assert [ast.unparse(node).partition(" =")[0] for node in names] in ([], ["__version__"])


@pytest.mark.parametrize("module", [module for module in TREES if room_of(module) in ("training", "workloads")])
def test_training_imports_no_library_of_search_spaces_studies_or_records(module: str) -> None:
    libraries = {"optuna", "mlflow", "yaml", "pydantic", "rich"}
    assert {name.partition(".")[0] for name in reached(module)} & libraries == set()


@pytest.mark.parametrize("module", TREES)
def test_a_module_uses_no_private_name_of_another(module: str) -> None:
    nodes = list(ast.walk(TREES[module]))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    ours = {
        alias.asname or alias.name for node in froms if str(node.module).startswith("pipeline") for alias in node.names
    }
    private = {name for name in ours if name.startswith("_") and name != "__version__"}
    private |= {
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in ours and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    assert private == set()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import pipeline", {"pipeline.errors", "pydantic", "torch", "optuna", "mlflow", "yaml", "rich"}),
        (
            "import pipeline.search, pipeline.train, pipeline.export, pipeline.report, pipeline.lr_range",
            {"torch", "optuna", "mlflow", "pydantic", "rich", "matplotlib"},
        ),
        ("import pipeline.app.start_search, pipeline.ui", {"torch", "optuna", "mlflow", "matplotlib"}),
        ("import pipeline.app.export", {"torch", "mlflow"}),
        ("import pipeline.training.plain", {"optuna", "mlflow", "yaml", "pydantic", "rich"}),
        ("import pipeline.study.study, pipeline.study.store", {"torch", "mlflow", "sklearn"}),
    ],
)
def test_an_import_leaves_the_heavy_libraries_alone(code: str, absent: set[str]) -> None:
    ask = f"{code}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert absent & set(done.stdout.split()) == set()
