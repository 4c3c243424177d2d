"""Configuration files: those that ep_comm ships, and the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ep_comm.job.exits import UserError

# In an installed package, and in a checkout: setup.py copies the one to the other.
_FOLDERS = (Path(__file__).with_name("configs"), Path(__file__).parents[2] / "configs")


def find_config(path: Path) -> Path:
    """Return the file that a ``--config`` means: its own, or the one of that name that we ship.

    ``tiny-cpu``, ``tiny-cpu.yaml`` and ``configs/tiny-cpu.yaml`` name a shipped one.

    Raises:
        UserError: There is no such file.
    """
    if path.is_file():
        return path
    shipped = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if shipped is not None and str(path.parent) in (".", "configs"):
        candidate = shipped / f"{path.name.removesuffix('.yaml')}.yaml"
        if candidate.is_file():
            return candidate
    names = sorted(file.stem for file in shipped.glob("*.yaml")) if shipped else []
    raise UserError(f"--config {path}: no such file; give a path, or one of {', '.join(names)}")


def read_config(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold 'key: value' lines")
    return {str(key): value for key, value in values.items()}
