"""Memory at its peak while a group of large trials is saved: `python benchmarks/checkpoint_memory.py`.

Thirteen ResNet-18 with AdamW train one step on two images, then the search saves a checkpoint. Memory is that of the
search's process and its training processes together, each page counted once (Pss), read every 20 ms; Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import torch
import torchvision
from torch import nn

from pipeline.space.config import Own, TrialConfig
from pipeline.space.optimizers import AdamW
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant
from pipeline.study.checkpoint import Checkpoints
from pipeline.training.contract import TrialGroup
from pipeline.training.executor import LocalExecutor
from pipeline.workloads.workload import Split, Workload

MIB = 1 << 20
EVERY_S = 0.02


def main() -> None:
    """Build the trials, save them, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=13)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    config = TrialConfig(
        workload=Own(function="benchmarks/checkpoint_memory.py:images"),
        epochs=2,
        batch_size=2,
        seed=0,
        optimizer=AdamW(base_lr=1e-4),
        scheduler=Constant(),
        param_groups={"all": ParamGroup(pattern=("*",))},
    )
    executor = LocalExecutor(images(), config, device=torch.device("cpu"), processes=arguments.processes)
    configs = {number: dataclasses.replace(config, seed=number) for number in range(arguments.trials)}
    with tempfile.TemporaryDirectory() as folder:
        group = executor.build(configs)
        group.train_epoch()
        state_mib = arguments.trials * state_bytes(config) / MIB
        training = memory()
        peak, seconds = peak_while(functools.partial(save, group, Path(folder)))
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / MIB
    executor.close()
    print(f"{arguments.trials} trials of {executor.plain_because or 'rows'}; {arguments.processes} processes")
    print(f"state of all trials {state_mib:7.0f} MiB; of one {state_mib / arguments.trials:.0f}; file {size:.0f}")
    print(f"while they train    {training / MIB:7.0f} MiB")
    print(f"peak while saving   {peak / MIB:7.0f} MiB: {(peak - training) / MIB:.0f} more, in {seconds:.1f} s")


def images() -> Workload:
    """Return two images of noise for training and for validation, and a ResNet-18."""
    inputs, targets = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    return Workload(
        name="noise",
        build_model=torchvision.models.resnet18,
        train=Split(inputs, targets),
        val=Split(inputs, targets),
        loss=nn.functional.cross_entropy,
    )


def state_bytes(config: TrialConfig) -> int:
    """Return the bytes of a trial's parameters and of AdamW's two averages of them."""
    return 3 * sum(parameter.nbytes for parameter in images().build_model().parameters())


def save(group: TrialGroup, folder: Path) -> None:
    """Save a group as a search does."""
    checkpoints = Checkpoints(folder, warn=print, share=1.0)
    checkpoints.save("group.pt", {}, group.trial_states)


def memory() -> int:
    """Return the bytes that this process and its children take, each page counted once."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in ("self", *children))
    return sum(1024 * int(number) for text in texts for number in re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE))


def peak_while(action: functools.partial[None]) -> tuple[int, float]:
    """Return the most memory while an action runs, and the seconds that it took."""
    found, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            found.append(memory())

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.monotonic()
    action()
    seconds = time.monotonic() - begun
    ended.set()
    thread.join()
    return max(found), seconds


if __name__ == "__main__":
    main()
