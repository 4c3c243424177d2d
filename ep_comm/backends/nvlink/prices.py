"""What asynchronous operations cost the GEMMs beside them, as measured, and what follows from it.

``ep-comm bench overlap --write FILE`` measures; the table that we ship is ``prices.json``. A table
is of one kind of GPU. `VARIABLE` names another one than ours.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from ep_comm.errors import EPArgumentError
from ep_comm.numeric import ceil_div, is_int, is_number
from ep_comm.routing.types import RowLayout

VARIABLE = "EP_COMM_PRICES"
# A tile of the output that one SM computes, as cuBLAS takes it for large BF16 GEMMs on Hopper.
TILE_M, TILE_N = 128, 256
SHIPPED = Path(__file__).with_name("prices.json")
OPS = ("dispatch", "combine")


@dataclass(frozen=True, kw_only=True)
class Price:
    """One operation with one SM count beside one GEMM.

    Attributes:
        op: "dispatch" or "combine".
        layout: Order of the rows.
        num_ranks: Of the group.
        num_bytes: Tokens of a rank times bytes of a row.
        tiles: Of the GEMM's output, see `gemm_tiles`.
        num_sms: SMs of the operation.
        lost_us: GEMM time that it took.
        serial_us: What it takes between GEMMs, with all SMs.
    """

    op: str
    layout: RowLayout
    num_ranks: int
    num_bytes: int
    tiles: int
    num_sms: int
    lost_us: float
    serial_us: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How an asynchronous operation runs.

    Attributes:
        num_sms: SMs that cost the GEMMs beside it least.
        lost_us: What it costs them, where that was measured.
        serial_us: What it takes between GEMMs.
    """

    num_sms: int
    lost_us: float
    serial_us: float

    @property
    def pays(self) -> bool:
        """Whether GEMMs lose less to it than it takes between them."""
        return self.lost_us < self.serial_us


@dataclass(frozen=True, kw_only=True)
class PriceTable:
    """What was measured on one kind of machine.

    Attributes:
        gpu: Name of its GPUs.
        available_sms: Of each.
        source: Where the figures come from.
        prices: In no order.
    """

    gpu: str
    available_sms: int
    source: str
    prices: tuple[Price, ...]

    def choice(
        self, op: str, layout: RowLayout, num_ranks: int, num_bytes: int, tiles: int | None
    ) -> Choice | None:
        """Return how an operation runs best, by what was measured nearest to it.

        The group's size counts before bytes, and bytes before tiles: distances are ratios.

        Args:
            op: "dispatch" or "combine".
            layout: Order of the rows; where it was not measured the other one's prices serve.
            num_ranks: Of the group.
            num_bytes: Tokens of a rank times bytes of a row.
            tiles: Of the GEMM beside; None where nobody has said: then the mean of all.

        Returns:
            None where nothing was measured of this operation.
        """
        found = [price for price in self.prices if price.op == op]
        found = [price for price in found if price.layout == layout] or found
        found = _nearest(found, "num_ranks", num_ranks)
        found = _nearest(found, "num_bytes", num_bytes)
        if tiles is not None:
            found = _nearest(found, "tiles", tiles)
        if not found:
            return None
        choices = [
            Choice(
                num_sms=num_sms,
                lost_us=fmean(price.lost_us for price in found if price.num_sms == num_sms),
                serial_us=fmean(price.serial_us for price in found if price.num_sms == num_sms),
            )
            for num_sms in sorted({price.num_sms for price in found})
        ]
        return min(choices, key=lambda choice: choice.lost_us)

    def merged(self, other: PriceTable) -> PriceTable:
        """Return this table with the other one's prices, instead of those of the same operations.

        Raises:
            EPArgumentError: They are of different machines.
        """
        other.check_machine(self.gpu, self.available_sms, "the table to be renewed")
        new = {_what(price) for price in other.prices}
        kept = tuple(price for price in self.prices if _what(price) not in new)
        return replace(other, prices=kept + other.prices)  # the machine is the same

    def check_machine(self, gpu: str, available_sms: int, what: str) -> None:
        """Refuse a table of another machine than `what`'s.

        Raises:
            EPArgumentError: Names both.
        """
        if (gpu, available_sms) != (self.gpu, self.available_sms):
            raise EPArgumentError(
                f"a table of prices is of {self.gpu} with {self.available_sms} SMs, and {what} is "
                f"of {gpu} with {available_sms}: measure with ep-comm bench overlap --write"
            )

    def document(self) -> dict[str, Any]:
        """Return what `read` takes."""
        return {**asdict(self), "prices": [asdict(price) for price in self.prices]}


def read(path: Path) -> PriceTable:
    """Read a table.

    Raises:
        EPArgumentError: It is none; names the file, and what is wrong with it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        table = PriceTable(
            gpu=document["gpu"],
            available_sms=document["available_sms"],
            source=document["source"],
            prices=tuple(Price(**price) for price in document["prices"]),
        )
    except OSError as error:
        raise EPArgumentError(f"cannot read the table of prices {path}: {error.strerror}") from None
    except KeyError as error:
        raise EPArgumentError(f"{path} is no table of prices: it has no {error}") from None
    except (ValueError, TypeError) as error:
        raise EPArgumentError(f"{path} is no table of prices: {error}") from None
    for i, price in enumerate(table.prices):
        _check(price, table.available_sms, f"{path}, price {i}")
    return table


def of_machine(gpu: str, available_sms: int) -> PriceTable | None:
    """Return the table for a machine; None where nobody has measured one like it.

    Raises:
        EPArgumentError: The table that `VARIABLE` names cannot be used here.
    """
    named = os.environ.get(VARIABLE)
    table = read(Path(named) if named else SHIPPED)
    if named:
        table.check_machine(gpu, available_sms, f"this machine ({VARIABLE}={named})")
    return table if (table.gpu, table.available_sms) == (gpu, available_sms) else None


def gemm_tiles(m: int, n: int) -> int:
    """Return the tiles of an output [m, n]: over the GPU's SMs that is the number of waves."""
    return ceil_div(m, TILE_M) * ceil_div(n, TILE_N)


class Chooser:
    """Chooses for the operations of one group, and remembers what it chose.

    Args:
        table: Of this machine; None where there is none.
        num_ranks: Of the group.

    Attributes:
        tiles: Of the GEMM that runs beside asynchronous operations; None where nobody has said.
    """

    def __init__(self, table: PriceTable | None, num_ranks: int) -> None:
        self.tiles: int | None = None
        self._table = table
        self._num_ranks = num_ranks
        self._choose = lru_cache(maxsize=256)(self._choose_anew)

    def choice(self, op: str, layout: RowLayout, num_bytes: int) -> Choice | None:
        """Return how an asynchronous operation runs; None where nothing was measured."""
        # Numbers of tokens change from call to call, choices only with their order of magnitude.
        return self._choose(op, layout, num_bytes.bit_length(), self.tiles)

    def _choose_anew(
        self, op: str, layout: RowLayout, num_bits: int, tiles: int | None
    ) -> Choice | None:
        if self._table is None:
            return None
        middle = 3 << num_bits >> 2  # of the numbers with so many bits
        return self._table.choice(op, layout, self._num_ranks, middle, tiles)


def _what(price: Price) -> tuple:
    return price.op, price.layout, price.num_ranks, price.num_bytes, price.tiles


def _nearest(prices: list[Price], name: str, wanted: int) -> list[Price]:
    """Return the prices whose attribute has the smallest ratio to what is wanted."""

    def distance(price: Price) -> float:
        return abs(math.log(getattr(price, name) / max(wanted, 1)))

    least = min(map(distance, prices), default=0.0)
    return [price for price in prices if distance(price) == least]


def _check(price: Price, available_sms: int, where: str) -> None:
    for field in fields(price):
        value = getattr(price, field.name)
        if field.name == "op" and value not in OPS:
            raise EPArgumentError(f"{where}: op {value!r} is none of {', '.join(OPS)}")
        if field.name == "layout" and value not in get_args(RowLayout):
            raise EPArgumentError(f"{where}: layout {value!r} is none of expert, rank")
        if field.name.startswith("num_") or field.name == "tiles":
            if not is_int(value) or value < 1:
                raise EPArgumentError(
                    f"{where}: {field.name} must be a positive integer, got {value!r}"
                )
        if field.name.endswith("_us") and not is_number(value):
            raise EPArgumentError(f"{where}: {field.name} must be a number, got {value!r}")
    if not 2 <= price.num_sms <= available_sms:
        raise EPArgumentError(f"{where}: num_sms {price.num_sms} is not in 2 to {available_sms}")
