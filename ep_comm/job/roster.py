"""Which ranks of a buffer go on, as those that do agree in torch.distributed's store.

Ranks may have died, or may come late. So nobody waits for ranks that are to be left out, and what
was agreed stands in the store as one word, which only one rank can change, and only once: whoever
comes later finds out there. The store goes with the process that holds it.
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch.distributed as dist

from ep_comm.errors import EPMismatchError, EPStateError, EPTimeoutError
from ep_comm.job.store import store_errors

_POLL_S = 5e-3
_MOST = 2**62  # of what ranks count


class _State(NamedTuple):
    """What was agreed last: the number of the agreement, and the ranks that are left out."""

    number: int
    masked: tuple[int, ...]


class _Word(NamedTuple):
    """What a rank that has come says.

    Attributes:
        masked: Whom it wants to leave out; None for those that do not come.
        answer: See `Roster.agree`; None once it has given up.
    """

    masked: tuple[int, ...] | None
    answer: int | None

    @property
    def has_left(self) -> bool:
        """Whether it has given up since."""
        return self.answer is None


class Roster:
    """The ranks of one buffer that take part, as this rank has agreed on with them.

    Args:
        store: Where they meet.
        name: The buffer's, the same on all ranks and of no other one.
        rank: This process's.
        num_ranks: Of the buffer.
        timeout_s: Bound of a wait of the buffer.

    Attributes:
        masked: The ranks that are left out, ascending.
    """

    def __init__(
        self, store: dist.Store, name: str, rank: int, num_ranks: int, timeout_s: float
    ) -> None:
        self.masked: tuple[int, ...] = ()
        self._store = store
        self._state_key = f"{name}/roster"
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._number = 0

    def latest(self) -> tuple[int, ...]:
        """Return the ranks that are left out by now, whoever has agreed on it."""
        with self._store_errors():
            return self._state()[0].masked

    def agree(self, op: str, masked: tuple[int, ...] | None, answer: int) -> list[int]:
        """Agree with all ranks that are not to be left out. Collective among these.

        A rank that has to wait for others before it gives up comes one timeout later than the
        first. So the wait is bounded by twice the timeout.

        Args:
            op: The call, for errors.
            masked: The ranks to leave out, which is waited for by nobody; None for those that do
                not come, beside those that are left out already.
            answer: What this rank has to say.

        Returns:
            What all ranks that take part have said, in rank order.

        Raises:
            EPTimeoutError: Names the ranks that did not come. All is as before.
            EPMismatchError: Ranks want to leave out different ones. All is as before.
            EPStateError: The others have left this rank out; or the store is gone.
        """
        with self._store_errors():
            return self._agree(op, masked, answer)

    def store(self) -> dist.Store:
        """Return a store of those that have agreed last, for that time alone."""
        return dist.PrefixStore(f"{self._state_key}/{self._number}", self._store)

    def meet(self, op: str) -> None:
        """Wait until all ranks that take part have come to this. Collective among these.

        Raises:
            EPTimeoutError: Names the ranks that did not come.
            EPStateError: The store is gone.
        """
        with self._store_errors():
            self._store.set(self._key(self._rank, "/ready"), "1")
            late = set(range(self._num_ranks)) - set(self.masked)
            deadline = time.monotonic() + self._timeout_s
            while late := {r for r in late if not self._store.check([self._key(r, "/ready")])}:
                if time.monotonic() > deadline:
                    raise self._timeout(op, "refill", late, self._timeout_s)
                time.sleep(_POLL_S)

    # --- agreeing --------------------------------------------------------------------------------

    def _agree(self, op: str, wanted: tuple[int, ...] | None, answer: int) -> list[int]:
        state, raw = self._state()
        if self._rank in state.masked and wanted != ():
            raise self._left_out()
        self._number = state.number + 1
        self._post(wanted, answer)
        everyone = set(range(self._num_ranks))
        expected = everyone - set(state.masked if wanted is None else wanted)
        bound_s = 2 * self._timeout_s
        deadline = time.monotonic() + bound_s
        while True:
            decided = self._state()[0]
            if decided.number > state.number:
                return self._take(decided)
            is_over = time.monotonic() > deadline
            words = {r: word for r in sorted(expected) if (word := self._word(r)) is not None}
            here = {r for r, word in words.items() if word.masked == wanted and not word.has_left}
            disagrees = [(r, word.masked) for r, word in words.items() if word.masked != wanted]
            if here == expected or (is_over and wanted is None and not disagrees):
                text = json.dumps([self._number, sorted(everyone - here)])
                self._store.compare_set(self._state_key, raw, text)  # or another rank was first
            elif is_over:
                self._post(wanted, None)
                if disagrees:
                    raise self._mismatch(op, wanted, *disagrees[0])
                raise self._timeout(op, "meeting", expected - here, bound_s)
            else:
                time.sleep(_POLL_S)

    def _take(self, decided: _State) -> list[int]:
        """Return the answers of those that take part in what was decided."""
        if self._rank in decided.masked:
            raise self._left_out()
        self.masked = decided.masked
        words = [self._word(r) for r in range(self._num_ranks) if r not in self.masked]
        return [word.answer for word in words if word and word.answer is not None]

    def _state(self) -> tuple[_State, str]:
        """Return what was agreed last, and its text in the store."""
        if not self._store.check([self._state_key]):
            return _State(0, ()), ""
        text = self._store.get(self._state_key).decode(errors="replace")
        number, masked = self._checked(text)
        if number is None or masked is None:
            raise self._unreadable(text)
        return _State(number, masked), text

    def _post(self, masked: tuple[int, ...] | None, answer: int | None) -> None:
        self._store.set(self._key(self._rank), json.dumps([masked, answer]))

    def _word(self, rank: int) -> _Word | None:
        """Return what a rank has said in the agreement that is on its way, or None."""
        key = self._key(rank)
        if not self._store.check([key]):  # nothing is ever deleted: `get` finds it
            return None
        answer, masked = self._checked(self._store.get(key).decode(errors="replace"), is_word=True)
        return _Word(masked, answer)

    def _checked(
        self, text: str, is_word: bool = False
    ) -> tuple[int | None, tuple[int, ...] | None]:
        """Return the number and the ranks of what stands in the store, whoever has written it."""
        try:
            first, second = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            raise self._unreadable(text) from None
        number, ranks = (second, first) if is_word else (first, second)
        if not (number is None or (type(number) is int and 0 <= number < _MOST)):
            raise self._unreadable(text)
        if ranks is None:
            return number, None
        if not isinstance(ranks, list) or any(type(rank) is not int for rank in ranks):
            raise self._unreadable(text)
        if sorted({*ranks} & {*range(self._num_ranks)}) != ranks:
            raise self._unreadable(text)
        return number, tuple(ranks)

    def _unreadable(self, text: str) -> EPMismatchError:
        return EPMismatchError(
            f"rank {self._rank} cannot read what another rank says of masks: {text[:80]!r}. Every "
            "rank must run the same version of ep_comm."
        )

    def _key(self, rank: int, phase: str = "") -> str:
        return f"{self._state_key}/{self._number}/{rank}{phase}"

    # --- errors ----------------------------------------------------------------------------------

    def _timeout(self, op: str, phase: str, late: set[int], timeout_s: float) -> EPTimeoutError:
        return EPTimeoutError(
            op=op,
            phase=phase,
            rank=self._rank,
            late_ranks=tuple(sorted(late)),
            epoch=self._number,
            timeout_s=timeout_s,
        )

    def _mismatch(
        self, op: str, mine: tuple[int, ...] | None, rank: int, theirs: tuple[int, ...] | None
    ) -> EPMismatchError:
        return EPMismatchError(
            f"{op}: ranks disagree: rank {self._rank} wants {_named(mine)}, rank {rank} "
            f"{_named(theirs)}. All that are to go on call it with the same ranks; or without any, "
            "to mask those that do not come"
        )

    def _left_out(self) -> EPStateError:
        return EPStateError(
            f"rank {self._rank} itself was masked by the others, which go on without it: it can "
            "come back when all ranks call clear_mask"
        )

    def _store_errors(self) -> AbstractContextManager[None]:
        return store_errors(self._rank, "ranks agreed on masks")


def _named(masked: tuple[int, ...] | None) -> str:
    if masked is None:
        return "whoever does not come masked"
    return f"rank {', '.join(map(str, masked))} masked" if masked else "no rank masked"
