"""Captured routing: which experts the tokens of a training step selected, in files.

A capture is a folder with a folder for each step, and in that a file of each rank::

    step-00000512/rank-0000.routing
    step-00000512/rank-0001.routing

A file is there whole or not at all. So what a killed run leaves can be read: a step that not all
ranks have written is no step. All numbers are unsigned and little-endian::

    8 bytes            b"EPROUTE1"
    7 times 4 bytes    step, experts, experts of a token (K), hidden size, ranks, rank, layers
    2 times 4 bytes    of each layer: its number, its tokens (T)
    ceil(T K B / 8)    of each layer: T x K entries of B bits, token by token
    4 bytes            CRC-32 of all before

B is the bit length of the number of experts, so that there is one number more than experts: it
stands for "no expert", of a token that was dropped. The lowest bit of an entry comes first, and of
a byte too. The experts of a token ascend, and "no expert" comes last. Experts, K and ranks are
those of the dispatch: the shards of expert tensor parallelism count as experts.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ep_comm.job.exits import UserError
from ep_comm.job.files import write_bytes
from ep_comm.numeric import ceil_div

_MAGIC = b"EPROUTE1"
_HEADER = struct.Struct("<8s7I")
_LAYER = struct.Struct("<2I")
_CHECKSUM = struct.Struct("<I")
# Beyond what any dispatch has: a number above these is damage.
_MAX_EXPERTS, _MAX_RANKS, _MAX_LAYERS, _MAX_BYTES = 1 << 14, 1 << 14, 1 << 12, 1 << 30


class Sizes(NamedTuple):
    """What all files of a capture agree in.

    Attributes:
        num_experts: Over all ranks.
        num_topk: Experts of a token, at most.
        hidden: Elements of a token.
        num_ranks: Ranks that share the experts.
    """

    num_experts: int
    num_topk: int
    hidden: int
    num_ranks: int

    def __str__(self) -> str:
        return (
            f"top-{self.num_topk} of {self.num_experts} experts on {self.num_ranks} ranks, hidden "
            f"{self.hidden}"
        )


class RankFile(NamedTuple):
    """A file.

    Attributes:
        step: The training step, from 1.
        sizes: Of the run.
        rank: Among those that share the experts.
        topk_idx: Of each layer, by its number: int16 [T, K], ascending, -1 last where a token was
            dropped.
    """

    step: int
    sizes: Sizes
    rank: int
    topk_idx: Mapping[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class Capture:
    """One step of a capture, of all ranks.

    Attributes:
        folder: Of the step.
        step: Its number.
        sizes: Of the run.
        layers: Numbers of the captured layers, ascending.
        topk_idx: Of each of these, of each rank: as `RankFile` has it.
    """

    folder: Path
    step: int
    sizes: Sizes
    layers: tuple[int, ...]
    topk_idx: tuple[tuple[np.ndarray, ...], ...]

    @property
    def tokens(self) -> int:
        """The fewest tokens that a rank has of a layer."""
        return min(len(rows) for of_layer in self.topk_idx for rows in of_layer)

    @property
    def has_dropped(self) -> bool:
        """Whether an entry has no expert."""
        return any((rows < 0).any() for of_layer in self.topk_idx for rows in of_layer)


def write_step(folder: Path, global_rank: int, content: RankFile) -> None:
    """Write the file of one rank.

    Args:
        folder: Of the capture; made if need be.
        global_rank: Of this process: no other one has a file of that name.
        content: What it has.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / f"step-{content.step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    write_bytes(path / f"rank-{global_rank:04d}.routing", to_bytes(content))


def to_bytes(content: RankFile) -> bytes:
    """Return the bytes of a file."""
    sizes, layers = content.sizes, content.topk_idx
    parts = [
        _HEADER.pack(_MAGIC, content.step, *sizes, content.rank, len(layers)),
        *(_LAYER.pack(number, len(rows)) for number, rows in layers.items()),
        *(_pack(rows, sizes.num_experts) for rows in layers.values()),
    ]
    written = b"".join(parts)
    return written + _CHECKSUM.pack(zlib.crc32(written))


def of_map(routing_map: np.ndarray, num_topk: int) -> np.ndarray:
    """Return the experts of each token as `RankFile` has them.

    Args:
        routing_map: bool [T, E], with at most K true entries a row.
        num_topk: K.
    """
    tokens, experts = np.nonzero(routing_map)
    begins = np.searchsorted(tokens, np.arange(len(routing_map)))
    topk_idx = np.full((len(routing_map), num_topk), -1, dtype=np.int16)
    topk_idx[tokens, np.arange(len(tokens)) - begins[tokens]] = experts
    return topk_idx


def spread(length: int, count: int) -> list[int]:
    """Return `count` places of so many, spread evenly; all of them where there are as many."""
    return [round(place) for place in np.linspace(0, length - 1, count)]


def read(folder: Path) -> Capture:
    """Read the last whole step of a capture, or one step.

    Args:
        folder: Of a capture, or of one of its steps.

    Raises:
        UserError: There is none, or a file is damaged or belongs to another run.
    """
    if not folder.is_dir():
        raise UserError(f"the capture {folder} is no folder")
    steps = [folder] if _files(folder) else sorted(folder.glob("step-*"), reverse=True)
    for step in steps:
        capture = _read_step(step)
        if capture is not None:
            return capture
    found = f"none of its {len(steps)} steps has all ranks' files" if steps else "it has no step"
    raise UserError(
        f"the capture {folder}: {found}; a training run writes them with --ep-capture-routing"
    )


def read_file(path: Path) -> RankFile:
    """Read a file.

    Raises:
        UserError: It cannot be read, is none or is damaged.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _Damaged(f"has more than {_MAX_BYTES} bytes")
        return _parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _Damaged as error:
        raise UserError(f"{path} is damaged: it {error}") from None


class _Damaged(Exception):
    """What a file does that no whole one does."""


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*.routing"))


def _read_step(folder: Path) -> Capture | None:
    """Return a step; None where files of ranks are missing."""
    files = {path: read_file(path) for path in _files(folder)}
    if not files:
        return None
    first_path, first = next(iter(files.items()))
    found: dict[int, dict[int, np.ndarray]] = {}
    for path, content in files.items():
        if (content.sizes, content.step) != (first.sizes, first.step):
            raise UserError(
                f"{path} is not of the same run and step as {first_path.name}: step "
                f"{content.step}, {content.sizes}; and step {first.step}, {first.sizes}. A "
                "capture needs a folder of its own"
            )
        for layer, rows in content.topk_idx.items():
            of_layer = found.setdefault(layer, {})
            if content.rank in of_layer:
                raise UserError(
                    f"{path} has layer {layer} of rank {content.rank}, as another file there has: "
                    "a capture needs a folder of its own"
                )
            of_layer[content.rank] = rows
    ranks = range(first.sizes.num_ranks)
    if any(len(of_layer) < len(ranks) for of_layer in found.values()):
        return None
    layers = tuple(sorted(found))
    topk_idx = tuple(tuple(found[layer][rank] for rank in ranks) for layer in layers)
    return Capture(folder, first.step, first.sizes, layers, topk_idx)


def _parse(file: bytes) -> RankFile:
    """Read the bytes of a file; nothing is made room for before there are as many as it takes."""
    if file[: len(_MAGIC)] != _MAGIC:
        raise _Damaged("does not begin as a file of captured routing")
    _check_length(file, _HEADER.size)
    _, step, *numbers, rank, num_layers = _HEADER.unpack_from(file)
    sizes = Sizes(*numbers)
    _check_header(sizes, rank, num_layers)
    place = _HEADER.size + num_layers * _LAYER.size
    _check_length(file, place)
    layers = list(_LAYER.iter_unpack(file[_HEADER.size : place]))
    lengths = [_packed_bytes(tokens, sizes) for _, tokens in layers]
    end = place + sum(lengths)
    _check_length(file, end + _CHECKSUM.size)
    if len(file) > end + _CHECKSUM.size:
        raise _Damaged(f"has {len(file)} bytes and needs {end + _CHECKSUM.size}")
    if _CHECKSUM.unpack_from(file, end) != (zlib.crc32(file[:end]),):
        raise _Damaged("has another checksum than its content")
    topk_idx = {}
    for (number, tokens), length in zip(layers, lengths, strict=True):
        if number in topk_idx:
            raise _Damaged(f"has layer {number} twice")
        topk_idx[number] = _unpack(file[place : place + length], tokens, sizes)
        place += length
    return RankFile(step, sizes, rank, topk_idx)


def _check_header(sizes: Sizes, rank: int, num_layers: int) -> None:
    experts, topk, hidden, ranks = sizes
    is_possible = (
        1 <= ranks <= _MAX_RANKS
        and 1 <= experts <= _MAX_EXPERTS
        and experts % ranks == 0
        and 1 <= topk <= experts
        and hidden >= 1
        and rank < ranks
        and 1 <= num_layers <= _MAX_LAYERS
    )
    if not is_possible:
        raise _Damaged(f"cannot be: {sizes}; rank {rank}, {num_layers} layers")


def _check_length(file: bytes, needed: int) -> None:
    if len(file) < needed:
        raise _Damaged(f"is cut off: it has {len(file)} bytes and needs at least {needed}")


def _packed_bytes(tokens: int, sizes: Sizes) -> int:
    return ceil_div(tokens * sizes.num_topk * sizes.num_experts.bit_length(), 8)


def _pack(topk_idx: np.ndarray, num_experts: int) -> bytes:
    entries = np.where(topk_idx < 0, num_experts, topk_idx).astype(np.uint16).reshape(-1, 1)
    bits = (entries >> np.arange(num_experts.bit_length(), dtype=np.uint16)) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _unpack(packed: bytes, tokens: int, sizes: Sizes) -> np.ndarray:
    num_bits, shape = sizes.num_experts.bit_length(), (tokens, sizes.num_topk)
    flat = np.frombuffer(packed, dtype=np.uint8)
    bits = np.unpackbits(flat, count=tokens * sizes.num_topk * num_bits, bitorder="little")
    weights = np.left_shift(1, np.arange(num_bits)).astype(np.uint16)
    entries = (bits.reshape(-1, num_bits) @ weights).reshape(shape)
    is_expert = entries < sizes.num_experts
    ascends = (entries[:, 1:] > entries[:, :-1]) | ~is_expert[:, 1:]
    if (entries > sizes.num_experts).any() or not ascends.all():
        raise _Damaged("has experts that do not ascend, or that there are not")
    return np.where(is_expert, entries.astype(np.int32), -1).astype(np.int16)
