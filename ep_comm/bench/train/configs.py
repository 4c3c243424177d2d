"""The training example's configuration of each variant."""

from __future__ import annotations

from ep_comm.bench.train.settings import TrainSettings
from ep_comm.job.exits import UserError
from ep_comm.pretrain.config import PretrainConfig
from ep_comm.pretrain.flags import parse_args


def make_configs(settings: TrainSettings, num_ranks: int | None) -> dict[str, PretrainConfig]:
    """Read the configuration for every variant.

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
