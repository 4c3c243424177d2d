"""Turn text into a Megatron ``.bin/.idx`` pair, with a BPE tokenizer trained on that text.

    python examples/prepare_text.py --input text.gz --vocab-size 16384 --output-prefix data/text

writes ``data/text.bin``, ``data/text.idx`` and ``data/text-tokenizer.json``, the tokenizer in the
format of the ``tokenizers`` library. ``pretrain_moe.py --data-path data/text`` reads all three.

A document begins with every line that is not indented and follows an empty one: a paragraph of
prose, or an entry of a dictionary whose other paragraphs are indented. Documents are stored in
random order, the same one each time, so that validation data, which is taken from the end, is a
sample of the whole text. The text is held in memory.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ep_comm.job.exits import UserError, user_errors_exit

warnings.filterwarnings("ignore", module="megatron")  # it misses packages that only training needs
from megatron.core.datasets.indexed_dataset import (  # noqa: E402
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from ep_comm.pretrain.data import TOKENIZER_SUFFIX, add_document, piece_size  # noqa: E402

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError:
    sys.exit("error: tokenizers is missing: pip install 'ep_comm[text]'")

END_OF_DOCUMENT = "<|endoftext|>"  # its token is the last of the vocabulary, as pretrain takes it
_NEW_DOCUMENT = re.compile(r"\n(?:[ \t]*\n)+(?=\S)")
_GZIP_MAGIC = b"\x1f\x8b"
_BYTES = 256
_HIGHEST_SHARE_REPLACED = 0.01  # of what is still taken for text
_CHARACTERS_OF_A_TOKEN = 4  # about
_BATCH = 1000  # documents that are tokenized at once


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description="Turn text into a Megatron .bin/.idx pair, with a BPE tokenizer trained on it."
    )
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="FILE",
        help="UTF-8 text, as it is or compressed by gzip or dictzip",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, default=16384,
        help="tokens of the vocabulary, with the end of a document (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output-prefix", type=Path, required=True, metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx and PREFIX-tokenizer.json",
    )  # fmt: skip
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with user_errors_exit():
            prepare(args.input, args.vocab_size, args.output_prefix)
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")


def prepare(files: list[Path], vocab_size: int, prefix: Path) -> None:
    """Write the pair and its tokenizer, all of them or none.

    Args:
        files: Text in UTF-8, or that compressed by gzip.
        vocab_size: Tokens of the vocabulary, of which the last ends a document.
        prefix: Path of the pair, without suffix. Its folder is made if need be.

    Raises:
        UserError: A file cannot be read, or is no text; there is too little text for such a
            vocabulary; or something is there already, or cannot be written.
    """
    if vocab_size <= _BYTES:
        raise UserError(
            f"--vocab-size {vocab_size} must be at least {_BYTES + 1}: every byte, and the end of "
            f"a document"
        )
    # In the order in which they are put in place: a pair is there when its index is.
    outputs = [f"{prefix}{TOKENIZER_SUFFIX}", get_bin_path(str(prefix)), get_idx_path(str(prefix))]
    for path in outputs:
        if Path(path).exists():
            raise UserError(f"{path} exists: choose another --output-prefix, or delete it")
    console = Console(stderr=True)
    text = "\n\n".join(_read(path, console) for path in files)
    documents = [part.strip("\n") for part in _NEW_DOCUMENT.split(text) if part.strip()]
    if not documents:
        raise UserError(f"--input {' '.join(map(str, files))}: there is no text in it")
    random.Random(0).shuffle(documents)
    console.print(f"{len(documents):,} documents; training the tokenizer", highlight=False)
    tokenizer = _train_tokenizer(documents, vocab_size)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{prefix.name}-", dir=prefix.parent) as folder:
            written = [os.path.join(folder, os.path.basename(path)) for path in outputs]
            _, data, index = written
            tokens = _write_pair(documents, tokenizer, data, index, console)
            # Not earlier: text that happens to spell it is to be tokenized as any other text.
            tokenizer.add_special_tokens([END_OF_DOCUMENT])
            tokenizer.save(written[0])
            for source, target in zip(written, outputs, strict=True):
                os.replace(source, target)
    except OSError as error:
        raise UserError(f"{prefix} cannot be written: {error.strerror}") from None
    size = sum(len(document.encode()) for document in documents)
    print(
        f"{prefix}: {tokens:,} tokens of {vocab_size:,} different ones, {len(documents):,} "
        f"documents, {size / tokens:.2f} bytes per token\n"
        f"to train on it: torchrun --nproc_per_node=N -m ep_comm.pretrain --config FILE "
        f"--data-path {shlex.quote(str(prefix))}"
    )


def _read(path: Path, console: Console) -> str:
    """Return the text of a file; a few bytes that are no UTF-8 are replaced."""
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--input {path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None
    text = data.decode("utf-8", errors="replace")
    replaced = text.count("\ufffd")
    if replaced > _HIGHEST_SHARE_REPLACED * len(text):
        raise UserError(f"--input {path} is no UTF-8 text")
    if replaced:
        console.print(f"{path}: {replaced} bytes that are no UTF-8 are replaced", highlight=False)
    return text.replace("\r\n", "\n")


def _train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a BPE over bytes: it knows every text. It lacks the token that ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The trainer takes memory for as many tokens as it is asked for, if there is text or not.
    highest = _BYTES + sum(len(document.encode()) for document in documents)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size - 1, highest),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    learnt = tokenizer.get_vocab_size() + 1
    if learnt != vocab_size:
        raise UserError(
            f"the text yields no more than {learnt} tokens: give more text, or --vocab-size "
            f"{learnt} at most, got {vocab_size}"
        )
    return tokenizer


def _write_pair(
    documents: list[str], tokenizer: Tokenizer, data: str, index: str, console: Console
) -> int:
    """Write both files; return the number of tokens."""
    end = tokenizer.get_vocab_size()
    dtype = DType.optimal_dtype(end + 1)
    builder = IndexedDatasetBuilder(data, dtype=dtype)
    total = 0
    about_tokens = sum(map(len, documents)) // _CHARACTERS_OF_A_TOKEN
    piece = piece_size(about_tokens, len(documents))
    for i in track(range(0, len(documents), _BATCH), "tokenizing", console=console):
        for encoding in tokenizer.encode_batch_fast(documents[i : i + _BATCH]):
            tokens = np.array([*encoding.ids, end], dtype=dtype)
            add_document(builder, tokens, piece)
            total += tokens.size
    builder.finalize(index)
    return total


if __name__ == "__main__":
    main()
