"""The name ``deep_ep``: given only where somebody asks for it."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ep_comm.errors import EPStateError

NAME = "deep_ep"
_FOLDER = Path(__file__).resolve().parent / "bare_name"


def path() -> str:
    """Return the folder to put on ``PYTHONPATH``, so that spawned processes find it too."""
    return str(_FOLDER)


def install(*, replace: bool = False) -> None:
    """Let ``import deep_ep`` find this, in this process and from now on.

    Call it before anybody has imported the other one: what was imported from that stays.

    Args:
        replace: Even where DeepEP is installed.

    Raises:
        EPStateError: DeepEP is installed; names where.
    """
    loaded = sys.modules.get(NAME)
    spec = None if loaded is None else loaded.__spec__
    if _is_ours(spec):
        return
    other = installed() if spec is None or spec.origin is None else spec
    if other is not None and not replace:
        raise EPStateError(
            f"DeepEP is installed, {other.origin}: uninstall it, or call install(replace=True)"
        )
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]
    spec = PathFinder.find_spec(NAME, [path()])
    assert spec is not None and spec.loader is not None  # it is part of the package
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[NAME]
        raise


def installed() -> ModuleSpec | None:
    """Return what ``import deep_ep`` would find if this were not there; None is nothing."""
    spec = PathFinder.find_spec(NAME, [entry for entry in sys.path if not _is_here(entry)])
    # Any folder of the name is a package without a file.
    return None if spec is None or spec.origin is None else spec


def warn_where_it_hides_another() -> None:
    """Say it where this stands before an installed DeepEP."""
    other = installed()
    if other is not None:
        warnings.warn(
            f"ep_comm stands in for deep_ep; DeepEP is installed too, {other.origin}", stacklevel=3
        )


def _is_ours(spec: ModuleSpec | None) -> bool:
    return spec is not None and spec.origin is not None and _is_here(Path(spec.origin).parents[1])


def _is_here(entry: str | Path) -> bool:
    return Path(entry).resolve() == _FOLDER
