"""`Config`: the settings of a kernel of DeepEP, of which one matters here."""

from __future__ import annotations

from dataclasses import dataclass

from ep_comm.checks import check_num_sms
from ep_comm.config import check_positive
from ep_comm.deep_ep.hints import Hints

_TOKENS = 4096  # of a rank, where no hint says how many


def bytes_of_rows(num_tokens: int, hidden_bytes: int, num_ranks: int) -> int:
    """Return the bytes that a rank holds for so many tokens of each, about."""
    return 2 * (num_ranks - 1) * num_tokens * hidden_bytes


@dataclass(frozen=True)
class Config:
    """What DeepEP tunes a dispatch or combine by.

    Attributes:
        num_sms: The most SMs that the operation may occupy.
        num_max_nvl_chunked_send_tokens: Without effect, like the three behind it: chunks are this
            library's own affair.
        num_max_nvl_chunked_recv_tokens: As before.
        num_max_rdma_chunked_send_tokens: As before.
        num_max_rdma_chunked_recv_tokens: As before.
        limits_sms: Whether somebody has asked for `num_sms`. False in what `Buffer` recommends
            before `Buffer.set_num_sms`: then an operation has the SMs that it has natively.

    Raises:
        EPArgumentError: `num_sms` is less than 2.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256
    limits_sms: bool = True

    def __post_init__(self) -> None:
        check_positive("num_sms", self.num_sms)
        check_num_sms(self.num_sms)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that a rank holds for rows of `hidden_bytes`, about.

        They are those of 4096 tokens a rank, or of the hint (`ep_comm.deep_ep.hints`). What a
        `Buffer` really holds follows its calls.
        """
        check_positive("hidden_bytes", hidden_bytes)
        check_positive("num_ranks", num_ranks)
        tokens = Hints.from_environment().max_tokens_per_rank or _TOKENS
        return bytes_of_rows(tokens, hidden_bytes, num_ranks)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return 0: what a network needs is in `get_nvl_buffer_size_hint`, about."""
        check_positive("hidden_bytes", hidden_bytes)
        check_positive("num_ranks", num_ranks)
        return 0
