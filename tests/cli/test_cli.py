"""The ``ep-comm`` command: what it says, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import run_command
from made_up_low_latency import made_up_run as low_latency_run
from made_up_operations import made_up_run
from typer.testing import CliRunner

from ep_comm import __version__, _native
from ep_comm.bench.ops.probe import Limit
from ep_comm.bench.ops.settings import PRESETS
from ep_comm.cli import doctor
from ep_comm.cli.app import app

ROOT = Path(__file__).parents[2]
CAPTURE = ROOT / "tests" / "data" / "routing-capture"
# Two GPUs; nvidia-smi marks the header with escapes, and a NIC has a row too.
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\t0-15
GPU1\tNV18\t X \tSYS\t0-15
NIC0\tSYS\tSYS\t X

Legend:
"""


@pytest.fixture
def no_job(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_help_names_all_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in ("bench", "compare", "doctor", "plan"))


def test_help_waits_for_no_heavy_import():
    """Of no command: torch and what trainings need take seconds."""
    code = """if True:
        import sys
        from ep_comm.cli.app import app
        from typer.main import get_command
        def ask(group, *names):
            app([*names, "--help"], standalone_mode=False)
            for name, command in getattr(group, "commands", {}).items():
                ask(command, *names, name)
        ask(get_command(app))
        heavy = {"torch", "numpy", "megatron", "matplotlib", "wandb", "yaml", "jinja2"}
        print("heavy:", sorted(heavy & sys.modules.keys()))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.count("Usage: ") >= 12, result.stdout + result.stderr
    assert result.stdout.endswith("heavy: []\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "start it with torchrun"),
        (["--preset", "W9"], "--preset 'W9' is none of W1, W2"),
        (["--sms", "few"], "--sms 'few' must be"),
        (["--layout", "token"], "--layout 'token' is none of"),
        (["--num-groups", "8"], "--num-groups and --topk-groups: pass both"),
        (["--num-groups", "8", "--topk-groups", "9"], "--topk-groups 9 is not in 1 to"),
    ],
)
def test_bench_outside_of_torchrun(no_job, capfd, flags, words):
    result = CliRunner().invoke(app, ["bench", *flags])
    assert result.exit_code == 2
    error = capfd.readouterr().err + result.output
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_without_a_gpu_ends_every_rank_with_one_line(tmp_path):
    done = run_command("bench", "--out", tmp_path)
    assert done.codes == (2, 2)
    assert "error: bench needs CUDA GPUs" in done.stderr and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("rate", "is_void"), [(331.0, False), (300.0, True)])
def test_bench_prints_and_writes_even_a_void_run(rate, is_void, monkeypatch, tmp_path):
    monkeypatch.setattr("ep_comm.job.start.has_launcher", lambda: True)
    monkeypatch.setattr("ep_comm.job.start.join", lambda: torch.device("cuda"))
    monkeypatch.setattr("ep_comm.job.start.on_rank_0", lambda action: action())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda: None)
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    asked = []

    def run(settings, *_):
        asked.append(settings)
        return made_up_run(Limit(gb_per_s_by_sms={16: rate}))

    monkeypatch.setattr("ep_comm.bench.ops.run.run", run)
    command = ["bench", "--preset", "W2", "--topk", "4", "--sms", "0,24", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert ("VOID" in result.output) == is_void
    assert {path.name for path in tmp_path.iterdir()} == {
        *("bench.json", "bench.png", "bench.html")
    }
    page = (tmp_path / "bench.html").read_text()
    assert ("Failed or in doubt" in page) == is_void and "dispatch, fresh" in page
    assert asked[0].shape == PRESETS["W2"]._replace(topk=4) and asked[0].sms == (0, 24)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "start it with torchrun"),
        (["--tokens", "0"], "--tokens 0 must be positive"),
        (["--tokens", "few"], "--tokens 'few' must be comma-separated"),
        (["--hidden", "100"], "--hidden 100 is not a multiple of 128"),
        (["--full", "--hidden", "2048"], "--full and --hidden"),
        (["--backend", "nvshmem"], "--backend 'nvshmem' is none of"),
        (["--num-groups", "7", "--topk-groups", "2"], "--num-groups 7 does not divide"),
    ],
)
def test_bench_low_latency_outside_of_torchrun(no_job, capfd, flags, words):
    result = CliRunner().invoke(app, ["bench", "low-latency", *flags])
    assert result.exit_code == 2
    error = capfd.readouterr().err + result.output
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


@pytest.mark.parametrize("wrong", [0, 3])
def test_bench_low_latency_prints_and_writes_even_wrong_results(wrong, monkeypatch, tmp_path):
    monkeypatch.setattr("ep_comm.job.start.has_launcher", lambda: True)
    monkeypatch.setattr("ep_comm.job.start.join", lambda: torch.device("cuda"))
    monkeypatch.setattr("ep_comm.job.start.on_rank_0", lambda action: action())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda: None)
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    asked = []

    def run(settings, device, progress, save):
        asked.append(settings)
        found = low_latency_run(wrong=wrong)
        save(found)
        return found

    monkeypatch.setattr("ep_comm.bench.low_latency.run.run", run)
    command = ["bench", "low-latency", "--quick", "--bf16", "--num-sms", "0,32"]
    command += ["--num-groups", "8", "--topk-groups", "4"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert result.exit_code == (1 if wrong else 0), result.output
    assert "one way 0.70" in result.output
    names = {f"bench-low-latency.{suffix}" for suffix in ("json", "png", "html")}
    assert {path.name for path in tmp_path.iterdir()} == names
    settings = asked[0]
    assert not settings.fp8 and settings.num_sms == (0, 32) and settings.replays == 100
    assert settings.routing.describe() == "4 of 8 groups"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU ranks are for machines without GPUs")
def test_bench_low_latency_on_cpu_ranks(tmp_path):
    flags = "--backend reference --tokens 130 --hidden 128 --topk 2 --experts 4"
    done = run_command("bench", "low-latency", *flags.split(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 ranks, top-2 of 4, uniform, FP8 dispatch" in done.stdout and "host, µs" in done.stdout
    document = json.loads((tmp_path / "bench-low-latency.json").read_text())
    assert document["num_wrong"] == 0 and len(document["host"]) == 1
    assert [result["operation"] for result in document["low_latency"]] == [
        *("dispatch", "dispatch + combine", "dispatch + combine, own weights", "gloo alltoall")
    ]
    assert (tmp_path / "bench-low-latency.png").exists()


def test_plan_prints_and_writes(tmp_path):
    command = "plan --nodes 4 --fp8 --num-groups 8 --topk-groups 4 --tokens 8192".split()
    files = {"--json": tmp_path / "plan.json", "--plot": tmp_path / "plan.png"}
    flags = [str(part) for pair in files.items() for part in pair]
    result = CliRunner().invoke(app, [*command, *flags])
    assert result.exit_code == 0, result.output
    assert "4 nodes of 8 GPUs" in result.output and "8192 tokens x 7168" in result.output
    document = json.loads(files["--json"].read_text())
    assert document["cluster"]["num_nodes"] == 4 and document["workload"]["fp8"]
    assert document["workload"]["shape"] == PRESETS["W1"]._replace(tokens=8192)._asdict()
    assert f"{document['operations'][0]['us']:.0f}" in result.output
    assert files["--plot"].stat().st_size > 10_000


@pytest.mark.parametrize("name", ["h200-x4-w1.json", "deepep-published.json"])
def test_plan_is_checked_against_files(name):
    result = CliRunner().invoke(app, ["plan", "--check", str(ROOT / "docs" / "results" / name)])
    assert result.exit_code == 0, result.output
    assert name in result.output and "deviation" in result.output and "%" in result.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "3"], "--experts 256 is not divisible by the 24 GPUs"),
        (["--nodes", "200"], "--nodes 200 of --gpus-per-node 8 are 1600 GPUs"),
        (["--preset", "W9"], "--preset 'W9' is none of W1, W2"),
        (["--topk-groups", "4"], "--num-groups and --topk-groups: pass both"),
        (["--nic-gb-per-s", "0"], "--nic-gb-per-s 0 must be positive"),
        (["--plot", "/no/such/folder/plan.png"], "/no/such/folder/plan.png cannot be written"),
        (["--plot", "plan.picture"], "plan.picture cannot be written: Format 'picture'"),
        (["--replay", "nowhere"], "the capture nowhere is no folder"),
        (["--replay", str(CAPTURE), "--experts", "16"], "--experts 16: the capture"),
        (["--replay", str(CAPTURE), "--preset", "W1"], "--preset W1 and --replay"),
        (["--replay", str(CAPTURE), "--nodes", "2"], "--experts 8 is not divisible by the 16 GPUs"),
        (["--check", "no.json"], "--check no.json: [Errno 2]"),
        (["--check", "no.json", "--nodes", "2"], "--nodes has no effect with --check"),
    ],
)
def test_plan_refuses_what_it_cannot_do(no_job, capfd, flags, words):
    result = CliRunner().invoke(app, ["plan", *flags])
    assert result.exit_code == 2
    said = (capfd.readouterr().err + result.output).splitlines()
    assert said[-1].startswith(f"error: {words}") and "Traceback" not in said
    # Only what cannot be written is found after the plan is made.
    assert len(said) == 1 or "cannot be written" in words


def test_plan_takes_a_capture(tmp_path):
    path = tmp_path / "plan.json"
    flags = ["--replay", str(CAPTURE), "--gpus-per-node", "2", "--hidden", "7168", "--json"]
    result = CliRunner().invoke(app, ["plan", *flags, str(path)])
    assert result.exit_code == 0, result.output
    assert "replay of routing-capture/step-00000064" in result.output
    assert "the fullest rank gets 1." in result.output
    found = json.loads(path.read_text())
    assert found["copies"]["fullest_rank"] > 1.05 and found["copies"]["nodes"] == 1
    assert found["workload"]["shape"] == {"tokens": 1024, "hidden": 7168, "experts": 8, "topk": 2}


def test_help_of_plan_has_an_example():
    text = " ".join(CliRunner().invoke(app, ["plan", "--help"]).output.split())
    assert "ep-comm plan --nodes 8 --fp8 --num-groups 8 --topk-groups 4" in text


def test_doctor_fits_on_one_screen():
    result = CliRunner().invoke(app, ["doctor"], terminal_width=80)
    assert result.exit_code == 0
    text = result.output
    assert __version__ in text and torch.__version__ in text
    assert "transformer-engine" in text and "symmetric memory" in text and "importable" in text
    for name in doctor.ENVIRONMENT:
        assert name in text
    assert len(text.splitlines()) < 50


def test_doctor_says_whether_the_library_is_there(monkeypatch):
    monkeypatch.setattr(_native, "status", lambda: "somewhere (ABI version 7)")
    assert "somewhere (ABI version 7)" in CliRunner().invoke(app, ["doctor"]).output


def test_backend_choice_without_gpus():
    assert doctor.backend_choice(0).startswith("reference, over gloo: there is no GPU")


def test_backend_choice_with_gpus(monkeypatch):
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_native, "unusable_reason", lambda gpu: None)
    assert doctor.backend_choice(4).startswith("nvlink, for up to 4 GPUs")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: (i, j) != (0, 1))
    assert doctor.backend_choice(4).startswith("reference, over NCCL: GPUs 0 and 1 have no peer")
    monkeypatch.setattr(_native, "unusable_reason", lambda gpu: f"GPU {gpu} is an A100")
    assert doctor.backend_choice(4) == "reference, over NCCL: GPU 0 is an A100"


def test_choice_across_hosts(monkeypatch):
    assert doctor.hosts_choice(0) == "across hosts: reference, over gloo"
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(_native, "nvshmem_unusable_reason", lambda: None)
    assert doctor.hosts_choice(4) == "across hosts: nodes, over NVSHMEM"
    monkeypatch.setattr(_native, "nvshmem_unusable_reason", lambda: "pip install it")
    assert doctor.hosts_choice(4) == (
        "across hosts: refused, as NVSHMEM cannot be used: pip install it"
    )


def test_gpus_and_links_are_shown(monkeypatch):
    class Gpu:
        name, total_memory, multi_processor_count, major, minor = "H200", 150e9, 132, 9, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Gpu)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: True)
    monkeypatch.setattr(doctor, "_links", lambda num_gpus: doctor.link_names(TOPOLOGY))
    text = CliRunner().invoke(app, ["doctor"]).output
    assert "140 GiB" in text and "132 SMs" in text and "sm_90" in text
    assert text.count("yes NV18") == 2


def test_links_of_nvidia_smi():
    assert doctor.link_names(TOPOLOGY) == [["X", "NV18"], ["NV18", "X"]]
    assert doctor.link_names("") == []


def without_packages(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command where neither typer nor rich can be imported."""
    code = f"""if True:
        import sys
        sys.modules.update(typer=None, rich=None)
        sys.argv[1:] = {list(arguments)}
        from ep_comm.__main__ import main
        main()
    """
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_doctor_works_on_a_bare_install():
    result = without_packages("doctor")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout and "will be used" in result.stdout
    assert without_packages("--version").stdout.strip() == __version__


def test_other_commands_say_what_is_missing():
    result = without_packages("bench")
    assert result.returncode == 1
    assert result.stderr.startswith("error: typer is missing: pip install 'ep_comm[cli]'")
    assert result.stderr.count("\n") == 1


def test_bench_train_says_which_package_it_misses(tmp_path):
    code = """if True:
        import sys
        sys.modules["yaml"] = None
        sys.argv[1:] = ["bench", "train", "--config", "tiny-cpu"]
        from ep_comm.cli.main import main
        main()
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: yaml is missing: pip install 'ep_comm[megatron]'\n"


@pytest.mark.parametrize("module", ["ep_comm", "ep_comm.cli"])
def test_version_and_help_of_the_module(module):
    def run(*flags: str) -> str:
        command = [sys.executable, "-m", module, *flags]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert run("--version").strip() == __version__
    assert run("-h") == run("--help") and "doctor" in run("-h")
