"""What a host has for a network, out of files that stand for its own."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from ep_comm import NetworkSettings
from ep_comm.cli import doctor
from ep_comm.network.host import Host, Port, find_host, hints


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with two InfiniBand cards and all that GPUDirect wants."""
    for card, numa in (("mlx5_0", "0"), ("mlx5_1", "1")):
        port = tmp_path / "sys/class/infiniband" / card / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text("4: ACTIVE\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text("InfiniBand\n")
        (port.parents[1] / "device").mkdir()
        (port.parents[1] / "device/numa_node").write_text(numa)
    for folder in ("sys/module/nvidia_peermem", "dev/infiniband", "proc/driver/nvidia"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("dev/infiniband/uverbs0", "dev/gdrdrv"):
        (tmp_path / file).touch()
    (tmp_path / "proc/driver/nvidia/params").write_text(
        'EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"\n'
    )
    return tmp_path


@pytest.fixture
def host(root: Path) -> Host:
    return find_host(root)._replace(memlock_bytes=-1)


def test_what_is_there_is_found(host):
    assert [str(port) for port in host.ports] == [
        "mlx5_0:1 InfiniBand 400 Gb/sec ACTIVE, NUMA node 0",
        "mlx5_1:1 InfiniBand 400 Gb/sec ACTIVE, NUMA node 1",
    ]
    assert host.has_verbs and host.gdrdrv and host.peer_mapping and not host.container
    assert host.describe_gpudirect() == "nvidia_peermem, gdrdrv there, PeerMappingOverride yes"
    assert hints(host, NetworkSettings(ibgda=True)) == []


def test_an_empty_host(tmp_path):
    host = find_host(tmp_path)
    assert host.ports == () and host.peer_memory is None and host.peer_mapping is None
    assert hints(host, NetworkSettings()) == [
        "no network card in /sys/class/infiniband: this host reaches no other GPUs by RDMA"
    ]
    (tmp_path / ".dockerenv").touch()
    assert "this container" in hints(find_host(tmp_path), NetworkSettings())[0]


def test_the_limit_of_pinned_memory_is_this_process_s(root):
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert find_host(root).memlock_bytes == (-1 if soft == resource.RLIM_INFINITY else soft)


ETHERNET = Port("mlx5_0", 1, "ACTIVE", "400 Gb/sec", "Ethernet", 0)
EFA = Port("rdmap16s27", 1, "ACTIVE", "100 Gb/sec", "Unspecified", 0)
DOWN = Port("mlx5_0", 1, "DOWN", "400 Gb/sec", "InfiniBand", 0)


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        (dict(has_verbs=False), {}, "uverbs"),
        (dict(ports=(DOWN,)), {}, "no port is ACTIVE"),
        (dict(memlock_bytes=64 << 10), {}, "only 0 MiB may be pinned: ulimit -l unlimited"),
        (dict(peer_memory=None), dict(dmabuf=False), "modprobe nvidia_peermem"),
        (dict(peer_memory=None), dict(ibgda=True), "modprobe nvidia_peermem"),
        (dict(peer_mapping=False), dict(ibgda=True), "PeerMappingOverride=1"),
        (dict(gdrdrv=False), dict(ibgda=True, nic_handler="cpu"), "needs GDRCopy"),
        (dict(ports=(EFA,)), {}, "no card is called mlx5*, but rdmap16s27"),
        ({}, dict(nics=("mlx5_7:1",)), "HCA_LIST names mlx5_7, which this host has not"),
        ({}, dict(nic_mapping=("mlx5_9:1:8",)), "HCA_PE_MAPPING names mlx5_9"),
        (dict(ports=(ETHERNET,)), {}, "RoCE with traffic class 0"),
    ],
)
def test_what_is_in_the_way_is_said_with_what_to_do(host, changes, settings, words):
    (hint,) = hints(host._replace(**changes), NetworkSettings(**settings))
    assert words in hint


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        (dict(peer_memory=None), {}),  # dma-buf does without
        (dict(peer_mapping=False), dict(ibgda=True, nic_handler="cpu_host_memory")),
        (dict(peer_mapping=None), dict(ibgda=True)),
        (dict(ports=(EFA,)), dict(remote_transport="libfabric", libfabric_provider="efa")),
        (dict(ports=(ETHERNET,)), dict(traffic_class=104)),
        ({}, dict(nics=("^mlx5_1",))),
    ],
)
def test_what_is_fine_gives_no_hint(host, changes, settings):
    assert hints(host._replace(**changes), NetworkSettings(**settings)) == []


def test_doctor_shows_all_of_it(monkeypatch, host):
    ports = tuple(ETHERNET._replace(card=f"mlx5_{i}") for i in range(12))
    monkeypatch.setattr(doctor, "find_host", lambda: host._replace(ports=ports))
    monkeypatch.setenv("NVSHMEM_IB_SL", "5")
    monkeypatch.setattr(doctor._native, "nvshmem_unusable_reason", lambda: "no wheel")
    monkeypatch.setattr(doctor, "package_version", lambda name: f"{name[-2:]}.0")
    text = doctor.diagnose()
    assert "no wheel (nvidia-nvshmem-cu13 13.0, nvidia-nvshmem-cu12 12.0)" in text
    assert "service level 5" in text and "mlx5_0:1 Ethernet" in text and "and 4 more" in text
    assert "RoCE with traffic class 0" in text
    assert "gdrdrv there" in text and len(text.splitlines()) < 50
    monkeypatch.setenv("NVSHMEM_IB_SL", "50")
    assert "refused: NVSHMEM_IB_SL (" in doctor.diagnose()
