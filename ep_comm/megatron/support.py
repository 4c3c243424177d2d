"""Everything that the Megatron integration refuses.

Each `Refusal` below is one line of the table in docs/megatron.md. Those of `BY_CONFIG` and
`BY_FLAGS` say themselves when they apply: to lift one, delete it. Those of `BY_MODEL` need more
than settings to be seen, and are raised where that is known.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from packaging.version import Version

from ep_comm import fp8
from ep_comm._native.header import EP_MAX_EXPERTS, EP_MAX_TOPK
from ep_comm.backends.nvlink import support as nvlink_support
from ep_comm.config import ROW_DTYPES
from ep_comm.errors import EPArgumentError, EPUnsupportedError
from ep_comm.megatron.names import NAME, STOCK
from ep_comm.megatron.options import EPOptions, flag_of

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# The only recipe whose GEMMs see the same values with and without FP8 on the wire.
_EXACT_RECIPE = "blockwise"
_FP8_CAPABILITY = (8, 9)
_MIN_TE = "2.3"  # the first with block scaling, and with delayed gradients of grouped experts
_MIN_TE_DIRECT = "2.20"  # whose inner interface ep_comm.megatron.fp8_direct is written for

When = Callable[[Any, EPOptions], object]


@dataclass(frozen=True)
class Refusal:
    """One thing that does not work with our dispatcher.

    Attributes:
        what: Completes "ep_comm does not support ...".
        why: The reason, or what to do instead; may be empty.
        when: Takes the settings (a `TransformerConfig`, or Megatron's parsed arguments) and our
            options. Returns something true where they ask for it. All but True is shown.
    """

    what: str
    why: str = ""
    when: When = lambda settings, options: False

    def check(self, settings: Any, options: EPOptions) -> None:
        """Raise `EPUnsupportedError` where the settings ask for it."""
        if found := self.when(settings, options):
            raise self.error("" if found is True else found)

    def error(self, found: object = "") -> EPUnsupportedError:
        """Return the error. `found` is what asks for it, in this run."""
        shown = f" ({found})" if found else ""
        why = f": {self.why}" if self.why else ""
        return EPUnsupportedError(f"{NAME} does not support {self.what}{shown}{why}")


def check_supported(config: TransformerConfig, options: EPOptions) -> None:
    """Raise for what a model asks for and does not get, before it is built.

    Warn, once a process, of an FP8 recipe whose results depend on the wire's type.

    Raises:
        EPUnsupportedError: One of `BY_CONFIG`.
        EPArgumentError: A setting contradicts another one, or the hidden size does not fit FP8.
    """
    for refusal in BY_CONFIG:
        refusal.check(config, options)
    if config.moe_token_dispatcher_type != STOCK:
        raise EPArgumentError(
            f"set moe_token_dispatcher_type={STOCK!r} in the TransformerConfig (Megatron "
            f"validates other features against it, and {NAME} then replaces the dispatcher); "
            f"got {config.moe_token_dispatcher_type!r}"
        )
    if wire_flags := _wire_flags(options):
        fp8.check_hidden(config.hidden_size)
        if torch.cuda.is_available():
            nvlink_support.check_fp8_hidden(config.hidden_size)
        if config.fp8 and not _has_exact_recipe(config):
            _warn(
                f"{' and '.join(wire_flags)} with --fp8-recipe {config.fp8_recipe}: the experts "
                "quantise what has arrived once more, with other scales, so their outputs are not "
                f"those of BF16 on the wire. With --fp8-recipe {_EXACT_RECIPE} they are, bit for "
                "bit"
            )


def check_flags(args: Any, options: EPOptions) -> None:
    """Raise `EPUnsupportedError` for arguments of Megatron's that no `TransformerConfig` holds."""
    for refusal in BY_FLAGS:
        refusal.check(args, options)


# --- what the refusals look at -------------------------------------------------------------------


def _is_set(*names: str) -> When:
    """Return whether one of the settings is there and on; its value, if that is no bool."""

    def when(settings: Any, options: EPOptions) -> object:
        return next((value for name in names if (value := getattr(settings, name, None))), False)

    return when


def _dtype(config: TransformerConfig, options: EPOptions) -> object:
    if config.params_dtype not in ROW_DTYPES:
        return f"params_dtype={config.params_dtype}"
    if config.enable_autocast and config.autocast_dtype not in ROW_DTYPES:
        return f"autocast_dtype={config.autocast_dtype}"
    return False


def _per_shard_above(name: str, maximum: int) -> When:
    """Return a setting that is too large once each expert's shard counts as an expert."""

    def when(config: TransformerConfig, options: EPOptions) -> object:
        value, shards = getattr(config, name), config.expert_tensor_parallel_size or 1
        return value * shards > maximum and f"{value} x {shards}"

    return when


def _graphed(config: TransformerConfig) -> set[str]:
    """Return the modules that are under CUDA graphs; "layer" where it is whole layers."""
    if getattr(config, "cuda_graph_impl", "none") == "none":
        return set()
    modules = getattr(config, "cuda_graph_modules", None)  # megatron-core 0.19; before: scope
    modules = modules or getattr(config, "cuda_graph_scope", None) or ()
    return {module.name for module in modules} or {"layer"}


def _graphs_with_counts(config: TransformerConfig, options: EPOptions) -> object:
    """Return the graphs that would hold a dispatch whose host waits for counts."""
    held = _graphed(config) & {"full_iteration", "layer", "moe"}
    if held == {"moe"} and config.moe_pad_expert_input_to_capacity:
        return False
    return ", ".join(sorted(held))


def _graphs_with_delay(config: TransformerConfig, options: EPOptions) -> object:
    return options.overlap_wgrad and "moe" in _graphed(config)


def _graphs_of_the_router_by_copies(config: TransformerConfig, options: EPOptions) -> object:
    held = _graphed(config) & {"moe_router", "moe_preprocess"}
    return options.copy_engines and ", ".join(sorted(held))


def _local_graphs_of_preprocess(config: TransformerConfig, options: EPOptions) -> object:
    return config.cuda_graph_impl == "local" and "moe_preprocess" in _graphed(config)


def _graphs_of_preprocess_that_drop(config: TransformerConfig, options: EPOptions) -> object:
    return "moe_preprocess" in _graphed(config) and config.moe_expert_capacity_factor


def _is_inference(config: TransformerConfig, options: EPOptions) -> object:
    return getattr(config, "transformer_impl", None) == "inference_optimized"


def _has_exact_recipe(config: TransformerConfig) -> bool:
    return bool(config.fp8) and config.fp8_recipe == _EXACT_RECIPE


def _wire_flags(options: EPOptions) -> list[str]:
    """Return the flags that put FP8 on the wire."""
    names = ("fp8_dispatch", "fp8_grad_dispatch")
    return [flag_of(name) for name in names if getattr(options, name)]


def _fp16_on_an_fp8_wire(config: TransformerConfig, options: EPOptions) -> object:
    return config.fp16 and ", ".join(_wire_flags(options))


def _fp8_without_hardware(config: TransformerConfig, options: EPOptions) -> object:
    flags = _wire_flags(options) + (["--fp8-format"] if config.fp8 else [])
    if not flags or not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability()
    return capability < _FP8_CAPABILITY and (
        f"{', '.join(flags)} on {torch.cuda.get_device_name()}, compute capability "
        f"{_dotted(capability)}"
    )


def _other_scales(config: TransformerConfig, options: EPOptions) -> object:
    return fp8.has_other_scales() and (bool(_wire_flags(options)) or _has_exact_recipe(config))


def _experts_unlike_ours(config: TransformerConfig, options: EPOptions) -> object:
    """Return what experts of `ep_comm.megatron.experts` do not have."""
    if not options.device_counts:
        return False
    if (config.expert_tensor_parallel_size or 1) > 1:
        return f"--expert-tensor-parallel-size {config.expert_tensor_parallel_size}"
    if config.gated_linear_unit and config.activation_func is not torch.nn.functional.silu:
        return "activation_func"
    return config.fp16 or config.add_bias_linear


def _two_capacities(config: TransformerConfig, options: EPOptions) -> object:
    return options.capacity_factor is not None and config.moe_expert_capacity_factor


def _delay_with_old_te(config: TransformerConfig, options: EPOptions) -> object:
    return options.overlap_wgrad and config.moe_grouped_gemm and _old_te()


def _blocks_with_old_te(config: TransformerConfig, options: EPOptions) -> object:
    return _has_exact_recipe(config) and _old_te()


def _direct_with_old_te(config: TransformerConfig, options: EPOptions) -> object:
    return options.fp8_direct and _old_te(_MIN_TE_DIRECT)


def _direct_without_its_experts(config: TransformerConfig, options: EPOptions) -> object:
    """Return what the experts are instead of FP8 ones of Transformer Engine's."""
    if not options.fp8_direct:
        return False
    if not _has_exact_recipe(config):
        return f"--fp8-recipe {config.fp8_recipe}" if config.fp8 else "no --fp8-format"
    if not config.moe_grouped_gemm:
        return "no --moe-grouped-gemm"
    return config.params_dtype != torch.bfloat16 and f"params_dtype={config.params_dtype}"


def _direct_with_other_rows(config: TransformerConfig, options: EPOptions) -> object:
    """Return what asks the experts' input to be something else than the rows that came."""
    if not options.fp8_direct:
        return False
    if (options.expert_alignment or 0) % fp8.COLUMNWISE_ROWS:
        return f"--ep-expert-alignment {options.expert_alignment}"
    offloads = getattr(config, "fine_grained_activation_offloading", False)
    if offloads and "expert_fc1" in config.offload_modules:
        return "expert_fc1 in offload_modules"
    names = (
        *("first_last_layers_bf16", "moe_apply_probs_on_input", "quant_recipe", "use_kitchen"),
        *("use_transformer_engine_op_fuser", "moe_single_grouped_weight"),
    )
    return ", ".join(name for name in names if getattr(config, name, None))


def _old_te(minimum: str = _MIN_TE) -> str:
    """Return the version of a Transformer Engine that is too old; empty where there is none."""
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"this is {version}" if Version(version) < Version(minimum) else ""


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


@functools.cache
def _warn(text: str) -> None:
    """Warn once a process, not once a layer, and on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(text, stacklevel=2)


# --- the refusals --------------------------------------------------------------------------------

_TYPES = "tokens travel as BF16, FP16 or FP32"
_SHARDS = "each shard of an expert counts as an expert"

BY_CONFIG = (
    Refusal("parameters or autocast that are not BF16, FP16 or FP32", _TYPES, _dtype),
    Refusal(
        "--fp16 with FP8 on the wire", "only BF16 and FP32 rows travel as FP8", _fp16_on_an_fp8_wire
    ),
    Refusal(
        f"--moe-router-topk x --expert-tensor-parallel-size above {EP_MAX_TOPK}",
        _SHARDS,
        _per_shard_above("moe_router_topk", EP_MAX_TOPK),
    ),
    Refusal(
        f"--num-experts x --expert-tensor-parallel-size above {EP_MAX_EXPERTS}",
        _SHARDS,
        _per_shard_above("num_moe_experts", EP_MAX_EXPERTS),
    ),
    Refusal(
        "--ep-overlap-wgrad with --overlap-moe-expert-parallel-comm (the 1F1B overlap)",
        "--delay-wgrad-compute delays weight gradients there",
        lambda config, options: options.overlap_wgrad and config.overlap_moe_expert_parallel_comm,
    ),
    Refusal(
        "--overlap-dispatch-backward-with-experts-wgrad",
        "take --ep-overlap-wgrad instead",
        _is_set("overlap_dispatch_backward_with_experts_wgrad"),
    ),
    Refusal(
        "CUDA graphs over the MoE layer",
        "the host waits for token counts; take 'attn', 'mlp', 'moe_router' and 'moe_preprocess', "
        "or 'moe' with --moe-pad-expert-input-to-capacity",
        _graphs_with_counts,
    ),
    Refusal(
        "CUDA graphs of 'moe' with --ep-overlap-wgrad",
        "gradients that the graph delays would be handed over once, when it is captured",
        _graphs_with_delay,
    ),
    Refusal(
        "CUDA graphs of 'moe_router' and 'moe_preprocess' with --ep-copy-engines",
        "rows are sent before the router, and the graph would end before their dispatch",
        _graphs_of_the_router_by_copies,
    ),
    Refusal(
        "CUDA graphs of 'moe_preprocess' with cuda_graph_impl='local'",
        "take cuda_graph_impl='transformer_engine'",
        _local_graphs_of_preprocess,
    ),
    Refusal(
        "CUDA graphs of 'moe_preprocess' with --moe-expert-capacity-factor",
        "take --ep-capacity-factor, or leave 'moe_preprocess' out",
        _graphs_of_preprocess_that_drop,
    ),
    Refusal(
        "--ep-capacity-factor with --moe-expert-capacity-factor",
        "take one of them: the other one's router drops tokens of each rank by itself",
        _two_capacities,
    ),
    Refusal(
        "--ep-device-counts without --ep-capacity-factor",
        "somebody has to say how many rows there are at most",
        lambda config, options: options.device_counts and options.capacity_factor is None,
    ),
    Refusal(
        "--ep-device-counts with FP8 experts (--fp8-format)",
        "on Hopper Transformer Engine's grouped GEMM takes counts on the device only with cuBLASLt "
        "13.6 or newer; leave --ep-device-counts out: --ep-capacity-factor alone waits for no "
        "counts either",
        lambda config, options: options.device_counts and config.fp8,
    ),
    Refusal(
        "--ep-device-counts with --fp16, --expert-tensor-parallel-size, --add-bias-linear, or an "
        "activation beside SwiGLU's",
        "leave it out",
        _experts_unlike_ours,
    ),
    Refusal(
        "--ep-device-counts with --ep-overlap-wgrad or Megatron's 1F1B overlap",
        "these experts do not delay their weight gradients",
        lambda config, options: (
            options.device_counts
            and (options.overlap_wgrad or config.overlap_moe_expert_parallel_comm)
        ),
    ),
    Refusal(
        "--ep-device-counts with a torch that has no grouped GEMM",
        "it needs torch 2.8 or newer",
        lambda config, options: (
            options.device_counts
            and not (hasattr(torch, "_grouped_mm") or hasattr(torch.nn.functional, "grouped_mm"))
        ),
    ),
    Refusal(
        "--ep-overflow without --ep-capacity-factor",
        "nothing is dropped without it",
        lambda config, options: options.overflow is not None and options.capacity_factor is None,
    ),
    Refusal(
        "--ep-fp8-direct without --ep-fp8-dispatch",
        "no rows arrive in FP8",
        lambda config, options: options.fp8_direct and not options.fp8_dispatch,
    ),
    Refusal(
        "--ep-fp8-direct without FP8 experts of Transformer Engine's",
        f"take --bf16 --moe-grouped-gemm --fp8-format e4m3 --fp8-recipe {_EXACT_RECIPE}",
        _direct_without_its_experts,
    ),
    Refusal(
        "--ep-fp8-direct with what changes the experts' input, or computes some layers otherwise",
        "leave one of them out",
        _direct_with_other_rows,
    ),
    Refusal(
        "--ep-fp8-direct with an old Transformer Engine",
        f"it needs {_MIN_TE_DIRECT} or newer",
        _direct_with_old_te,
    ),
    Refusal("--moe-latent-size", when=_is_set("moe_latent_size")),
    Refusal("--fp4-format", when=_is_set("fp4")),
    Refusal("transformer_impl='inference_optimized'", when=_is_inference),
    Refusal(
        "--ep-fp8-dispatch, --ep-fp8-grad-dispatch or --fp8-format on a GPU without FP8",
        f"FP8 begins with compute capability {_dotted(_FP8_CAPABILITY)}; leave them out",
        _fp8_without_hardware,
    ),
    Refusal(
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 with --ep-fp8-dispatch, --ep-fp8-grad-dispatch or "
        f"--fp8-recipe {_EXACT_RECIPE}",
        "it asks Transformer Engine for scales that are no powers of two, so unset it",
        _other_scales,
    ),
    Refusal(
        "--ep-overlap-wgrad with --moe-grouped-gemm and an old Transformer Engine",
        f"it needs {_MIN_TE} or newer",
        _delay_with_old_te,
    ),
    Refusal(
        f"--fp8-recipe {_EXACT_RECIPE} with an old Transformer Engine",
        f"it needs {_MIN_TE} or newer",
        _blocks_with_old_te,
    ),
)

FSDP = Refusal(
    "FSDP (--use-megatron-fsdp, --use-torch-fsdp2)",
    "take DistributedDataParallel",
    _is_set("use_megatron_fsdp", "use_torch_fsdp2"),
)

BY_FLAGS = (
    Refusal(
        "--moe-enable-deepep",
        "it asks for Megatron's own flex dispatcher (flex-deepep)",
        _is_set("moe_enable_deepep"),
    ),
    Refusal(
        "--moe-flex-dispatcher-backend",
        "it belongs to Megatron's own flex dispatcher",
        lambda args, options: (
            (backend := getattr(args, "moe_flex_dispatcher_backend", None)) != "deepep" and backend
        ),
    ),
    FSDP,
)

FUSED_ACCUMULATION = Refusal(
    "--ep-overlap-wgrad with gradient_accumulation_fusion in Megatron's own linear layers",
    "set it to False (--no-gradient-accumulation-fusion), or take Transformer Engine's layers",
)
UNKNOWN_EXPERTS = Refusal(
    "--ep-overlap-wgrad with experts that have weights outside of Megatron's or Transformer "
    "Engine's linear layers",
    "nothing delays the gradients of these",
)
NO_DIRECT_EXPERTS = Refusal(
    "--ep-fp8-direct with experts beside Megatron's TEGroupedMLP, or with Transformer Engine's own "
    "grouped tensors in it",
    "leave it out",
)

BY_MODEL = (FUSED_ACCUMULATION, UNKNOWN_EXPERTS, NO_DIRECT_EXPERTS)

REFUSALS = BY_CONFIG + BY_FLAGS + BY_MODEL
