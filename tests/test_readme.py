import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.space.load import load_space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_search_space_of_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = [
        text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "optimizer:" in text and "low" in text
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(block)
    space = load_space(file)
    assert list(space.optimizers) == ["sgd", "adamw"]
    assert space.enqueue == ({"optimizer": "adamw", "adamw.base_lr": 1e-3},)


def test_the_model_of_the_readme_is_the_template_of_the_page_on_own_workloads() -> None:
    def templates(text: str) -> list[str]:
        return [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "-> Workload" in code]

    (template,) = templates(README)
    assert [template] == templates((ROOT / "docs" / "own-workloads.md").read_text())


def paths_of_the_tree() -> Iterator[str]:
    """Yield each path that the file tree names; a line names one or several in one folder, then says what for."""
    (tree,) = re.findall(r"```\n(pipeline/\n.*?)```", README, re.DOTALL)
    folders: list[str] = []
    for line in tree.splitlines():
        names, depth = line.split(), (len(line) - len(line.lstrip())) // 4
        del folders[depth:]
        for name in names:
            if not re.fullmatch(r"\w+(\.\w+|/)", name):
                break
            yield "".join([*folders, name])
        if names[0].endswith("/"):
            folders.append(names[0])


def test_the_file_tree_names_every_module_under_its_package_and_nothing_else() -> None:
    modules = (path for path in (ROOT / "pipeline").rglob("*.py") if path.name != "__init__.py")
    packages = {path.parent for path in (ROOT / "pipeline").rglob("__init__.py")}
    there = {str(path.relative_to(ROOT)) for path in modules} | {f"{path.relative_to(ROOT)}/" for path in packages}
    tree = list(paths_of_the_tree())
    assert {path for path in tree if path.startswith("pipeline/")} == there
    assert len(tree) == len(set(tree))
    assert [path for path in tree if not (ROOT / path).exists()] == []


NAMED = set(re.findall(r"\b(?:benchmarks|search_spaces|pipeline|docs)/[\w/-]+\.\w+", README))


@pytest.mark.parametrize("path", sorted(NAMED - {"search_spaces/mine.yaml"}))
def test_a_file_that_the_readme_names_exists(path: str) -> None:
    assert (ROOT / path).exists()
