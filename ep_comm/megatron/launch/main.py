r"""Run an unmodified Megatron-LM script with ep_comm's dispatcher.

    torchrun --nproc_per_node=8 -m ep_comm.megatron.launch pretrain_gpt.py \
        --moe-token-dispatcher deepep ARGS...

The script runs as if Python had been given it directly, except that Megatron's argument parser
knows our flags (`flags`). Where they ask for our dispatcher, every MoE layer gets it, and the
training loop checks and logs it (`hooks`). A request that cannot be met ends with one line that
begins with ``error:``, and with exit code 2, before the first step. docs/megatron.md is the user's
guide.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from ep_comm.errors import EPError
from ep_comm.job import ranks
from ep_comm.job.exits import UserError, exit_together
from ep_comm.megatron import cpu
from ep_comm.megatron.launch.flags import add_flags, extend_parser, wants_ep_comm
from ep_comm.megatron.names import NAME, VALUES
from ep_comm.megatron.versions import SUPPORTED, is_supported


def main() -> None:
    """Run ``launch SCRIPT ARGS...`` in this process."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        parser = _help_parser()
        parser.parse_known_args(arguments or ["--help"])
        parser.error("the script comes first, then its arguments")
    training = None
    try:
        os.environ.update(ranks.rank_variables(os.environ))
        script = _script(arguments[0])
        _become(script, arguments)
        version = _check_megatron(script)
        training = _hook_megatron(version)
        check_parsed = functools.partial(_check_parsed, script, training)
        if wants_ep_comm(arguments):
            register_optimizer_step_pre_hook(check_parsed)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit:  # Megatron ends like this at --exit-interval, or after SIGTERM
            training.finish()
            raise
        if wants_ep_comm(arguments):
            check_parsed()
            training.finish()
    except UserError as error:
        exit_together(error)
    except EPError as error:
        if training is not None and training.started:
            raise
        exit_together(error)


def _script(name: str) -> Path:
    script = Path(name).absolute()
    if not script.is_file():
        raise UserError(f"there is no script {name}; give Megatron's, such as pretrain_gpt.py")
    return script


def _become(script: Path, arguments: list[str]) -> None:
    """Give the process the path and the arguments that ``python SCRIPT ARGS...`` would have."""
    sys.argv = arguments
    module_folder_is_first = not getattr(sys.flags, "safe_path", False)  # of python -m: the cwd
    sys.path[: int(module_folder_is_first)] = [str(script.parent)]


def _check_megatron(script: Path) -> str:
    """Return the version of the Megatron that the script will find.

    Raises:
        UserError: There is none, not a whole one, more than one, or one that we do not support.
    """
    core, training = _folder("megatron.core"), _folder("megatron.training")
    if core is None or training is None:
        missing = "megatron.core" if core is None else "megatron.training"
        raise UserError(
            f"there is no {missing} next to {script} or on the path: run a script of a "
            "Megatron-LM clone where it is, or name the clone in PYTHONPATH"
        )
    version = _version(core)
    if not is_supported(version):
        raise UserError(
            f"Megatron {version} in {core.parent} is not supported: ep_comm works with "
            f"megatron-core {SUPPORTED}"
        )
    if core.parent != training.parent:
        raise UserError(
            f"two copies of megatron are mixed: megatron.core comes from {core.parent}, "
            f"megatron.training from {training.parent}. Run the script of a whole Megatron-LM "
            "clone, and name no other one in PYTHONPATH"
        )
    for entry in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        other = Path(entry).absolute() / "megatron"
        if (other / "core").is_dir() and other.resolve() != core.parent.resolve():
            raise UserError(
                f"two copies of megatron: {script} uses the one in {core.parent}, but PYTHONPATH "
                f"names {other.parent}. Take it out of PYTHONPATH, or run the script of that clone"
            )
    return version


def _folder(package: str) -> Path | None:
    """Return where `package` would be imported from."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _version(core: Path) -> str:
    """Return the version of a Megatron-Core without importing it: an unknown one may not import."""
    try:
        return runpy.run_path(str(core / "package_info.py"))["__version__"]
    except (OSError, KeyError):
        return "of unknown version"


def _hook_megatron(version: str) -> Any:
    """Import Megatron's training, and extend it by our flags and hooks; returns the hooks."""
    try:
        cpu.enable()
        from ep_comm.megatron.launch.hooks import Training

        arguments = importlib.import_module("megatron.training.arguments")
        training = Training(importlib.import_module("megatron.training.training"), version)
    except ImportError as error:
        raise UserError(f"Megatron {version} cannot be imported: {error}") from error
    extend_parser(arguments, training.use)
    return training


def _check_parsed(script: Path, training: Any, *_: object) -> None:
    """Raise where the script has not used the flags, before an optimizer's step or at the end."""
    if training.options is None:
        raise UserError(
            f"{script} never called Megatron's argument parser, so it does not know "
            f"--moe-token-dispatcher {NAME}: it is no training script of Megatron-LM's"
        )


def _help_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ep_comm.megatron.launch",
        usage="torchrun --nproc_per_node=N -m ep_comm.megatron.launch SCRIPT ARGS...",
        description="Run an unmodified Megatron-LM script, such as pretrain_gpt.py, with ep_comm's "
        f"MoE token dispatcher. Works with megatron-core {SUPPORTED}. SCRIPT takes Megatron's own "
        "arguments (SCRIPT --help lists them) and the following. Without --moe-token-dispatcher "
        f"{' or '.join(VALUES)} it runs as it is.",
        epilog="Under SLURM: srun --ntasks-per-node=8 python -m ep_comm.megatron.launch SCRIPT "
        "ARGS... More in docs/megatron.md.",
        allow_abbrev=False,
    )
    add_flags(parser, ["alltoall", "allgather", "flex"])
    return parser
