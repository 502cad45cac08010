"""Whether a notebook searches, trains the winner and goes on with the study, and what its cells show.

The cells are those of `docs/own-workloads.md`, "From Python". nbconvert executes them in a kernel of their own, in an
empty folder. Checked are the outputs that the executed notebook holds: a search shows one bar in its last state, a
result its table, and training again repeats every metric.

    pip install nbconvert ipykernel
    python benchmarks/notebook.py
    python benchmarks/notebook.py --out notebook.html
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parent.parent
TRIALS, MORE_TRIALS = 20, 30
"""Trials of the page's search, and of the study after it has gone on."""
TABLE = 7
"""Most lines of a result: the study, the header and the five best trials."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the executed notebook as HTML")
    arguments = parser.parse_args()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells()])
    started = time.monotonic()
    execute(notebook)
    print(f"{len(notebook.cells)} cells in {time.monotonic() - started:.0f} s")
    for cell in notebook.cells:
        print(f"  {cell.source.strip().splitlines()[0][:70]:<70}  {kinds(cell)}")
    if arguments.out is not None:
        arguments.out.write_text(HTMLExporter().from_notebook_node(notebook)[0])
    problems = check(notebook)
    print("\n".join(problems) or "every cell shows what it should")
    raise SystemExit(bool(problems))


def cells() -> list[str]:
    """Return the page's workload, then its calls, a cell per paragraph, with a cell that shows the result."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-workloads.md").read_text(), re.DOTALL)
    workload = next(code for code in blocks if "-> Workload" in code)
    imports, search, *others = next(code for code in blocks if "train(result" in code).strip().split("\n\n")
    return [workload, imports, search, "result", *others]


def execute(notebook: Any) -> None:
    """Execute a notebook in an empty folder; an exception in a cell is raised here."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": folder}})


def kinds(cell: Any) -> str:
    """Return how many outputs of which kind a cell has."""
    return ", ".join(
        f"{count} {kind}" for kind, count in Counter(output.output_type for output in cell.outputs).items()
    )


def check(notebook: Any) -> list[str]:
    """Return what the executed notebook lacks."""
    *_, search, result, trained, more = notebook.cells
    problems = [*bar_problems(search, f"{TRIALS}/{TRIALS}"), *bar_problems(more, f"{MORE_TRIALS}/{MORE_TRIALS}")]
    shown = text_of(result).splitlines()
    if not shown[0].startswith(f"study python-sine-1: {TRIALS} trials, complete ") or len(shown) > TABLE:
        problems.append(f"a result is no short table: {shown}")
    if "repeated      every metric of the search, to the last bit" not in text_of(trained):
        problems.append(f"training again did not repeat the search: {text_of(trained)}")
    if f"goes on from trial {TRIALS}" not in text_of(more):
        problems.append(f"the study did not go on: {text_of(more)}")
    if "train it again: from pipeline.train import train; train(" not in text_of(search):
        problems.append(f"the search names no call that trains its winner: {text_of(search)}")
    return problems


def bar_problems(cell: Any, done: str) -> list[str]:
    """Return what is wrong with the bar of a search's cell."""
    bars = [output for output in cell.outputs if output.output_type == "display_data"]
    if len(bars) == 1 and done in bars[0].data["text/html"]:
        return []
    return [f"a cell shows {len(bars)} displays in place of one that says {done}: {cell.source}"]


def text_of(cell: Any) -> str:
    """Return the text that a cell shows."""
    return "".join(output.get("text") or output.data.get("text/plain", "") for output in cell.outputs)


if __name__ == "__main__":
    main()
