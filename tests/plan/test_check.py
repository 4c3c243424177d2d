"""``ep-comm plan --check``: the model beside files that benchmarks wrote."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from made_up_operations import LIMIT, made_up_run
from rich.console import Console

from ep_comm.bench.ops.report import document, write_json
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.job.exits import UserError
from ep_comm.plan import facts
from ep_comm.plan.check import compare, read, render
from ep_comm.plan.model import make_plan
from ep_comm.plan.report import document as document_of_plan
from ep_comm.plan.report import render as render_plan
from ep_comm.plan.sizes import Cluster, Workload

W1 = dict(shape=dict(tokens=4096, hidden=7168, experts=256, topk=8), layout="expert")


def a_call(case: str, num_sms: int | None, us: float) -> dict:
    return {"case": case, "num_sms": num_sms, "samples_us": {"call": [us, us, 9 * us]}}


def a_run(*calls: dict, **more) -> dict:
    """Of four ranks with links of 333 GB/s."""
    settings = {**W1, "routing": {"kind": "uniform"}}
    return {
        "settings": settings, "num_ranks": 4, "limit": {"gb_per_s": 333.0}, "results": calls, **more
    }  # fmt: skip


def test_a_run_is_compared_case_by_case():
    found = compare(
        a_run(
            a_call("dispatch, cached", 0, 500),
            a_call("dispatch, cached", 16, 500),
            a_call("FP8 dispatch, cached", 0, 250),
            a_call("FP8 dispatch to BF16, cached", 0, 250),  # not in the model
            a_call("NCCL alltoall combine", None, 2000),
        )
    )
    assert [(each.name, each.num_sms) for each in found] == [
        *(("dispatch, cached", 0), ("dispatch, cached", 16), ("FP8 dispatch, cached", 0))
    ]
    # 3.614 ranks a token, three of four over the links, at the rate of the same run.
    floor_us = 4096 * 14336 * 3.6142 * 0.75 / 333e3
    latency_us = facts.DISPATCH_US.value + facts.NVLINK_LATENCY.value
    assert found[0].model == pytest.approx(floor_us + latency_us, rel=1e-3)
    assert found[0].measured == 500 and found[0].slack is None
    assert found[0].deviation == pytest.approx(found[0].model / 500 - 1)
    assert found[1].model > 1.5 * found[0].model and found[1].limit == "expand SMs"
    assert found[2].model < 0.6 * found[0].model


def test_nodes_of_one_host_have_the_throttle_and_share_the_links():
    call = a_call("combine", 0, 1300)
    throttled = compare(a_run(call, ranks_per_node=2, network_gb_per_s=50.0))[0]
    network_us = 4096 * 14336 * 1.99302 / 2 / 50e3
    nvlink_us = 4096 * 14336 * (1.99302 / 2 + 3.61421 / 2) / 333e3
    assert throttled.limit == "network" and throttled.model > network_us
    assert throttled.slack == pytest.approx((1300 - network_us) / nvlink_us, rel=1e-3)
    free = compare(a_run(call, ranks_per_node=2, network_gb_per_s=None))[0]
    assert (
        free.limit == "NVLink"
        and free.slack is None
        and free.model
        == pytest.approx(
            nvlink_us + facts.COMBINE_US.value + 2 * facts.NVLINK_LATENCY.value, rel=1e-3
        )
    )


def test_files_of_ep_comm_bench_can_be_read(tmp_path):
    write_json(made_up_run(LIMIT), tmp_path / "bench.json")
    found = compare(read(tmp_path / "bench.json"))
    assert found and {each.unit for each in found} == {"µs"}
    assert "limit" in document(made_up_run(LIMIT))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "is neither of ep-comm bench"),
        (json.dumps({"headline": "?"}), "is neither of ep-comm bench"),
        (None, "No such file"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(settings={**W1, "routing": {"kind": "zipf"}}), "a plan has no zipf routing"),
        (dict(settings={**W1, "routing": {"kind": "uniform", "luck": 1}}), "luck"),
        (dict(limit={}), "gb_per_s"),
        (dict(results=[{"case": "combine"}]), "num_sms"),
        (dict(published=[{"name": "somebody's"}]), "cluster"),
    ],
)
def test_what_a_file_lacks_is_named(changes, message):
    with pytest.raises(UserError, match=f"the file cannot be compared: .*{message}"):
        compare({**a_run(), **changes})


def shown(renderable) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_a_table_has_deviations():
    text = shown(render(a_run(a_call("combine", 0, 480)), "a-file.json"))
    assert "a-file.json" in text and "480" in text and "NVLink" in text and "%" in text


def test_a_plan_is_shown_and_written_whole():
    routing = RoutingSpec(kind="group-limited")
    workload = dataclasses.replace(
        Workload(shape=made_up_run(LIMIT).settings.shape), routing=routing, fp8=True
    )
    plan = make_plan(Cluster(num_nodes=8, gpus_per_node=1), workload)
    text = shown(render_plan(plan))
    for words in ("8 nodes of 1 GPUs", "4 of 8 groups", "new routing", "gather", "GiB for NVLink"):
        assert words in text
    found = json.loads(json.dumps(document_of_plan(plan)))
    assert found["cluster"]["num_nodes"] == 8 and found["copies"]["nodes"] == plan.copies.nodes
    assert [each["name"] for each in found["operations"]] == [op.name for op in plan.operations]
    assert found["operations"][0]["us"] == plan.operations[0].us
    assert all(fact["source"] and fact["unit"] for fact in found["facts"])
    assert len(found["facts"]) == len(facts.FACTS)


def test_every_fact_is_in_the_docs_as_it_is():
    named = [value for value in vars(facts).values() if isinstance(value, facts.Fact)]
    assert sorted(named) == sorted(facts.FACTS)
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    for fact in facts.FACTS:
        assert f"| {fact.what} | {fact.value:g} {fact.unit} | {fact.source} |" in page, fact
