"""A learning-rate strategy in a few words, for people."""

from __future__ import annotations

from pipeline.space.config import TrialConfig


def strategy_words(config: TrialConfig, *, batch: bool) -> list[str]:
    """Return the parts of a strategy: `adamw 3.1e-03`, `batch 64`, `step 6 × 0.21`, `head ×2.4`.

    Args:
        config: The strategy.
        batch: Whether the batch size is a part, as where it is searched.
    """
    groups = config.param_groups.items()
    ratios = [f"{name} ×{group.lr_ratio:.2g}" for name, group in groups if group.lr_ratio != 1]
    decays = [f"{name} layers ×{group.layer_decay:.2g}" for name, group in groups if group.layer_decay is not None]
    rate = f"{config.optimizer.name} {config.optimizer.base_lr:.1e}"
    clip = [f"clip {config.clip_grad_norm:.2g}"] if config.clip_grad_norm is not None else []
    size = [f"batch {config.batch_size}"] if batch else []
    return [rate, *size, schedule_line(config), *ratios, *decays, *clip]


def schedule_line(config: TrialConfig) -> str:
    """Return a schedule in a few words: `step 6 × 0.21, warm-up 2`."""
    warmup = getattr(config.scheduler, "warmup", 0)
    return f"{config.scheduler}, warm-up {warmup}" if warmup else str(config.scheduler)
