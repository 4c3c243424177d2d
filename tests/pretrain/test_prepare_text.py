"""``examples/prepare_text.py``: text becomes a pair that the training example reads."""

from __future__ import annotations

import contextlib
import gzip
import io
import signal
import subprocess
import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")
tokenizers = pytest.importorskip("tokenizers")

from example_runs import EXAMPLES, SMALL, environment, train  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402
from ranks import run_ranks, stop_pool  # noqa: E402

VOCAB_SIZE = 400
# Two entries, the first of two paragraphs, and what the separators and the tokenizer may trip on.
ENTRIES = [
    'Abjure \\Ab*jure"\\, v. t.\n   1. To renounce upon oath.\n\n   2. To reject; as, to abjure.',
    "naïve <|endoftext|> \U0001f600\nsecond line",
]
COMMAND = [sys.executable, str(EXAMPLES / "prepare_text.py")]


def prepare(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, "--vocab-size", str(VOCAB_SIZE), *map(str, flags)],
        capture_output=True,
        text=True,
        env=environment(),
    )


def stdlib_text() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((folder / name).read_text() for name in ("argparse.py", "ast.py"))


def test_documents_come_back(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.gz"
    first.write_text(stdlib_text(), encoding="utf-8")
    second.write_bytes(gzip.compress("\n \n\n".join(ENTRIES).encode() + b"\n"))
    prefix = tmp_path / "made" / "text"
    result = prepare("--input", first, second, "--output-prefix", prefix)
    assert result.returncode == 0, result.stderr
    assert "warn" not in result.stderr.lower()

    tokenizer = tokenizers.Tokenizer.from_file(f"{prefix}-tokenizer.json")
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end == VOCAB_SIZE - 1
    pair = IndexedDataset(str(prefix))
    assert pair[0].dtype == np.uint16
    documents = [  # of one or more sequences each: there are few of them
        np.concatenate(pair[first:behind]) for first, behind in pairwise(pair.document_indices)
    ]
    assert len(pair) > len(documents)
    assert all((tokens == end).tolist().index(True) == tokens.size - 1 for tokens in documents)
    texts = [tokenizer.decode(tokens[:-1], skip_special_tokens=False) for tokens in documents]
    assert set(texts) >= set(ENTRIES)
    words = f"{stdlib_text()} {' '.join(ENTRIES)}".split()
    assert sorted("\n".join(texts).split()) == sorted(words)
    assert texts[-2:] != ENTRIES  # they are stored in another order
    tokens = sum(document.size for document in documents)
    size = sum(len(text.encode()) for text in texts)
    assert f"{tokens:,} tokens of {VOCAB_SIZE} different ones, {len(texts):,} doc" in result.stdout
    assert f"{size / tokens:.2f} bytes per token" in result.stdout
    assert result.stdout.endswith(f"-m ep_comm.pretrain --config FILE --data-path {prefix}\n")
    assert {path.name for path in prefix.parent.iterdir()} == {
        *("text.bin", "text.idx", "text-tokenizer.json")
    }

    loss = train(
        tmp_path / "run",
        *(*SMALL, "--train-iters", 30, "--lr-decay-iters", 100, "--eval-iters", 1),
        *("--data-path", prefix),  # its vocabulary is beside it
    )
    assert loss[30] < loss[1] - 0.3


def refusal(*flags: object) -> str:
    """The line with which the program ends; one process sees all refusals in turn."""
    (answer,) = run_ranks(1, end_of_main, [str(flag) for flag in flags], pool="prepare-text")
    code, stderr = answer
    assert code == 2 and "Traceback" not in stderr, stderr
    error = stderr.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def end_of_main(rank: int, flags: list[str]) -> tuple[object, str]:
    """Exit code and stderr."""
    import prepare_text

    with (
        mock.patch.object(sys, "argv", [prepare_text.__file__, *flags]),
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        pytest.raises(SystemExit) as exit,
    ):
        prepare_text.main()
    return exit.value.code, stderr.getvalue()


@pytest.fixture(scope="module", autouse=True)
def processes():
    yield
    stop_pool("prepare-text")


@pytest.mark.parametrize(
    ("content", "vocab_size", "words"),
    [
        (None, VOCAB_SIZE, ["text cannot be read: No such file"]),
        (b" \n\n", VOCAB_SIZE, ["no text in it"]),
        (b"\xff\xfe" * 50, VOCAB_SIZE, ["no UTF-8 text"]),
        (gzip.compress(bytes(1000))[:-9], VOCAB_SIZE, ["is damaged"]),
        (b"a rose is a rose is a rose", VOCAB_SIZE, ["more text, or --vocab-size", "got 400"]),
        (b"a rose", 10**14, ["more text, or --vocab-size", "got 100000000000000"]),
        (b"a rose", 256, ["--vocab-size 256", "at least 257"]),
    ],
    ids=["missing", "empty", "binary", "truncated", "too little", "huge vocabulary", "small one"],
)
def test_refusals(tmp_path, content, vocab_size, words):
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    prefix = tmp_path / "out" / "pair"
    error = refusal("--vocab-size", vocab_size, "--input", text, "--output-prefix", prefix)
    for word in words:
        assert word in error
    assert not prefix.parent.exists()


def test_an_existing_pair_is_not_overwritten(tmp_path):
    text, index = tmp_path / "text", tmp_path / "pair.idx"
    text.write_text(stdlib_text())
    index.write_bytes(b"precious")
    flags = ["--vocab-size", VOCAB_SIZE, "--input", text, "--output-prefix", tmp_path / "pair"]
    assert f"{index} exists" in refusal(*flags)
    assert index.read_bytes() == b"precious" and not (tmp_path / "pair.bin").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path, signum):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("\n\n".join([stdlib_text()] * 60))
    process = subprocess.Popen(
        [*COMMAND, "--vocab-size", "400", "--input", text, "--output-prefix", out / "pair"],
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(out.glob(".pair-*/*.bin")):  # it is writing
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert stderr.endswith("error: interrupted; nothing was written\n")
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []
