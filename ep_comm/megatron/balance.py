"""How the tokens of a step were spread over ranks and experts, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ep_comm.markdown import table
from ep_comm.telemetry.stats import max_over_mean

TABLE = "ep/balance"  # what logs call it
_NAMES = {
    "layer": "layer",
    "imbalance-rank": "rank_imbalance",
    "imbalance-expert": "expert_imbalance",
    "fullest-rank": "fullest_rank",
    "fullest-expert": "fullest_expert",
    "idle-experts": "num_idle",
}
COLUMNS = tuple(_NAMES)


class LayerBalance(NamedTuple):
    """The tokens of one MoE layer in one step, over all of its experts.

    Attributes:
        layer: Its number in the model, from 1, as Megatron counts; MTP's come last.
        num_ranks: Expert-parallel ranks, each with as many consecutive experts.
        tokens: That each expert of the layer received, padding not counted.
    """

    layer: int
    num_ranks: int
    tokens: tuple[int, ...]

    @property
    def tokens_of_ranks(self) -> tuple[int, ...]:
        """What each rank's experts received, a token once for each expert."""
        size = len(self.tokens) // self.num_ranks
        return tuple(sum(self.tokens[i : i + size]) for i in range(0, len(self.tokens), size))

    @property
    def rank_imbalance(self) -> float:
        """Tokens of the fullest rank over the mean; 1 is even."""
        return max_over_mean(self.tokens_of_ranks)

    @property
    def expert_imbalance(self) -> float:
        """Tokens of the fullest expert over the mean; 1 is even."""
        return max_over_mean(self.tokens)

    @property
    def fullest_rank(self) -> int:
        """Expert-parallel rank with most tokens."""
        return _largest(self.tokens_of_ranks)

    @property
    def fullest_expert(self) -> int:
        """Expert with most tokens, counted from 0 over all ranks."""
        return _largest(self.tokens)

    @property
    def num_idle(self) -> int:
        """Experts without a token."""
        return sum(not count for count in self.tokens)

    def row(self) -> dict[str, Any]:
        """Return what a table says of the layer, by the names in `COLUMNS`."""
        return {name: getattr(self, attribute) for name, attribute in _NAMES.items()}


def markdown(layers: Iterable[LayerBalance]) -> str:
    """Return a table with a line for each layer, as TensorBoard shows text."""
    rows = [
        [
            f"{value:.2f}" if isinstance(value, float) else str(value)
            for value in each.row().values()
        ]
        for each in layers
    ]
    return "".join(f"{line}\n" for line in table(COLUMNS, rows, of_numbers=True))


def _largest(counts: Sequence[int]) -> int:
    return max(range(len(counts)), key=counts.__getitem__)
