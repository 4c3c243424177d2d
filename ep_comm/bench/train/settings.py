"""What ``ep-comm bench train`` measures, and the configurations that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ep_comm.job.exits import UserError
from ep_comm.pretrain.config import PretrainConfig
from ep_comm.pretrain.config_files import find_config
from ep_comm.pretrain.flags import parse_args
from ep_comm.pretrain.variants import DISPATCHER_FLAGS, VARIANTS, current_name, first_owned

# What the benchmark decides itself, by flag, with what to use instead.
_OWN_FLAGS = {
    "--global-batch-size": "--microbatches",
    "--train-iters": "--steps",
    **{flag: "--variants" for flags in VARIANTS.values() for flag in flags if flag[:2] == "--"},
    **dict.fromkeys(DISPATCHER_FLAGS, "--variants"),
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One run; equal on all ranks.

    Attributes:
        config: YAML file of the training example.
        flags: Further flags of the example, for all variants.
        variants: What is measured, by name.
        microbatches: Numbers of forward passes of an optimizer step to measure with.
        blocks: Visits of each variant, with each number of microbatches.
        steps: Timed steps of a visit, after one that is not.
        warmup: Steps of each variant before the first block, with each number of microbatches.
    """

    config: Path
    flags: tuple[str, ...]
    variants: tuple[str, ...]
    microbatches: tuple[int, ...]
    blocks: int
    steps: int
    warmup: int

    def arguments(self, variant: str) -> list[str]:
        """Return the example's command line for a variant."""
        return ["--config", str(self.config), *self.flags, *VARIANTS[variant]]

    def order(self, block: int) -> tuple[str, ...]:
        """Return the variants in the order of a block: each block begins with another one."""
        first = block % len(self.variants)
        return self.variants[first:] + self.variants[:first]


def make_train_settings(
    *,
    config: Path,
    extra: Sequence[str],
    variants: str,
    microbatches: str,
    blocks: int,
    steps: int,
    warmup: int,
) -> TrainSettings:
    """Check what the user asked for, as far as the example's configuration is not needed.

    Args:
        config: YAML file of the example, or the name of one that we ship.
        extra: Further flags of the example.
        variants: Comma-separated names.
        microbatches: Comma-separated numbers.
        blocks: Visits of each variant.
        steps: Timed steps of a visit.
        warmup: Steps of each variant before the first block.

    Raises:
        UserError: Something of it is wrong.
    """
    if own := first_owned(extra, _OWN_FLAGS):
        raise UserError(f"{own[0]} is what is measured: use {own[1]}")
    for name, value, least in (
        ("--blocks", blocks, 1),
        ("--steps", steps, 1),
        ("--warmup", warmup, 0),
    ):
        if value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    return TrainSettings(
        config=find_config(config),
        flags=tuple(extra),
        variants=_parse_variants(variants),
        microbatches=_parse_microbatches(microbatches),
        blocks=blocks,
        steps=steps,
        warmup=warmup,
    )


def make_configs(settings: TrainSettings, num_ranks: int | None) -> dict[str, PretrainConfig]:
    """Read the example's configuration for every variant.

    Args:
        settings: Which variants, and the example's flags.
        num_ranks: Of the job; None where it is not known yet.

    Raises:
        UserError: A key or a value is wrong, or unknown to this version of the example.
    """
    configs = {}
    for name in settings.variants:
        try:
            config = parse_args(settings.arguments(name))
            if num_ranks is not None:
                smallest = {"global_batch_size": config.micro_batch_size * num_ranks}
                config.model_copy(update=smallest).num_microbatches(num_ranks)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        configs[name] = config
    return configs


def _parse_variants(text: str) -> tuple[str, ...]:
    names = [current_name(name.strip()) for name in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variants {name!r} is none of {', '.join(VARIANTS)}")
    return tuple(dict.fromkeys(names))


def _parse_microbatches(text: str) -> tuple[int, ...]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise UserError(
            f"--microbatches {text!r} must be comma-separated positive numbers, such as 1,8"
        )
    return tuple(counts)
