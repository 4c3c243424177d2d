"""Compare the losses of runs: a plot, and the largest difference from the first one.

Run it as::

    python examples/plot_runs.py runs/tiny-cpu-alltoall runs/tiny-cpu-deepep --out loss.png

after the runs, or while they are under way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files, also where there is no display
import matplotlib.pyplot as plt  # noqa: E402
from moe_log import LOG_FILE, read_log  # noqa: E402

Losses = dict[int, float]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="image to write")
    args = parser.parse_args()
    try:
        train = {run.name: _losses(run, "train", "lm loss") for run in args.run_dirs}
        valid = {run.name: _losses(run, "valid", "lm loss validation") for run in args.run_dirs}
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    for name, losses in train.items():
        if not losses:
            parser.error(f"{name} has no training step yet")
        first, last = min(losses), max(losses)
        print(f"{name}: loss {losses[first]:.4f} at step {first}, {losses[last]:.4f} at {last}")
    reference, *others = train
    for name in others:
        step, difference = _largest_difference(train[reference], train[name])
        print(f"largest |{name} - {reference}|: {difference:.3e} (step {step})")
    _plot(train, valid, args.out)
    print(f"plot: {args.out}")


def _losses(run_dir: Path, record_type: str, key: str) -> Losses:
    records = read_log(run_dir / LOG_FILE)
    return {r["iteration"]: r[key] for r in records if r["type"] == record_type}


def _largest_difference(a: Losses, b: Losses) -> tuple[int, float]:
    step = max(a.keys() & b.keys(), key=lambda i: abs(a[i] - b[i]), default=0)
    return step, abs(a[step] - b[step]) if step else float("nan")


def _plot(train: dict[str, Losses], valid: dict[str, Losses], path: Path) -> None:
    figure, (curves, differences) = plt.subplots(2, 1, sharex=True, figsize=(8, 7))
    reference, *others = train
    for i, (name, losses) in enumerate(train.items()):
        style = {"color": f"C{i}", "linestyle": ["-", "--", ":"][i % 3]}  # curves may coincide
        curves.plot(losses.keys(), losses.values(), label=name, **style)
        curves.plot(valid[name].keys(), valid[name].values(), "o", color=f"C{i}", mfc="none")
        if name != reference:
            steps = sorted(losses.keys() & train[reference].keys())
            differences.plot(steps, [losses[s] - train[reference][s] for s in steps], **style)
    curves.set(ylabel="loss (circles: validation)")
    curves.legend()
    differences.axhline(0, color="C0", linewidth=0.8)
    differences.set(xlabel="step", ylabel=f"difference from {reference}")
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
