"""Ways to dispatch tokens that are compared with each other, as flags of the training script."""

from __future__ import annotations

_ALLTOALL = ("--moe-token-dispatcher", "alltoall")
_DEEPEP = ("--moe-token-dispatcher", "deepep")
_OVERLAP = ("--ep-overlap-wgrad",)
# FP8 experts as Megatron recommends them for Hopper.
FP8_EXPERTS = (
    *("--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
    *("--fp8-param-gather", "--moe-router-padding-for-fp8"),
)
# Both legs of dispatch: who sends activations in FP8 will send gradients so too, and what holds for
# both holds for one.
FP8_WIRE = ("--ep-fp8-dispatch", "--ep-fp8-grad-dispatch")

# "-overlap" is what is named before it, with the weight gradients beside the backward combine.
VARIANTS: dict[str, tuple[str, ...]] = {
    "alltoall": _ALLTOALL,
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
