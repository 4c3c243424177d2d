"""What Megatron-Core wants done before the processes meet, and before its first import."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from ep_comm.job import start
from ep_comm.megatron import cpu


def join() -> torch.device:
    """Join the job as `ep_comm.job.start.join` does, with Megatron's order of launches.

    Its overlap of communication and computation counts on one hardware queue. CUDA reads how many
    there are when the process first uses its GPU.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # With torch's expandable segments NCCL may not register what a graph uses; Megatron insists.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    return start.join()


def prepare_megatron() -> None:
    """Call it before the first import of Megatron; where there is no GPU it runs on the CPU then.

    Each rank would warn of each optional package that Megatron misses, and of each torch function
    that it should no longer use: they keep quiet.
    """
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu.enable()
