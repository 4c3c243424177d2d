"""The C interface of the CUDA library, read from ``ep_comm.h``, which documents every field.

What it declares is here under names of Python's style: constants as they are, ``ep_plan_args`` as
the ctypes structure `PlanArgs`. So the interface is written down once, and `DIGEST` tells whether a
library was built from the same text.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("ep_comm.h")
DIGEST = hashlib.sha256(PATH.read_bytes()).hexdigest()

_CODE = re.sub(r"/\*.*?\*/", " ", PATH.read_text(), flags=re.S)
_SCALARS: dict[str, type] = {
    "float": ctypes.c_float,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
}

CONSTANTS: dict[str, int] = {
    name: int(value) for name, value in re.findall(r"\b(EP_[A-Z0-9_]+) (?:= )?(\d+)", _CODE)
}
_CODE = re.sub(r"^#.*$", "", _CODE, flags=re.M)
# By name in C, in the order in which they are declared.
STRUCTS: dict[str, type[ctypes.Structure]] = {}
# Name in C to result and arguments: what libep_comm.so has, and what libep_comm_nvshmem.so has
# besides some of that.
FUNCTIONS: dict[str, tuple[type, list[type]]] = {}
NVSHMEM_FUNCTIONS: dict[str, tuple[type, list[type]]] = {}


def _kind(declared: str) -> Any:
    """Return the ctypes type of a declared one.

    Pointers are addresses, but for text and for a function's arguments that come as one struct.
    """
    name = declared.replace("const", "").replace("*", "").strip()
    if "*" not in declared:
        return STRUCTS.get(name) or _SCALARS[name]
    if name == "char":
        return ctypes.c_char_p
    return ctypes.POINTER(STRUCTS[name]) if name.endswith("_args") else ctypes.c_void_p


def _split(declaration: str) -> tuple[str, str, list[int]]:
    """Return type, name and array sizes, such as ("int32_t", "num_rows", [8])."""
    parts = re.fullmatch(r"(.*?[\s*])(\w+)((?:\[\w+\])*)", declaration.strip())
    assert parts is not None, f"{PATH}: cannot read {declaration!r}"
    sizes = re.findall(r"\w+", parts[3])
    return parts[1], parts[2], [CONSTANTS.get(size) or int(size) for size in sizes]


def _structure(name: str, body: str) -> type[ctypes.Structure]:
    fields = []
    for declaration in filter(str.strip, body.split(";")):
        declared, field, sizes = _split(declaration)
        kind = _kind(declared)
        for size in reversed(sizes):
            kind = kind * size
        fields.append((field, kind))
    return type(_python_name(name), (ctypes.Structure,), {"_fields_": fields, "__doc__": name})


def _python_name(name: str) -> str:
    return name.removeprefix("ep_").title().replace("_", "")


for _name, _body in re.findall(r"typedef struct (\w+) \{(.*?)\}", _CODE, re.S):
    STRUCTS[_name] = _structure(_name, _body)
for _api, _result, _name, _arguments in re.findall(
    r"\b(EP_API|EP_NVSHMEM_API) ([\w\s*]+?)(\w+)\((.*?)\);", _CODE, re.S
):
    _kinds = [_kind(_split(each)[0]) for each in _arguments.split(",") if each.strip() != "void"]
    _functions = FUNCTIONS if _api == "EP_API" else NVSHMEM_FUNCTIONS
    _functions[_name] = (_kind(_result), _kinds)
globals().update(CONSTANTS, **{_python_name(name): kind for name, kind in STRUCTS.items()})


def __getattr__(name: str) -> Any:
    """Raise for what the header does not declare: what it does is set above."""
    raise AttributeError(f"{PATH} declares no {name}")
