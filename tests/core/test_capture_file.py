"""Files of captured routing: what is written is read, and whatever is damaged is named."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_comm.job.exits import UserError
from ep_comm.routing.capture import RankFile, Sizes, of_map, read, read_file, to_bytes, write_step

SHIPPED = Path(__file__).parents[1] / "data" / "routing-capture"
SIZES = Sizes(num_experts=6, num_topk=3, hidden=32, num_ranks=2)


def rows_of(sizes: Sizes, tokens: int, seed: int, dropped: float = 0.3) -> np.ndarray:
    """Experts of tokens, ascending; some have fewer, -1 last."""
    chance = np.random.default_rng(seed)
    rows = np.full((tokens, sizes.num_topk), -1, dtype=np.int16)
    for row in rows:
        chosen = chance.choice(sizes.num_experts, sizes.num_topk, replace=False)
        kept = np.sort(chosen[chance.random(sizes.num_topk) >= dropped])
        row[: len(kept)] = kept
    return rows


def content(rank: int = 0, step: int = 8, sizes: Sizes = SIZES, layers=(2, 5)) -> RankFile:
    rows = {layer: rows_of(sizes, 9 + rank, 10 * rank + layer) for layer in layers}
    return RankFile(step, sizes, rank, rows)


def assert_same(found: RankFile, written: RankFile) -> None:
    assert found[:3] == written[:3] and list(found.topk_idx) == list(written.topk_idx)
    for layer, rows in written.topk_idx.items():
        assert found.topk_idx[layer].dtype == np.int16
        np.testing.assert_array_equal(found.topk_idx[layer], rows)


def write(folder: Path, written: RankFile) -> Path:
    write_step(folder, written.rank, written)
    return folder / f"step-{written.step:08d}" / f"rank-{written.rank:04d}.routing"


@given(
    experts_of_rank=st.integers(1, 40),
    num_ranks=st.sampled_from([1, 2, 8]),
    topk=st.integers(1, 8),
    tokens=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, experts_of_rank, num_ranks, topk, tokens, seed):
    experts = experts_of_rank * num_ranks
    sizes = Sizes(experts, min(topk, experts), 128, num_ranks)
    rows = {3: rows_of(sizes, tokens, seed), 1: rows_of(sizes, tokens // 2, seed + 1)}
    written = RankFile(7, sizes, num_ranks - 1, rows)
    path = write(tmp_path_factory.mktemp("capture"), written)
    assert_same(read_file(path), written)


def test_a_routing_map_gives_its_experts():
    rows = rows_of(SIZES, 50, seed=1)
    routing_map = np.zeros((50, SIZES.num_experts), dtype=bool)
    for token, of_token in enumerate(rows):
        routing_map[token, of_token[of_token >= 0]] = True
    np.testing.assert_array_equal(of_map(routing_map, SIZES.num_topk), rows)
    assert of_map(routing_map[:0], SIZES.num_topk).shape == (0, SIZES.num_topk)


@pytest.mark.parametrize(("experts", "topk", "most"), [(8, 2, 0.6), (256, 8, 1.2), (4096, 8, 1.7)])
def test_an_entry_takes_less_than_two_bytes(experts, topk, most):
    sizes = Sizes(experts, topk, 7168, 8)
    rows = {layer: rows_of(sizes, 500, layer) for layer in range(4)}
    num_bytes = len(to_bytes(RankFile(1, sizes, 0, rows)))
    assert num_bytes / (4 * 500 * topk) < most


def test_the_shipped_capture_is_real_and_small():
    capture = read(SHIPPED)
    assert capture.step == 64 and capture.sizes == Sizes(8, 2, 128, 2)
    assert capture.layers == (1, 2) and capture.tokens == 1024 and not capture.has_dropped
    for of_layer in capture.topk_idx:
        counts = np.bincount(np.concatenate(of_layer).ravel(), minlength=8)
        assert counts.sum() == 2 * 1024 * 2
        assert counts.max() > 1.4 * counts.mean()  # no uniform one is
    files = list(SHIPPED.glob("step-*/rank-*.routing"))
    entries = len(files) * 2 * 1024 * 2
    assert sum(path.stat().st_size for path in files) / entries < 2


def test_the_last_step_of_all_ranks_counts(tmp_path):
    for step in (1, 2, 4):
        for rank in range(2):
            write(tmp_path, content(rank, step))
    assert read(tmp_path).step == 4
    assert read(tmp_path / "step-00000002").step == 2
    path = tmp_path / "step-00000004" / "rank-0001.routing"
    path.rename(path.with_suffix(".routing.tmp"))  # the run was killed while it was written
    capture = read(tmp_path)
    assert (capture.step, capture.folder) == (2, tmp_path / "step-00000002")
    assert capture.layers == (2, 5) and capture.tokens == 9 and capture.has_dropped
    for place, layer in enumerate(capture.layers):
        for rank in range(2):
            written = content(rank, 2).topk_idx[layer]
            np.testing.assert_array_equal(capture.topk_idx[place][rank], written)


def test_pipeline_stages_are_one_capture(tmp_path):
    for global_rank in range(4):
        layers = (1,) if global_rank < 2 else (2,)
        write_step(tmp_path, global_rank, content(global_rank % 2, layers=layers))
    assert read(tmp_path).layers == (1, 2)


def test_a_cut_off_file_is_named_wherever_it_is_cut(tmp_path):
    path = write(tmp_path, content())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{path} is damaged: it (is cut off|does not begin)"):
            read(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="has [0-9]+ bytes and needs"):
        read(tmp_path)


def test_any_other_byte_is_noticed(tmp_path):
    path = write(tmp_path, content())
    whole = path.read_bytes()
    for place in range(len(whole)):
        other = bytearray(whole)
        other[place] ^= 0x41
        path.write_bytes(other)
        with pytest.raises(UserError, match=f"{path} is damaged"):
            read_file(path)


def forged(written: bytes, at: int, value: int) -> bytes:
    """A file with another number at a place, and the checksum that goes with it."""
    forged = bytearray(written[:-4])
    struct.pack_into("<I", forged, at, value)
    return bytes(forged) + struct.pack("<I", zlib.crc32(forged))


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (12, 0, "cannot be"),  # experts
        (12, 7, "cannot be"),  # no multiple of the ranks
        (12, 2**32 - 2, "cannot be"),
        (16, 0, "cannot be"),  # K
        (16, 7, "cannot be"),
        (20, 0, "cannot be"),  # hidden
        (24, 0, "cannot be"),  # ranks
        (28, 2, "cannot be"),  # rank
        (32, 0, "cannot be"),  # layers
        (32, 2**32 - 1, "cannot be"),
        (40, 2**32 - 1, "is cut off"),  # tokens of the first layer
        (44, 2, "has layer 2 twice"),
        (52, 0, "has experts that do not ascend"),  # entries: all the first expert
        (52, 2**32 - 1, "has experts that do not ascend, or that there are not"),
    ],
)
def test_what_cannot_be_is_refused_though_the_checksum_is_right(tmp_path, at, value, words):
    path = write(tmp_path, content())
    path.write_bytes(forged(path.read_bytes(), at, value))
    with pytest.raises(UserError, match=f"is damaged: it {words}"):
        read_file(path)


def test_files_of_two_runs_are_told_apart(tmp_path):
    write(tmp_path, content(0))
    path = write(tmp_path, content(1, sizes=SIZES._replace(num_experts=8)))
    with pytest.raises(UserError, match="needs a folder of its own") as caught:
        read(tmp_path)
    assert str(path) in str(caught.value) and "top-3 of 8 experts" in str(caught.value)
    other = tmp_path / "other"
    write_step(other, 0, content(0))
    write_step(other, 1, content(0))
    with pytest.raises(UserError, match="layer 2 of rank 0, as another file there has"):
        read(other)


def test_where_there_is_nothing_it_is_said(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it has no step; a training run writes them with --ep-cap"):
        read(tmp_path)
    write(tmp_path, content(0))
    with pytest.raises(UserError, match="none of its 1 steps has all ranks' files"):
        read(tmp_path)


def test_a_capture_is_not_pickled(tmp_path):
    """A file that a pickle would run is no more than a damaged one."""
    shutil.copytree(SHIPPED / "step-00000001", tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / "rank-0000.routing").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="does not begin as a file of captured routing"):
        read(tmp_path)
