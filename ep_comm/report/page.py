"""The page of a run, or of two: what it has in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ep_comm.pretrain.log_file import TOKENS_PER_S, TRAIN_LOSS, VALID_LOSS, WIRE_MIB
from ep_comm.report import maps, pictures
from ep_comm.report.document import (
    Beside,
    Block,
    Cells,
    Finding,
    Findings,
    Folded,
    Heading,
    Items,
    Line,
    Page,
    Picture,
    Section,
    Table,
    Text,
    to_html,
)
from ep_comm.report.run import MODEL_KEYS, Run, differences

_NOT_ON_RECORD = Text("Not on record.")


def render(runs: Sequence[Run], findings: Sequence[list[Finding]], command: str) -> str:
    """Return the HTML of the page.

    Args:
        runs: One, or two to be set beside each other.
        findings: Of them, as `find_all` returns them.
        command: That makes it, for its last line.
    """
    page = Page(
        title=" and ".join(run.name for run in runs),
        tool="ep-comm report",
        lines=[_state(run, place if len(runs) > 1 else 0) for place, run in enumerate(runs, 1)],
        sections=[
            Section("findings", "Findings", _findings(runs, findings)),
            Section("summary", "Numbers", _summary(runs)),
            *_pictures(runs),
            Section("configuration", "Configuration", _configurations(runs)),
            Section("versions", "Versions", _by_run(runs, map(_versions, runs))),
            Section("warnings", "Warnings", _by_run(runs, map(_warnings, runs))),
        ],
        sources=[run.folder for run in runs],
        command=command,
    )
    return to_html(page)


def _state(run: Run, swatch: int) -> Line:
    state = f"{run.state[:1].upper()}{run.state[1:]}"
    text = (
        f"{state}. {run.processes or 'An unknown number of'} processes, "
        f"{run.versions.get('device', 'device not known')}, dispatcher "
        f"{run.config.get('moe_token_dispatcher', 'not known')}. "
        f"Last written {run.written:%Y-%m-%d %H:%M:%S}."
    )
    return Line(text, name=run.name if swatch else "", swatch=swatch)


def _by_run(runs: Sequence[Run], blocks: Iterable[list[Block]]) -> list[Block]:
    """Return the blocks of each run, under its name where there are several."""
    found: list[Block] = []
    for run, of_run in zip(runs, blocks, strict=True):
        found += [Heading(run.name), *of_run] if len(runs) > 1 else of_run
    return found


def _findings(runs: Sequence[Run], findings: Sequence[list[Finding]]) -> list[Block]:
    blocks: list[list[Block]] = [
        [Findings(found) if found else Text("Nothing stands out.")]
        for found in findings[-len(runs) :]
    ]
    common = findings[0] if len(runs) > 1 else []
    return [*([Findings(common)] if common else []), *_by_run(runs, blocks)]


def _pictures(runs: Sequence[Run]) -> list[Section]:
    is_wide = len(runs) == 1

    def together(anchor: str, panels: Sequence[pictures.Panel], caption: str) -> list[Block]:
        picture = pictures.lines(anchor, panels, runs, caption)
        return [picture or _NOT_ON_RECORD]

    def beside(anchor: str, draw: Callable[[str, Run], list[Picture]]) -> list[Block]:
        drawn = [draw(f"{anchor}-{i}", run) for i, run in enumerate(runs)]
        if not any(drawn):
            return [_NOT_ON_RECORD]
        columns: list[list[Block]] = [[*found] or [_NOT_ON_RECORD] for found in drawn]
        if len(runs) > 1:
            columns = [[Heading(r.name), *each] for r, each in zip(runs, columns, strict=True)]
        return [Beside(columns)]

    def one(draw: Callable[..., Picture | None]) -> Callable[[str, Run], list[Picture]]:
        def drawn(name: str, run: Run) -> list[Picture]:
            picture = draw(name, run, is_wide=is_wide)
            return [picture] if picture else []

        return drawn

    faint = (
        "Lines: means of a few steps, where there are many; the band around them: least and most."
    )
    return [
        Section("loss", "Loss", together("loss", pictures.LOSS, faint)),
        Section("speed", "Speed", [
            Text("The first step after a start is left out."),
            *together("speed", pictures.SPEED, faint)]),
        Section("time", "Where a step's time goes", [
            Text("Dispatch, combine and experts: forward time of all layers, each on the rank "
                 "where it was longest. The rest has attention, the backward pass and the "
                 "optimizer."),
            *beside("time", one(pictures.split))]),
        Section("exposed", "Exposed communication and waits", [
            Text("Exposed: an operation ran, forward or backward, and no weight gradient beside "
                 "it; waits for other ranks count."),
            *together("exposed", pictures.EXPOSED, faint)]),
        Section("tails", "Tails", [
            Text("The 99th percentile of a step's operations, on the rank where it is highest."),
            *together("tails", pictures.TAILS, faint)]),
        Section("ranks", "Slowest rank", [
            Text("Whom the other ranks waited for, step by step."),
            *beside("ranks", one(maps.slowest_ranks))]),
        Section("balance", "Load of the experts",
                beside("balance", lambda name, run: _balance(name, run, is_wide))),
    ]  # fmt: skip


def _balance(name: str, run: Run, is_wide: bool) -> list[Picture]:
    if run.load is None:
        return []
    num_ranks = run.config.get("expert_model_parallel_size", 1)
    return [
        maps.imbalance(f"{name}-steps", run.load, is_wide=is_wide),
        maps.experts(f"{name}-experts", run.load, num_ranks, is_wide=is_wide),
        maps.one_layer(f"{name}-layer", run.load, is_wide=is_wide),
    ]


def _summary(runs: Sequence[Run]) -> list[Block]:
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
    rows: Cells = []
    for name, form, value in of:
        values = [value(run) for run in runs]
        if all(each != each for each in values):
            continue
        cells = ["–" if each != each else format(each, form) for each in values]
        if len(values) > 1:
            ratio = values[1] / values[0] if values[0] else float("nan")
            cells.append("–" if ratio != ratio else f"{ratio:.3f}")
        rows.append([name, *cells])
    columns = ["", *(run.name for run in runs), *(["second ÷ first"] if len(runs) > 1 else [])]
    return [
        Text(
            "Medians over the steps, without the first one after a start, unless a line says "
            "otherwise."
        ),
        Table(columns, rows, "numbers of the run"),
    ]


def _configurations(runs: Sequence[Run]) -> list[Block]:
    found: list[Block] = []
    if len(runs) > 1:
        rows = [[key, *map(_shown, values)] for key, values in differences(*runs).items()]
        if rows:
            columns = ["key", *(run.name for run in runs)]
            found += [Heading("What differs"), Table(columns, rows, "keys that differ")]
        else:
            found.append(Text("The configurations are the same."))
    for run in runs:
        keys = sorted(run.config, key=lambda key: key not in MODEL_KEYS)  # those of the model first
        rows = [[key, _shown(run.config[key])] for key in keys]
        table = Table(["key", "value"], rows, f"configuration of {run.name}")
        found.append(Folded(f"All keys of {run.name}", [table if rows else _NOT_ON_RECORD]))
    return found


def _versions(run: Run) -> list[Block]:
    rows = [[name, str(version)] for name, version in run.versions.items()]
    starts = f"Started {len(run.starts)} time{'s' * (len(run.starts) != 1)}"
    if len(run.starts) > 1:
        starts += f": after steps {', '.join(str(each['iteration']) for each in run.starts)}"
    return [Table(["what", "version"], rows, f"versions of {run.name}"), Text(f"{starts}.")]


def _warnings(run: Run) -> list[Block]:
    found = [*run.fault, *(f"Step {step}: {text}" for step, text in run.warnings)]
    if run.damaged:
        lines = ", ".join(map(str, run.damaged))
        found.append(
            f"Lines of the log that cannot be read: {lines[:200]}{'...' * (len(lines) > 200)}"
        )
    return [Items(found) if found else Text("None on record.")]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
