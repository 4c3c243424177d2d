"""Everything that a training can be told, and what does not go together.

Names are Megatron-LM's wherever it has one. Keys that begin with ``ep_`` are the fields of
`EPOptions`, under the names of their flags. `ep_comm.pretrain.flags` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    create_model,
    model_validator,
)

from ep_comm.errors import EPArgumentError
from ep_comm.job.exits import UserError
from ep_comm.megatron.names import NAME, printed
from ep_comm.megatron.options import OPTIONS, EPOptions

Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=1, le=2**31 - 1)]  # numpy takes 32 bits, and Megatron adds to it


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _key(default: Any, description: str) -> Any:
    return Field(default, description=description)


class Model(_Group):
    """Model."""

    num_layers: PositiveInt = _key(..., "transformer layers, each of them with experts")
    hidden_size: PositiveInt = _key(..., "elements of a token's hidden state")
    num_attention_heads: PositiveInt = _key(..., "attention heads")
    num_query_groups: PositiveInt | None = _key(None, "key/value heads; none: one per head")
    kv_channels: PositiveInt | None = _key(None, "head size; none: hidden size / heads")
    qk_layernorm: bool = _key(False, "normalise queries and keys")
    rotary_base: PositiveInt = _key(10_000, "base period of the rotary position embedding")
    seq_length: PositiveInt = _key(..., "tokens of a training sequence")


class MixtureOfExperts(_Group):
    """Mixture of experts."""

    num_experts: PositiveInt = _key(..., "experts of a layer, over all ranks")
    moe_ffn_hidden_size: PositiveInt = _key(..., "hidden size of an expert")
    moe_router_topk: PositiveInt = _key(2, "experts that a token selects")
    moe_router_score_function: Literal["softmax", "sigmoid"] = _key("softmax", "router scores")
    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "none"
    ] = _key("aux_loss", "loss that balances the experts")
    moe_aux_loss_coeff: NonNegativeFloat = _key(0.0, "weight of the balancing loss")
    moe_router_enable_expert_bias: bool = _key(
        False, "balance by a bias on the scores, without a loss; needs sigmoid scores"
    )
    moe_router_bias_update_rate: PositiveFloat = _key(1e-3, "step of the expert bias")
    moe_router_force_load_balancing: bool = _key(
        False, "route every token at random: for measurements of speed, nothing is learnt"
    )
    moe_shared_expert_intermediate_size: PositiveInt | None = _key(
        None, "hidden size of the expert that every token passes; none: no such expert"
    )
    moe_shared_expert_overlap: bool = _key(
        False, "run that expert beside dispatch and combine; with ep_comm set ep_num_sms too"
    )
    moe_expert_capacity_factor: PositiveFloat | None = _key(
        None,
        "drop what an expert gets beyond this times its even share of a rank's tokens; none: "
        "nothing is dropped",
    )
    moe_pad_expert_input_to_capacity: bool = _key(
        False, "fill each expert up to that, so that its rows are always as many"
    )
    moe_grouped_gemm: bool = _key(False, "all local experts in one grouped GEMM; needs TE")
    moe_permute_fusion: bool = _key(False, "fused permutation kernels of alltoall; needs TE")
    moe_router_fusion: bool = _key(False, "fused kernels of the router; needs TE")
    moe_router_padding_for_fp8: bool = _key(
        False, "fill up the experts of alltoall with more tokens, as FP8 GEMMs need; needs TE"
    )


class Dispatch(_Group):
    """Token dispatch."""

    expert_model_parallel_size: PositiveInt = _key(1, "ranks that share the experts of a layer")
    moe_token_dispatcher: Annotated[
        Literal["ep_comm", "alltoall", "allgather"], BeforeValidator(printed)
    ] = _key("ep_comm", "ep_comm's dispatcher, deepep for short, or one of Megatron's")
    overlap_dispatch_backward_with_experts_wgrad: bool = _key(
        False,
        "compute the experts' weight gradients while the backward of Megatron's own dispatch is "
        "under way; needs TE",
    )
    overlap_moe_expert_parallel_comm: bool = _key(
        False,
        "run the dispatch and combine of a micro-batch beside the computation of another one: "
        "Megatron's 1F1B overlap",
    )
    delay_wgrad_compute: bool = _key(
        False, "in that overlap compute weight gradients beside communication too; needs TE"
    )


_EP_KEYS: dict[str, Any] = {
    each.key: (
        each.annotation,
        _key(each.default, each.help + (f" None: {each.unset}." if each.unset else "")),
    )
    for each in OPTIONS
}
EPKeys = create_model("EPKeys", __base__=_Group, __doc__="ep_comm's dispatcher.", **_EP_KEYS)


class Training(_Group):
    """Training."""

    micro_batch_size: PositiveInt = _key(..., "sequences of one forward pass on one rank")
    global_batch_size: PositiveInt = _key(..., "sequences of one step, over all ranks")
    train_iters: PositiveInt = _key(..., "steps")
    lr: PositiveFloat = _key(..., "highest learning rate")
    min_lr: NonNegativeFloat = _key(0.0, "learning rate at the end of the decay")
    lr_warmup_iters: NonNegativeInt = _key(0, "steps of linear warm-up")
    lr_decay_iters: PositiveInt | None = _key(None, "steps until min_lr; none: train_iters")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = _key(
        "cosine", "shape of the decay"
    )
    clip_grad: NonNegativeFloat = _key(1.0, "highest gradient norm; 0: no clipping")
    weight_decay: NonNegativeFloat = _key(0.01, "weight decay of AdamW")
    adam_beta1: Decay = _key(0.9, "decay of AdamW's first moment")
    adam_beta2: Decay = _key(0.95, "decay of AdamW's second moment")
    seed: Seed = _key(1234, "seed of weights, data order and dropout")
    data_seed: Seed | None = _key(None, "seed of the data order; none: seed")
    bf16: bool = _key(False, "BF16 weights and activations, FP32 gradients and master weights")
    fp8_format: Literal["e4m3"] | None = _key(
        None, "GEMMs of the layers in FP8, activations and weights in BF16; needs TE; none: no FP8"
    )
    fp8_recipe: Literal["blockwise", "delayed", "tensorwise"] = _key(
        "blockwise", "scales of FP8 GEMMs; FP8 dispatch changes no output of blockwise ones"
    )
    fp8_param_gather: bool = _key(
        False, "weights of FP8 GEMMs stored and gathered in FP8; needs TE"
    )
    gradient_accumulation_fusion: bool = _key(
        False,
        "add weight gradients up inside the GEMMs that compute them, except in the output layer; "
        "needs TE, but not Apex",
    )
    use_distributed_optimizer: bool = _key(False, "share the optimizer state between ranks")
    overlap_grad_reduce: bool = _key(False, "reduce gradients during the backward pass")
    cuda_graph_modules: list[Literal["attn", "moe_router", "moe_preprocess", "moe"]] = _key(
        [], "parts of a layer to capture in CUDA graphs after the first steps; needs TE"
    )
    overlap_param_gather: bool = _key(False, "gather updated weights during the forward pass")
    recompute_granularity: Literal["full", "selective"] | None = _key(
        None, "recompute activations in the backward pass: whole layers, or recompute_modules"
    )
    recompute_modules: list[str] | None = _key(
        None, "what selective recomputation covers, such as core_attn, moe, moe_act"
    )
    manual_gc: bool = _key(
        False, "collect Python's garbage at the same steps on all ranks, not at any time on each"
    )
    manual_gc_interval: NonNegativeInt = _key(
        0, "steps between two such collections; 0: only around validations"
    )


class Data(_Group):
    """Data."""

    data_path: list[str] = _key(
        [],
        "text files, folders or globs, read as bytes, or the prefix of one Megatron .bin/.idx "
        "pair; none: the source of Python's standard library",
    )
    vocab_size: PositiveInt | None = _key(None, "tokens of a .bin/.idx pair's tokenizer")
    split: str = Field(
        "95,5",
        pattern=r"^\d+(\.\d+)?,\d+(\.\d+)?$",
        description="shares of training and validation data",
    )
    data_cache_path: Path | None = _key(
        None, "folder for tokenized data, visible to all nodes; none: the user's cache folder"
    )


# Keys that a resumed run may have other values of if the user says so: data may have moved.
MAY_CHANGE = ("data_path", "split", "data_seed", "micro_batch_size", "global_batch_size")


class Output(_Group):
    """Validation, checkpoints, logs."""

    eval_interval: PositiveInt = _key(100, "steps between validations; one more at the end")
    eval_iters: NonNegativeInt = _key(8, "global batches of one validation; 0: no validation")
    save: Path | None = _key(None, "folder to write checkpoints to")
    save_interval: PositiveInt | None = _key(
        None, "steps between checkpoints; one more at the end; none: only that one"
    )
    keep_checkpoints: PositiveInt | None = _key(
        None, "latest checkpoints in save to keep; older ones are deleted; none: all are kept"
    )
    load: Path | None = _key(
        None, "folder of checkpoints to resume from, at the latest one; may be empty if it is save"
    )
    load_despite: list[str] = _key(
        [], f"keys that may differ from the checkpoint's, out of {', '.join(MAY_CHANGE)}"
    )
    run_dir: Path | None = _key(None, "folder of the logs; none: runs/CONFIG-DISPATCHER")
    log_interval: PositiveInt = _key(1, "steps between lines on the screen; log.jsonl has all")
    wandb_project: str | None = _key(None, "W&B project; none: no W&B")
    wandb_exp_name: str | None = _key(None, "W&B run name; none: the name of run_dir")
    wandb_entity: str | None = _key(None, "W&B user or team")
    wandb_save_dir: Path | None = _key(None, "folder of W&B's files; none: run_dir")


# Keys that, set, need another one.
_NEEDS = (
    ("fp8_param_gather", "fp8_format"),
    ("fp8_param_gather", "use_distributed_optimizer"),
    ("moe_router_padding_for_fp8", "fp8_format"),
    ("moe_shared_expert_overlap", "moe_shared_expert_intermediate_size"),
    ("overlap_dispatch_backward_with_experts_wgrad", "moe_grouped_gemm"),
    ("overlap_moe_expert_parallel_comm", "bf16"),
    ("delay_wgrad_compute", "overlap_moe_expert_parallel_comm"),
    ("moe_pad_expert_input_to_capacity", "moe_expert_capacity_factor"),
    ("cuda_graph_modules", "bf16"),
    ("overlap_param_gather", "use_distributed_optimizer"),
    ("overlap_param_gather", "overlap_grad_reduce"),
    ("manual_gc_interval", "manual_gc"),
    ("keep_checkpoints", "save"),
    ("load_despite", "load"),
    ("recompute_modules", "recompute_granularity"),
    ("ep_overflow", "ep_capacity_factor"),
    ("ep_device_counts", "ep_capacity_factor"),
)
# With another dispatcher these would be left out without a word.
_NEED_EP_COMM = [each.key for each in OPTIONS if each.value_type in (bool, str)]
_NEED_EP_COMM.append("ep_capacity_factor")


class PretrainConfig(
    Model,
    MixtureOfExperts,
    Dispatch,
    EPKeys,  # type: ignore[misc, valid-type]  # made at run time
    Training,
    Data,
    Output,
):
    """Everything that `ep_comm.pretrain` can be told."""

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        channels = self.kv_channels or self.hidden_size // self.num_attention_heads
        own_overlap = self.overlap_dispatch_backward_with_experts_wgrad
        is_padded_alltoall = (
            self.moe_router_padding_for_fp8 and self.moe_token_dispatcher == "alltoall"
        )
        refusals: list[tuple[Any, str]] = [  # whether, and why
            (
                self.num_experts % self.expert_model_parallel_size,
                f"num_experts {self.num_experts} is not divisible by "
                f"expert_model_parallel_size {self.expert_model_parallel_size}",
            ),
            (
                self.moe_router_topk > self.num_experts,
                f"moe_router_topk {self.moe_router_topk} is more than "
                f"num_experts {self.num_experts}",
            ),
            (
                self.num_query_groups and self.num_attention_heads % self.num_query_groups,
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}",
            ),
            (
                channels % 2,
                f"kv_channels (by default hidden_size / num_attention_heads) must be even for "
                f"rotary embeddings, got {channels}",
            ),
            (
                own_overlap and self.uses_ep_comm,
                "overlap_dispatch_backward_with_experts_wgrad is for Megatron's own dispatchers: "
                f"with moe_token_dispatcher {NAME} use ep_overlap_wgrad",
            ),
            (
                # Megatron-Core's pads, in place, the map that the fused router's backward needs.
                is_padded_alltoall and self.moe_router_fusion,
                "moe_router_padding_for_fp8 with moe_token_dispatcher alltoall fails in the "
                "backward of moe_router_fusion: turn that off (--no-moe-router-fusion)",
            ),
            (
                self.cuda_graph_modules and self.overlap_param_gather,
                "cuda_graph_modules does not go with overlap_param_gather: graphs would read "
                "weights that are still to come",
            ),
            (
                self.cuda_graph_modules and self.overlap_moe_expert_parallel_comm,
                "cuda_graph_modules does not go with overlap_moe_expert_parallel_comm: a layer has "
                "one graph, which would hold the activations of two micro-batches",
            ),
            (
                self.cuda_graph_modules
                and self.ep_overlap_wgrad  # type: ignore[attr-defined]  # one of EPKeys
                and self.expert_model_parallel_size == 1,
                "cuda_graph_modules with ep_overlap_wgrad needs expert_model_parallel_size of 2 or "
                "more: else experts share gradient buffers with layers whose hooks run elsewhere",
            ),
            (self.min_lr > self.lr, f"min_lr {self.min_lr} is more than lr {self.lr}"),
            (
                self.lr_warmup_iters >= self.decay_iters,
                f"lr_warmup_iters {self.lr_warmup_iters} must be less than lr_decay_iters (by "
                f"default train_iters), which is {self.decay_iters}",
            ),
        ]
        refusals += [
            (getattr(self, key) and not getattr(self, needed), f"{key} needs {needed}")
            for key, needed in _NEEDS
        ]
        refusals += [
            (
                getattr(self, key) and not self.uses_ep_comm,
                f"{key} needs moe_token_dispatcher {NAME}, not {self.moe_token_dispatcher}",
            )
            for key in _NEED_EP_COMM
        ]
        refusals += [
            (key not in MAY_CHANGE, f"load_despite {key} is none of {', '.join(MAY_CHANGE)}")
            for key in self.load_despite
        ]
        for is_wrong, why in refusals:
            if is_wrong:
                raise ValueError(why)
        for each in OPTIONS:
            try:
                EPOptions(**{each.name: getattr(self, each.key)})
            except EPArgumentError as error:
                raise ValueError(str(error).replace(each.name, each.key, 1)) from None
        return self

    @property
    def uses_ep_comm(self) -> bool:
        """Whether tokens go through ep_comm's dispatcher, not through one of Megatron's."""
        return self.moe_token_dispatcher == NAME

    @property
    def ep_options(self) -> EPOptions:
        """The dispatcher's settings; a buffer takes one micro-batch unless a key says otherwise."""
        values = {each.name: getattr(self, each.key) for each in OPTIONS}
        if values["max_tokens_per_rank"] is None:
            values["max_tokens_per_rank"] = self.micro_batch_size * self.seq_length
        return EPOptions(**values)

    @property
    def log_dir(self) -> Path:
        """Folder of the logs: `run_dir`, which `parse_args` fills in where it was not given."""
        assert self.run_dir is not None
        return self.run_dir

    @property
    def decay_iters(self) -> int:
        """Steps until the learning rate has reached its minimum."""
        return self.lr_decay_iters or self.train_iters

    def num_microbatches(self, world_size: int) -> int:
        """Return the forward passes of one step on one rank; all ranks are data-parallel.

        Raises:
            UserError: The parallel sizes or batch sizes do not fit this number of ranks.
        """
        if world_size % self.expert_model_parallel_size:
            raise UserError(
                f"{world_size} processes cannot form groups of expert_model_parallel_size "
                f"{self.expert_model_parallel_size}: start a multiple of it "
                f"(torchrun --nproc_per_node), or change --expert-model-parallel-size"
            )
        samples = self.micro_batch_size * world_size
        if self.global_batch_size % samples:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size} x {world_size} processes = {samples}"
            )
        return self.global_batch_size // samples


GROUPS: tuple[type[BaseModel], ...] = PretrainConfig.__bases__  # in the order of the help
