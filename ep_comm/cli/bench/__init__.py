"""``ep-comm bench`` with ``low-latency``, ``overlap`` and ``train``."""

from __future__ import annotations

import typer

from ep_comm.cli.bench import low_latency, operations, overlap, train

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.callback()(operations.bench)
app.command("low-latency", short_help="Time the operations for decoding.")(low_latency.low_latency)
app.command("overlap", short_help="Say what operations cost the GEMMs that run beside them.")(
    overlap.overlap
)
app.command(
    "train",
    short_help="Time whole training steps with several dispatchers.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(train.train)
