"""How many SMs an operation takes: as the caller says, or what costs GEMMs beside it least."""

from __future__ import annotations

from ep_comm.backends.nvlink.prices import Chooser, PriceTable
from ep_comm.backends.nvlink.tuning import default_sms
from ep_comm.errors import EPArgumentError
from ep_comm.routing.types import RowLayout


class Sms:
    """The SMs of one buffer's operations.

    Args:
        available: Of the GPU.
        fewest: That an operation's kernels can run on.
        by_copy: Whether copy engines move rows.
        prices: Measured on this machine; None where nobody has.
        num_ranks: Of the group.

    Attributes:
        available: As passed.
        is_overlapped: Whether computation runs beside all operations.
        chooser: Chooses by the prices.
    """

    def __init__(
        self,
        available: int,
        fewest: int,
        by_copy: bool,
        prices: PriceTable | None,
        num_ranks: int,
    ) -> None:
        self.available = available
        self.is_overlapped = False
        self.chooser = Chooser(prices, num_ranks)
        self._fewest = fewest
        self._by_copy = by_copy
        self._limit: int | None = None

    @property
    def most(self) -> int:
        """What an operation may occupy."""
        return self._limit or self.available

    def limit(self, num_sms: int | None) -> None:
        """Have operations take so many; None leaves it to this class.

        Raises:
            EPArgumentError: It is too few, or the GPU has fewer.
        """
        if num_sms is not None and not self._fewest <= num_sms <= self.available:
            raise EPArgumentError(
                f"num_sms must be {self._fewest} to {self.available}, or None, got {num_sms}"
            )
        self._limit = num_sms

    def of(self, asynchronous: bool) -> int:
        """Return the SMs of an operation that has no price."""
        return self._limit or default_sms(
            self.available, asynchronous or self.is_overlapped, self._by_copy
        )

    def of_rows(self, op: str, layout: RowLayout, num_bytes: int, asynchronous: bool) -> int:
        """Return the SMs of a dispatch or a combine, of so many tokens times bytes of a row."""
        if self._limit is None and (asynchronous or self.is_overlapped):
            choice = self.chooser.choice(op, layout, num_bytes)
            if choice is not None:
                return choice.num_sms
        return self.of(asynchronous)

    def loss(self, op: str, layout: RowLayout, num_bytes: int) -> str | None:
        """Return why an operation is not to run beside GEMMs, by the prices of this machine."""
        choice = self.chooser.choice(op, layout, num_bytes)
        if choice is None or choice.pays or self._limit is not None:
            return None
        return (
            f"it would cost the GEMMs beside it {choice.lost_us:.0f} µs, and takes "
            f"{choice.serial_us:.0f} between them"
        )
