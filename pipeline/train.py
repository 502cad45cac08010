"""Train a config again: `python -m pipeline.train best.yaml`.

A trial trains again with the placement of the search, so on the same kind of machine every metric is repeated to the
last bit. A config written by hand trains alone, with every core, as does any config with `--fast`.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import NoReturn

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parse(argv)

    from pipeline.space.load import load_config
    from pipeline.space.overrides import source_of

    overrides = cli.overrides_of(arguments)
    cli.refuse_out(arguments.out)
    if arguments.out.resolve() == arguments.config.resolve():
        raise InvalidInput("--out", [Problem(str(arguments.out), "is the config itself; name another file")])
    space, _, found = load_config(arguments.config, overrides)

    import torch

    from pipeline.app.train_config import Found, train_config
    from pipeline.files.atomic import write_atomic

    cli.say_own_code(space)
    source = source_of(arguments.config, overrides)
    group, finished = train_config(
        space,
        None if overrides else Found.read(found, source=source),  # a changed config has nothing to repeat
        source=source,
        device=arguments.device,
        fast=arguments.fast,
        test=arguments.test,
        say=lambda line: print(line, flush=True),
    )
    if not finished:
        return 1
    buffer = io.BytesIO()
    torch.save(group.model_state(0), buffer)
    try:
        write_atomic(arguments.out.resolve(), buffer.getvalue())
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(arguments.out), f"cannot be written: {error.strerror}")]) from None
    print(f"model         {arguments.out}   a state dict: torch.load({str(arguments.out)!r}, weights_only=True)")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description="Train a config, such as best.yaml.")
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
