"""Prices of asynchronous operations: the table, what is chosen by it, and tables that are wrong."""

from __future__ import annotations

import json

import pytest

from ep_comm.backends.nvlink import prices
from ep_comm.backends.nvlink.prices import Chooser, Price, PriceTable
from ep_comm.errors import EPArgumentError

W1 = 4096 * 7168 * 2
H200 = ("NVIDIA H200", 132)


def price(op="combine", num_sms=32, lost=150.0, **others) -> Price:
    kept = dict(layout="expert", num_ranks=2, num_bytes=W1, tiles=512, serial_us=200.0)
    return Price(op=op, num_sms=num_sms, lost_us=lost, **{**kept, **others})


def table(*found: Price) -> PriceTable:
    return PriceTable(gpu=H200[0], available_sms=H200[1], source="a test", prices=found)


def chosen(found: PriceTable, **changes) -> prices.Choice | None:
    wanted = dict(op="combine", layout="expert", num_ranks=2, num_bytes=W1, tiles=None)
    return found.choice(**{**wanted, **changes})


def test_the_shipped_table_says_what_was_measured_on_two_gpus(monkeypatch):
    monkeypatch.delenv(prices.VARIABLE, raising=False)
    shipped = prices.of_machine(*H200)
    assert shipped is not None
    for op in prices.OPS:
        for layout in ("expert", "rank"):
            choice = chosen(shipped, op=op, layout=layout)
            assert choice is not None and choice.num_sms >= 24 and choice.pays
    assert prices.of_machine("NVIDIA H100", 132) is None
    assert prices.of_machine(H200[0], 78) is None  # a part of one


def test_the_cheapest_sm_count_is_taken():
    found = table(price(num_sms=64, lost=183), price(lost=158), price(num_sms=24, lost=262))
    choice = chosen(found)
    assert (choice.num_sms, choice.lost_us, choice.pays) == (32, 158, True)


def test_what_costs_more_than_it_takes_does_not_pay():
    assert not chosen(table(price(lost=200.0))).pays
    assert chosen(table(price(lost=199.9))).pays


def test_the_nearest_group_bytes_and_tiles_count_in_this_order():
    found = table(
        price(num_sms=10, num_ranks=2),
        price(num_sms=20, num_ranks=8, num_bytes=W1 // 16),
        price(num_sms=30, num_ranks=8, num_bytes=W1, tiles=64),
        price(num_sms=40, num_ranks=8, num_bytes=W1, tiles=512),
    )
    assert chosen(found, num_ranks=3).num_sms == 10
    assert chosen(found, num_ranks=8, num_bytes=W1 // 8).num_sms == 20
    assert chosen(found, num_ranks=8, tiles=100).num_sms == 30
    assert chosen(found, num_ranks=8, tiles=10_000).num_sms == 40
    assert chosen(found, num_ranks=8, num_bytes=0).num_sms == 20


def test_without_tiles_the_mean_of_all_gemms_counts():
    found = table(
        price(num_sms=16, lost=100, tiles=64),
        price(num_sms=16, lost=300, tiles=512),
        price(num_sms=32, lost=180, tiles=64),
        price(num_sms=32, lost=190, tiles=512),
    )
    assert chosen(found).num_sms == 32 and chosen(found).lost_us == 185
    assert chosen(found, tiles=64).num_sms == 16


def test_a_layout_that_was_not_measured_has_the_others_prices():
    found = table(price(), price(op="dispatch", num_sms=64))
    assert chosen(found, layout="rank").num_sms == 32
    assert chosen(found, op="dispatch", layout="rank").num_sms == 64
    assert chosen(table(price()), op="dispatch") is None


def test_a_chooser_follows_the_gemm_beside():
    found = table(price(num_sms=16, tiles=64), price(num_sms=32, tiles=512, lost=140))
    chooser = Chooser(found, num_ranks=2)
    assert chooser.choice("combine", "expert", W1).num_sms == 32
    chooser.tiles = 64
    assert chooser.choice("combine", "expert", W1).num_sms == 16
    assert Chooser(None, 2).choice("combine", "expert", W1) is None


def test_tables_are_read_as_they_are_written(tmp_path):
    found = table(price(), price(op="dispatch", lost=1.5))
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(found.document()))
    assert prices.read(path) == found


def test_renewing_replaces_what_was_measured_again():
    old = table(price(num_sms=16), price(num_sms=24), price(op="dispatch"), price(tiles=64))
    renewed = old.merged(table(price(num_sms=40, lost=1.0)))
    assert renewed.prices == (price(op="dispatch"), price(tiles=64), price(num_sms=40, lost=1.0))


def test_a_table_of_another_machine_is_named(tmp_path, monkeypatch):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(table(price()).document()))
    monkeypatch.setenv(prices.VARIABLE, str(path))
    assert prices.of_machine(*H200) == table(price())
    with pytest.raises(EPArgumentError, match=r"NVIDIA H200 with 132 SMs.*NVIDIA B200 with 148"):
        prices.of_machine("NVIDIA B200", 148)
    with pytest.raises(EPArgumentError, match="the table to be renewed"):
        table(price()).merged(PriceTable(gpu="B", available_sms=1, source="", prices=()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(op="gather"), "price 0: op 'gather' is none of dispatch"),
        (dict(layout="token"), "layout 'token'"),
        (dict(num_sms=133), "num_sms 133 is not in 2 to 132"),
        (dict(num_bytes=0), "num_bytes must be a positive integer"),
        (dict(lost_us="150"), "lost_us must be a number, got '150'"),
        (dict(speed=7), "speed"),
    ],
)
def test_a_bad_table_is_named(tmp_path, changes, message):
    document = table(price()).document()
    document["prices"][0].update(changes)
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(document))
    with pytest.raises(EPArgumentError, match=message) as error:
        prices.read(path)
    assert str(path) in str(error.value)


def test_a_table_without_its_machine_is_named(tmp_path):
    document = table(price()).document()
    del document["gpu"]
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(document))
    with pytest.raises(EPArgumentError, match="prices.json is no table of prices: it has no 'gpu'"):
        prices.read(path)


def test_no_file_and_no_json_are_named(tmp_path):
    with pytest.raises(EPArgumentError, match="cannot read the table of prices .*no-such"):
        prices.read(tmp_path / "no-such.json")
    path = tmp_path / "prices.json"
    path.write_text("{")
    with pytest.raises(EPArgumentError, match="is no table of prices"):
        prices.read(path)
