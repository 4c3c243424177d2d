"""EPOptions: one definition for own loops, flags and docs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from ep_comm.errors import EPArgumentError
from ep_comm.markdown import with_tables
from ep_comm.megatron import EPOptions, tables
from ep_comm.megatron.launch.flags import add_flags
from ep_comm.megatron.options import OPTIONS, flag_of

DOCS = Path(__file__).parents[2] / "docs"


def test_every_field_has_a_flag_a_key_and_words():
    assert [each.name for each in OPTIONS] == [f.name for f in dataclasses.fields(EPOptions)]
    for each in OPTIONS:
        assert each.flag.startswith("--ep-") and each.help.endswith(".")
        assert each.flag == f"--{each.key.replace('_', '-')}"
        assert (each.default is None) == bool(each.unset), each.name
        assert (each.value_type is bool) == (each.metavar is None), each.name
        assert not each.choices or each.value_type is str, each.name
    timeout = next(each for each in OPTIONS if each.name == "timeout_s")
    assert (timeout.flag, timeout.key, timeout.value_type) == ("--ep-timeout", "ep_timeout", float)
    assert flag_of("timeout_s") == "--ep-timeout"


def test_flags_leave_values_of_the_fields_types():
    parser = argparse.ArgumentParser()
    add_flags(parser, ["deepep"])
    line = "--ep-num-sms 8 --ep-timeout 5 --ep-fp8-dispatch --no-ep-overlap-wgrad"
    assert vars(parser.parse_args(line.split())) == {
        "ep_num_sms": 8,
        "ep_timeout": 5.0,
        "ep_fp8_dispatch": True,
        "ep_overlap_wgrad": False,
    }
    help = " ".join(parser.format_help().split())
    for each in OPTIONS:
        assert each.full_help.split(":")[0] in help


def test_the_page_has_the_current_tables():
    """If not: python -m ep_comm.megatron.tables docs/megatron.md."""
    page = (DOCS / "megatron.md").read_text()
    assert with_tables(page, tables.TABLES) == page
    for name in tables.TABLES:
        assert f"<!-- table: {name} -->" in page
    for each in OPTIONS:
        assert f"`{each.flag}" in page


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8_dispatch", 1),
        ("overlap_wgrad", None),
        ("num_sms", 1),
        ("num_sms", 2.5),
        ("timeout_s", 0),
        ("timeout_s", "7"),
        ("expert_alignment", 0),
        ("max_tokens_per_rank", 0),
        ("max_tokens_per_rank", True),
        ("capacity_factor", 0.99),
        ("capacity_factor", float("nan")),
        ("capacity_factor", True),
        ("overflow", "raise"),
    ],
)
def test_values_are_checked(name, value):
    with pytest.raises(EPArgumentError, match=name):
        EPOptions(**{name: value})
