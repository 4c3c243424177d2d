"""The bare name ``deep_ep``: on request only, in spawned processes too, never hiding DeepEP unsaid.

And what the constructor refuses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from own_name import patience
from ranks import run_ranks

from ep_comm import EPArgumentError, EPMismatchError, EPUnsupportedError, deep_ep
from ep_comm.deep_ep.hints import BACKEND_VARIABLE, Hints

patience()
ROOT = Path(__file__).resolve().parents[2]


def python(
    *args: str, path: tuple[str, ...] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd or ROOT.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])},
    )


def program(text: str) -> tuple[str, str]:
    return "-c", textwrap.dedent(text)


def test_path_is_a_folder_that_holds_it():
    result = python("-m", "ep_comm.deep_ep", "--path")
    assert result.returncode == 0 and not result.stderr, result.stderr
    folder = Path(result.stdout.strip())
    assert (folder / "deep_ep" / "__init__.py").is_file()
    assert str(folder) == deep_ep.path()
    assert python("-m", "ep_comm.deep_ep").returncode == 2


def test_without_a_request_there_is_none():
    result = python(*program("import ep_comm.deep_ep; import deep_ep"))
    assert "No module named 'deep_ep'" in result.stderr


def test_a_spawned_child_finds_it(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent("""
        import importlib.util
        import multiprocessing

        def child(pipe):
            import deep_ep
            from deep_ep.utils import EventHandle, EventOverlap
            assert importlib.util.find_spec("deep_ep").origin == deep_ep.__file__
            pipe.send(deep_ep.Buffer.__module__)

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            mine, theirs = context.Pipe()
            process = context.Process(target=child, args=(theirs,))
            process.start()
            process.join()
            print(mine.recv() if mine.poll() else "nothing")
    """)
    )
    result = python(str(script), path=(deep_ep.path(),))
    assert result.stdout.strip() == "ep_comm.deep_ep.buffer", result.stderr
    assert not result.stderr


INSTALL = """
    from ep_comm import deep_ep
    deep_ep.install()
    deep_ep.install()  # once more does nothing
    import importlib.util
    spec = importlib.util.find_spec("deep_ep")
    assert spec.name == "deep_ep" and spec.origin and spec.submodule_search_locations
    import deep_ep as found
    from deep_ep.utils import EventHandle, EventOverlap
    assert found is not deep_ep and found.Buffer is deep_ep.Buffer
    assert found.__spec__ is spec and found.utils.EventOverlap is EventOverlap
"""


def test_install_gives_the_name_to_one_process():
    result = python(*program(INSTALL))
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_a_folder_of_the_name_is_no_deepep(tmp_path):
    (tmp_path / "deep_ep").mkdir()
    result = python(*program(INSTALL), path=(str(tmp_path),))
    assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.fixture
def installed(tmp_path) -> str:
    """A folder on the path with something else of that name."""
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("Buffer = 'theirs'\n")
    return str(tmp_path)


def test_an_installed_deepep_is_not_hidden_unsaid(installed):
    result = python("-m", "ep_comm.deep_ep", "--path", path=(installed,))
    assert result.stdout.strip() == deep_ep.path() and installed in result.stderr

    text = "import deep_ep; print(deep_ep.Buffer)"
    result = python("-c", text, path=(deep_ep.path(), installed))
    assert "ep_comm.deep_ep.buffer.Buffer" in result.stdout
    assert "stands in for deep_ep" in result.stderr and installed in result.stderr
    # Where theirs comes first, it is what is imported.
    assert python("-c", text, path=(installed, deep_ep.path())).stdout == "theirs\n"


@pytest.mark.parametrize("loaded", [False, True])
def test_install_beside_an_installed_deepep(installed, loaded):
    first = "import deep_ep\n" if loaded else ""
    code = first + "from ep_comm import deep_ep\ndeep_ep.install({})\n"
    result = python("-c", code.format(""), path=(installed,))
    assert "EPStateError: DeepEP is installed" in result.stderr and installed in result.stderr
    code = code.format("replace=True") + "import deep_ep as d; assert d.Buffer is deep_ep.Buffer\n"
    result = python("-c", code, path=(installed,))
    assert result.returncode == 0, result.stderr
    assert "stands in for deep_ep" in result.stderr


# ---- The constructor ---------------------------------------------------------------------------


def wrong_buffers(rank: int) -> None:
    import torch.distributed as dist

    group = dist.group.WORLD
    for error, message, arguments in (
        (EPArgumentError, "pass a group", dict(group=None)),
        (EPUnsupportedError, "mpi4py", dict(group=None, comm=object())),
        (
            EPUnsupportedError,
            "allow_nvlink_for_low_latency_mode=False",
            dict(low_latency_mode=True, allow_nvlink_for_low_latency_mode=False),
        ),
        (EPUnsupportedError, "use_fabric=True", dict(use_fabric=True)),
        (EPArgumentError, "enable_shrink=True needs", dict(enable_shrink=True)),
        (EPArgumentError, "group must be a ProcessGroup", dict(group="all")),
    ):
        with pytest.raises(error, match=message):
            deep_ep.Buffer(**{"group": group, **arguments})
    os.environ[BACKEND_VARIABLE] = "nccl"
    with pytest.raises(EPArgumentError, match=f"{BACKEND_VARIABLE} must be one of auto, nvlink"):
        deep_ep.Buffer(group)
    del os.environ[BACKEND_VARIABLE]
    with pytest.raises(EPMismatchError, match="low_latency_mode="):
        deep_ep.Buffer(group, low_latency_mode=rank == 0)
    buffer = deep_ep.Buffer(group, num_nvl_bytes=100, num_rdma_bytes=7)
    with pytest.raises(EPArgumentError, match="no communication stream"):
        buffer.get_comm_stream()
    check_local_memory(buffer)
    buffer.destroy()


def check_local_memory(buffer: deep_ep.Buffer) -> None:
    import torch

    local = buffer.get_local_buffer_tensor
    assert local(torch.int32).numel() == 25 and local(torch.int8, use_rdma_buffer=True).numel() == 7
    local(torch.int8, offset=4).fill_(1)
    part = local(torch.int32, torch.Size([2, 3]), offset=4)
    assert part.shape == (2, 3) and (part == 0x01010101).all()
    assert local(torch.int32)[0] == 0
    with pytest.raises(EPArgumentError, match="26 elements of torch.int32, the buffer has 25"):
        local(torch.int32, torch.Size([26]))


def test_what_is_not_there_is_refused_when_the_buffer_is_made():
    run_ranks(2, wrong_buffers)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EP_COMM_DEEP_EP_MAX_TOKENS", "many", "EP_COMM_DEEP_EP_MAX_TOKENS=many"),
        ("EP_COMM_DEEP_EP_MAX_TOKENS", "0", "the number of tokens must be a positive integer"),
        ("EP_COMM_DEEP_EP_TIMEOUT_S", "-1", "timeout_s must be a positive number"),
    ],
)
def test_bad_hints(variable, value, message):
    with pytest.raises(EPArgumentError, match=message):
        Hints.from_environment({variable: value})
    assert Hints.from_environment({}) == Hints()
