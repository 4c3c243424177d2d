"""Where things stand in the symmetric memory of a buffer. Nothing here needs a GPU."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from ep_comm import Buffer
from ep_comm._native import header
from ep_comm.errors import EPArgumentError

# For (max_tokens, row_bytes, num_topk, num_ranks): the fields of ep_buffer_offsets in their order,
# without the first five, as they were when Python computed them.
KNOWN = {
    (1, 16, 1, 1): (1280, 1536, 1792, 2048, 2304, 2304, 2304, 2560, 1),
    (8, 16, 2, 2): (1280, 1536, 1792, 2048, 2304, 3328, 3584, 3840, 2),
    (3, 96, 3, 3): (1280, 1536, 1792, 2048, 2304, 3072, 3840, 4096, 1),
    (129, 256, 5, 7): (1536, 3584, 4608, 22784, 40960, 338176, 536320, 536576, 33),
    (65, 1040, 32, 5): (1536, 2304, 2816, 44544, 86272, 419072, 689664, 690944, 17),
    (5, 2048, 9, 6): (1536, 1792, 2048, 3328, 4608, 59136, 110336, 112384, 2),
    (16384, 5760, 4, 1): (1280, 34048, 50432, 312576, 574720, 574720, 574720, 580608, 4096),
    (1000, 92000, 4, 2): (1280, 5376, 7424, 39424, 71424, 92103424, 184103424, 184195584, 250),
    (8192, 4096, 8, 4): (
        *(1280, 66816, 99584, 1148160, 2196736, 106005760, 206669056, 206673152, 2048),
    ),
    (4096, 16384, 6, 4): (
        *(1280, 34048, 50432, 443648, 836864, 203736320, 405062912, 405079296, 1024),
    ),
    (4096, 14336, 8, 8): (
        *(1536, 67072, 99840, 1148416, 2196992, 416908800, 827950592, 827964928, 1024),
    ),
    (100000, 14336, 8, 8): (
        *(1536, 1601536, 2401536, 28001536, 53601536),
        *(10178401536, 20213601536, 20213615872, 25000),
    ),
}


def fields(offsets: header.BufferOffsets) -> dict[str, int]:
    return {name: getattr(offsets, name) for name, _ in offsets._fields_}


@pytest.mark.parametrize("sizes", KNOWN, ids=str)
def test_offsets_are_what_they_were(library, sizes):
    found = fields(library.buffer_offsets(header.BufferLayoutArgs(*sizes)))
    later = ("low_latency", "copy_", "plan_token_bits")
    no_room = [found.pop(name) for name in list(found) if name.startswith(later)]
    del found["region_bytes"]
    assert tuple(found.values()) == (0, 256, 512, 768, 1024, *KNOWN[sizes])
    assert set(no_room) == {found["total"]}  # none was asked for


def bytes_of_parts(
    tokens: int, row_bytes: int, topk: int, ranks: int, room: int, hidden: int, copies: int = 0
) -> dict[str, int]:
    """What ep_comm.h says of every part, in the order in which they stand there."""
    weight_words = -(-topk // 3)
    tokens_of_halves = 2 * ranks * room
    chunks = -(-tokens // header.EP_MIN_CHUNK_TOKENS)
    slot_bytes = -(-(row_bytes + 4 * (topk + -topk % 4)) // 128) * 128
    return {
        "farewells": 4 * ranks,
        "plan_flags": 4 * ranks,
        "dispatch_credits": 4 * ranks,
        "combine_credits": 4 * ranks,
        "plan_headers": 4 * ranks * 16,
        "dispatch_flags": 8 * ranks * chunks,
        "combine_flags": 4 * ranks * chunks,
        "plan_idx": 4 * ranks * tokens * topk,
        "combine_weights": 4 * ranks * tokens * topk,
        "dispatch_slots": (ranks - 1) * tokens * slot_bytes,
        "combine_rows": (ranks - 1) * tokens * row_bytes,
        "zeros": row_bytes,
        "plan_token_bits": 8 * copies * ranks * -(-tokens // 32),
        "copy_flags": 16 * copies * ranks * header.EP_COPY_FLAGS,
        "copy_marks": 8 * copies * ranks,
        "low_latency_credits": 16 * ranks if room else 0,
        "low_latency_headers": 64 * ranks if room else 0,
        "low_latency_entries": 16 * tokens_of_halves * (-(-topk // 8) + weight_words),
        "low_latency_weights": 16 * tokens_of_halves * weight_words,
        "low_latency_dispatch": 2 * hidden * tokens_of_halves,
        "low_latency_combine": 2 * hidden * tokens_of_halves,
    }


def test_low_latency_size_hint_is_enough():
    for ranks, room, topk, hidden in product(
        range(1, header.EP_MAX_PEERS + 1), (1, 128), (1, 8, header.EP_MAX_TOPK), (8, 2048, 7168)
    ):
        parts = bytes_of_parts(1, 16, topk, ranks, room, hidden)
        rounded = [-(-size // 256) * 256 for name, size in parts.items() if "low_latency" in name]
        hint = Buffer.get_low_latency_size_hint(room, hidden, ranks, 64 * ranks)
        assert len(rounded) == 6 and sum(rounded) <= hint
        if hidden > 8:
            assert hint < 1.4 * sum(rounded) + 4096


@pytest.mark.parametrize("ranks", range(1, header.EP_MAX_PEERS + 1))
def test_parts_are_apart_aligned_and_inside(library, ranks):
    for tokens, row_bytes, topk, low_latency, copies in product(
        (1, 4, 130, 5000), (16, 2064, 14336), (1, 8, 32), ((0, 64), (1, 8), (128, 7168)), (0, 1)
    ):
        sizes = (tokens, row_bytes, topk, ranks, *low_latency, copies)
        found = fields(library.buffer_offsets(header.BufferLayoutArgs(*sizes)))
        total, chunks = found.pop("total"), found.pop("max_chunks")
        parts = bytes_of_parts(*sizes)
        assert (ranks - 1) * found.pop("region_bytes") == parts["dispatch_slots"]
        assert list(found) == list(parts)
        ends = [found[name] + num_bytes for name, num_bytes in parts.items()]
        starts = [*found.values(), total]
        assert starts[0] == 0 and all(start % 256 == 0 for start in starts)
        for end, (start, following) in zip(ends, pairwise(starts), strict=True):
            assert start <= end <= following < end + 256  # no overlap, and no gap for nothing
        assert (chunks - 1) * header.EP_MIN_CHUNK_TOKENS < tokens
        assert chunks * header.EP_MIN_CHUNK_TOKENS >= tokens


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 16, 1, 1), r"max_tokens = 0 is not in \[1, 2147483647\]"),
        ((2**31, 16, 1, 1), "max_tokens = 2147483648 is not"),
        ((1, 0, 1, 1), r"row_bytes = 0 is not in \[16, 2147483647\] and a multiple of 16"),
        ((1, 24, 1, 1), "row_bytes = 24 is not"),
        ((1, 16, 33, 1), r"num_topk = 33 is not in \[1, 32\]"),
        ((1, 16, 1, 0), r"num_ranks = 0 is not in \[1, 8\]"),
        ((1, 16, 1, 9), "num_ranks = 9 is not"),
        ((1, 16, 1, 1, 4097, 8), r"low_latency_tokens = 4097 is not in \[0, 4096\]"),
    ],
)
def test_sizes_out_of_bounds_are_refused(library, sizes, message):
    with pytest.raises(EPArgumentError, match=message):
        library.buffer_offsets(header.BufferLayoutArgs(*sizes))
