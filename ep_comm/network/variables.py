"""Kinds of NVSHMEM's variables: which values they take, and how these are written."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from ep_comm.numeric import is_int

PREFIX = "NVSHMEM_"

_YES, _NO = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off")
_SCALES = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)([kmgt]?)", re.IGNORECASE)


class Kind:
    """What a variable may be. `allowed` says it for messages and pages."""

    allowed: str

    def parse(self, text: str) -> Any:
        """Return the value that a variable's text stands for.

        Raises:
            ValueError: It stands for none.
        """
        return text

    def allows(self, value: object) -> bool:
        """Return whether a field may have this value."""
        raise NotImplementedError

    def text(self, value: Any) -> str:
        """Return what the variable has to be for this value."""
        return str(value)

    def show(self, value: Any) -> str:
        """Return the value for people."""
        return self.text(value)


class Whole(Kind):
    """An integer between bounds."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.allowed = f"an integer from {low} to {high}"

    def parse(self, text: str) -> int:
        """Return the integer."""
        return int(text)

    def allows(self, value: object) -> bool:
        """Return whether it is one, and within the bounds."""
        return is_int(value) and self.low <= value <= self.high


class Size(Kind):
    """A positive number of bytes; the variable may have a suffix k, m, g or t."""

    allowed = "a positive number of bytes, in the variable also with suffix k, m, g or t"

    def parse(self, text: str) -> int:
        """Return bytes."""
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(text)
        number, suffix = match.groups()
        return int(float(number) * 2 ** _SCALES[suffix.lower()])

    def allows(self, value: object) -> bool:
        """Return whether it is a positive integer."""
        return is_int(value) and value > 0

    def show(self, value: int) -> str:
        """Return it in the largest unit that divides it."""
        for suffix, unit in ((" GiB", 2**30), (" MiB", 2**20), (" KiB", 2**10)):
            if value % unit == 0:
                return f"{value // unit}{suffix}"
        return str(value)


class PowerSize(Size):
    """A number of bytes that is a power of two."""

    def __init__(self, low: int) -> None:
        self.low = low
        self.allowed = f"a power of two of at least {self.show(low)}"

    def allows(self, value: object) -> bool:
        """Return whether it is one."""
        return super().allows(value) and value >= self.low and not value & (value - 1)  # type: ignore[operator]  # it is an int


class Switch(Kind):
    """On or off. An `inverted` one is a variable that switches the thing off."""

    def __init__(self, *, inverted: bool = False) -> None:
        self.inverted = inverted
        self.allowed = "0 or 1"

    def parse(self, text: str) -> bool:
        """Return whether the thing is on."""
        if text.lower() not in _YES + _NO:
            raise ValueError(text)
        return (text.lower() in _YES) != self.inverted

    def allows(self, value: object) -> bool:
        """Return whether it is a bool."""
        return isinstance(value, bool)

    def text(self, value: bool) -> str:
        """Return 0 or 1."""
        return str(int(value != self.inverted))

    def show(self, value: bool) -> str:
        """Return on or off."""
        return "on" if value else "off"


class Word(Kind):
    """One of several words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.allowed = f"one of {', '.join(words)}"

    def allows(self, value: object) -> bool:
        """Return whether it is among them."""
        return value in self.words


class Name(Kind):
    """A name of something on the host."""

    def __init__(self, what: str) -> None:
        self.allowed = f"the name of {what}"

    def allows(self, value: object) -> bool:
        """Return whether it is one word."""
        return isinstance(value, str) and re.fullmatch(r"[^\s,]+", value) is not None


class Cards(Kind):
    """A list of network cards, a tuple of text in the settings."""

    def __init__(self, form: str, example: str) -> None:
        self._form = re.compile(form)
        self.allowed = f"a list such as {example}"

    def parse(self, text: str) -> tuple[str, ...]:
        """Return its parts."""
        return tuple(part.strip() for part in text.split(","))

    def allows(self, value: object) -> bool:
        """Return whether every part has the form."""
        return isinstance(value, tuple) and all(
            isinstance(part, str) and self._form.fullmatch(part) for part in value
        )

    def text(self, value: tuple[str, ...]) -> str:
        """Return the parts with commas."""
        return ",".join(value)


class Variable(NamedTuple):
    """A field of the settings.

    Attributes:
        field: Its name.
        name: The variable's, without the prefix.
        kind: What it may be.
        unit: Of the value; "" where it has none.
        help: What it does.
        default: Of the field.
        theirs: NVSHMEM's own default, where ours is another; None where it is the same.
    """

    field: str
    name: str
    kind: Kind
    unit: str
    help: str
    default: Any
    theirs: str | None

    @property
    def full_name(self) -> str:
        """The variable's name in the environment."""
        return PREFIX + self.name


def variable(
    default: Any, name: str, kind: Kind, help: str, *, unit: str = "", theirs: str | None = None
) -> Any:
    """Return a field of the settings; see `Variable`."""
    metadata = {"name": name, "kind": kind, "unit": unit, "help": help, "theirs": theirs}
    return dataclasses.field(default=default, metadata=metadata)


def variables_of(settings: type) -> tuple[Variable, ...]:
    """Return the variables of a class whose fields `variable` made."""
    return tuple(
        Variable(field=field.name, default=field.default, **field.metadata)
        for field in dataclasses.fields(settings)
    )
