"""A trial as a file that trains again: its config, and what the search found with it.

python -m pipeline.export [--study NAME] [--trial N] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import sys
from typing import TYPE_CHECKING, Any

from pipeline import cli
from pipeline.errors import InvalidInput, Problem
from pipeline.trial import EndedTrial, number

if TYPE_CHECKING:
    from pipeline.study import Study


def config_file(study: Study, trial: EndedTrial) -> str:
    """Return a trial as YAML: its config, and under `found` its score and where it comes from."""
    from pipeline import strict_yaml
    from pipeline.space import FOUND

    found: dict[str, Any] = {
        "study": study.name,
        "trial": trial.number,
        "state": trial.state.value,
        "objective": {"metric": study.space.objective.metric, "direction": study.space.objective.direction},
        "epochs": len(trial.epochs),
        "metrics": dict(trial.metrics),
        "date": datetime.datetime.fromtimestamp(trial.ended).isoformat(timespec="seconds"),
        "environment": dict(trial.environment),
    }
    comment = f"Trial {trial.number} of study {study.name}: {_score_line(study, trial)}."
    return strict_yaml.dumps({**trial.config.to_dict(), FOUND: found}, comment=comment)


def choose_trial(study: Study, number: int | None) -> EndedTrial:
    """Return a trial of a study by number, or its best.

    Raises:
        InvalidInput: There is no such trial.
    """
    if number is not None:
        if number >= len(study.ended):
            last = (
                f"the last of {study.name} is {len(study.ended) - 1}" if study.ended else f"{study.name} has none yet"
            )
            raise InvalidInput("--trial", [Problem(str(number), f"there is no such trial; {last}")])
        return study.ended[number]
    best = study.best()
    if not best:
        message = "no trial is complete: each was pruned, diverged or failed; name one with --trial"
        raise InvalidInput("--study", [Problem(study.name, message)])
    return best[0]


def _score_line(study: Study, trial: EndedTrial) -> str:
    metric = study.space.objective.metric
    if metric not in trial.metrics:
        return f"{trial.state.value}, {trial.reason}"
    return f"{metric} {number(trial.metrics[metric])} after {len(trial.epochs)} epochs, {trial.state.value}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export", description="Write a trial as a file that trains again."
    )
    cli.add_root(parser)
    cli.add_study(parser, help="which study (default: the newest)")
    parser.add_argument("--trial", type=cli.whole_number(0), metavar="N", help="which trial (default: the best)")
    parser.add_argument("--out", type=cli.file, metavar="FILE", help="where to write it (default: the terminal)")
    arguments = parser.parse_args(argv)

    from pipeline.store import Store
    from pipeline.strict_yaml import write_atomic

    if arguments.out is not None:
        cli.refuse_out(arguments.out)
    study = Store(arguments.root).open(arguments.study)
    text = config_file(study, choose_trial(study, arguments.trial))
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    try:
        write_atomic(arguments.out.resolve(), text)
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(arguments.out), f"cannot be written: {error.strerror}")]) from None
    print(f"{arguments.out}   train it: python -m pipeline.train {cli.quoted(arguments.out)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
