"""Text, or a tokenized corpus, as Megatron's GPTDataset.

Text is tokenized by byte: no vocabulary to download, any language, any file. The tokens are stored
once per set of files as a Megatron ``.bin/.idx`` pair in the user's cache folder. For longer tokens
there is ``examples/prepare_text.py``.

Megatron splits data between training and validation at the borders of sequences, here pieces of a
document (`piece_size`).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import struct
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetBuilder,
    _IndexReader,
    get_bin_path,
    get_idx_path,
)

from ep_comm.job.exits import UserError
from ep_comm.job.start import agree, on_rank_0
from ep_comm.pretrain.config import PretrainConfig

TOKENIZER_SUFFIX = "-tokenizer.json"  # of the file beside a pair
EOD = 256  # ends a document; the bytes are 0 to 255
CACHE_FORMAT = "2"  # part of the cache key: change it with the way that text is tokenized

_LARGEST_PIECE, _SMALLEST_PIECE = 1 << 16, 64
_FEWEST_PIECES = 200


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A Megatron ``.bin/.idx`` pair, and as much of its tokenizer as GPTDataset asks for.

    Attributes:
        prefix: Path of both files, without suffix.
        vocab_size: Number of different tokens.
        eod: Token that ends a document.
        cache: Folder for files derived from the corpus.
    """

    prefix: str
    vocab_size: int
    eod: int
    cache: Path

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """What GPTDataset keys its index files by."""
        return {"vocab_size": self.vocab_size, "eod": self.eod}


def load_datasets(config: PretrainConfig) -> tuple[Corpus, GPTDataset, GPTDataset | None]:
    """Return corpus, training data and (if it is on) validation data; call it on all ranks.

    Raises:
        UserError: The data cannot be read, is damaged, or is not enough for one sequence.
    """
    corpus, split = on_rank_0(lambda: _checked_corpus(config))
    agree(lambda: _check_visible(corpus))
    # One epoch of shuffled indices takes no time to build, and an interrupted build would leave
    # index files that the next run trusts: make them anew for each run.
    indices = on_rank_0(lambda: tempfile.mkdtemp(prefix="indices-", dir=corpus.cache))
    dataset_config = GPTDatasetConfig(
        random_seed=config.data_seed or config.seed,
        sequence_length=config.seq_length,
        blend=([corpus.prefix], None),
        split=split,
        tokenizer=corpus,
        path_to_cache=indices,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # causal attention needs none
    )
    # No sizes: one epoch, in an order that does not depend on the number of steps. A run that is
    # continued for longer than planned reads on where it would have anyway.
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [None, None, None], lambda: True, dataset_config
    )
    train, valid, _ = builder.build()
    for dataset in filter(None, (train, valid)):
        # Read, not mapped: over NFS other machines would lose the files below with their pages.
        for name in ("document_index", "sample_index", "shuffle_index"):
            setattr(dataset, name, np.array(getattr(dataset, name)))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(indices)
    return corpus, train, valid if config.eval_iters else None


def microbatches(
    dataset: GPTDataset, *, config: PretrainConfig, first_sample: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's microbatches without end, from `first_sample` of the global order on.

    A microbatch takes the next ``micro_batch_size * ranks`` samples, and rank r the r-th part of
    them. After the last sample the first one follows.
    """
    ranks, rank, size = dist.get_world_size(), dist.get_rank(), config.micro_batch_size
    position = first_sample + rank * size
    while True:
        samples = [dataset[(position + i) % len(dataset)] for i in range(size)]
        batch = torch.utils.data.default_collate(samples)
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        position += ranks * size


def piece_size(num_tokens: int, num_documents: int) -> int:
    """Return how many tokens of a document form a sequence, in a pair of `num_tokens`.

    Few small documents have small pieces: there are always enough to split them.
    """
    if num_documents >= _FEWEST_PIECES:
        return _LARGEST_PIECE
    return min(max(num_tokens // _FEWEST_PIECES, _SMALLEST_PIECE), _LARGEST_PIECE)


def add_document(builder: IndexedDatasetBuilder, tokens: np.ndarray, piece: int) -> None:
    """Add a document, with the token that ends it, to a pair that is being written.

    Args:
        builder: Writes the pair.
        tokens: All of the document.
        piece: Tokens of a sequence (`piece_size`).
    """
    full, rest = divmod(tokens.size, piece)
    builder.add_document(tokens, [piece] * full + [rest] * bool(rest))


def _checked_corpus(config: PretrainConfig) -> tuple[Corpus, str]:
    """Return the corpus, and how Megatron is to split it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = config.data_cache_path or home / "ep_comm"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        corpus = _corpus(config, cache)
        lengths, token_size = _read_index(corpus.prefix)
        split = _split(lengths, config)
        _check_tokens(corpus, token_size)
    except OSError as error:
        path = Path(error.filename or cache)  # a full disk has no name
        text = f"{path}: {error.strerror}"
        if path.is_relative_to(cache) or cache.is_relative_to(path):
            text += f"; the data cache is {cache}, --data-cache-path chooses another"
        raise UserError(text) from None
    return corpus, split


def _corpus(config: PretrainConfig, cache: Path) -> Corpus:
    if not config.data_path:
        return _tokenized(_standard_library(), cache)
    prefix = config.data_path[0].removesuffix(".bin").removesuffix(".idx")
    if Path(get_idx_path(prefix)).exists() or Path(get_bin_path(prefix)).exists():
        return _megatron_pair(prefix, config, cache)
    return _tokenized(_text_files(config.data_path), cache)


def _standard_library() -> list[Path]:
    found = []
    for folder, below, names in os.walk(sysconfig.get_path("stdlib")):
        below[:] = [name for name in below if name != "site-packages"]  # may have many files
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [path for path in paths if path.is_file()]
    return sorted(found)


def _text_files(data_path: list[str]) -> list[Path]:
    """Return the files that the user named, in an order that does not depend on the machine."""
    files: list[Path] = []
    for name in data_path:
        if Path(name).is_dir():
            found = [path for path in Path(name).rglob("*") if path.is_file()]
        else:
            found = [path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file()]
            empty = [path for path in found if path.stat().st_size == 0]
            if empty:
                raise UserError(f"data file {empty[0]} is empty")
        if not found:
            raise UserError(
                f"--data-path {name}: no such file; give text files, folders or globs, or the "
                f"prefix of a Megatron .bin/.idx pair"
            )
        files += sorted(found)
    return files


def _tokenized(files: list[Path], cache: Path) -> Corpus:
    """Tokenize `files` into `cache`, unless that was done before."""
    key = hashlib.sha256(CACHE_FORMAT.encode())
    for path in files:
        stat = path.stat()
        key.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    folder = cache / key.hexdigest()[:16]
    if not folder.exists():
        # Written aside and renamed, so that a folder with this name is always complete.
        with tempfile.TemporaryDirectory(prefix="tokenize-", dir=cache) as temporary:
            _tokenize(files, Path(temporary, folder.name))
            try:
                Path(temporary, folder.name).rename(folder)
            except OSError:
                if not folder.exists():  # else another run was faster, with the same result
                    raise
    return Corpus(prefix=str(folder / "corpus"), vocab_size=EOD + 1, eod=EOD, cache=cache)


def _tokenize(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    prefix = str(folder / "corpus")
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=np.uint16)
    piece = piece_size(sum(path.stat().st_size for path in files), len(files))
    for path in files:
        tokens = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.uint16)
        if tokens.size:
            add_document(builder, np.append(tokens, np.uint16(EOD)), piece)
    builder.finalize(get_idx_path(prefix))


def _megatron_pair(prefix: str, config: PretrainConfig, cache: Path) -> Corpus:
    if len(config.data_path) > 1:
        raise UserError(
            f"--data-path {config.data_path[0]} is a Megatron .bin/.idx pair: give one pair only"
        )
    for path in (get_bin_path(prefix), get_idx_path(prefix)):
        if not Path(path).is_file() or not Path(path).stat().st_size:
            raise UserError(f"data file {path} is missing or empty; .bin and .idx belong together")
    size = config.vocab_size or _tokenizer_size(Path(f"{prefix}{TOKENIZER_SUFFIX}"))
    if size is None:
        raise UserError(
            f"--data-path {prefix} is tokenized, and there is no {prefix}{TOKENIZER_SUFFIX} beside "
            f"it: give its tokenizer's --vocab-size"
        )
    return Corpus(prefix=prefix, vocab_size=size, eod=size - 1, cache=cache)


def _tokenizer_size(path: Path) -> int | None:
    """Return the size of a tokenizer of the ``tokenizers`` library; None if there is no file."""
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        added = [token["id"] for token in tokenizer.get("added_tokens", [])]
        return max([*tokenizer["model"]["vocab"].values(), *added]) + 1
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no tokenizer: give --vocab-size, or move it away") from None


def _split(lengths: np.ndarray, config: PretrainConfig) -> str:
    """Return shares of training and validation, each enough for a sequence.

    Where the shares nobody asked for leave too little for validation, it gets as many of the last
    pieces as one sequence takes.

    Raises:
        UserError: There is too little text, or the user's shares leave too little.
    """
    split, needed = config.split, config.seq_length + 1
    shares = [float(share) for share in split.split(",")]
    boundary = round(shares[0] / sum(shares) * len(lengths)) if sum(shares) else 0
    is_default = split == PretrainConfig.model_fields["split"].default
    if config.eval_iters and is_default and lengths[boundary:].sum() < needed <= lengths.sum():
        from_the_end = np.cumsum(lengths[::-1])
        boundary = len(lengths) - int(np.searchsorted(from_the_end, needed)) - 1
        split = f"{boundary},{len(lengths) - boundary}"
    parts = {"training": lengths[:boundary]}
    if config.eval_iters:
        parts["validation"] = lengths[boundary:]
    for use, part in parts.items():
        if part.sum() < needed:
            raise UserError(
                f"{len(part)} of {len(lengths)} pieces of the data, {part.sum()} of "
                f"{lengths.sum()} tokens, are for {use} (--split {split}), but one sequence "
                f"takes seq_length + 1 = {needed} tokens: give more data, a smaller --seq-length"
                + (", a larger second share, or --eval-iters 0" if use == "validation" else "")
            )
    return split


def _check_tokens(corpus: Corpus, token_size: int) -> None:
    """Refuse tokens that the model does not know, before the ranks part ways."""
    highest = _highest_token(corpus, token_size)
    if highest >= corpus.vocab_size:
        raise UserError(
            f"{get_bin_path(corpus.prefix)} holds token {highest}: "
            f"--vocab-size {corpus.vocab_size} is too small"
        )


def _highest_token(corpus: Corpus, token_size: int) -> int:
    """Return the highest token of a pair.

    It is kept in the cache: a run that goes on does not read all of a file again that is as it was.
    """
    path = Path(get_bin_path(corpus.prefix))
    stat = path.stat()
    file = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{token_size}"
    kept = corpus.cache / f"highest-{hashlib.sha256(file.encode()).hexdigest()[:16]}.txt"
    try:
        return int(kept.read_text())
    except (FileNotFoundError, ValueError):
        pass  # not read before, or cut off
    # Read as unsigned, a negative token is a very high one: one pass finds both kinds of mistake.
    highest = int(np.memmap(path, dtype=f"u{token_size}", mode="r").max())
    kept.write_text(f"{highest}\n")
    return highest


def _read_index(prefix: str) -> tuple[np.ndarray, int]:
    """Return the lengths of a pair's sequences, and bytes of a token, if both files are whole."""
    index_file, data_file = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
    try:
        # Not IndexedDataset: when that cannot be built, its __del__ prints a stack trace.
        index = _IndexReader(str(index_file), multimodal=False)
        lengths = index.sequence_lengths.copy()  # the index unmaps its memory when it goes
        sequences, token_size = index.document_indices[-1], np.dtype(index.dtype).itemsize
    except (AssertionError, IndexError, OverflowError, ValueError, struct.error) as error:
        raise UserError(f"{index_file} is no Megatron index file, or damaged: {error}") from None
    if sequences != len(lengths):
        raise UserError(
            f"{index_file} is damaged: {len(lengths)} sequences, documents of {sequences}"
        )
    expected, size = int(lengths.sum()) * token_size, data_file.stat().st_size
    if size != expected:
        raise UserError(
            f"{data_file} has {size} bytes, but {index_file} tells of {expected}: one of them "
            f"is incomplete, or they do not belong together"
        )
    return lengths, token_size


def _check_visible(corpus: Corpus) -> None:
    if not Path(get_idx_path(corpus.prefix)).exists():
        raise UserError(
            f"rank {dist.get_rank()} cannot see {corpus.prefix}: "
            f"--data-cache-path must be a folder that all nodes share"
        )
