"""Run Megatron-LM's own token dispatcher tests against ours.

    torchrun --nproc_per_node=2 scripts/megatron_unit_tests.py MEGATRON_LM [--stock]

Takes the test container of a Megatron-LM clone (tests/unit_tests/transformer/moe) and runs each of
its checks in each layout that fits the number of processes: a round trip through identity experts,
dropped tokens, padding to capacity, padding for FP8. `--stock` runs Megatron's alltoall instead, to
tell a difference of ours from one of the machine. Works on GPUs (NCCL) and without (gloo). Prints
one line a check; exits with 1 if one fails. What ep_comm refuses by name is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ep_comm.errors import EPUnsupportedError
from ep_comm.megatron import cpu

_MODULE = "tests.unit_tests.transformer.moe.test_token_dispatcher"
# The settings under which Megatron's TestAlltoAllDispatcher calls each check.
_CHECKS = {
    "dispatcher_dropless_test": {},
    "dispatcher_capacity_test": {"moe_expert_capacity_factor": 0.5},
    "dispatcher_drop_and_pad_test": {
        "moe_expert_capacity_factor": 0.6,
        "moe_pad_expert_input_to_capacity": True,
    },
    "dispatcher_router_padding_for_fp8_test": {"hidden_size": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", type=Path, metavar="MEGATRON_LM", help="a Megatron-LM clone")
    parser.add_argument("--stock", action="store_true", help="Megatron's alltoall, not ep_comm")
    args = parser.parse_args()
    test_file = args.clone / (_MODULE.replace(".", "/") + ".py")
    if not test_file.is_file():
        parser.error(f"{args.clone} is no Megatron-LM clone: it has no {test_file}")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc_per_node=N")
    sys.path[0] = str(args.clone.resolve())
    on_cpu = cpu.enable()
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timedelta(minutes=2))
    tests = importlib.import_module(_MODULE)
    if not args.stock:
        importlib.import_module("ep_comm.megatron").install()

    size = dist.get_world_size()
    layouts = {(1, size), (size, 1), (1, 1)} | ({(size // 2, 2)} if size >= 4 else set())
    failed = False
    for check, (tp_size, ep_size) in itertools.product(_CHECKS, sorted(layouts)):
        outcome = _run(tests.MoEModelTestContainer, check, tp_size, ep_size)
        failed |= outcome.startswith("FAILS")
        if dist.get_rank() == 0:
            print(f"{check} TP {tp_size} EP {ep_size}: {outcome}", flush=True)
    sys.exit(failed)


def _run(container: type, check: str, tp_size: int, ep_size: int) -> str:
    """One check on all ranks; the worst outcome of any."""
    from ep_comm.megatron import destroy_buffers

    outcome, built = "passes", None
    if "fp8" in check and importlib.util.find_spec("transformer_engine") is None:
        return "skipped: needs Transformer Engine, as in Megatron"
    try:
        built = container(
            tp_size=tp_size,
            ep_size=ep_size,
            pp_size=1,
            moe_token_dispatcher_type="alltoall",
            **_CHECKS[check],
        )
        getattr(built, check)()
    except EPUnsupportedError as error:
        outcome = f"refused: {error}"
    except Exception as error:  # a failed check may be anything
        outcome = f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    destroy_buffers()
    del built  # destroys the groups, collectively
    outcomes = [""] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return min(outcomes)  # FAILS before passes and refused


if __name__ == "__main__":
    main()
