"""Pretrain a Megatron-Core mixture-of-experts model through ep_comm.

    torchrun --nproc_per_node=2 examples/pretrain_moe.py --config configs/tiny-cpu.yaml

or, in a SLURM job, by srun with one task for each process (``scripts/slurm/pretrain_moe.sbatch``).
``--moe-token-dispatcher alltoall`` or ``allgather`` runs the same with Megatron's own dispatcher,
``--help`` lists everything else. With no ``--data-path`` it trains on the source of Python's
standard library, byte by byte. On SIGTERM or Ctrl-C it finishes the step, writes a checkpoint to
``--save`` and exits with 75; ``--load`` goes on from there.

The program is `ep_comm.pretrain`, which an installed package has too: ``torchrun ... -m
ep_comm.pretrain``. Its `loop` module is the training loop. For a loop of your own see
``own_loop.py``.
"""

from ep_comm.pretrain.__main__ import main

if __name__ == "__main__":
    main()
