"""The settings of the dispatcher: one definition for own loops, flags, configurations and docs.

A setting is a field of `EPOptions`. Its flag and its help stand with it, and `OPTIONS` hands them
to whoever needs them: the launcher's parser, the example's configuration, docs/megatron.md.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ep_comm.checks import check_alignment, check_num_sms
from ep_comm.config import check_positive, check_timeout
from ep_comm.errors import EPArgumentError
from ep_comm.numeric import is_number


def option(
    default: Any,
    *,
    flag: str,
    help: str,
    unset: str = "",
    metavar: str | None = None,
) -> Any:
    """Return a field of `EPOptions`.

    Args:
        default: The value without the flag.
        flag: Its flag, such as ``"--ep-num-sms"``.
        help: One or more sentences, for readers of ``--help`` and of docs/megatron.md.
        unset: Says what a default of None stands for.
        metavar: The flag's value in the help; None for a switch or one of several words.
    """
    metadata = {"flag": flag, "help": help, "unset": unset, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EPOptions:
    """Settings of our dispatcher; everything else comes from the `TransformerConfig`.

    ``python -m ep_comm.megatron.launch --help`` prints what each field does, under the name of its
    flag: `timeout_s` is ``--ep-timeout``. A field that is None is left to us. In a loop of your own
    `overlap_wgrad` also needs ``DistributedDataParallelConfig(delay_wgrad_compute=True)``, and
    `capture_routing` a `RoutingCapture` that is told of each step.

    Raises:
        EPArgumentError: A value has the wrong type, or is out of range.
    """

    fp8_dispatch: bool = option(
        False,
        flag="--ep-fp8-dispatch",
        help="Activations travel to the experts as FP8 E4M3 in blocks of 128. The experts' "
        "outputs, and the gradients of their inputs, keep the type of the activations. The hidden "
        "size must be a multiple of 128, on GPUs of 512.",
    )
    fp8_grad_dispatch: bool = option(
        False,
        flag="--ep-fp8-grad-dispatch",
        help="Gradients of the experts' outputs, which the backward of combine sends to the "
        "experts, travel as FP8 E4M3 in blocks of 128. Independent of --ep-fp8-dispatch.",
    )
    fp8_direct: bool = option(
        False,
        flag="--ep-fp8-direct",
        help="With --ep-fp8-dispatch and FP8 experts of --fp8-recipe blockwise: rows go into the "
        "experts' first GEMM as they came, neither dequantised nor quantised again. With "
        "--ep-fp8-grad-dispatch gradients do so at the last GEMM. Results are the same, bit for "
        "bit. Needs Transformer Engine 2.20.",
    )
    overlap_wgrad: bool = option(
        False,
        flag="--ep-overlap-wgrad",
        help="Compute the routed experts' weight gradients while the backward combine is in "
        "flight, or behind it, where that costs less by measured prices. Megatron's own linear "
        "layers need --no-gradient-accumulation-fusion with it.",
    )
    copy_engines: bool = option(
        False,
        flag="--ep-copy-engines",
        help="Tokens travel by the GPUs' copy engines, which leave more SMs to GEMMs. They set out "
        "while the router computes, every token to every rank: for two to four GPUs of one host, "
        "and enough experts a token. Results are the same.",
    )
    num_sms: int | None = option(
        None,
        flag="--ep-num-sms",
        metavar="N",
        help="SMs that each dispatch and combine may occupy, at least 2, across hosts 4. No effect "
        "with the reference backend.",
        unset="all; beside weight gradients and under Megatron's 1F1B overlap what costs GEMMs "
        "least, as measured, or 24",
    )
    timeout_s: float | None = option(
        None,
        flag="--ep-timeout",
        metavar="SECONDS",
        help="Bound of every wait for another rank, after which the late one is named.",
        unset="half of the process group's own timeout, at most 300 s",
    )
    expert_alignment: int | None = option(
        None,
        flag="--ep-expert-alignment",
        metavar="ROWS",
        help="The rows of each expert are padded to a multiple of this.",
        unset="what Megatron's quantisation needs, else no padding",
    )
    max_tokens_per_rank: int | None = option(
        None,
        flag="--ep-max-tokens-per-rank",
        metavar="N",
        help="Most tokens of one micro-batch on one rank. More of them are an error. A rank holds "
        "about 2 (EP - 1) N x hidden x bytes of an element, once for all layers; across hosts see "
        "docs/buffer.md.",
        unset="by the sizes of batch, sequence and parallel groups where they are known; else the "
        "first micro-batch's, and a longer one makes a larger buffer",
    )
    capture_routing: str | None = option(
        None,
        flag="--ep-capture-routing",
        metavar="FOLDER",
        help="Write which experts the tokens select, in the 1st, 2nd, 4th, 8th, ... step after the "
        "start, for ep-comm bench --replay and ep-comm plan --replay (docs/routing-capture.md). A "
        "run needs a folder of its own, which all ranks can write to.",
        unset="nothing is written",
    )
    capacity_factor: float | None = option(
        None,
        flag="--ep-capacity-factor",
        metavar="F",
        help="Every expert has rows for F times its even share of all ranks' tokens, F at least 1: "
        "no host waits for counts. What does not fit is dropped and counted. All ranks bring the "
        "same number of tokens. The experts compute F times as many rows.",
        unset="as many rows as come",
    )
    device_counts: bool = option(
        False,
        flag="--ep-device-counts",
        help="With --ep-capacity-factor: F counts for all experts of a rank together, whose rows "
        "stand without gaps. Token counts stay on the device, and torch's grouped GEMM computes "
        "the experts, in BF16 or FP32. Their weights are named otherwise in checkpoints.",
    )
    overflow: Literal["warn", "error"] | None = option(
        None,
        flag="--ep-overflow",
        metavar="{warn,error}",
        help="Where tokens were dropped by --ep-capacity-factor: a warning, or an error before the "
        "optimizer's step, for which the host waits for the backward pass.",
        unset="warn",
    )

    def __post_init__(self) -> None:
        for each in OPTIONS:
            if each.value_type is bool and not isinstance(getattr(self, each.name), bool):
                raise EPArgumentError(
                    f"{each.name} must be a bool, got {getattr(self, each.name)!r}"
                )
        check_num_sms(self.num_sms)
        if self.timeout_s is not None:
            check_timeout(self.timeout_s)
        if self.expert_alignment is not None:
            check_alignment(self.expert_alignment)
        if self.capture_routing is not None and not (
            isinstance(self.capture_routing, str) and self.capture_routing
        ):
            raise EPArgumentError(
                f"capture_routing must be the name of a folder, got {self.capture_routing!r}"
            )
        if self.max_tokens_per_rank is not None:
            check_positive("max_tokens_per_rank", self.max_tokens_per_rank)
        _check_capacity_factor(self.capacity_factor)
        if self.overflow not in (None, "warn", "error"):
            raise EPArgumentError(f"overflow must be 'warn' or 'error', got {self.overflow!r}")


def _check_capacity_factor(factor: object) -> None:
    if factor is None:
        return
    if not is_number(factor) or not factor < math.inf:
        raise EPArgumentError(f"capacity_factor must be a number, got {factor!r}")
    if factor < 1:
        raise EPArgumentError(
            f"capacity_factor must be at least 1, got {factor:g}: with less even balanced routing "
            "would lose tokens"
        )


class Option(NamedTuple):
    """A field of `EPOptions`, as parsers, configurations and tables need it.

    Attributes:
        name: The field.
        flag: Such as ``"--ep-num-sms"``.
        key: The flag's name in parsed arguments and configurations, such as ``"ep_num_sms"``.
        annotation: Type of the field.
        value_type: bool, int, float or str. Where the default is None, so may the value be.
        choices: The values of a str.
        default: The value without the flag.
        help: Says what it does.
        unset: Says what a default of None stands for; else empty.
        metavar: The flag's value in the help; None for a switch.
    """

    name: str
    flag: str
    key: str
    annotation: Any
    value_type: type
    choices: tuple[str, ...]
    default: Any
    help: str
    unset: str
    metavar: str | None

    @property
    def full_help(self) -> str:
        """Return `help`, with what leaving the flag out means."""
        return f"{self.help} Default: {self.unset}." if self.unset else self.help


def _plain(annotation: Any) -> Any:
    """Return the type of what may also be None."""
    return next(iter(typing.get_args(annotation)), annotation)


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the values of one of several words; empty for every other type."""
    plain = _plain(annotation)
    return typing.get_args(plain) if typing.get_origin(plain) is Literal else ()


def _options() -> tuple[Option, ...]:
    types = typing.get_type_hints(EPOptions)
    return tuple(_option(field, types[field.name]) for field in dataclasses.fields(EPOptions))


def _option(field: dataclasses.Field, annotation: Any) -> Option:
    choices = _choices(annotation)
    return Option(
        name=field.name,
        key=field.metadata["flag"].removeprefix("--").replace("-", "_"),
        annotation=annotation,
        value_type=str if choices else _plain(annotation),
        choices=choices,
        default=field.default,
        **field.metadata,
    )


OPTIONS = _options()


def flag_of(name: str) -> str:
    """Return the flag of a field of `EPOptions`."""
    return next(each.flag for each in OPTIONS if each.name == name)
