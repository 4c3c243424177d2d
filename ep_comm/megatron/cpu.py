"""Run megatron-core on a machine without CUDA.

Megatron-core takes a GPU for granted: it asks for streams, for the CUDA random state and for
``device="cuda"`` tensors also where nothing else ties it to one. `enable` redirects exactly those
requests to the CPU, so that a model can be built, trained and checkpointed over gloo: for tests,
for trying things out, for stepping through the code. It is not a way to train fast.

The redirection reaches the whole process, other libraries' torch calls included. That is why it
happens only on request, never where CUDA is available, and says so on stderr.

Use a plain setup of Megatron with it: the local layer spec, and in `TransformerConfig`
``use_cpu_initialization=True``, ``gradient_accumulation_fusion=False``, no fusions.
Checked with megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable

import torch

_enabled = False
_tensor_type = torch.Tensor.type

# The functions that megatron-core calls with a literal device="cuda": in the optimizer, gradient
# clipping, the schedules, the causal mask, the logging of auxiliary losses.
# (A TorchFunctionMode would catch all functions, but is off during backward, where recomputation
# runs forward code.)
_FACTORIES = ("empty", "empty_like", "ones", "randn", "tensor", "zeros")


def enable() -> bool:
    """Make megatron-core run on the CPU; call it before the first megatron import.

    Returns:
        Whether megatron-core runs on the CPU now: False, with nothing touched, where CUDA is
        available; True otherwise, however often it is called.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        if os.environ.get("RANK", "0") == "0":
            print(
                "no CUDA: megatron-core runs on CPU through ep_comm.megatron.cpu, "
                "which patches torch.cuda process-wide",
                file=sys.stderr,
                flush=True,
            )
        _patch_torch()
        _patch_megatron()
        _enabled = True
    return True


class _Stream(torch.cpu.Stream):
    """torch's CPU stream, with the arguments and methods of a CUDA stream that Megatron uses."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        super().__init__()

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...


class _Event(torch.cpu.Event):
    """torch's CPU event, with the arguments of a CUDA event."""

    def __init__(self, enable_timing: bool = False, **_: object) -> None: ...


_STREAM = _Stream()


def _patch_torch() -> None:
    """Give `torch.cuda` CPU versions of what Megatron calls without asking for a device first."""
    cuda = torch.cuda

    # Megatron compiles small functions with torch.compile. On a CPU that costs a C++ compiler and
    # seconds a function, for nothing; and the compiler alone takes a second to import.
    torch.compile = _do_not_compile

    # Streams and events: the alltoall dispatcher makes a copy stream when it is built, shared
    # experts, checkpointing and the 1F1B overlap use others. The CPU runs everything in order, so
    # they do nothing, and no memory has to wait for them. Profilers see none of their marks.
    cuda.Stream, cuda.Event, cuda.stream = _Stream, _Event, torch.cpu.stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _STREAM
    cuda.synchronize = lambda device=None: None
    cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.record_stream = lambda tensor, stream: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None

    # Devices: the answer is used as a `device=` argument (router, gradient buffers, optimizer).
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None

    # Tensors: made on "cuda" by name, or moved there.
    for name in _FACTORIES:
        _redirect_factory(name)
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    # The optimizers sort parameters by type string, and clipping asserts it:
    # "torch.cuda.FloatTensor" is the only FP32 that they know.
    torch.Tensor.type = _type

    # Random state: Megatron's tracker forks the "CUDA" generator for initialisation, dropout and
    # recomputation. The CPU generator takes its place.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(
        state
    )


def _patch_megatron() -> None:
    """Correct the places in megatron-core itself that fail without CUDA."""
    _stub_paged_stash()

    # The tracker's setter reaches into torch's CUDA internals instead of calling torch.cuda.
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )

    # 0.16: the router's GEMM reads this name, which is bound only where TE is installed.
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)

    # The alltoall dispatcher turns its split sizes into host integers only if they are on a GPU;
    # all_to_all_single does not take them as a tensor.
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _to_host


def _stub_paged_stash() -> None:
    """Let 0.18 and later import without triton, which a CPU build of torch does not bring.

    All imports of triton on the way to a GPT model are guarded, except the one in this module of
    kernels. Only its importer is named here: a fake `triton` would mislead torch's own checks.
    """
    if importlib.util.find_spec("triton") is None:
        stub = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        stub.GLOBAL_BLOCK_SIZE = 1024
        stub.paged_stash_copy_kernel = stub.paged_stash_pop_kernel = None
        sys.modules[stub.__name__] = stub


def _to_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Do what `maybe_move_tensor_to_cpu` does, for tensors that are there already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _do_not_compile(model: Callable | None = None, **_: object) -> Callable:
    """Stand in for `torch.compile`, called or as a decorator, and leave `model` as it is."""
    return _do_not_compile if model is None else model


def _redirect_factory(name: str) -> None:
    """Let ``torch.<name>(..., device="cuda")`` make a CPU tensor."""
    factory = getattr(torch, name)

    @functools.wraps(factory)
    def redirected(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "cuda":
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    setattr(torch, name, redirected)


def _type(tensor: torch.Tensor, dtype: object = None, **kwargs: object) -> object:
    """Do what `torch.Tensor.type` does, but say "torch.cuda.FloatTensor" of an FP32 tensor."""
    if dtype is None:
        return _tensor_type(tensor).replace("torch.", "torch.cuda.", 1)
    return _tensor_type(tensor, dtype, **kwargs)
