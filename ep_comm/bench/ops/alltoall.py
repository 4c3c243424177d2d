"""Dispatch and combine as Megatron-Core's alltoall dispatcher does them, in plain torch.

What our kernels are compared with: one copy of a token per expert. It follows the steps of
``MoEAlltoAllTokenDispatcher`` without its permute fusion, and takes what Megatron's router gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# The second is its name before torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Where the rows of one dispatch went.

    Attributes:
        shape: [T, H] of the tokens.
        token_of_row: [T * K] int64, the token of each row sent, in order of experts.
        sent: Rows sent to each rank.
        received: Rows received from each rank.
        chunks: [R][E_local] rows received from each rank for each local expert.
    """

    shape: torch.Size
    token_of_row: Tensor
    sent: list[int]
    received: list[int]
    chunks: list[list[int]]


class AllToAll:
    """Expert parallelism of `group`, by ``all_to_all_single``."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, num_topk: int) -> None:
        self._group = group
        self._num_experts = num_experts
        self._num_topk = num_topk
        self.rank = dist.get_rank(group)
        self._num_ranks = dist.get_world_size(group)

    def dispatch(
        self, x_TH: Tensor, routing_map_TE: Tensor, probs_TE: Tensor
    ) -> tuple[Tensor, Tensor, Permutation]:
        """Send each token to each of its experts.

        Args:
            x_TH: [T, H] rows.
            routing_map_TE: [T, E] bool, exactly K true in a row.
            probs_TE: [T, E] probabilities.

        Returns:
            Rows by local expert, then source rank, then token; the probability of each row; and
            what `combine` needs.
        """
        num_tokens = x_TH.shape[0]
        num_rows = num_tokens * self._num_topk
        counts_E = routing_map_TE.sum(dim=0)
        counts_RE = counts_E.new_empty(self._num_ranks * self._num_experts)
        _all_gather(counts_RE, counts_E, group=self._group)

        # Places of the true entries, expert by expert, without asking how many there are.
        by_expert = routing_map_TE.T.reshape(-1).argsort(descending=True, stable=True)[:num_rows]
        token_of_row = by_expert % num_tokens
        rows = x_TH.index_select(0, token_of_row)
        probs = probs_TE.T.reshape(-1)[by_expert]

        # Source, destination, local expert.
        counts_RRe = counts_RE.view(self._num_ranks, self._num_ranks, -1)
        sent_received = torch.stack(
            [counts_RRe[self.rank].sum(dim=1), counts_RRe[:, self.rank].sum(dim=1)]
        )
        chunks = counts_RRe[:, self.rank].tolist()  # the host waits for all ranks' routing
        sent, received = sent_received.tolist()
        permutation = Permutation(
            shape=x_TH.shape,
            token_of_row=token_of_row,
            sent=sent,
            received=received,
            chunks=chunks,
        )
        rows = self._exchange(rows, sent, received)
        probs = self._exchange(probs, sent, received)
        return _regroup(rows, chunks), _regroup(probs, chunks), permutation

    def combine(self, rows: Tensor, permutation: Permutation) -> Tensor:
        """Sum the rows of each token, in no fixed order and in the rows' own type: [T, H]."""
        rows = _regroup(rows, [list(counts) for counts in zip(*permutation.chunks, strict=True)])
        rows = self._exchange(rows, permutation.received, permutation.sent)
        combined = rows.new_zeros(permutation.shape)
        index = permutation.token_of_row.unsqueeze(1).expand(-1, rows.shape[1])
        return combined.scatter_add_(0, index, rows)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows, received, sent, group=self._group)
        return out


def _regroup(rows: Tensor, chunks: list[list[int]]) -> Tensor:
    """Bring rows from the order of `chunks` into that of its columns.

    From source ranks to experts where chunks are [R][E_local], and back where [E_local][R].
    """
    parts = rows.split([count for chunk in chunks for count in chunk])
    num_columns = len(chunks[0])
    return torch.cat([part for i in range(num_columns) for part in parts[i::num_columns]])
