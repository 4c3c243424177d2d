"""A run as tables, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group
from rich.text import Text

from ep_comm.backends.nvlink import prices
from ep_comm.bench.overlap.price import best
from ep_comm.bench.overlap.run import Price, Run
from ep_comm.bench.tables import screen_table, sms_name
from ep_comm.job import files
from ep_comm.job.environment import surroundings

# What gradients and activations of a training go by; a known routing is what is hidden.
_OPS = {"dispatch, cached": "dispatch", "combine": "combine"}
_NOTES = """\
times in µs of one operation, the slowest rank's median. alone: one of several back to back; beside:
the same while GEMMs run on another stream
links: what these need for its bytes, as they were measured in this run
lost: GEMM time with operations beside less that without, over the operations that ran meanwhile
serial: what the operation takes between GEMMs on their own stream, with all SMs
*: the SM count that costs GEMMs least. pays: they lose less than the serial time
wrong: rows on all ranks that were not bit for bit what plain torch gives; NCCL's are not checked"""


def headline(run: Run) -> str:
    """Return sizes and limit; of a void run, that it is void and why."""
    shape, settings = run.settings.shape, run.settings
    wire = "" if settings.wire == "sm" else ", rows by copy engines"
    return (
        f"{run.num_ranks} ranks, {shape.tokens} tokens x {shape.hidden}, top-{shape.topk} of "
        f"{shape.experts}, {settings.routing.describe()}{wire}; {run.limit.describe()}"
    )


def title(run: Run, gemm: str) -> str:
    """Return what runs beside, and how long one of it takes alone."""
    (tiles,) = {price.tiles for price in run.prices if price.gemm == gemm}
    waves = tiles / run.available_sms
    return f"beside {gemm}: {run.gemm_us[gemm]:.0f} µs alone, {tiles} tiles, {waves:.2f} waves"


def curves(prices: Iterable[Price]) -> dict[tuple[str, str], list[Price]]:
    """Return the prices of each GEMM and operation."""
    found: dict[tuple[str, str], list[Price]] = {}
    for price in prices:
        found.setdefault((price.gemm, price.name), []).append(price)
    return found


def best_of(curve: list[Price]) -> Price:
    """Return the price at the SM count that costs GEMMs least."""
    return curve[best([(i, median(price.lost)) for i, price in enumerate(curve)])]


def render(run: Run) -> Group:
    """Return what rank 0 prints."""
    parts: list[Any] = [Text(headline(run), style="bold red" if run.limit.is_void else "bold")]
    columns = (
        "case",
        "SMs",
        "alone",
        "links",
        "beside",
        "lost",
        "min",
        "max",
        "serial",
        "pays",
        "wrong",
    )
    for gemm in run.gemm_us:
        table = screen_table(title(run, gemm), columns)
        for (of, name), curve in curves(run.prices).items():
            if of != gemm:
                continue
            least = best_of(curve)
            for price in curve:
                is_best = price is least and len(curve) > 1
                table.add_row(name, *_cells(run, price, is_best), style="bold" if is_best else None)
        parts.append(table)
    if run.num_wrong:
        parts.append(Text(f"WRONG RESULTS: {run.num_wrong} rows", style="bold red"))
    return Group(*parts, Text(run.backend), Text(_NOTES, style="dim"))


def document(run: Run) -> dict[str, Any]:
    """Return everything: settings, surroundings, and every sample in µs."""
    settings = {
        **asdict(run.settings),
        "shape": run.settings.shape._asdict(),
        "gemms": [gemm._asdict() for gemm in run.settings.gemms],
        "experts": run.settings.experts and run.settings.experts._asdict(),
    }
    least = {id(best_of(curve)) for curve in curves(run.prices).values()}
    return {
        "headline": headline(run),
        **surroundings(),
        "num_ranks": run.num_ranks,
        "available_sms": run.available_sms,
        "limit": run.limit.document(),
        "void": run.limit.is_void,
        "settings": settings,
        "backend": run.backend,
        "gemm_us": run.gemm_us,
        "num_wrong": run.num_wrong,
        "prices": [
            {
                "case": price.case,
                "layout": price.layout,
                "gemm": price.gemm,
                "tiles": price.tiles,
                "num_sms": price.num_sms,
                "alone_us": median(price.alone),
                "links_us": run.limit.floor_us(price.wire_bytes),
                "beside_us": median(price.beside),
                "lost_us": median(price.lost),
                "serial_us": median(price.serial),
                "pays": price.pays,
                "is_best": id(price) in least,
                "num_wrong": price.num_wrong,
                "samples_us": {
                    name: getattr(price, name) for name in ("alone", "beside", "lost", "serial")
                },
            }
            for price in run.prices
        ],
    }


def write_json(run: Run, path: Path) -> None:
    """Write `document`."""
    files.write_json(path, document(run))


def price_table(run: Run, gpu: str) -> prices.PriceTable:
    """Return what asynchronous operations choose their SMs by; `gpu` is the name of the GPUs."""
    surrounding = surroundings()
    shape = run.settings.shape
    return prices.PriceTable(
        gpu=gpu,
        available_sms=run.available_sms,
        source=f"{surrounding['command']}, {surrounding['date']}, {surrounding['commit']}",
        prices=tuple(
            prices.Price(
                op=_OPS[price.case],
                layout=price.layout,
                num_ranks=run.num_ranks,
                num_bytes=shape.tokens * shape.hidden * 2,
                tiles=price.tiles,
                num_sms=price.num_sms or run.available_sms,
                lost_us=round(median(price.lost), 1),
                serial_us=round(median(price.serial), 1),
            )
            for price in run.prices
            if price.case in _OPS and price.layout is not None and price.num_sms is not None
        ),
    )


def write_prices(run: Run, gpu: str, path: Path) -> None:
    """Write a table of prices, or renew what the run measured of one that is there.

    Raises:
        EPArgumentError: What is there is no table, or of another machine.
    """
    table = price_table(run, gpu)
    files.write_json(path, (prices.read(path).merged(table) if path.exists() else table).document())


def write_plot(run: Run, path: Path) -> None:
    """Draw the GEMM time lost against SMs, a line an operation, the best SM count marked."""
    from matplotlib.figure import Figure  # slow to import, and seldom needed

    names = list(run.gemm_us)
    figure = Figure(figsize=(9, 5.5 * len(names)), layout="constrained")
    figure.suptitle(headline(run), fontsize=10, color="red" if run.limit.is_void else "black")
    counts = sorted({count or run.available_sms for count in run.settings.sms})
    for axes, gemm in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        for (of, name), curve in curves(run.prices).items():
            if of != gemm:
                continue
            serial, least = median(curve[0].serial), best_of(curve)
            if least.num_sms is None:  # NCCL's choice
                axes.axhline(median(least.lost), color="grey", linewidth=1, label=name)
                continue
            points = sorted(_point(run, price) for price in curve)
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
            axes.axhline(serial, color=line.get_color(), linestyle=":", linewidth=1)
            axes.plot(*_point(run, least), marker="*", markersize=15, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("SMs that an operation may occupy (star: the best count)")
        axes.set_ylabel("GEMM time lost, µs (dotted: serial, all SMs)")
        axes.set_title(title(run, gemm), fontsize=9)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _point(run: Run, price: Price) -> tuple[int, float]:
    return price.num_sms or run.available_sms, median(price.lost)


def _cells(run: Run, price: Price, is_best: bool) -> list[str]:
    sms = sms_name(price.num_sms)
    lost = median(price.lost)
    return [
        f"{sms}*" if is_best else sms,
        f"{median(price.alone):.0f}",
        f"{run.limit.floor_us(price.wire_bytes):.0f}",
        f"{median(price.beside):.0f}",
        f"{lost:.0f}",
        f"{min(price.lost):.0f}",
        f"{max(price.lost):.0f}",
        f"{median(price.serial):.0f}",
        "yes" if price.pays else "no",
        str(price.num_wrong),
    ]
