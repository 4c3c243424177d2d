"""The outcome of a comparison: one document, as JSON and as a page for a pull request."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ep_comm.bench.tables import markdown_table, number
from ep_comm.compare.directory import Directory
from ep_comm.compare.plan import (
    EP_COMM,
    REFERENCE,
    WIDE,
    Plan,
    seed_number,
    with_seed,
    without_seed,
)
from ep_comm.compare.plots import plot_differences, plot_losses
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

LOSS_PLOT = "loss.png"
DIFFERENCE_PLOT = "difference.png"

# Verdicts on a variant, besides the reasons why there is none.
_FAILED, _PASSED, _UNCLEAR, _EQUAL = "FAILED", "passed", "unclear", "bitwise equal"


def write_report(
    plan: Plan, directory: Directory, runs: Mapping[str, Run], tolerances: Tolerances
) -> dict[str, Any]:
    """Write ``report.md``, ``report.json`` and the pictures; return what the JSON says.

    Args:
        plan: What was compared.
        directory: Where the report goes, and the logs are.
        runs: The finished runs, by variant.
        tolerances: What they may differ by.
    """
    document = make_document(plan, directory, runs, tolerances)
    title, window = document["title"], document["window"]
    plot_losses(runs, window, title, directory.path / LOSS_PLOT)
    if document["difference_plot"]:
        plot_differences(runs, window, title, directory.path / DIFFERENCE_PLOT)
    else:
        (directory.path / DIFFERENCE_PLOT).unlink(missing_ok=True)  # of fewer runs
    write_json(directory.path / "report.json", document)
    write_text(directory.path / "report.md", render(document))
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
        "difference_plot": not all(run.has_losses_of(reference) for run in runs.values()),
        "pairs": {name: asdict(found) for name, found in pairs.items()},
        "settings": plan.settings,
    }


def render(document: dict[str, Any]) -> str:
    """Return the document as Markdown."""
    variants = document["variants"]
    outcome = [
        f"{says}: {', '.join(names)}"
        for verdict, says in (
            (_FAILED, "OUTSIDE tolerances"),
            (_EQUAL, f"Bitwise equal to {REFERENCE}"),
            (_PASSED, "Within tolerances"),
            (_UNCLEAR, "Unclear, more seeds tell"),
        )
        if (names := [n for n, variant in variants.items() if variant["verdict"] == verdict])
    ]
    lines = [
        f"## Convergence of {document['title']}",
        "",
        f"**{'. '.join(outcome) or 'Nothing was judged'}.** Same data order in all runs; "
        f"|Δ| from {REFERENCE}; training losses smoothed over {document['window']} steps; largest "
        f"and mean from step {document['steps_skipped'] + 1} on.",
        "",
        *markdown_table(
            ["variant", "seed", "final train loss", "final validation loss", "largest |Δ|",
             "at step", "mean |Δ|", "mean |Δ| / noise", "final validation |Δ|",
             "tokens/s, median", "MiB sent/step", "verdict"],
            [_row(name, variant, document["noise"]) for name, variant in variants.items()],
        ),
        "",
        *_order(variants),
        *_pairs(document["pairs"]),
        *[f"Skipped: {name}: {reason}." for name, reason in document["skipped"].items()],
    ]  # fmt: skip
    checks = [
        [name, check["what"], f"{check['value']:.3g}", f"{check['limit']:.3g}",
         "yes" if check["passed"] else "unclear" if check["is_unclear"] else "**NO**"]
        for name, variant in variants.items()
        for check in variant["checks"]
    ]  # fmt: skip
    if checks:
        lines += markdown_table(["variant", "what", "found", "allowed", "within"], checks)
        lines += ["", _explain(document)]
    lines += [
        "",
        f"![losses]({LOSS_PLOT})",
        f"![differences]({DIFFERENCE_PLOT})"
        if document["difference_plot"]
        else "All losses are equal, bit by bit: there are no differences to draw.",
        "",
        *_surroundings(document),
        "",
        "```bash",
        document["command"],
        "```",
    ]
    return "\n".join(lines) + "\n"


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


def _row(name: str, variant: dict[str, Any], noise: dict[str, Any] | None) -> list[object]:
    found = variant["difference"] or {}
    share = found["mean"] / noise["mean"] if found and noise and noise["mean"] else None
    return [
        *(name, variant["seed"], number(variant["final_train_loss"], ".6f")),
        *(number(variant["final_valid_loss"], ".6f"), number(found.get("largest"), ".2e")),
        *(found.get("largest_step"), number(found.get("mean"), ".2e"), number(share, ".2g")),
        *(number(found.get("final_valid"), ".2e"), number(variant["tokens_per_s"], ",.0f")),
        *(number(variant["wire_mib"], ".2f"), variant["verdict"]),
    ]


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


def _order(variants: dict[str, Any]) -> list[str]:
    """Say which runs are above and below: the reference may be the one far from all others."""
    offset = {name: variant["offset"] for name, variant in variants.items()}
    if None in offset.values():
        return []
    runs = ", ".join(
        f"{name} {offset[name]:+.2e}" for name in sorted(offset, key=lambda name: offset[name])
    )
    return [
        f"Signed mean Δ from the mean of the {len(alltoall_among(variants))} {REFERENCE} runs, "
        f"lowest first: {runs}.",
        "",
    ]


def _pairs(pairs: dict[str, Any]) -> list[str]:
    """Return the table of pairs of the same seed; empty where no variant has two pairs."""
    several = {name: found for name, found in pairs.items() if len(found["seeds"]) > 1}
    if not several:
        return []
    rows = [
        [name, found["counterpart"], ", ".join(map(str, found["seeds"])),
         *_each_and_mean(found["final_train"]), *_each_and_mean(found["final_valid"])]
        for name, found in several.items()
    ]  # fmt: skip
    header = ["variant", "against", "seeds", "final train loss, relative Δ of each", "mean",
              "final validation loss", "mean"]  # fmt: skip
    title = "Pairs of the same seed, means with their standard errors:"
    return [title, "", *markdown_table(header, rows), ""]


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
            "**The runs were not all trained with the same versions or devices:** "
            + "; ".join(
                ", ".join(f"{k} {v}" for k, v in each.items()) for each in document["trained_with"]
            )
            + "."
        )
    return lines
