"""Settings of the network: what of NVSHMEM's variables is taken, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ep_comm import EPArgumentError, EPConfig, NetworkSettings
from ep_comm._native.header import EP_LOW_LATENCY_CHUNKS, EP_MAX_NETWORK_CHUNKS
from ep_comm.markdown import with_tables
from ep_comm.network import settings, tables

GIVEN = {
    "NVSHMEM_IB_SL": "2",
    "NVSHMEM_IB_TRAFFIC_CLASS": "104",
    "NVSHMEM_IB_GID_INDEX": "3",
    "NVSHMEM_IB_ENABLE_IBGDA": "true",
    "NVSHMEM_QP_DEPTH": "2048",
    "NVSHMEM_HCA_LIST": "mlx5_0:1, mlx5_3:1",
    "NVSHMEM_DISABLE_GDRCOPY": "1",
    "NVSHMEM_SYMMETRIC_SIZE": "1.5G",
    "NVSHMEM_CUMEM_GRANULARITY": "128m",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "ib0",
    "PATH": "/bin",
}


def test_variables_become_fields():
    got = NetworkSettings.from_environment(GIVEN)
    assert got == NetworkSettings(
        service_level=2,
        traffic_class=104,
        gid_index=3,
        ibgda=True,
        queue_depth=2048,
        nics=("mlx5_0:1", "mlx5_3:1"),
        gdrcopy=False,
        symmetric_size=3 * 2**29,
        granularity=128 * 2**20,
        bootstrap_interface="ib0",
    )


def test_the_environment_says_the_same_again():
    got = NetworkSettings.from_environment(GIVEN)
    environment = got.environment()
    again = NetworkSettings.from_environment(environment)
    # Only this field says in the environment what it had left open.
    assert again == dataclasses.replace(got, map_nics=True)
    assert environment["NVSHMEM_SYMMETRIC_SIZE"] == str(3 * 2**29)
    assert environment["NVSHMEM_DISABLE_GDRCOPY"] == "1"
    assert environment["NVSHMEM_HCA_LIST"] == "mlx5_0:1,mlx5_3:1"
    assert environment["NVSHMEM_ENABLE_NIC_PE_MAPPING"] == "1"


def test_our_defaults_where_those_of_nvshmem_are_bad():
    environment = NetworkSettings.from_environment({}).environment()
    assert environment["NVSHMEM_CUMEM_GRANULARITY"] == str(64 * 2**20)
    assert environment["NVSHMEM_DISABLE_NVLS"] == "1"
    assert environment["NVSHMEM_DISABLE_NCCL"] == "1"
    assert environment["NVSHMEM_ENABLE_NIC_PE_MAPPING"] == "0"
    assert "NVSHMEM_HCA_LIST" not in environment
    assert "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME" not in environment
    assert all(name.startswith("NVSHMEM_") for name in environment)


def test_what_is_left_to_nvshmem_is_unset():
    environment = dict(GIVEN)
    NetworkSettings(service_level=1).apply(environment)
    assert "NVSHMEM_HCA_LIST" not in environment and environment["PATH"] == "/bin"
    assert environment["NVSHMEM_IB_SL"] == "1" and environment["NVSHMEM_QP_DEPTH"] == "4096"


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("IB_SL", "16", "an integer from 0 to 15, got 16"),
        ("IB_SL", "high", "an integer from 0 to 15, got 'high'"),
        ("IB_TRAFFIC_CLASS", "-1", "from 0 to 255"),
        ("IB_GID_INDEX", "x", "from -1 to 255"),
        ("IB_ADDR_FAMILY", "IPv6", "one of AF_INET, AF_INET6"),
        ("IB_ROCE_VERSION_NUM", "3", "from 1 to 2"),
        ("REMOTE_TRANSPORT", "none", "one of ibrc, ibdevx, ucx, libfabric"),
        ("IB_ENABLE_IBGDA", "maybe", "0 or 1"),
        ("QP_DEPTH", "512", "half of it has to hold 120 messages to a peer, of 4 places each"),
        ("QP_DEPTH", "65536", "from 960 to 32768"),
        ("IBGDA_NUM_RC_PER_PE", "0", "from 1 to 64"),
        ("IBGDA_RC_MAP_BY", "thread", "one of cta, sm, warp"),
        ("HCA_LIST", "mlx5_0:one", "a list such as mlx5_0:1,mlx5_1:1"),
        ("HCA_PE_MAPPING", "mlx5_0:1", "a list such as mlx5_0:1:2,mlx5_1:1:2"),
        ("IBGDA_NIC_HANDLER", "nic", "one of auto, gpu, cpu, cpu_host_memory"),
        ("SYMMETRIC_SIZE", "1 gigabyte", "a positive number of bytes"),
        ("SYMMETRIC_SIZE", "0", "a positive number of bytes"),
        ("CUMEM_GRANULARITY", "3m", "a power of two of at least 2 MiB"),
        ("BOOTSTRAP_UID_SOCK_IFNAME", "ib 0", "the name of a network interface"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(variable, text, words):
    with pytest.raises(EPArgumentError) as error:
        NetworkSettings.from_environment({f"NVSHMEM_{variable}": text})
    assert str(error.value).startswith(f"NVSHMEM_{variable} (NetworkSettings.")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (dict(HCA_LIST="mlx5_0:1", HCA_PE_MAPPING="mlx5_0:1:8"), "keep one of them"),
        (dict(HCA_LIST="mlx5_0:1", ENABLE_NIC_PE_MAPPING="0"), "HCA_LIST has no effect"),
        (dict(HCA_PE_MAPPING="mlx5_0:1:8", ENABLE_NIC_PE_MAPPING="0"), "HCA_PE_MAPPING has no ef"),
        (dict(IB_ENABLE_IBGDA="1", REMOTE_TRANSPORT="libfabric"), "IBGDA=1 works with mlx5"),
    ],
)
def test_contradictions_are_refused(variables, words):
    with pytest.raises(EPArgumentError, match=words):
        NetworkSettings.from_environment({f"NVSHMEM_{k}": v for k, v in variables.items()})


def test_fields_are_checked_where_they_are_set_in_code():
    with pytest.raises(EPArgumentError, match="NetworkSettings.nics"):
        NetworkSettings(nics="mlx5_0:1")  # type: ignore[arg-type]
    with pytest.raises(EPArgumentError, match="NetworkSettings.service_level"):
        NetworkSettings(service_level=True)
    with pytest.raises(EPArgumentError, match="NetworkSettings.queue_depth"):
        NetworkSettings(queue_depth=None)  # type: ignore[arg-type]


def test_all_messages_to_a_peer_fit_half_of_the_default_queue_pair():
    """The numbers are those of csrc/PROTOCOL.md, "What the network must do"."""
    page = (Path(__file__).parents[2] / "csrc" / "PROTOCOL.md").read_text()
    assert "at most 32 chunks a dispatch, 64 puts a combine\n   (rows and weights), a plan" in page
    assert EP_MAX_NETWORK_CHUNKS == 32
    assert "4 (4 x 4 + 3) = 76 places" in page and EP_LOW_LATENCY_CHUNKS == 3
    assert settings.MESSAGES_TO_A_PEER >= 32 + 64 + 1 + 2 + 4 * (4 + 1)
    places = settings.MESSAGES_TO_A_PEER * settings.PLACES_OF_A_MESSAGE
    assert places <= NetworkSettings().queue_depth // 2
    assert NetworkSettings(queue_depth=2 * places).queue_depth == 2 * places
    with pytest.raises(EPArgumentError):
        NetworkSettings(queue_depth=2 * places - 1)


def test_one_line():
    assert NetworkSettings().describe() == ("ibrc, by the proxy, service level 0, traffic class 0")
    got = NetworkSettings(ibgda=True, service_level=3, nics=("mlx5_0:1",), granularity=2**21)
    assert got.describe() == (
        "IBGDA, service level 3, traffic class 0, nics mlx5_0:1, granularity 2 MiB"
    )
    efa = NetworkSettings(remote_transport="libfabric", libfabric_provider="efa")
    assert efa.describe().startswith("libfabric (efa), by the proxy")


def test_a_buffer_takes_them():
    sizes = dict(num_experts=4, hidden=8, max_tokens_per_rank=1, num_topk=1)
    assert EPConfig(**sizes).network is None
    assert EPConfig(**sizes, network=NetworkSettings(service_level=1)).network.service_level == 1
    with pytest.raises(EPArgumentError, match="network must be NetworkSettings or None, got dict"):
        EPConfig(**sizes, network={})


def test_the_page_has_the_current_table():
    """If not: python -m ep_comm.network.tables docs/network.md."""
    page = (Path(__file__).parents[2] / "docs" / "network.md").read_text()
    assert "<!-- table: settings -->" in page and with_tables(page, tables.TABLES) == page
