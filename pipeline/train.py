"""Train a config again: `python -m pipeline.train best.yaml`.

The trainer, the initial weights and the order of the data are the search's, so on the same machine's CPU the
validation metrics are too, to the last bit.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem
from pipeline.space.trial import EpochMetrics, number


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description="Train a config, such as best.yaml.")
    parser.add_argument("config", type=cli.file, metavar="CONFIG", help="a YAML file: of a search, or written by hand")
    parser.add_argument("--test", action="store_true", help="report the test split too; never choose by it")
    help = "where to save the trained model (default: model.pt)"
    parser.add_argument("--out", type=cli.file, default=Path("model.pt"), metavar="FILE", help=help)
    cli.add_device(parser)
    cli.add_overrides(parser)
    arguments = parser.parse_args(argv)

    from pipeline.space.load import load_config
    from pipeline.space.overrides import source_of

    overrides = cli.overrides_of(arguments)
    cli.refuse_out(arguments.out)
    space, config, found = load_config(arguments.config, overrides)

    import torch

    from pipeline.app.prepare import fitted, prepare
    from pipeline.files.atomic import write_atomic

    cli.say_own_code(space)
    trainer = prepare(space, source=source_of(arguments.config, overrides), device=arguments.device, searching=False)
    config = fitted(space, trainer.workload).example()
    if arguments.test and trainer.workload.test is None:
        raise InvalidInput("--test", [Problem("", f"{trainer.workload.name} has no test split; leave --test away")])
    group = trainer.build({0: config})
    for _ in range(config.epochs):
        (epoch,) = group.train_epoch().values()
        metrics = "  ".join(f"{name} {number(value)}" for name, value in epoch.metrics.items())
        rates = "  ".join(f"lr/{name} {points[-1][1]:.2e}" for name, points in epoch.lr.items())
        print(f"epoch {epoch.epoch:>3}/{config.epochs}  {metrics}  {rates}", flush=True)
        if not epoch.finished:
            print(f"ended: {epoch.diverged or epoch.failed}")
            return 1
    for line in _comparison(epoch, found):
        print(line)
    if arguments.test:
        print("test        ", "  ".join(f"{name} {number(value)}" for name, value in group.test()[0].items()))
    buffer = io.BytesIO()
    torch.save(group.model_state(0), buffer)
    try:
        write_atomic(arguments.out.resolve(), buffer.getvalue())
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(arguments.out), f"cannot be written: {error.strerror}")]) from None
    print(f"model        {arguments.out}   a state dict: torch.load({str(arguments.out)!r}, weights_only=True)")
    return 0


def _comparison(epoch: EpochMetrics, found: Mapping[str, Any]) -> list[str]:
    """Say whether the search's metrics came out again; of a pruned trial there is nothing to compare."""
    before = found.get("metrics")
    if not isinstance(before, dict) or found.get("epochs") != epoch.epoch or not epoch.metrics.keys() <= before.keys():
        return []
    differing = [name for name, value in epoch.metrics.items() if before[name] != value]
    if not differing:
        return ["repeated     every metric of the search, to the last bit"]
    return [f"differs      {name}: {epoch.metrics[name]!r}, the search had {before[name]!r}" for name in differing]


if __name__ == "__main__":
    cli.run(main)
