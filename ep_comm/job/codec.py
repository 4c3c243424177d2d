"""What ranks tell each other, as JSON: no bytes of another process are ever run as code.

Pickle calls what its bytes name. Here a reader builds plain values, and records: dataclasses and
named tuples of this package, which check their own fields.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, str)
_PACKAGE = __package__.partition(".")[0]


class CodecError(ValueError):
    """Bytes that `dumps` has not made, or a value that it cannot take."""


def dumps(value: object) -> bytes:
    """Return `value` as bytes.

    Args:
        value: Plain values, paths, types of tensors, records of this package; and lists, tuples and
            dictionaries of them.

    Raises:
        CodecError: It is, or has in it, something else.
    """
    return json.dumps(_encoded(value), separators=(",", ":")).encode()


def loads(data: bytes) -> Any:
    """Return the value that `dumps` was given.

    Raises:
        CodecError: Says what is wrong with the bytes.
    """
    try:
        return _decoded(json.loads(data))
    except CodecError:
        raise
    except (RecursionError, Exception) as error:  # whatever a record says of its fields
        raise CodecError(f"{type(error).__name__}: {error}") from error


def _encoded(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [_encoded(each) for each in value]
    if type(value) is tuple:
        return {"tuple": [_encoded(each) for each in value]}
    if type(value) in (dict, Counter):
        return {"dict": [[_encoded(key), _encoded(each)] for key, each in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    names = _field_names(type(value))
    return {
        "record": f"{type(value).__module__}:{type(value).__qualname__}",
        "fields": {name: _encoded(getattr(value, name)) for name in names},
    }


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"record", "fields"}:
        fields = {name: _decoded(each) for name, each in value["fields"].items()}
        return _record_type(value["record"])(**fields)
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(_decoded(each) for each in inner)
    if kind == "dict":
        return {_decoded(key): _decoded(each) for key, each in inner}
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "path":
        return Path(inner)
    if kind == "dtype" and isinstance(found := getattr(torch, inner, None), torch.dtype):
        return found
    raise CodecError(f"no value of this package: {kind!r}")


def _record_type(text: str) -> type:
    """Return the class with that name, which has to be one of our records, and loaded."""
    module, _, name = text.partition(":")
    found = None
    if module.partition(".")[0] == _PACKAGE:
        found = getattr(sys.modules.get(module), name, None)
    if not isinstance(found, type) or found.__module__ != module:
        raise CodecError(f"no record of this package: {text!r}")
    _field_names(found)
    return found


def _field_names(kind: type) -> tuple[str, ...]:
    if kind.__module__.partition(".")[0] == _PACKAGE:
        if dataclasses.is_dataclass(kind):
            return tuple(field.name for field in dataclasses.fields(kind) if field.init)
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return kind._fields
    raise CodecError(f"cannot send a {kind.__module__}.{kind.__qualname__} to other ranks")
