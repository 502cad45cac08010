"""Compare a whole search with the same search written by hand: one Optuna objective, a DataLoader loop, MLflow.

Both searches are whole commands that run in turns, in fresh processes and fresh folders. Wall time includes imports,
databases and MLflow. Both train the digits with the same model, split, number of epochs and batch size, draw from the
distributions of `frozen_digits.yaml` with TPE, and store trials in SQLite. Both log parameters, and metrics and
learning rates of every epoch, to MLflow's SQLite store.

The search by hand follows the documentation of Optuna and MLflow: `study.optimize` with `sqlite:///optuna.db`, a nested
run per trial, `mlflow.log_metrics` once per epoch, Optuna's `SuccessiveHalvingPruner` with our numbers. PyTorch chooses
the number of threads unless `--peer-threads` says otherwise.

Results are printed but not compared. Proposals differ (thirteen at a time in `pipeline.search`, one at a time by hand),
pruned trials differ, and a few searches say little about which is better. Trial-epochs per search are printed, because
a pruner that stops more trials would otherwise look like speed. Several processes that share one study are not
measured.

    python benchmarks/peer_search.py
    python benchmarks/peer_search.py --model mlp --no-pruning --repeats 1
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parent.parent
SPACE = REPOSITORY / "benchmarks" / "frozen_digits.yaml"
EPOCHS = 20
BATCH_SIZE = 64
OURS, PEER = "pipeline.search", "by hand"

if TYPE_CHECKING:
    import optuna
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of one search."""

    wall_s: float
    best: float
    """Validation accuracy after the last epoch."""
    trial_epochs: int
    ended: dict[str, int]
    """Optuna's trial state to the number of trials."""


def main() -> None:
    """Run both searches in turns and print their times and the ratio."""
    options = _parse()
    if options.by_hand:
        search_by_hand(options.model, options.trials, pruning=options.pruning, threads=options.peer_threads)
        return
    commands = _commands(options)
    found: dict[str, list[Found]] = {OURS: [], PEER: []}
    for repeat in range(options.repeats):
        for side in (OURS, PEER) if repeat % 2 == 0 else (PEER, OURS):
            found[side].append(_run(commands[side], options))
            _print(side, found[side][-1])
    seconds = {side: [search.wall_s for search in searches] for side, searches in found.items()}
    ratios = [peer / ours for ours, peer in zip(seconds[OURS], seconds[PEER], strict=True)]
    work = sum(f.trial_epochs for f in found[PEER]) / sum(f.trial_epochs for f in found[OURS])
    pruning = "with" if options.pruning else "without"
    print(f"\n{options.trials} trials, digits {options.model}, {pruning} pruning, {os.cpu_count()} CPU cores")
    print(f"RATIO by hand to pipeline.search  {statistics.median(ratios):.2f}", end="")
    print(f"   (of each turn: {' '.join(f'{ratio:.2f}' for ratio in ratios)}", end="")
    print(f"; fastest to fastest: {min(seconds[PEER]) / min(seconds[OURS]):.2f}; trial-epochs: {work:.2f})")


def search_by_hand(model: str, trials: int, *, pruning: bool, threads: int | None) -> None:
    """Search in the working folder with Optuna and MLflow alone."""
    import mlflow
    import optuna
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    from pipeline.workloads.digits import MODELS, digits
    from pipeline.workloads.workload import Split

    if threads:
        torch.set_num_threads(threads)
    data = digits(model)
    assert isinstance(data.train, Split)
    assert isinstance(data.val, Split)
    train_set, val_set = (TensorDataset(split.inputs, split.targets) for split in (data.train, data.val))

    def objective(trial: optuna.Trial) -> float:
        torch.manual_seed(0)
        net = MODELS[model]()
        optimizer = _suggest_optimizer(trial, net)
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer,
            step_size=trial.suggest_int("step_size", 2, 10),
            gamma=trial.suggest_float("gamma", 0.05, 0.9, log=True),
        )
        train_loader = DataLoader(train_set, batch_size=BATCH_SIZE, shuffle=True)
        val_loader = DataLoader(val_set, batch_size=1024)
        with mlflow.start_run(run_name=f"trial {trial.number}", nested=True):
            mlflow.log_params(trial.params)
            for epoch in range(1, EPOCHS + 1):
                rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
                net.train()
                train_loss = 0.0
                for images, labels in train_loader:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(net(images), labels)
                    loss.backward()
                    optimizer.step()
                    train_loss += loss.item() * len(labels)
                scheduler.step()
                net.eval()
                val_loss, correct = 0.0, 0
                with torch.no_grad():
                    for images, labels in val_loader:
                        outputs = net(images)
                        val_loss += F.cross_entropy(outputs, labels).item() * len(labels)
                        correct += int((outputs.argmax(dim=1) == labels).sum().item())
                accuracy = correct / len(val_set)
                if not math.isfinite(train_loss) or not math.isfinite(val_loss):
                    raise optuna.TrialPruned
                losses = {"train/loss": train_loss / len(train_set), "val/loss": val_loss / len(val_set)}
                mlflow.log_metrics({**losses, "val/accuracy": accuracy, **rates}, step=epoch)
                trial.report(accuracy, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return accuracy

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment(f"digits-{model}")
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if pruning:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=4, reduction_factor=2)
    study = optuna.create_study(
        storage="sqlite:///optuna.db",
        study_name="by-hand",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=pruner,
    )
    with mlflow.start_run(run_name="by-hand"):
        study.optimize(objective, n_trials=trials)
        mlflow.log_metric("best", study.best_value)


def _suggest_optimizer(trial: optuna.Trial, net: nn.Module) -> torch.optim.Optimizer:
    """Draw an optimizer and the head's ratio from the distributions of frozen_digits.yaml."""
    import torch

    head_ratio = trial.suggest_float("head_ratio", 0.1, 10.0, log=True)
    name = trial.suggest_categorical("optimizer", ["sgd", "adamw", "rmsprop"])
    low, high = {"sgd": (1e-3, 1.0), "adamw": (1e-4, 1e-1), "rmsprop": (1e-5, 1e-2)}[name]
    rate = trial.suggest_float(f"{name}_lr", low, high, log=True)
    groups: list[dict[str, Any]] = [
        {
            "name": "head",
            "params": [p for n, p in net.named_parameters() if n.startswith("fc.")],
            "lr": rate * head_ratio,
        },
        {"name": "body", "params": [p for n, p in net.named_parameters() if not n.startswith("fc.")]},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=trial.suggest_categorical("momentum", [0.0, 0.9]))
    if name == "adamw":
        return torch.optim.AdamW(
            groups, lr=rate, weight_decay=trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True)
        )
    return torch.optim.RMSprop(groups, lr=rate)


def _commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return both command lines; `_run` writes the `space.yaml` that ours reads."""
    ours = [sys.executable, "-m", "pipeline.search", "--space", "space.yaml", "--trials", str(options.trials)]
    peer = [sys.executable, str(Path(__file__).resolve()), "--by-hand"]
    peer += ["--model", options.model, "--trials", str(options.trials), *([] if options.pruning else ["--no-pruning"])]
    peer += ["--peer-threads", str(options.peer_threads)] if options.peer_threads else []
    return {OURS: ours, PEER: peer}


def _run(command: Sequence[str], options: argparse.Namespace) -> Found:
    """Run one search in a fresh folder, and read the result from the Optuna database."""
    import yaml

    space = yaml.safe_load(SPACE.read_text())
    assert (space["epochs"], space["batch_size"]) == (EPOCHS, BATCH_SIZE)
    space["workload"]["model"] = options.model
    space["pruner"] = space["pruner"] if options.pruning else {"name": "none"}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
        start = time.perf_counter()
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        wall_s = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with status {process.returncode}:\n{process.stderr}")
        return _found(next(Path(folder).rglob("optuna.db")), wall_s)


def _found(database: Path, wall_s: float) -> Found:
    """Read an Optuna database."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = f"sqlite:///{database}"
    study = optuna.load_study(study_name=None, storage=storage)
    ended: dict[str, int] = {}
    epochs = 0
    for trial in study.trials:
        ended[trial.state.name] = ended.get(trial.state.name, 0) + 1
        epochs += len(trial.intermediate_values)
    return Found(wall_s=wall_s, best=study.best_value, trial_epochs=epochs, ended=ended)


def _print(side: str, found: Found) -> None:
    ended = ", ".join(f"{count} {state.lower()}" for state, count in sorted(found.ended.items()))
    print(f"{side:16} {found.wall_s:8.1f} s   best {found.best:.4f}   {found.trial_epochs:5} trial-epochs   {ended}")


def _parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", choices=("cnn", "mlp"), default="cnn", help="(default: cnn)")
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="(default: 50)")
    parser.add_argument("--no-pruning", dest="pruning", action="store_false", help="every trial to its last epoch")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="turns of both (default: 2)")
    parser.add_argument(
        "--peer-threads", type=int, metavar="N", help="threads of the search by hand (default: PyTorch's choice)"
    )
    parser.add_argument("--by-hand", action="store_true", help="run only the search by hand, in the working folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
