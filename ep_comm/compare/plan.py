"""What is compared: the variants, and the flags that each is trained with."""

from __future__ import annotations

import glob
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ep_comm.job.exits import UserError, needs_extra
from ep_comm.megatron.names import NAME as EP_COMM
from ep_comm.megatron.names import STOCK as REFERENCE
from ep_comm.pretrain import variants
from ep_comm.pretrain.variants import first_owned

FP8 = f"{EP_COMM}-fp8"
FP8_EXPERTS = f"{EP_COMM}-fp8-experts"
FP8_ALL = f"{EP_COMM}-fp8-all"

# Flags of each variant; each may be trained with other seeds too: `seed_number`.
VARIANTS: dict[str, tuple[str, ...]] = {
    name: variants.VARIANTS[name] for name in (REFERENCE, EP_COMM, FP8, FP8_EXPERTS, FP8_ALL)
}
# The same with a BF16 wire, which a variant with an FP8 wire is judged by.
WIDE = {FP8: EP_COMM, FP8_ALL: FP8_EXPERTS}

_WITH_SEED = re.compile(rf"({'|'.join(VARIANTS)})(?:-seed([2-9]|[1-9][0-9]+))?")
_OTHERS = f"{', '.join(list(VARIANTS)[1:])}, or any with -seed2 (-seed3, ...)"
_VARIANT_FLAGS = {flag for flags in VARIANTS.values() for flag in flags if flag.startswith("--")}
# What a comparison decides itself, by flag, with what to use instead.
_OWN_FLAGS = {
    **dict.fromkeys((*_VARIANT_FLAGS, *variants.DISPATCHER_FLAGS), "--variants"),
    "--train-iters": "--steps",
    **dict.fromkeys(("--run-dir", "--save", "--load", "--keep-checkpoints"), "--out"),
    "--wandb-exp-name": "--wandb-project; runs are named after their variant",
}
_VARIANT_KEYS = {flag.removeprefix("--").replace("-", "_") for flag in _VARIANT_FLAGS}
# What the YAML file leaves out, with the reason: each of the first turns on FP8.
_NOT_IN_FILE = {
    **dict.fromkeys(
        ("ep_fp8_dispatch", "ep_fp8_grad_dispatch", "fp8_format"),
        " is what is compared: leave it out there",
    ),
    **dict.fromkeys(
        ("save", "load"),
        ": every run would have the same checkpoints. Leave it out there: runs that are "
        "interrupted go on from their own, in --out",
    ),
}
_PLACES = ("data_cache_path", "wandb_save_dir")  # of files, whatever machine they are on
_PROGRAM = "ep_comm.pretrain"  # unless the user gives a script
_CHECKPOINTS = 10  # of a run, where the configuration does not say how many
_NEEDED_SETTINGS = """
    train_iters eval_iters save_interval seed data_seed hidden_size expert_model_parallel_size
    bf16 use_distributed_optimizer data_path wandb_project wandb_save_dir
""".split()


def seed_number(variant: str) -> int:
    """Return n of ``ep_comm-seedn``, 1 of ``ep_comm``."""
    return int(_parts(variant)[2] or 1)


def without_seed(variant: str) -> str:
    """Return ``ep_comm`` of ``ep_comm-seedn``, which differs in the seed of the weights only."""
    return _parts(variant)[1]


def _parts(variant: str) -> re.Match[str]:
    match = _WITH_SEED.fullmatch(variant)
    assert match is not None, variant  # names were checked when they were read
    return match


def with_seed(name: str, number: int) -> str:
    """Return the variant whose `without_seed` and `seed_number` these are."""
    return name if number == 1 else f"{name}-seed{number}"


def flags_of(variant: str) -> tuple[str, ...]:
    """Return what `variant` is trained with, but for its seed."""
    return VARIANTS[without_seed(variant)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison, checked.

    Attributes:
        script: The training script; None for the module `ep_comm.pretrain`.
        config: YAML file that it reads.
        flags: Further flags of every run.
        settings: The script's configuration: every key, but those that a variant decides.
        processes: Processes of a run, all on this machine.
        variants: Names of what is trained, in order; the first is `REFERENCE`.
        skipped: What was asked for and cannot be trained, with the reason.
        notes: What the user should know of the flags, a sentence each.
    """

    script: Path | None
    config: Path
    flags: tuple[str, ...]
    settings: dict[str, Any] = field(repr=False)
    processes: int
    variants: tuple[str, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Training steps of every run."""
        return self.settings["train_iters"]

    @property
    def missing_data(self) -> list[str]:
        """Of ``data_path``, what is neither a file nor a glob nor the prefix of a Megatron pair."""
        names = self.settings["data_path"] or []
        return [n for n in names if not glob.glob(n, recursive=True) and not glob.glob(f"{n}.idx")]

    def with_trained(self, variants: Iterable[str]) -> Plan:
        """Return the plan with those of `skipped` that were trained on another machine."""
        trained = set(variants)
        return replace(
            self,
            variants=tuple(_in_order({*self.variants, *trained})),
            skipped={name: why for name, why in self.skipped.items() if name not in trained},
        )

    def seed(self, variant: str) -> int:
        """Return the seed of the weights of a variant."""
        return self.settings["seed"] + seed_number(variant) - 1

    @property
    def identity(self) -> dict[str, Any]:
        """What all runs of a comparison have in common, in whatever place they are trained.

        Of data its name is enough: it may lie elsewhere.
        """
        settings = {key: value for key, value in self.settings.items() if key not in _PLACES}
        settings["data_path"] = [Path(name).name for name in settings["data_path"]]
        script = self.script.name if self.script else _PROGRAM
        return {"processes": self.processes, "script": script, **settings}

    @property
    def data_seed(self) -> int:
        """Seed of the data order of every variant."""
        return self.settings["data_seed"] or self.settings["seed"]

    def command(self, variant: str, run_dir: Path, *, resume: bool) -> list[str]:
        """Return the command that trains `variant`, from its latest checkpoint to resume.

        It writes none if its first one would be that of a finished run.
        """
        checkpoints = str(run_dir / "checkpoints")
        interval = self.settings["save_interval"] or math.ceil(self.steps / _CHECKPOINTS)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(self.processes), *_program(self.script)]
        command += ["--config", str(self.config), *self.flags, *flags_of(variant)]
        command += ["--seed", str(self.seed(variant)), "--data-seed", str(self.data_seed)]
        command += ["--run-dir", str(run_dir)]
        if interval < self.steps:
            command += ["--save", checkpoints, "--save-interval", str(interval)]
            command += ["--keep-checkpoints", "1"]  # nobody goes back to older ones
        if resume:
            command += ["--load", checkpoints]
        if self.settings["wandb_project"]:
            command += ["--wandb-exp-name", f"{self.config.stem}-{variant}"]
        return command


def make_plan(
    *,
    config: Path,
    steps: int | None,
    processes: int | None,
    variants: str,
    script: Path | None,
    wandb_project: str | None,
    extra: Sequence[str],
) -> Plan:
    """Check what the user asked for.

    Args:
        config: YAML file of the training script.
        steps: Steps of each run; None: as the file says.
        processes: Processes of each run; None: as many as share the experts of a layer.
        variants: Comma-separated names: of `VARIANTS`, and of these with ``-seedn``.
        script: The training script; None: `ep_comm.pretrain`.
        wandb_project: W&B project; None: no W&B.
        extra: Further flags of the training script.

    Raises:
        UserError: Something of it is wrong.
    """
    names = _parse_variants(variants)
    with needs_extra("megatron"):
        from ep_comm.pretrain.config_files import find_config, read_config
    config = find_config(config)
    if script is not None and not script.is_file():
        raise UserError(f"--script {script}: no such file")
    if own := first_owned(extra, _OWN_FLAGS):
        raise UserError(f"{own[0]} is what is compared: use {own[1]}")
    flags = list(extra)
    notes: list[str] = []
    if steps is not None:
        flags += ["--train-iters", str(steps)]
        if warmup := _too_long_warmup(read_config(config), extra, steps):
            flags += ["--lr-warmup-iters", str(steps // 10)]
            notes = [
                f"lr_warmup_iters is {steps // 10} instead of {warmup}: there are but {steps} steps"
            ]
    if wandb_project is not None:
        flags += ["--wandb-project", wandb_project]
    settings = _settings(script, config, flags)
    processes = settings["expert_model_parallel_size"] if processes is None else processes
    if processes < 1 or processes % settings["expert_model_parallel_size"]:
        raise UserError(
            f"--nproc-per-node {processes} is no multiple of expert_model_parallel_size "
            f"{settings['expert_model_parallel_size']}"
        )
    reasons = {name: _skip_reason(flags_of(name), settings) for name in names}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    return Plan(
        script=script and script.resolve(),
        config=config,
        flags=tuple(flags),
        settings=settings,
        processes=processes,
        variants=tuple(name for name in names if name not in skipped),
        skipped=skipped,
        notes=tuple(notes),
    )


def _too_long_warmup(values: dict[str, Any], flags: Sequence[str], steps: int) -> int | None:
    """Return the warm-up of a file whose learning rate would rise to the end; None if it is not.

    The user's own flags are left alone.
    """
    warmup = values.get("lr_warmup_iters", 0)
    given = {flag.split("=")[0] for flag in flags} & {"--lr-warmup-iters", "--lr-decay-iters"}
    if given or values.get("lr_decay_iters") or not isinstance(warmup, int):
        return None
    return warmup if warmup >= steps else None


def _parse_variants(text: str) -> list[str]:
    asked = [variants.current_name(name.strip()) for name in text.split(",")]
    for name in asked:
        if not _WITH_SEED.fullmatch(name):
            raise UserError(f"--variants {name!r} is none of {REFERENCE}, {_OTHERS}")
    if REFERENCE not in asked or len(set(asked)) < 2:
        raise UserError(
            f"--variants {text}: give {REFERENCE}, which the others are compared with, and at "
            f"least one other of {_OTHERS}"
        )
    return _in_order(set(asked))


def _in_order(names: Iterable[str]) -> list[str]:
    order = list(VARIANTS)
    return sorted(names, key=lambda name: (order.index(without_seed(name)), seed_number(name)))


def _program(script: Path | None) -> list[str]:
    """Return what Python, or torchrun, is told to run."""
    return ["-m", _PROGRAM] if script is None else [str(script)]


def _settings(script: Path | None, config: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Return what the script makes of its flags, without keys that a variant decides.

    Raises:
        UserError: Its complaint, or the file has what is compared.
    """
    result = subprocess.run(
        [sys.executable, *_program(script), "--config", str(config), *flags, "--print-config"],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()
        error = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise UserError(error.removeprefix("error: "))
    try:
        settings = json.loads(result.stdout)
        missing = [key for key in _NEEDED_SETTINGS if key not in settings]
    except (json.JSONDecodeError, TypeError):
        raise UserError(f"{script} --print-config must print its configuration as JSON") from None
    if missing:
        raise UserError(f"{script} --print-config tells nothing of {', '.join(missing)}")
    for key, why in _NOT_IN_FILE.items():
        if settings.get(key):
            raise UserError(f"{key} in {config}{why}")
    not_common = _VARIANT_KEYS | {"run_dir", "wandb_exp_name"}
    return {key: value for key, value in settings.items() if key not in not_common}


def _skip_reason(flags: Sequence[str], settings: dict[str, Any]) -> str | None:
    """Return why a variant cannot be trained here; None if it can."""
    reason = _no_fp8_wire_reason(settings) if set(variants.FP8_WIRE) <= set(flags) else None
    if set(variants.FP8_EXPERTS) <= set(flags):
        reason = _no_fp8_gemms_reason(settings) or reason
    return reason


def _no_fp8_wire_reason(settings: dict[str, Any]) -> str | None:
    hidden = settings["hidden_size"]
    multiple = 512 if torch.cuda.is_available() else 128  # NVLink kernels; reference backend
    if hidden % multiple == 0:
        return None
    return f"FP8 dispatch needs hidden_size to be a multiple of {multiple} here, got {hidden}"


def _no_fp8_gemms_reason(settings: dict[str, Any]) -> str | None:
    if not torch.cuda.is_available():
        return "FP8 experts need a GPU"
    try:
        from transformer_engine.pytorch.fp8 import check_fp8_block_scaling_support
    except ImportError:
        return "FP8 experts need Transformer Engine 2.3 or later"
    supported, reason = check_fp8_block_scaling_support()
    if not supported:
        return f"FP8 experts cannot be computed here: {reason}"
    missing = [key for key in ("bf16", "use_distributed_optimizer") if not settings[key]]
    return f"FP8 experts need {' and '.join(missing)}" if missing else None
