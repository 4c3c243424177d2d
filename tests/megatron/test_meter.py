"""`MoEMeter`: what was exposed, and the balance of every layer."""

from __future__ import annotations

import time

import pytest
from example_runs import ROOT
from megatron_model import BATCH, SEQ, Setup, make_config, make_model, parallel_state, train
from ranks import run_ranks, stop_pool

pytest.importorskip("megatron.core")
import torch  # noqa: E402

from ep_comm.megatron.balance import COLUMNS, LayerBalance  # noqa: E402
from ep_comm.telemetry.spans import covered  # noqa: E402

WORK_S = 0.1


@pytest.fixture(scope="module", autouse=True)
def megatron_processes():
    yield
    for pool in ("meter", "exposed"):
        stop_pool(pool)


def work_beside_a_combine(rank: int, overlap: bool) -> tuple[float, float]:
    """Seconds in which an operation ran, and exposed ones of these by the meter."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions, MoEMeter, destroy_buffers
    from ep_comm.megatron.layer import moe_layers

    setup = Setup(options=(("overlap_wgrad", overlap),))
    parallel_state(setup)
    destroy_buffers()
    config = make_config(setup, EPOptions())
    model = make_model(setup, config, EPOptions(overlap_wgrad=overlap))
    _, layer = next(iter(moe_layers(model)))
    if overlap:
        gradients = layer.token_dispatcher.during_backward

        def slow() -> None:
            time.sleep(WORK_S)
            gradients()

        layer.token_dispatcher.during_backward = slow
    meter = MoEMeter(model)
    x = torch.randn(6, 1, config.hidden_size, requires_grad=True)
    layer(x)[0].sum().backward()
    records = layer.token_dispatcher.buffer.records
    spans = [(record.began_s, record.began_s + record.seconds) for record in records]
    exposed_s = meter.step()["ep/exposed-ms"] / 1e3
    return covered(spans), exposed_s


def test_weight_gradients_beside_a_combine_hide_it():
    """Of all ranks the meter gives the one where most is exposed."""
    found = run_ranks(2, work_beside_a_combine, True, pool="exposed")
    most_s, (exposed_s, same_s) = max(s for s, _ in found), (exposed_s for _, exposed_s in found)
    assert exposed_s == same_s
    assert most_s > WORK_S  # the combine is not done before what runs beside it
    assert 0 < exposed_s < most_s - 0.9 * WORK_S


def test_without_them_all_of_it_is_exposed():
    found = run_ranks(2, work_beside_a_combine, False, pool="exposed")
    assert found[0][1] == pytest.approx(max(s for s, _ in found))


@pytest.mark.parametrize("dispatcher", ["deepep", "alltoall"])
@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [
        (2, {}),
        (2, dict(ep=1, pp=2)),
        (4, dict(ep=2, etp=2)),
        (2, dict(config=(("mtp_num_layers", 1),))),
    ],
    ids=["ep", "pp", "etp", "mtp"],
)
def test_balance_of_all_layers_on_all_ranks(dispatcher, num_ranks, sizes):
    setup = Setup(dispatcher=dispatcher, steps=1, **sizes)
    runs = run_ranks(num_ranks, train, setup, pool="meter")
    balance = runs[0]["balance"]
    assert all(run["balance"] == balance for run in runs if setup.ep > 1 or setup.pp > 1)
    extra = dict(setup.config).get("mtp_num_layers", 0)
    numbers = [layer.layer for layer in balance]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 2 + extra
    # A step of each rank that holds other experts, or other shards of them; each token goes to two.
    tokens = 2 * BATCH * SEQ * setup.ep * setup.etp
    assert all(sum(layer.tokens) == tokens for layer in balance)
    assert all(layer.num_ranks == setup.ep for layer in balance)
    for what in ("rank", "expert"):
        worst = max(getattr(layer, f"{what}_imbalance") for layer in balance)
        assert runs[0]["metrics"][f"ep/imbalance-{what}"] == worst


def test_the_page_has_every_scalar_and_column():
    run = run_ranks(2, train, Setup(steps=1), pool="meter")[0]
    page = (ROOT / "docs" / "recorder.md").read_text()
    scalars = page.partition("## In a training run")[2].partition("## What it costs")[0]
    for name in (*run["metrics"], *COLUMNS):
        assert f"`{name}`" in scalars.replace("`ep/imbalance-*`", ""), name


def test_what_a_line_of_the_table_says():
    layer = LayerBalance(layer=3, num_ranks=2, tokens=(1, 5, 0, 2))
    assert layer.tokens_of_ranks == (6, 2)
    assert tuple(layer.row()) == COLUMNS
    assert tuple(layer.row().values()) == (3, 1.5, 2.5, 0, 1, 1)
    empty = LayerBalance(layer=1, num_ranks=2, tokens=(0, 0))
    assert (empty.rank_imbalance, empty.expert_imbalance) == (1, 1)
