"""The outcome of a comparison: one document, as JSON, as a page, and as that for a pull request."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from ep_comm.bench.tables import number
from ep_comm.compare.directory import Directory
from ep_comm.compare.pictures import differences, losses
from ep_comm.compare.plan import (
    EP_COMM,
    REFERENCE,
    WIDE,
    Plan,
    seed_number,
    with_seed,
    without_seed,
)
from ep_comm.compare.statistics import (
    Pairs,
    Run,
    Tolerances,
    alltoall_among,
    difference,
    equal_to_alltoall,
    judge,
    noise_of,
    offsets,
    pairs_of,
    standard_error,
    steps_skipped,
    window_of,
)
from ep_comm.job.environment import surroundings
from ep_comm.job.files import write_json, write_text
from ep_comm.report.document import (
    Block,
    Code,
    Finding,
    Findings,
    Level,
    Line,
    Page,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
)

PAGE = "report.html"

# Verdicts on a variant, besides the reasons why there is none.
_FAILED, _PASSED, _UNCLEAR, _EQUAL = "FAILED", "passed", "unclear", "bitwise equal"
_OUTCOMES: tuple[tuple[str, Level, str, str], ...] = (
    (_FAILED, "bad", "OUTSIDE tolerances", ""),
    (_UNCLEAR, "look", "Unclear", "More seeds tell"),
    (_EQUAL, "good", f"Bitwise equal to {REFERENCE}", ""),
    (_PASSED, "good", "Within tolerances", ""),
)


def write_report(
    plan: Plan, directory: Directory, runs: Mapping[str, Run], tolerances: Tolerances
) -> dict[str, Any]:
    """Write ``report.html``, ``report.md`` and ``report.json``; return what the JSON says.

    Args:
        plan: What was compared.
        directory: Where the report goes, and the logs are.
        runs: The finished runs, by variant.
        tolerances: What they may differ by.
    """
    document = make_document(plan, directory, runs, tolerances)
    page = make_page(document, runs, directory.path)
    write_json(directory.path / "report.json", document)
    write_text(directory.path / PAGE, to_html(page))
    write_text(directory.path / "report.md", to_markdown(page))
    return document


def make_document(
    plan: Plan, directory: Directory, runs: Mapping[str, Run], tolerances: Tolerances
) -> dict[str, Any]:
    """Return everything that the report says, in plain types."""
    reference, checks = runs[REFERENCE], judge(runs, tolerances)
    noise, offset, pairs = noise_of(runs), offsets(runs), pairs_of(runs)
    starts = [r for name in runs for r in directory.log(name) if r["type"] == "start"]
    trained_with = list(
        {json.dumps(start["versions"]): start["versions"] for start in starts}.values()
    )
    verdicts = {name: _verdict(name, runs, checks, pairs) for name in runs}
    return {
        "title": f"{plan.config.stem}: {plan.steps} steps on {plan.processes} processes",
        # None: nothing was judged.
        "passed": _passed(verdicts.values()),
        **surroundings(),
        "command": shlex.join(["ep-comm", *sys.argv[1:]]),
        "commit": ", ".join(sorted({each.get("commit", "none") for each in trained_with})),
        "trained_with": trained_with,
        "cpu_cores": os.cpu_count(),
        "processes": plan.processes,
        "steps": plan.steps,
        "window": window_of(plan.steps),
        "steps_skipped": steps_skipped(plan.steps),
        "data_seed": plan.data_seed,
        "wandb_group": directory.group if plan.settings["wandb_project"] else None,
        "tolerances": asdict(tolerances),
        "noise": None if noise is None else asdict(noise),
        "skipped": plan.skipped,
        "variants": {
            name: {
                "seed": plan.seed(name),
                "final_train_loss": run.final_train,
                "final_valid_loss": run.final_valid,
                "tokens_per_s": run.tokens_per_s,
                "wire_mib": run.wire_mib,
                "difference": None if name == REFERENCE else asdict(difference(run, reference)),
                "offset": offset.get(name),
                "checks": [
                    {**asdict(check), "passed": check.passed, "is_unclear": check.is_unclear}
                    for check in checks.get(name, [])
                ],
                "verdict": verdicts[name],
            }
            for name, run in runs.items()
        },
        "pairs": {name: asdict(found) for name, found in pairs.items()},
        "settings": plan.settings,
    }


def make_page(document: dict[str, Any], runs: Mapping[str, Run], folder: Path) -> Page:
    """Return the document as a page, with pictures of the runs."""
    window = document["window"]
    differ = not all(run.has_losses_of(runs[REFERENCE]) for run in runs.values())
    equal = Text("All losses are equal, bit by bit: there are no differences to draw.")
    others = [
        Section("order", "Order of the runs", _order(document["variants"])),
        Section("pairs", "Pairs of the same seed", _pairs(document["pairs"])),
        Section("checks", "Checks", _checks(document)),
    ]
    return Page(
        title=f"Convergence of {document['title']}",
        tool="ep-comm compare",
        lines=[
            Line(
                f"Same data order in all runs; |Δ| from {REFERENCE}; training losses smoothed over "
                f"{window} steps; largest and mean from step {document['steps_skipped'] + 1} on."
            )
        ],
        sections=[
            Section("outcome", "Outcome", _outcome(document)),
            Section("variants", "Variants", [_variants(document)]),
            Section("losses", "Losses", [losses(runs, window)]),
            Section("differences", "Differences", [differences(runs, window) if differ else equal]),
            *(section for section in others if section.blocks),
            Section(
                "surroundings",
                "Machine and versions",
                [*map(Text, _surroundings(document)), Code(document["command"])],
            ),
        ],
        sources=[folder],
        command=document["command"],
    )


def _outcome(document: dict[str, Any]) -> list[Block]:
    """Say which variants passed, and what else is to be known."""
    found = []
    for verdict, level, says, todo in _OUTCOMES:
        names = [n for n, each in document["variants"].items() if each["verdict"] == verdict]
        if names:
            section = "checks" if _is_judged(document) else "variants"
            found.append(Finding(level, f"{says}: {', '.join(names)}.", todo, section))
    if not found:
        found.append(Finding("note", "Nothing was judged.", "", "variants"))
    if len(document["trained_with"]) > 1:
        text = "The runs were not all trained with the same versions or devices."
        found.append(Finding("look", text, "", "surroundings"))
    found += [
        Finding("note", f"Skipped: {name}: {reason}.", "", "variants")
        for name, reason in document["skipped"].items()
    ]
    return [Findings(found)]


def _is_judged(document: dict[str, Any]) -> bool:
    """Return whether any variant was held against tolerances."""
    return any(variant["checks"] for variant in document["variants"].values())


def _variants(document: dict[str, Any]) -> Table:
    rows = [_row(name, each, document["noise"]) for name, each in document["variants"].items()]
    cells = _text(row.values() for row in rows)
    return Table([*rows[0]], cells, "losses of the variants, and their differences")


def _checks(document: dict[str, Any]) -> list[Block]:
    rows = [
        [name, check["what"], f"{check['value']:.3g}", f"{check['limit']:.3g}",
         "yes" if check["passed"] else "unclear" if check["is_unclear"] else "NO"]
        for name, variant in document["variants"].items()
        for check in variant["checks"]
    ]  # fmt: skip
    if not rows:
        return []
    columns = ["variant", "what", "found", "allowed", "within"]
    return [Table(columns, rows, "checks of the variants"), Text(_explain(document))]


def _passed(verdicts: Collection[str]) -> bool | None:
    """Return whether no variant failed; None where nothing was judged."""
    if _FAILED in verdicts:
        return False
    return True if {_EQUAL, _PASSED, _UNCLEAR} & set(verdicts) else None


def _verdict(
    variant: str,
    runs: Mapping[str, Run],
    checks: Mapping[str, list],
    pairs: Mapping[str, Pairs],
) -> str:
    name, seed = without_seed(variant), seed_number(variant)
    if name == REFERENCE:
        return "reference" if seed == 1 else "noise"
    if equal_to_alltoall(variant, runs):
        return _EQUAL
    if variant in checks:
        doubtful = [check for check in checks[variant] if not check.passed]
        if not all(check.is_unclear for check in doubtful):
            return _FAILED
        return _UNCLEAR if doubtful else _PASSED
    if seed > 1 and name in pairs and seed in pairs[name].seeds:
        return "pair"
    needed = WIDE.get(name, REFERENCE if name == EP_COMM else None)
    if needed is None:
        return "not judged"
    return f"not judged: needs {with_seed(needed, max(seed, 2) if needed == REFERENCE else seed)}"


def _row(name: str, variant: dict[str, Any], noise: dict[str, Any] | None) -> dict[str, object]:
    """Return a variant's cells by column."""
    found = variant["difference"] or {}
    share = found["mean"] / noise["mean"] if found and noise and noise["mean"] else None
    return {
        "variant": name,
        "seed": variant["seed"],
        "final train loss": number(variant["final_train_loss"], ".6f"),
        "final validation loss": number(variant["final_valid_loss"], ".6f"),
        "largest |Δ|": number(found.get("largest"), ".2e"),
        "at step": found.get("largest_step"),
        "mean |Δ|": number(found.get("mean"), ".2e"),
        "mean |Δ| / noise": number(share, ".2g"),
        "final validation |Δ|": number(found.get("final_valid"), ".2e"),
        "tokens/s, median": number(variant["tokens_per_s"], ",.0f"),
        "MiB sent/step": number(variant["wire_mib"], ".2f"),
        "verdict": variant["verdict"],
    }


def _explain(document: dict[str, Any]) -> str:
    noise, fp8 = document["tolerances"]["noise"], document["tolerances"]["fp8"]
    sentences = []
    if document["variants"].get(EP_COMM, {}).get("checks"):
        alltoall = ", ".join(alltoall_among(document["variants"]))
        sentences.append(
            f"{EP_COMM}: each |Δ| at most {noise:g} × the noise, the largest between any two of "
            f"{alltoall}, which differ in the seed of the weights only; for the final validation "
            f"the noise is taken as at least its mean."
        )
    for name, pairs in document["pairs"].items():
        if name != EP_COMM:
            several = ", the mean of all seeds," if len(pairs["seeds"]) > 1 else ""
            sentences.append(
                f"{name}: final losses{several} within {fp8:.2%} of those of "
                f"{pairs['counterpart']}."
            )
            if document["variants"][with_seed(name, pairs["seeds"][0])]["verdict"] == _UNCLEAR:
                more = ",".join(with_seed(each, 2) for each in (pairs["counterpart"], name))
                sentences.append(
                    "One pair is further apart, but no further than seeds of alltoall are, and "
                    f"that may be chance: add {more} (-seed3, ...) to --variants."
                )
    return " ".join(sentences)


def _order(variants: dict[str, Any]) -> list[Block]:
    """Say which runs are above and below: the reference may be the one far from all others."""
    offset = {name: variant["offset"] for name, variant in variants.items()}
    if None in offset.values():
        return []
    runs = ", ".join(
        f"{name} {offset[name]:+.2e}" for name in sorted(offset, key=lambda name: offset[name])
    )
    return [
        Text(
            f"Signed mean Δ from the mean of the {len(alltoall_among(variants))} {REFERENCE} runs, "
            f"lowest first: {runs}."
        )
    ]


def _pairs(pairs: dict[str, Any]) -> list[Block]:
    """Return the table of pairs of the same seed; nothing where no variant has two pairs."""
    several = {name: found for name, found in pairs.items() if len(found["seeds"]) > 1}
    if not several:
        return []
    rows = [
        [name, found["counterpart"], ", ".join(map(str, found["seeds"])),
         *_each_and_mean(found["final_train"]), *_each_and_mean(found["final_valid"])]
        for name, found in several.items()
    ]  # fmt: skip
    columns = ["variant", "against", "seeds", "final train loss, relative Δ of each", "mean",
               "final validation loss", "mean"]  # fmt: skip
    return [
        Text("Means with their standard errors."),
        Table(columns, _text(rows), "pairs of the same seed"),
    ]


def _text(rows: Iterable[Iterable[object]]) -> list[list[str]]:
    """Return cells as text, and None as a dash."""
    return [["–" if cell is None else str(cell) for cell in row] for row in rows]


def _each_and_mean(relative: list[float]) -> tuple[str | None, str | None]:
    if not relative:
        return None, None
    each = ", ".join(f"{value:+.2%}" for value in relative)
    return each, f"{fmean(relative):+.2%} ± {standard_error(relative):.2%}"


def _surroundings(document: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    gpus = document["gpus"]
    devices = f"{len(gpus)} × {gpus[0]}" if gpus else f"CPU, {document['cpu_cores']} cores"
    lines = [f"{document['date']}; {devices}; commit {document['commit']}; {versions}."]
    if len(document["trained_with"]) > 1:
        lines.append(
            "The runs were trained with: "
            + "; ".join(
                ", ".join(f"{k} {v}" for k, v in each.items()) for each in document["trained_with"]
            )
            + "."
        )
    return lines
