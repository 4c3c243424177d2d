"""Which file a --config means."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from example_runs import CONFIGS  # noqa: E402

from ep_comm.job.exits import UserError  # noqa: E402
from ep_comm.pretrain.config_files import find_config, read_config  # noqa: E402


@pytest.mark.parametrize("name", ["tiny-cpu", "tiny-cpu.yaml", "configs/tiny-cpu.yaml"])
def test_a_shipped_file_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(Path(name)) == CONFIGS / "tiny-cpu.yaml"


def test_the_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("configs", "tiny-cpu.yaml")
    own.parent.mkdir()
    own.write_text("num_layers: 1\n")
    assert find_config(own) == own and read_config(own) == {"num_layers": 1}


@pytest.mark.parametrize("name", ["elsewhere/tiny-cpu.yaml", "huge"])
def test_a_path_that_is_wrong_is_no_shipped_file(name):
    with pytest.raises(UserError, match=f"--config {name}: no such file; .* tiny-cpu, tiny-cpu-t"):
        find_config(Path(name))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: [", "is no YAML"),
        (b"- a", "must hold 'key: value' lines"),
        (b"", "must hold"),
        (b"\x80\x00\xff", "is no YAML"),
        (b"a: !!python/object/apply:os.mkdir [made]", "is no YAML"),
    ],
    ids=["broken", "list", "empty", "binary", "code"],
)
def test_a_file_that_is_no_configuration(text, words, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=words):
        read_config(path)


def test_top4_differs_from_tiny_cpu_in_its_experts_alone():
    tiny, top4 = (read_config(CONFIGS / f"{name}.yaml") for name in ("tiny-cpu", "tiny-cpu-top4"))
    assert {key for key in tiny if tiny[key] != top4[key]} == {"moe_router_topk"}
    assert tiny.keys() == top4.keys()
