"""The names of dispatchers and variants, and the flags of `ep_comm.pretrain` behind each.

`ep_comm.megatron.names` has the dispatchers'. A variant is called after its dispatcher; the older
name of ours, ``deepep``, is understood wherever one is read (`current_name`), and printed nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ep_comm.megatron.names import NAME, STOCK, printed

DISPATCHER_FLAGS = ("--moe-token-dispatcher", "--moe-token-dispatcher-type")  # both mean the same

_ALLTOALL = (DISPATCHER_FLAGS[0], STOCK)
_EP_COMM = (DISPATCHER_FLAGS[0], NAME)
_OVERLAP = ("--ep-overlap-wgrad",)
_DIRECT = ("--ep-fp8-direct",)
_OWN_OVERLAP = ("--overlap-dispatch-backward-with-experts-wgrad",)  # Megatron's
_1F1B = ("--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute")
_CAPACITY = ("--moe-pad-expert-input-to-capacity",)  # of a factor that the run is given
_FACTOR = "--ep-capacity-factor"
_COUNTS = (_FACTOR, "2", "--ep-device-counts")
_GRAPHS = ("--cuda-graph-modules", "attn", "moe_router", "moe_preprocess")
_LAYER_GRAPHS = ("--cuda-graph-modules", "attn", "moe")
# FP8 experts as Megatron recommends them for Hopper.
FP8_EXPERTS = (
    *("--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
    *("--fp8-param-gather", "--moe-router-padding-for-fp8"),
)
# Both legs of dispatch: who sends activations in FP8 will send gradients so too, and what holds for
# both holds for one.
FP8_WIRE = ("--ep-fp8-dispatch", "--ep-fp8-grad-dispatch")

# "-overlap" is what is named before it, with the experts' weight gradients beside communication of
# the backward pass: ours beside the combine, Megatron's own beside its backward of dispatch.
# "-factor-F" gives every expert rows for F times its even share, and waits for no counts;
# "-device-counts-F" gives them to a rank's experts together, and torch's GEMM takes the counts.
# "-fp8-direct" is "-fp8-all" whose experts compute with FP8 rows as they came.
# "-graphs" has all that precedes the dispatch in CUDA graphs, and with a capacity the whole layer.
# "-1f1b" is Megatron's overlap of one micro-batch's communication with another one's computation.
VARIANTS: dict[str, tuple[str, ...]] = {
    "alltoall": _ALLTOALL,
    "alltoall-overlap": _ALLTOALL + _OWN_OVERLAP,
    "ep_comm": _EP_COMM,
    "ep_comm-overlap": _EP_COMM + _OVERLAP,
    "ep_comm-fp8": _EP_COMM + FP8_WIRE,
    "alltoall-fp8": _ALLTOALL + FP8_EXPERTS,
    "ep_comm-fp8-experts": _EP_COMM + FP8_EXPERTS,
    "ep_comm-fp8-all": _EP_COMM + FP8_EXPERTS + FP8_WIRE,
    "ep_comm-fp8-all-overlap": _EP_COMM + FP8_EXPERTS + FP8_WIRE + _OVERLAP,
    "ep_comm-fp8-direct": _EP_COMM + FP8_EXPERTS + FP8_WIRE + _DIRECT,
    "ep_comm-fp8-direct-overlap": _EP_COMM + FP8_EXPERTS + FP8_WIRE + _DIRECT + _OVERLAP,
    "alltoall-1f1b": _ALLTOALL + _1F1B,
    "ep_comm-1f1b": _EP_COMM + _1F1B,
    "alltoall-fp8-1f1b": _ALLTOALL + FP8_EXPERTS + _1F1B,
    "ep_comm-fp8-all-1f1b": _EP_COMM + FP8_EXPERTS + FP8_WIRE + _1F1B,
    "alltoall-capacity": _ALLTOALL + _CAPACITY,
    "ep_comm-capacity": _EP_COMM + _CAPACITY,
    "ep_comm-factor-1.25": (*_EP_COMM, _FACTOR, "1.25"),
    "ep_comm-factor-2": (*_EP_COMM, _FACTOR, "2"),
    "ep_comm-device-counts-2": _EP_COMM + _COUNTS,
    "ep_comm-fp8-all-factor-2": (*_EP_COMM, *FP8_EXPERTS, *FP8_WIRE, _FACTOR, "2"),
    "alltoall-graphs": _ALLTOALL + _GRAPHS,
    "ep_comm-graphs": _EP_COMM + _GRAPHS,
    "ep_comm-device-counts-2-graphs": _EP_COMM + _COUNTS + _GRAPHS,
    "alltoall-capacity-graphs": _ALLTOALL + _CAPACITY + _LAYER_GRAPHS,
    "ep_comm-capacity-graphs": _EP_COMM + _CAPACITY + _LAYER_GRAPHS,
}


def current_name(name: str) -> str:
    """Return the present name of a dispatcher or variant: ``ep_comm-fp8`` for ``deepep-fp8``.

    Every other name is returned as it is.
    """
    dispatcher, dash, rest = name.partition("-")
    return printed(dispatcher) + dash + rest


def reference_of(name: str) -> str:
    """Return the variant of Megatron's own dispatcher that has the same experts as `name`.

    And the same capacity: what drops tokens has less to do.
    """
    flags = VARIANTS[name]
    if _CAPACITY[0] in flags:
        return "alltoall-capacity"
    return "alltoall-fp8" if "--fp8-format" in flags else STOCK


def references_of(name: str) -> tuple[str, ...]:
    """Return the variants of which the faster one is what `name` has to be faster than.

    That is `reference_of`, and for ours under the 1F1B overlap alltoall under it too.
    """
    reference = reference_of(name)
    is_1f1b = _1F1B[0] in VARIANTS[name] and _EP_COMM[1] in VARIANTS[name]
    return (reference, f"{reference}-1f1b") if is_1f1b else (reference,)


def serial_of(name: str) -> str | None:
    """Return the variant that does without the overlap of `name`; None if it has none."""
    return name.removesuffix("-overlap") if name.endswith("-overlap") else None


def first_owned(arguments: Iterable[str], owned: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the first flag among `arguments` that `owned` has, and its value there.

    A flag is found with or without ``--no-``. None if there is none.
    """
    for flag in (argument.split("=")[0] for argument in arguments):
        if instead := owned.get(flag.replace("--no-", "--", 1)):
            return flag, instead
    return None
