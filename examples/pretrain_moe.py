"""Pretrain a Megatron-Core mixture-of-experts model through ep_comm.

    torchrun --nproc_per_node=2 examples/pretrain_moe.py --config configs/tiny-cpu.yaml

or, in a SLURM job, by srun with one task for each process (``scripts/slurm/pretrain_moe.sbatch``).
``--moe-token-dispatcher alltoall`` or ``allgather`` runs the same with Megatron's own dispatcher,
``--help`` lists everything else. With no ``--data-path`` it trains on the source of Python's
standard library, byte by byte. On SIGTERM or Ctrl-C it finishes the step, writes a checkpoint to
``--save`` and exits with 75; ``--load`` goes on from there.

This file starts the processes' work; `ep_comm.pretrain.loop` is the training loop.
"""

from __future__ import annotations

import os

from ep_comm.job.exits import UserError, user_errors_exit
from ep_comm.job.start import agree, has_launcher
from ep_comm.pretrain.config import parse_args
from ep_comm.pretrain.start import join, prepare_megatron


def main() -> None:
    """Entry point of every process."""
    with user_errors_exit():
        if not has_launcher():
            parse_args()  # --help, and mistakes, without torchrun
            raise UserError(
                "start it with torchrun --nproc_per_node=N examples/pretrain_moe.py"
                + (", or with srun" if "SLURM_JOB_ID" in os.environ else "")
            )
        join()
        config = agree(parse_args)
        prepare_megatron()
        from ep_comm.pretrain.loop import pretrain  # imports Megatron: only now

        pretrain(config)


if __name__ == "__main__":
    main()
