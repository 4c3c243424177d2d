"""Ways to dispatch tokens that are compared with each other, as flags of `ep_comm.pretrain`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_ALLTOALL = ("--moe-token-dispatcher", "alltoall")
_DEEPEP = ("--moe-token-dispatcher", "deepep")
_OVERLAP = ("--ep-overlap-wgrad",)
_OWN_OVERLAP = ("--overlap-dispatch-backward-with-experts-wgrad",)  # Megatron's
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
VARIANTS: dict[str, tuple[str, ...]] = {
    "alltoall": _ALLTOALL,
    "alltoall-overlap": _ALLTOALL + _OWN_OVERLAP,
    "deepep": _DEEPEP,
    "deepep-overlap": _DEEPEP + _OVERLAP,
    "deepep-fp8": _DEEPEP + FP8_WIRE,
    "alltoall-fp8": _ALLTOALL + FP8_EXPERTS,
    "deepep-fp8-experts": _DEEPEP + FP8_EXPERTS,
    "deepep-fp8-all": _DEEPEP + FP8_EXPERTS + FP8_WIRE,
    "deepep-fp8-all-overlap": _DEEPEP + FP8_EXPERTS + FP8_WIRE + _OVERLAP,
}


def reference_of(name: str) -> str:
    """The variant of Megatron's own dispatcher that has the same experts as `name`."""
    return "alltoall-fp8" if "--fp8-format" in VARIANTS[name] else "alltoall"


def serial_of(name: str) -> str | None:
    """The variant that does without the overlap of `name`; None if it has none."""
    return name.removesuffix("-overlap") if name.endswith("-overlap") else None


def first_owned(arguments: Iterable[str], owned: Mapping[str, str]) -> tuple[str, str] | None:
    """The first flag among `arguments` that `owned` has, with or without ``--no-``, and its value
    there; None if there is none."""
    for flag in (argument.split("=")[0] for argument in arguments):
        if instead := owned.get(flag.replace("--no-", "--", 1)):
            return flag, instead
    return None
