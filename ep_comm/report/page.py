"""The page: what it has in which order, and the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ep_comm.pretrain.log_file import TOKENS_PER_S, TRAIN_LOSS, VALID_LOSS, WIRE_MIB
from ep_comm.report import maps, pictures
from ep_comm.report.findings import Finding
from ep_comm.report.pictures import Cells, Picture
from ep_comm.report.run import MODEL_KEYS, Run, differences
from ep_comm.version import __version__

_LEVELS = {"bad": "Failed or in doubt", "look": "Worth a look", "note": "To be known"}


class Section(NamedTuple):
    """A part of the page with pictures.

    Attributes:
        anchor: Its identifier.
        title: Its heading.
        text: A sentence under it.
        shared: Pictures of all runs together.
        by_run: Pictures of each run, beside each other; all lists are as long.
    """

    anchor: str
    title: str
    text: str
    shared: list[Picture]
    by_run: list[list[Picture]]


def render(runs: Sequence[Run], findings: Sequence[list[Finding]], command: str) -> str:
    """Return the HTML of the page.

    Args:
        runs: One, or two to be set beside each other.
        findings: Of them, as `find_all` returns them.
        command: That makes it, for its last line.
    """
    environment = Environment(
        loader=PackageLoader("ep_comm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    environment.filters["sentence"] = _sentence
    environment.globals["css"] = Markup((Path(__file__).parent / "page.css").read_text())
    sections = _sections(runs)
    titles = {
        "findings": "Findings",
        "summary": "Numbers",
        **{section.anchor: section.title for section in sections},
        "configuration": "Configuration",
        "versions": "Versions",
        "warnings": "Warnings",
    }
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        titles=titles,
        title=" and ".join(run.name for run in runs),
        levels=_LEVELS,
        common_findings=findings[0] if len(runs) > 1 else [],
        findings=findings[-len(runs) :],
        summary=_summary(runs),
        sections=sections,
        differing={k: list(map(_shown, v)) for k, v in differences(*runs).items()}
        if len(runs) > 1
        else {},
        configurations=[_configuration(run) for run in runs],
        version=__version__,
        command=command,
    )


def _sections(runs: Sequence[Run]) -> list[Section]:
    is_wide = len(runs) == 1

    def together(anchor: str, panels: Sequence[pictures.Panel], caption: str) -> list[Picture]:
        picture = pictures.lines(anchor, panels, runs, caption)
        return [picture] if picture else []

    def beside(anchor: str, draw: Callable[[str, Run], Picture | None]) -> list[list[Picture]]:
        drawn = [draw(f"{anchor}-{i}", run) for i, run in enumerate(runs)]
        return [[each] if each else [] for each in drawn]

    faint = (
        "Lines: means of a few steps, where there are many; the band around them: least and most."
    )
    found = [
        Section("loss", "Loss", "", together("loss", pictures.LOSS, faint), []),
        Section("speed", "Speed", "The first step after a start is left out.",
                together("speed", pictures.SPEED, faint), []),
        Section("time", "Where a step's time goes",
                "Dispatch, combine and experts: forward time of all layers, each on the rank where "
                "it was longest. The rest has attention, the backward pass and the optimizer.",
                [], beside("time", lambda n, run: pictures.split(n, run, is_wide=is_wide))),
        Section("exposed", "Exposed communication and waits",
                "Exposed: an operation ran, forward or backward, and no weight gradient beside it; "
                "waits for other ranks count.",
                together("exposed", pictures.EXPOSED, faint), []),
        Section("tails", "Tails",
                "The 99th percentile of a step's operations, on the rank where it is highest.",
                together("tails", pictures.TAILS, faint), []),
        Section("ranks", "Slowest rank", "Whom the other ranks waited for, step by step.",
                [], beside("ranks", lambda n, run: maps.slowest_ranks(n, run, is_wide=is_wide))),
        Section("balance", "Load of the experts", "", [],
                [_balance(f"balance-{i}", run, is_wide) for i, run in enumerate(runs)]),
    ]  # fmt: skip
    return found


def _balance(name: str, run: Run, is_wide: bool) -> list[Picture]:
    if run.load is None:
        return []
    num_ranks = run.config.get("expert_model_parallel_size", 1)
    return [
        maps.imbalance(f"{name}-steps", run.load, is_wide=is_wide),
        maps.experts(f"{name}-experts", run.load, num_ranks, is_wide=is_wide),
        maps.one_layer(f"{name}-layer", run.load, is_wide=is_wide),
    ]


def _summary(runs: Sequence[Run]) -> Cells:
    """Return what the numbers come to: name, a value for each run, and the ratio of two."""
    of: list[tuple[str, str, Callable[[Run], float]]] = [
        ("training loss, last tenth", ".4f", lambda run: run.series(TRAIN_LOSS).last(0.1).median),
        ("validation loss, last", ".4f",
         lambda run: run.series(VALID_LOSS, kind="valid").last(0).median),
        ("tokens/s", ",.0f", lambda run: run.steady(TOKENS_PER_S).median),
        ("step, ms", ",.4g", lambda run: run.steady("iteration-time", scale=1e3).median),
        ("TFLOP/s a rank", ",.3g", lambda run: run.steady("throughput").median),
        ("MFU", ".1%", lambda run: run.steady("mfu").median),
        ("dispatch, forward, ms", ",.4g", lambda run: run.steady("ep/dispatch-ms").median),
        ("combine, forward, ms", ",.4g", lambda run: run.steady("ep/combine-ms").median),
        ("experts, forward, ms", ",.4g", lambda run: run.steady("ep/expert-ms").median),
        ("one dispatch, p99, ms", ",.4g", lambda run: run.steady("ep/dispatch-ms-p99").median),
        ("one combine, p99, ms", ",.4g", lambda run: run.steady("ep/combine-ms-p99").median),
        ("waits, part of operations", ".1%", lambda run: run.steady("ep/wait-share").median),
        ("exposed, part of a step", ".1%",
         lambda run: run.share("ep/exposed-ms", "iteration-time", scale=1e-3).median),
        ("fullest rank over mean", ".2f", lambda run: run.steady("ep/imbalance-rank").median),
        ("fullest expert over mean", ".2f", lambda run: run.steady("ep/imbalance-expert").median),
        ("sent by a rank, MiB", ",.4g", lambda run: run.steady(WIRE_MIB).median),
    ]  # fmt: skip
    rows = []
    for name, form, value in of:
        values = [value(run) for run in runs]
        if all(each != each for each in values):
            continue
        cells = ["–" if each != each else format(each, form) for each in values]
        if len(values) > 1:
            ratio = values[1] / values[0] if values[0] else float("nan")
            cells.append("–" if ratio != ratio else f"{ratio:.3f}")
        rows.append([name, *cells])
    return rows


def _configuration(run: Run) -> Cells:
    """Return the keys and their values, those of the model first."""
    keys = sorted(run.config, key=lambda key: key not in MODEL_KEYS)
    return [[key, _shown(run.config[key])] for key in keys]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _code(text: str) -> Markup:
    """Return text as HTML, with `code` in backticks."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _sentence(text: str) -> str:
    """Return text with a capital at its begin and a full stop at its end."""
    stop = "" if text.endswith((".", "?", "!")) else "."
    return f"{text[:1].upper()}{text[1:]}{stop}"
