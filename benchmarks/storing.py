"""How long does it take to store ended trials in PostgreSQL, and in SQLite?

A private PostgreSQL runs in a temporary folder and syncs to the disk, as SQLite does. Trials that end together are
stored together. Printed are the median and the worst of the wall time, and the median of the CPU time of the search,
in rounds that alternate.

    python benchmarks/storing.py --together 1 8 25
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import postgres_server
from test_store import ended_trial, space_with
from tiny import RULES

from pipeline.space.trial import EpochMetrics
from pipeline.study.store import Store


def main() -> None:
    """Store trials in both databases, three rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, metavar="N", help="trials a round (default: 100)")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 8, 25], metavar="N", help="default: 1 8 25")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="epochs of a trial (default: 20)")
    options = parser.parse_args()
    with postgres_server.server(fsync=True) as server, tempfile.TemporaryDirectory() as folder:
        for number, together in enumerate(options.together * 3):
            for name, url in (("PostgreSQL", server.uri), ("SQLite", None)):
                root, trials = Path(folder) / f"{name}-{number}", options.trials // together * together
                wall, cpu = stored(root, url, f"round-{number}", trials, together, epochs=options.epochs)
                median, worst = 1000 * statistics.median(wall), 1000 * max(wall)
                print(f"{name:10}  {together:2} together", end="")
                print(f"  {median:5.1f} ms, worst {worst:4.0f} ms, CPU {1000 * statistics.median(cpu):4.1f} ms")


def stored(
    root: Path, url: str | None, name: str, trials: int, together: int, *, epochs: int
) -> tuple[list[float], list[float]]:
    """Store trials, some together; return the seconds of wall and of CPU time of each time."""
    wall, cpu = [], []
    with contextlib.closing(Store(root, url)) as store, store.lock(name):
        study = store.create(space_with(epochs=epochs), name=name, trials=trials, rules=RULES)
        metrics = ended_trial(0).epochs[0].metrics
        history = tuple(EpochMetrics(epoch=n, step=20 * n, metrics=metrics, lr={}) for n in range(1, epochs + 1))
        ended = [dataclasses.replace(ended_trial(number), epochs=history) for number in range(trials)]
        for first in range(0, trials, together):
            group = ended[first : first + together]
            begun = time.perf_counter(), time.process_time()
            study.add(*group)
            wall.append(time.perf_counter() - begun[0])
            cpu.append(time.process_time() - begun[1])
    return wall, cpu


if __name__ == "__main__":
    main()
