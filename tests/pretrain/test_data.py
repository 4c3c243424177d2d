"""What is read of a tokenized corpus before training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("megatron.core")

from ep_comm.job.exits import UserError
from ep_comm.pretrain import data


def corpus_of(folder: Path, vocab_size: int) -> data.Corpus:
    return data.Corpus(
        prefix=str(folder / "pair"), vocab_size=vocab_size, eod=vocab_size - 1, cache=folder
    )


def test_tokens_are_read_once(tmp_path, monkeypatch):
    """A run that goes on finds the highest token of the same file in the cache."""
    path = tmp_path / "pair.bin"
    np.array([3, 301, 7], np.uint16).tofile(path)
    reads = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **how: reads.append(1) or memmap(*a, **how))
    for vocab_size in (302, 302, 400):
        data._check_tokens(corpus_of(tmp_path, vocab_size), 2)
    assert len(reads) == 1
    for _ in range(2):
        with pytest.raises(UserError, match="pair.bin holds token 301: --vocab-size 301 is too"):
            data._check_tokens(corpus_of(tmp_path, 301), 2)
    assert len(reads) == 1

    # Other tokens in a file of the same size.
    np.array([3, 302, 7], np.uint16).tofile(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))
    with pytest.raises(UserError, match="holds token 302"):
        data._check_tokens(corpus_of(tmp_path, 302), 2)
    assert len(reads) == 2

    # What a full disk has left of the cache counts for nothing.
    for kept in tmp_path.glob("highest-*.txt"):
        kept.write_text("")
    data._check_tokens(corpus_of(tmp_path, 303), 2)
    assert len(reads) == 3
