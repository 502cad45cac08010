"""Train a config again: `python -m pipeline.train best.yaml`, or `train` from Python.

A trial trains again with the placement of the search, so on the same kind of machine every metric is repeated to the
last bit. A config written by hand trains alone, with every core, as does any config with `--fast`.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from pipeline.app.start_training import Config
    from pipeline.app.train_config import Trained
    from pipeline.space.overrides import Overrides
    from pipeline.workloads.loop import Epochs
    from pipeline.workloads.workload import Workload


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parse(argv)
    file = cli.writable_out(arguments.out)
    if file == arguments.config.resolve():
        raise InvalidInput("--out", [Problem(str(arguments.out), "is the config itself; name another file")])
    trained = train(
        arguments.config,
        overrides=cli.overrides_of(arguments),
        device=arguments.device,
        fast=arguments.fast,
        test=arguments.test,
    )
    _save(trained, file, shown=arguments.out)
    return 0


def train(
    config: Config,
    workload: Callable[..., Workload | Epochs] | Workload | str | None = None,
    *,
    overrides: Overrides = MappingProxyType({}),
    device: str = "auto",
    fast: bool = False,
    test: bool = False,
    quiet: bool = False,
) -> Trained:
    """Train a config, or a trial of a search again, as the command line does.

    A trial that a search recorded trains with the placement that it had, so its metrics are repeated to the bit on the
    same kind of machine; with `overrides` or another workload there is nothing to repeat.

    Args:
        config: A file such as best.yaml, the content of one, a `TrialConfig`, a trial of a search, or the result of a
            search, which stands for its best trial.
        workload: The workload to train: itself, a function that returns one, or a name as `--workload` takes; None: the
            one that the config names. One that was made in Python has to be given again.
        overrides: Changes to the config, dotted place to value, such as `{"epochs": 100}`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        fast: Train alone, with every core, even if a search recorded the placement.
        test: Report the test split too; never choose by it.
        quiet: Print nothing.

    Returns:
        The trained model, the metrics of the last epoch, and the history of all.

    Raises:
        PipelineError: As `pipeline.errors` draws them: `InvalidInput` with every problem of the arguments, and
            `TrainingEnded` if the training diverges or the model raises.
    """
    from pipeline.app.start_training import start_training

    say: Callable[[str], Any] = (lambda line: None) if quiet else functools.partial(print, flush=True)
    return start_training(config, workload, overrides=overrides, device=device, fast=fast, test=test, say=say)


def _save(trained: Trained, file: Path, *, shown: Path) -> None:
    """Write the state of a trained model, and say so with the path as it was given.

    Raises:
        InvalidInput: The file cannot be written.
    """
    import torch

    from pipeline.files.atomic import write_atomic

    tensors = {name: value for name, value in trained.model.state_dict().items() if isinstance(value, torch.Tensor)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    try:
        write_atomic(file, buffer.getvalue())
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(shown), f"cannot be written: {error.strerror}")]) from None
    print(f"model         {shown}   a state dict: torch.load({str(shown)!r}, weights_only=True)")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("train", "Train a config, such as best.yaml.")
    parser.add_argument("config", type=cli.file, metavar="CONFIG", help="a YAML file: of a search, or written by hand")
    parser.add_argument("--test", action="store_true", help="report the test split too; never choose by it")
    help = "train alone, with every core, in place of repeating the search's metrics to the bit"
    parser.add_argument("--fast", action="store_true", help=help)
    help = "where to save the trained model (default: model.pt)"
    parser.add_argument("--out", type=cli.file, default=Path("model.pt"), metavar="FILE", help=help)
    cli.add_device(parser)
    cli.add_overrides(parser)
    return parser.parse_args(argv)


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
