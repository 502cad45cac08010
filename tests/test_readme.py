import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.space.load import load_space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def modules_of(folder: Path) -> Iterable[str]:
    return (path.name for path in folder.glob("*.py") if path.name != "__init__.py")


def test_the_search_space_of_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = [
        text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "optimizer:" in text and "low" in text
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(block)
    space = load_space(file)
    assert list(space.optimizers) == ["sgd", "adamw"]
    assert space.enqueue == ({"optimizer": "adamw", "adamw.base_lr": 1e-3},)


@pytest.mark.parametrize("module", sorted(modules_of(ROOT / "pipeline")))
def test_the_readme_says_what_each_module_is_for(module: str) -> None:
    assert re.search(rf"\b{re.escape(module)}\b", README)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:benchmarks|search_spaces|pipeline)/\w+\.\w+", README))))
def test_a_file_that_the_readme_names_exists(path: str) -> None:
    assert (ROOT / path).exists() or path == "search_spaces/mine.yaml"
