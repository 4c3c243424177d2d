"""Pretrain a Megatron-Core mixture-of-experts model through ep_comm.

    torchrun --nproc_per_node=2 -m ep_comm.pretrain --config configs/tiny-cpu.yaml

``examples/pretrain_moe.py`` is the same as a script, and says more.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from ep_comm.job.exits import UserError, needs_extra, user_errors_exit
from ep_comm.job.start import agree, has_launcher


def main() -> None:
    """Do the work of one process of the job, from its command line to its exit code."""
    with user_errors_exit():
        with needs_extra("megatron"):
            from ep_comm.pretrain.flags import parse_args
            from ep_comm.pretrain.log import announce
            from ep_comm.pretrain.start import join, prepare_megatron
        if not has_launcher():
            parse_args()  # --help, and mistakes, without torchrun
            raise UserError(
                "start it with torchrun --nproc_per_node=N -m ep_comm.pretrain"
                + (", or with srun" if "SLURM_JOB_ID" in os.environ else "")
            )
        join()
        config = agree(parse_args)
        announce(f"{dist.get_world_size()} processes; loading Megatron-Core")
        prepare_megatron()
        with needs_extra("megatron"):
            from ep_comm.pretrain.loop import pretrain  # imports Megatron: only now

        pretrain(config)


if __name__ == "__main__":
    main()
