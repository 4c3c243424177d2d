"""What a checkpoint's file of metadata may name, for torch reads it with pickle.

Pickle imports and calls whatever its bytes name. All else in a checkpoint torch reads with
``weights_only``, which does not.
"""

from __future__ import annotations

import dataclasses
import enum
import pickle
from pathlib import Path
from typing import Any

import torch

_FILE = ".metadata"
_OF_RECORDS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_HARMLESS = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout")}
_HARMLESS |= {("pathlib", "PosixPath")}


def check_metadata(folder: Path) -> None:
    """Read the metadata of a checkpoint without running anything that it may hold.

    Raises:
        pickle.UnpicklingError: It is damaged, or names something that no metadata has.
        Others: It is damaged otherwise.
    """
    path = folder / _FILE
    if path.exists():  # other formats have none
        with path.open("rb") as file:
            _Reader(file).load()


class _Reader(pickle.Unpickler):
    """Knows sizes and types of tensors, and records of torch's and Megatron's checkpoints."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_OF_RECORDS) and "." not in name:
            found = super().find_class(module, name)
            is_record = dataclasses.is_dataclass(found) or isinstance(found, enum.EnumMeta)
            if is_record and found.__module__ == module:
                return found
        elif (module, name) in _HARMLESS:
            return super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{_FILE} names {module}.{name}, which no metadata has")
