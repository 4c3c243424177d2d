"""The command line of a training: a flag for every key of its configuration, and ``--config``.

The parser is argparse. pydantic-settings and tyro were tried: the one takes no ``--data-path A B``,
the other says what is wrong in a box of many lines, and both need as much code around them.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from ep_comm.job.exits import UserError
from ep_comm.pretrain.config import GROUPS, PretrainConfig
from ep_comm.pretrain.config_files import find_config, read_config
from ep_comm.pretrain.variants import DISPATCHER_FLAGS


def parse_args(argv: list[str] | None = None) -> PretrainConfig:
    """Read the YAML file named by ``--config``, then the flags, which win.

    ``--print-config`` ends the process with the result as JSON, as ``--help`` does with the flags.

    Raises:
        UserError: A key, a flag or a value is wrong.
    """
    flags = vars(_parser().parse_args(argv))
    path, print_config = flags.pop("config", None), flags.pop("print_config", False)
    values = read_config(find_config(Path(path))) if path else {}
    name = Path(path).stem if path else "pretrain"
    try:
        config = PretrainConfig(**{**values, **flags})
    except ValidationError as error:
        raise UserError(_describe(error, path)) from None
    run_dir = config.run_dir or Path("runs") / f"{name}-{config.moe_token_dispatcher}"
    config = config.model_copy(update={"run_dir": run_dir})
    if print_config:
        if _is_first():
            print(config.model_dump_json(indent=1))
        sys.exit()
    return config


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        if _is_first():
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            hint = _did_you_mean(flag, list(self._option_string_actions))
        raise UserError(f"{message}{hint}; --help lists all flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ep_comm.pretrain",
        usage="torchrun --nproc_per_node=N -m ep_comm.pretrain --config FILE [--KEY VALUE]",
        description="Pretrain a Megatron-Core mixture-of-experts model through ep_comm.",
        epilog="Every flag is also a key of the YAML file: --train-iters 60 is train_iters: 60.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, such as configs/tiny-cpu.yaml")
    parser.add_argument(
        "--print-config", action="store_true", help="print every key's value as JSON, and exit"
    )
    for group_type in GROUPS:
        group = parser.add_argument_group((group_type.__doc__ or "").rstrip(".").lower())
        for key, field in group_type.model_fields.items():
            default = "required" if field.is_required() else f"default: {_show(field.default)}"
            help = f"{field.description} ({default})".replace("%", "%%")  # argparse formats it
            options: dict[str, Any] = {"help": help}
            if field.annotation is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                # Types and choices are pydantic's business: it checks the YAML file as well.
                options["metavar"] = _metavar(field.annotation)
                if "list" in str(field.annotation):
                    options["nargs"] = "+"
            flag = f"--{key.replace('_', '-')}"
            names = DISPATCHER_FLAGS if flag == DISPATCHER_FLAGS[0] else (flag,)
            group.add_argument(*names, **options)
    return parser


def _metavar(annotation: Any) -> str:
    choices = getattr(annotation, "__args__", ())
    choices = getattr(choices[0], "__args__", choices) if choices else ()
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    text = str(annotation)
    return next((name.upper() for name in ("int", "float", "Path") if name in text), "STR")


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, []) else str(default)


def _describe(error: ValidationError, path: str | None) -> str:
    """Return one line for all of pydantic's complaints."""
    problems, missing = [], []
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            missing.append(f"--{key.replace('_', '-')}")
        elif problem["type"] == "extra_forbidden":
            hint = _did_you_mean(key, list(PretrainConfig.model_fields))
            problems.append(f"unknown key {key!r} in {path}{hint}")
        elif key:
            message = message.replace("Input should be", "must be")
            problems.append(f"{key} {message}, got {problem['input']!r}")
        else:
            problems.append(message)
    if missing:
        problems.append(f"not set: {', '.join(missing)}; give them, or a --config that has them")
    return "; ".join(problems)


def _did_you_mean(word: str, words: list[str]) -> str:
    closest = difflib.get_close_matches(word, words, n=1, cutoff=0.75)
    return f" (did you mean {closest[0]!r}?)" if closest else ""
