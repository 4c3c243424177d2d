"""``ep-comm bench overlap``: the arithmetic, the check of results, what it writes, a tiny run."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from made_up_overlap import SETTINGS, made_up_price, made_up_run
from ranks import run_ranks

from ep_comm import Buffer
from ep_comm.backends.nvlink import prices
from ep_comm.backends.nvlink.prices import gemm_tiles
from ep_comm.bench.ops.cases import buffer_cases, make_inputs
from ep_comm.bench.ops.probe import Limit
from ep_comm.bench.ops.settings import PRESETS, Shape
from ep_comm.bench.overlap import check, gemms, price, settings
from ep_comm.bench.overlap.price import Beside, Span
from ep_comm.bench.overlap.report import (
    best_of,
    curves,
    document,
    render,
    title,
    write_json,
    write_plot,
    write_prices,
)
from ep_comm.bench.overlap.run import Run, run
from ep_comm.bench.overlap.settings import ExpertShape, GemmShape, OverlapSettings
from ep_comm.cli.common import wide_console
from ep_comm.errors import EPArgumentError
from ep_comm.job.exits import UserError

# ---- Settings ------------------------------------------------------------------------------------


def test_presets_can_be_measured():
    for shape in PRESETS.values():
        wanted = dataclasses.replace(SETTINGS, shape=shape)
        wanted.check()
        wanted.check_job(num_ranks=2, available_sms=132)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shape=Shape(0, 512, 8, 2)), "--tokens 0 must be positive"),
        (dict(gemms=(GemmShape(256, 100, 128),)), "--gemm 256x100x128: N and K must be multiples"),
        (dict(gemms=()), "nothing to run beside: pass --gemm, --model"),
        (dict(runs=2), "--runs 2 is too few"),
        (dict(wire="ce"), "--wire 'ce' is none of sm, copy-engine"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **changes).check()


def test_a_job_of_one_rank_is_refused():
    with pytest.raises(UserError, match="1 rank"):
        SETTINGS.check_job(num_ranks=1, available_sms=132)
    with pytest.raises(UserError, match="--sms 16 is neither"):
        SETTINGS.check_job(num_ranks=2, available_sms=8)


def test_a_wire_that_suits_no_such_job_is_refused():
    by_copy = dataclasses.replace(SETTINGS, wire="copy-engine")
    by_copy.check_job(num_ranks=2, available_sms=132)
    with pytest.raises(UserError, match="--wire copy-engine: .* of the 4 ranks: with num_topk 3"):
        by_copy.check_job(num_ranks=4, available_sms=132)


def test_lists():
    assert settings.parse_gemms("8x16x24, 32x8x8,8x16x24") == ((8, 16, 24), (32, 8, 8))
    assert settings.parse_layouts("rank,expert,rank") == ("rank", "expert")
    for text in ("8x16", "8x16x24x8", "", "8x-1x8"):
        with pytest.raises(UserError, match="must be MxNxK"):
            settings.parse_gemms(text)
    with pytest.raises(UserError, match="--layouts 'token' is none of expert, rank"):
        settings.parse_layouts("token")


def test_sizes_of_a_model():
    shape, experts = settings.of_model(Path("deepseek-v3-proxy"))
    assert shape == Shape(tokens=4096, hidden=7168, experts=64, topk=8)
    assert experts == ExpertShape("deepseek-v3-proxy", 7168, 2048)
    with pytest.raises(UserError, match="no such file"):
        settings.of_model(Path("no-such-model"))


# ---- Arithmetic ----------------------------------------------------------------------------------


def beside(gemms_end: float, *operations: tuple[float, float]) -> Beside:
    return Beside(gemms=Span(10, gemms_end), operations=tuple(Span(*span) for span in operations))


def test_lost_time_is_divided_by_the_operations_within():
    # GEMMs of 1000 took 1390; three operations, and half of a fourth, while they did.
    found = beside(1400, (20, 420), (420, 820), (820, 1200), (1200, 1600), (1600, 1700))
    assert found.operations_within == pytest.approx(3.5)
    assert found.lost(gemms_alone=1000) == pytest.approx(390 / 3.5)
    assert found.time_beside == 400  # of those that were beside GEMMs from begin to end


def test_operations_before_the_gemms_count_in_part():
    assert beside(1400, (0, 20), (20, 40)).operations_within == pytest.approx(1.5)


def test_no_operation_beside_is_no_price():
    with pytest.raises(ValueError, match="no operation"):
        beside(100, (100, 200)).lost(90)


def test_one_operation_longer_than_the_gemms():
    found = beside(110, (10, 410))
    assert found.time_beside == 400 and found.lost(80) == pytest.approx(20 / 0.25)


def test_serial_price():
    assert price.serial_price(together=4000, gemms_alone=2400, num_operations=8) == 200


def test_numbers_of_a_run():
    assert price.gemms_of_run(307, 10_000) == 33 and price.gemms_of_run(5000, 10_000) == 8
    # 10 000 µs of GEMMs and 222 µs alone: enough where both take half as long again.
    assert price.operations_of_run(222, 10_000) == 68
    assert price.operations_of_run(1e6, 10_000) == 4
    assert price.best([(0, 186), (64, 170), (32, 190), (16, 170)]) == 64


def test_tiles():
    assert gemm_tiles(4096, 4096) == 32 * 16 and gemm_tiles(1, 257) == 2
    gemm = gemms.dense(GemmShape(256, 512, 128), torch.device("cpu"))
    gemm.call()
    assert gemm.tiles == 4 and gemm.name == "256x512x128"


# ---- Results are checked -------------------------------------------------------------------------


def wrong_rows_of(rank: int, layout: str) -> dict[str, list[int]]:
    """Wrong rows of every operation: as it is, then with a byte of one rank's result changed."""
    device = torch.device("cpu")
    wanted = SETTINGS.operations(layout)
    inputs = make_inputs(wanted, rank, device)
    buffer = Buffer(None, wanted.buffer_config(device))
    found = {}
    for case in buffer_cases(buffer, inputs, wanted):
        for i, given in enumerate(inputs):
            out = case.call(i)
            alignment = 1 if layout == "rank" else 16
            want = check.expected(given, layout, alignment, wanted.shape.experts)
            wrong = [check.check(out, given, want)]
            for part in parts_of(out):
                kept = part.flatten()[-1].clone()
                if rank == 1:
                    part.view(torch.uint8).flatten()[-1] ^= 1
                wrong.append(check.check(out, given, want))
                part.flatten()[-1] = kept
            found[f"{case.name} {i}"] = wrong
    return found


def parts_of(out: object) -> tuple[torch.Tensor, ...]:
    rows = out.combined_x if hasattr(out, "combined_x") else out.recv_x
    return rows if isinstance(rows, tuple) else (rows,)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_one_wrong_byte_is_found(layout):
    first, second = run_ranks(2, wrong_rows_of, layout)
    assert first == second
    for name, (as_it_is, *changed) in first.items():
        if "to BF16" in name:  # nor is what it gives measured
            continue
        assert as_it_is == 0, name
        assert changed == [1] * (2 if name.startswith("FP8") else 1), name


# ---- What is written -----------------------------------------------------------------------------


def text_of(found: Run) -> str:
    console = wide_console(io.StringIO())
    with console.capture() as capture:
        console.print(render(found))
    return capture.get()


def test_the_best_sm_count_is_marked():
    text = text_of(made_up_run())
    assert "beside 4096x4096x7168: 307 µs alone, 512 tiles, 3.88 waves" in text
    rows = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in text.splitlines()
        if "expert-major" in line or "alltoall" in line
    ]
    case = "dispatch, cached, expert-major"
    assert rows == [
        [case, "all", "222", "159", "489", "186", "181", "193", "230", "yes", "0"],
        [case, "64*", "222", "159", "489", "170", "165", "177", "230", "yes", "0"],
        [case, "24", "222", "159", "489", "237", "232", "244", "230", "no", "0"],
        ["NCCL alltoall dispatch", "-", "222", "159", "489", "404", "399", "411", "230", "no", "0"],
    ]
    assert "WRONG" not in text and "VOID" not in text and "…" not in text


def test_slow_links_void_a_run():
    slow = dataclasses.replace(made_up_run(), limit=Limit(gb_per_s_by_sms={16: 90.0, 32: 92.0}))
    assert "VOID: the links carried 92.0 GB/s, below the 320 that a run needs" in text_of(slow)
    assert document(slow)["void"] and not document(made_up_run())["void"]


def test_wrong_results_are_said_in_red():
    found = made_up_run(made_up_price("combine", 0, 150, num_wrong=3))
    assert found.num_wrong == 3 and "WRONG RESULTS: 3 rows" in text_of(found)


def test_curves_are_of_one_gemm_and_layout():
    other = made_up_price("dispatch, cached", 0, 10, layout="rank")
    found = curves(made_up_run(other).prices)
    assert [len(curve) for curve in found.values()] == [3, 1, 1]
    assert best_of(found["4096x4096x7168", "dispatch, cached, expert-major"]).num_sms == 64
    assert title(made_up_run(), "4096x4096x7168").startswith("beside 4096x4096x7168: 307 µs")


def test_json_and_picture(tmp_path):
    write_json(made_up_run(), tmp_path / "bench-overlap.json")
    written = json.loads((tmp_path / "bench-overlap.json").read_text())
    assert {"date", "command", "commit", "versions", "gpus"} <= written.keys()
    assert written["settings"]["gemms"] == [{"m": 4096, "n": 4096, "k": 7168}]
    assert [each["is_best"] for each in written["prices"]] == [False, True, False, True]
    assert [each["pays"] for each in written["prices"]] == [True, True, False, False]
    assert written["prices"][0]["samples_us"]["lost"] == [181, 186, 193]
    assert written["limit"]["gb_per_s"] == 370 and written["limit"]["required_gb_per_s"] == 320
    assert written["prices"][0]["links_us"] == pytest.approx(58.7e6 / 370e3)
    write_plot(made_up_run(), tmp_path / "bench-overlap.png")
    assert (tmp_path / "bench-overlap.png").read_bytes().startswith(b"\x89PNG")


def test_prices_of_a_run(tmp_path):
    combine = made_up_price("combine", 32, 158)
    found = made_up_run(combine, made_up_price("FP8 dispatch, cached", 32, 90))
    path = tmp_path / "prices.json"
    write_prices(found, "NVIDIA H200", path)
    table = prices.read(path)
    assert (table.gpu, table.available_sms) == ("NVIDIA H200", 132)
    assert [(p.op, p.num_sms, p.lost_us) for p in table.prices] == [
        ("dispatch", 132, 186), ("dispatch", 64, 170), ("dispatch", 24, 237), ("combine", 32, 158)
    ]  # fmt: skip
    assert {(p.num_ranks, p.num_bytes, p.tiles, p.serial_us) for p in table.prices} == {
        (2, 24 * 512 * 2, 512, 230)
    }
    renewed = dataclasses.replace(found, prices=(dataclasses.replace(combine, lost=(120.0,) * 3),))
    write_prices(renewed, "NVIDIA H200", path)
    assert [(p.op, p.lost_us) for p in prices.read(path).prices][-1] == ("combine", 120)
    assert len(prices.read(path).prices) == 4
    with pytest.raises(EPArgumentError, match="of NVIDIA H100"):
        write_prices(found, "NVIDIA H100", path)


# ---- A run ---------------------------------------------------------------------------------------


def a_run(rank: int, wanted: OverlapSettings) -> tuple[Run, list[str]]:
    said: list[str] = []
    return run(wanted, torch.device("cuda", rank), said.append), said


@pytest.mark.multi_gpu
@pytest.mark.parametrize("wire", ["sm", "copy-engine"])
def test_run_on_gpus(wire):
    shape = Shape(tokens=256, hidden=512, experts=8, topk=3)
    wanted = dataclasses.replace(SETTINGS, shape=shape, layouts=("expert", "rank"), wire=wire)
    (found, said), (other, _) = run_ranks(2, a_run, wanted, backend="nccl")
    assert found == other  # each time is the slowest rank's
    ours = [each for each in found.prices if each.num_sms is not None]
    others = 2 + (wire == "copy-engine")  # copies without the rest of a dispatch
    assert len(ours) == 2 * 5 * 2 and len(found.prices) == len(ours) + others
    assert len(said) == 2 + 1 + len(found.prices)  # the limit, and the GEMM
    assert found.num_wrong == 0
    for each in found.prices:
        assert min(each.alone) > 0 and min(each.beside) > 0 and each.wire_bytes > 0
        assert len(each.lost) == len(each.serial) == 3
    assert found.gemm_us["256x512x128"] > 0
