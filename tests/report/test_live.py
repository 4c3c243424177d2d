"""A run in a terminal: what is shown, that it goes on, and that it ends."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up_log import even_step, write_run
from rich.console import Console
from typer.testing import CliRunner

from ep_comm.cli.app import app
from ep_comm.report.live import view
from ep_comm.report.run import read


def shown(folder: Path, *, later_s: float = 0.0, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))
    run = read(folder)
    console.print(view(run, run.written.timestamp() + later_s))
    return console.export_text()


def test_the_view_has_last_steps_tails_and_findings(tmp_path):
    def change(record):
        if record["type"] == "train":
            record["ep/slowest-rank"] = 5 if record["iteration"] > 40 else -1
            record["ep/wait-share"] = 0.4

    text = shown(write_run(tmp_path / "run", 80, change, asked=200))
    assert "run: step 80 of 200, 0 min 36 s left" in text
    assert re.findall(r"^ +(\d+) ", text, re.M) == [str(step) for step in range(73, 81)]
    assert "dispatch" in text and "rank 5 was the one" in text
    assert "nothing new" not in text


def test_a_narrow_terminal_has_all_columns(tmp_path):
    text = shown(write_run(tmp_path / "run", 1200), width=80)
    assert "…" not in text and "tokens/s" in text and text.count("p99, ms") == 2


def test_a_run_that_stands_still_says_so(tmp_path):
    folder = write_run(tmp_path / "run", 20, asked=50)
    text = shown(folder, later_s=75)
    assert "nothing new for 1 min 15 s: no process that we see is at it" in text
    assert "nothing new" not in shown(write_run(folder, 20), later_s=75)  # it has finished


def test_scalars_that_are_not_on_record_have_no_column(tmp_path):
    def remove(record):
        for name in [name for name in record if name.startswith("ep/") or name == "mfu"]:
            del record[name]

    text = shown(write_run(tmp_path / "run", 9, remove))
    assert "tokens/s" in text and "p99" not in text and "MFU" not in text


def test_without_a_terminal_it_is_printed_once(tmp_path, capfd):
    result = CliRunner().invoke(app, ["watch", str(write_run(tmp_path / "run", 9, asked=99))])
    assert result.exit_code == 0 and "step 9 of 99" in result.output
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "is no folder" in capfd.readouterr().err + result.output


class Terminal:
    """`ep-comm watch` in a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ep_comm.cli", "watch", str(folder)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "50"},
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, words: str, *, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while words not in self.text:
            assert time.monotonic() < end, self.text
            self._read()

    def finish(self, *, timeout_s: float = 60) -> int:
        end = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < end, self.text
            self._read()
        return self.process.returncode

    def _read(self) -> None:
        if select.select([self._master], [], [], 0.2)[0]:
            try:
                self.text += os.read(self._master, 65536).decode(errors="replace")
            except OSError:
                pass  # the other side has closed it


def add_step(folder: Path, step: int) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(even_step(step, random.Random(step))) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["finished", "interrupted"])
def test_it_follows_a_run_and_leaves(tmp_path, ends):
    folder = tmp_path / "run"
    folder.mkdir()
    terminal = Terminal(folder)
    try:
        terminal.wait_for("waiting: ")
        write_run(folder, 7, asked=9)
        terminal.wait_for("step 7 of 9")
        add_step(folder, 8)
        terminal.wait_for("step 8 of 9")
        if ends == "finished":
            add_step(folder, 9)
            terminal.wait_for("finished")
        else:
            terminal.process.send_signal(signal.SIGINT)
        assert terminal.finish() == 0
        assert "Traceback" not in terminal.text and "\x1b[?25h" in terminal.text  # the cursor
    finally:
        terminal.process.kill()
