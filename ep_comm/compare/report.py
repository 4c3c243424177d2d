"""The outcome of a comparison: one document, as JSON and as a page for a pull request."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import fmean
from typing import Any

import numpy as np

from ep_comm.compare.directory import Directory, write_text
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
    Check,
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
from ep_comm.job.environment import gpu_names, versions

LOSS_PLOT = "loss.png"
DIFFERENCE_PLOT = "difference.png"

# Verdicts on a variant, besides the reasons why there is none.
_FAILED, _PASSED, _UNCLEAR, _EQUAL = "FAILED", "passed", "unclear", "bitwise equal"


def write_report(
    plan: Plan, directory: Directory, runs: Mapping[str, Run], tolerances: Tolerances, command: str
) -> dict[str, Any]:
    """Write ``report.md``, ``report.json`` and the pictures; returns what the JSON says.

    Args:
        plan: What was compared.
        directory: Where the report goes, and the logs are.
        runs: The finished runs, by variant.
        tolerances: What they may differ by.
        command: The command line that repeats it.
    """
    document = make_document(plan, directory, runs, tolerances, command)
    title, window = document["title"], document["window"]
    plot_losses(runs, window, title, directory.path / LOSS_PLOT)
    if document["difference_plot"]:
        plot_differences(runs, window, title, directory.path / DIFFERENCE_PLOT)
    else:
        (directory.path / DIFFERENCE_PLOT).unlink(missing_ok=True)  # of fewer runs
    write_text(directory.path / "report.json", json.dumps(document, indent=1) + "\n")
    write_text(directory.path / "report.md", render(document))
    return document


def make_document(
    plan: Plan, directory: Directory, runs: Mapping[str, Run], tolerances: Tolerances, command: str
) -> dict[str, Any]:
    """Everything that the report says, in plain types."""
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
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        "trained_with": trained_with,
        "gpus": gpu_names(),
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
        "difference_plot": any(
            not np.array_equal(run.train, reference.train) or run.valid != reference.valid
            for run in runs.values()
        ),
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
        *_table(
            ["variant", "seed", "final train loss", "final validation loss", "largest \\|Δ\\|",
             "at step", "mean \\|Δ\\|", "mean \\|Δ\\| / noise", "final validation \\|Δ\\|",
             "tokens/s, median", "MiB sent/step", "verdict"],
            [_row(name, variant, document["noise"]) for name, variant in variants.items()],
        ),
        "",
        *_order(variants),
        *_pairs(document["pairs"]),
        *[f"Skipped: {name}: {reason}." for name, reason in document["skipped"].items()],
    ]  # fmt: skip
    checks = [
        [name, check["what"].replace("|", "\\|"), f"{check['value']:.3g}", f"{check['limit']:.3g}",
         "yes" if check["passed"] else "unclear" if check["is_unclear"] else "**NO**"]
        for name, variant in variants.items()
        for check in variant["checks"]
    ]  # fmt: skip
    if checks:
        lines += _table(["variant", "what", "found", "allowed", "within"], checks)
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


def _fails(checks: list[Check]) -> bool:
    return not all(check.passed or check.is_unclear for check in checks)


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
        if _fails(checks[variant]):
            return _FAILED
        return _PASSED if all(check.passed for check in checks[variant]) else _UNCLEAR
    if seed > 1 and name in pairs and seed in pairs[name].seeds:
        return "pair"
    needed = WIDE.get(name, REFERENCE if name == EP_COMM else None)
    if needed is None:
        return "not judged"
    return f"not judged: needs {with_seed(needed, max(seed, 2) if needed == REFERENCE else seed)}"


def _row(name: str, variant: dict[str, Any], noise: dict[str, Any] | None) -> list[str]:
    found = variant["difference"]
    cells = [name, str(variant["seed"]), f"{variant['final_train_loss']:.6f}"]
    cells.append(_number(variant["final_valid_loss"], ".6f"))
    if found is None:
        cells += ["–"] * 5
    else:
        share = found["mean"] / noise["mean"] if noise and noise["mean"] else None
        cells += [f"{found['largest']:.2e}", str(found["largest_step"]), f"{found['mean']:.2e}"]
        cells += [_number(share, ".2g"), _number(found["final_valid"], ".2e")]
    cells += [f"{variant['tokens_per_s']:,.0f}", _number(variant["wire_mib"], ".2f")]
    return [*cells, variant["verdict"]]


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


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
         _each(found["final_train"]), _mean(found["final_train"]),
         _each(found["final_valid"]), _mean(found["final_valid"])]
        for name, found in several.items()
    ]  # fmt: skip
    header = ["variant", "against", "seeds", "final train loss, relative Δ of each", "mean",
              "final validation loss", "mean"]  # fmt: skip
    return ["Pairs of the same seed, means with their standard errors:", "", *_table(header, rows),
            ""]  # fmt: skip


def _each(relative: list[float]) -> str:
    return ", ".join(f"{value:+.2%}" for value in relative) or "–"


def _mean(relative: list[float]) -> str:
    return f"{fmean(relative):+.2%} ± {standard_error(relative):.2%}" if relative else "–"


def _surroundings(document: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    gpus = document["gpus"]
    devices = f"{len(gpus)} × {gpus[0]}" if gpus else f"CPU, {document['cpu_cores']} cores"
    commits = {each.get("commit", "none") for each in document["trained_with"]}
    source = f"commit {', '.join(sorted(commits))}"
    lines = [f"{document['date']}; {devices}; {source}; {versions}."]
    if len(document["trained_with"]) > 1:
        lines.append(
            "**The runs were not all trained with the same versions or devices:** "
            + "; ".join(
                ", ".join(f"{k} {v}" for k, v in each.items()) for each in document["trained_with"]
            )
            + "."
        )
    return lines


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    separator = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, separator, *rows)]
