"""Ids of parametrized tests: a few words that tell a case from the others, no reprs of objects."""

from __future__ import annotations

import dataclasses
import enum
import re
from pathlib import Path
from typing import Any

import torch

_MAX_LENGTH = 40  # of one value; a test's id joins those of all its parameters
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}


def id_of(name: str, value: Any) -> str:
    """Return a text without spaces for parameter `name`, cut after a word where it is long.

    A dataclass shows the fields that differ from their defaults, uncut.

    Raises:
        TypeError: Nothing short can be said of `value`: the test has to give the id.
    """
    if _is_dataclass(value):
        return _text(value)
    if isinstance(value, (int, float)) and not isinstance(value, (bool, enum.Enum)):
        return f"{name}={value}"
    if isinstance(value, torch.Tensor) or value:
        return name if value is True else _cut(_text(value))
    return f"no-{name}"  # False, None, an empty one


def _text(value: Any) -> str:
    if isinstance(value, str):
        return re.sub(r"[^\w.=%+<>/-]+", "-", value).strip("-")
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value) or str(value).removeprefix("torch.")
    if isinstance(value, torch.Tensor):
        return f"{_text(value.dtype)}-{'x'.join(map(str, value.shape))}"
    if isinstance(value, Path):
        return value.name
    if isinstance(value, dict):
        return ",".join(f"{key}={_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        words = all(isinstance(item, str) for item in value)
        return ("-" if words else ",").join(map(_text, value))
    if _is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return _text({field.name: got for field, got in fields if got != field.default})
    if isinstance(value, type):
        return value.__name__
    raise TypeError(f"no short id for {value!r}: give it one, as pytest.param(..., id=...)")


def _is_dataclass(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _cut(text: str) -> str:
    if len(text) <= _MAX_LENGTH:
        return text
    whole_words = re.match(rf".{{8,{_MAX_LENGTH}}}(?=[-,])", text)
    return whole_words.group().rstrip("-,") if whole_words else text[:_MAX_LENGTH]
