"""Decode with a mixture of experts spread over the GPUs of a machine: one CUDA graph a step.

    torchrun --nproc_per_node=2 examples/decode_moe.py
    torchrun --nproc_per_node=2 examples/decode_moe.py --overlap --tokens 128 --json decode.json

Every sequence gets one token a step, the likeliest, which is the input of the next step. The same
model runs with three ways to the experts and back, whose GEMMs have the same shape in all three:

* ``low-latency``: ``Buffer.low_latency_dispatch`` and ``low_latency_combine``, rows in BF16.
* ``normal``: ``Buffer.dispatch`` and ``combine``, with ``num_worst_tokens``.
* ``alltoall``: NCCL's ``all_to_all_single``. In a graph its sizes are fixed, and nothing may be
  dropped, so each rank sends all its tokens to every rank: the least that is always enough. A copy
  for each expert, which Megatron's alltoall sends, is more on fewer ranks than ``--topk``.

``--overlap`` cuts the tokens in two micro-batches: while rows of one are in flight the GEMMs of the
other run, and the hooks receive behind them. Two micro-batches read all weights twice, so compare
with both: the same two one after the other, and one batch.

Weights are random. In attention's place stands a decaying sum over the tokens so far, between two
GEMMs. Without GPUs it runs over gloo and the reference backend, small and without graphs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from ep_comm import Buffer, EPConfig
from ep_comm.bench.tables import number, screen_table
from ep_comm.job import files
from ep_comm.job.environment import surroundings
from ep_comm.job.exits import UserError, user_errors_exit
from ep_comm.job.start import has_launcher, join, on_rank_0
from ep_comm.telemetry.records import timed

SIZES = {  # defaults on GPUs and on CPU
    "tokens": (16, 16, "sequences of each rank"),
    "layers": (4, 2, "layers"),
    "hidden": (2048, 64, "elements of a row"),
    "ffn": (768, 64, "elements of a row inside of an expert"),
    "experts": (64, 8, "experts of a layer, over all ranks"),
    "topk": (8, 2, "experts of a token"),
    "steps": (500, 20, "steps that are timed"),
}
VOCABULARY = 1024
DECAY = 0.9  # of the sum in attention's place
WARM_UP = 10  # steps before those that are timed
LEAST_SAME = 0.9  # of the first tokens: rounding may tip one whose two likeliest nearly tie
IN_TURN, OVERLAPPED = "low-latency, 2 in turn", "low-latency, 2 overlapped"

Phases = Generator[None, None, Tensor]  # yields while something of it is in flight


# --- To the experts and back ----------------------------------------------------------------------
# x [T, hidden], topk_idx and FP32 weights [T, K] of this rank's tokens; the result is [T, hidden].


def low_latency(
    buffer: Buffer, split: bool, x: Tensor, topk_idx: Tensor, weights: Tensor, experts: Experts
) -> Phases:
    """Dispatch, and combine, which weights and sums; with `split` hooks receive."""
    num_experts = buffer.config.num_experts
    out = buffer.low_latency_dispatch(
        x, topk_idx, len(x), num_experts, weights, use_fp8=False, return_recv_hook=split
    )
    if split:
        yield
        out.hook()
    y = experts(out.recv_x)  # rows behind recv_count too: nobody reads what comes of them
    back = buffer.low_latency_combine(y, topk_idx, None, out.handle, return_recv_hook=split)
    if split:
        yield
        back.hook()
    return back.combined_x


def normal(
    buffer: Buffer, x: Tensor, topk_idx: Tensor, weights: Tensor, experts: Experts
) -> Phases:
    """Dispatch into an output with room for all tokens of all ranks; combine."""
    yield from ()  # nothing is left in flight
    room = buffer.num_ranks * len(x)
    out = buffer.dispatch(x, topk_idx, weights, layout="rank", num_worst_tokens=room)
    sums = experts.weighted_sum(out.recv_x, out.recv_topk_idx, out.recv_topk_weights)
    return buffer.combine(sums, out.handle).combined_x


def alltoall(x: Tensor, topk_idx: Tensor, weights: Tensor, experts: Experts) -> Phases:
    """Send all rows to all ranks, weights and experts behind each; every rank returns sums."""
    yield from ()
    num_ranks, first_expert = dist.get_world_size(), dist.get_rank() * len(experts.up)
    routing = torch.cat([weights, topk_idx.float()], dim=1)
    rows = torch.cat([x, routing.view(x.dtype)], dim=1).expand(num_ranks, -1, -1)
    rows, routing = _exchanged(rows.contiguous()).flatten(0, 1).tensor_split([x.shape[1]], dim=1)
    weights, topk_idx = routing.contiguous().view(torch.float32).chunk(2, dim=1)
    sums = experts.weighted_sum(rows, topk_idx.long() - first_expert, weights)
    sums = _exchanged(sums.unflatten(0, (num_ranks, len(x))))
    return sums.sum(0, dtype=torch.float32).bfloat16()


def _exchanged(of_ranks: Tensor) -> Tensor:
    received = torch.empty_like(of_ranks)
    dist.all_to_all_single(received, of_ranks)
    return received


# --- The model ------------------------------------------------------------------------------------


class Experts(NamedTuple):
    """The E experts of this rank: weights [E, hidden, ffn] and [E, ffn, hidden]."""

    up: Tensor
    down: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return what each expert makes of its own rows, [E, rows, hidden]."""
        return torch.bmm(silu(torch.bmm(x, self.up)), self.down)

    def weighted_sum(self, x: Tensor, topk_idx: Tensor, weights: Tensor) -> Tensor:
        """Sum what experts make of rows [N, hidden]; `topk_idx` not in 0 to E - 1 is no expert."""
        last, row = len(self.up) - 1, torch.arange(len(x), device=x.device)
        y = self(x.expand(last + 1, -1, -1))[topk_idx.clamp(0, last), row[:, None]]
        weights = weights.masked_fill((topk_idx < 0) | (topk_idx > last), 0)
        return (y * weights[:, :, None]).sum(1).bfloat16()


class Decoder:
    """Embedding, layers and head in BF16: every rank has all of it but the others' experts."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        hidden, ffn, experts = options.hidden, options.ffn, options.experts
        num_local_experts = experts // dist.get_world_size()
        everywhere = torch.Generator(device).manual_seed(0)
        here = torch.Generator(device).manual_seed(1 + dist.get_rank())

        def weight(*shape: int, generator: torch.Generator = everywhere) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return (values / shape[-2] ** 0.5).bfloat16()

        self.topk = options.topk
        self.embedding = weight(VOCABULARY, hidden) * VOCABULARY**0.5
        self.head = weight(hidden, VOCABULARY)
        self.layers = []
        for _ in range(options.layers):
            up = weight(num_local_experts, hidden, ffn, generator=here)
            # SiLU and weights make rows smaller, and experts are to count as much as the rest.
            down = 4 * weight(num_local_experts, ffn, hidden, generator=here)
            dense = weight(hidden, 2 * hidden), weight(hidden, hidden), weight(hidden, experts)
            self.layers.append((*dense, Experts(up, down)))

    def step(self, tokens: Tensor, past: Tensor, exchange: Callable[..., Phases]) -> Phases:
        """Put the next tokens in the place of `tokens` [T]; `past` is [layers, T, hidden]."""
        x = self.embedding[tokens]
        for (into, out, router, experts), sums in zip(self.layers, past, strict=True):
            values, gates = (_normed(x) @ into).chunk(2, dim=1)
            sums.mul_(DECAY).add_(values)
            x = x + (sums * silu(gates)) @ out
            h = _normed(x)
            scores, topk_idx = (h @ router).float().topk(self.topk)
            x = x + (yield from exchange(h, topk_idx, scores.softmax(dim=1), experts))
        return tokens.copy_((_normed(x) @ self.head).argmax(dim=1))


def _normed(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:])


# --- Running and timing it ------------------------------------------------------------------------


def run(options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Run every variant, and return the figures of each by its name. Collective."""
    on_gpu = device.type == "cuda"
    config = EPConfig(
        num_experts=options.experts,
        hidden=options.hidden,
        max_tokens_per_rank=options.tokens,
        num_topk=options.topk,
        low_latency_tokens=options.tokens,
        backend="nvlink" if on_gpu else "reference",  # of the two only NVLink fits a graph
    )
    stream = torch.cuda.Stream() if on_gpu else None  # the default stream cannot be captured
    with torch.cuda.stream(stream), Buffer(None, config) as buffer:
        model = Decoder(options, device)
        generator = torch.Generator().manual_seed(dist.get_rank())
        prompt = torch.randint(VOCABULARY, [options.tokens], generator=generator).to(device)
        tokens = prompt.clone()
        past = torch.zeros(options.layers, options.tokens, options.hidden, device=device).bfloat16()

        def step(exchange: Callable[..., Phases], num_batches: int = 1, overlap=False) -> None:
            batches = zip(tokens.chunk(num_batches), past.chunk(num_batches, dim=1), strict=True)
            parts = [model.step(*batch, exchange) for batch in batches]
            # Overlapped, they take turns: each goes on until something of it is in flight.
            for _ in zip_longest(*parts) if overlap else chain(*parts):
                pass

        def first_tokens(step: Callable[[], None]) -> Tensor:
            tokens.copy_(prompt)
            past.zero_()
            step()
            return tokens.clone()

        fused, split = (partial(low_latency, buffer, split) for split in (False, True))
        variants = {
            "alltoall": partial(step, alltoall),
            "normal": partial(step, partial(normal, buffer)),
            "low-latency": partial(step, fused),
        }
        expected = first_tokens(variants["alltoall"])
        if options.dispatcher != "all":
            variants = {options.dispatcher: variants[options.dispatcher]}
        if options.overlap:
            variants[IN_TURN] = partial(step, fused, 2)
            variants[OVERLAPPED] = partial(step, split, 2, overlap=True)
        results = {}
        for name, variant in variants.items():
            if on_gpu:
                variant = captured(variant)
            same = (first_tokens(variant) == expected).sum()
            dist.all_reduce(same)
            *step_us, total_us = times(variant, options.steps, device)
            buffer.synchronize()  # raises what went wrong in replays
            num_tokens = options.tokens * dist.get_world_size()
            results[name] = {
                "p50_us": float(np.percentile(step_us, 50)),
                "p99_us": float(np.percentile(step_us, 99)),
                "tokens_per_s": 1e6 * options.steps * num_tokens / total_us,
                "same_tokens": same.item() / num_tokens,
            }
        return results


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of `step`."""
    for _ in range(2):
        step()  # loads kernels, and makes what cannot be made in a graph
    stream = torch.cuda.current_stream()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Relaxed: NCCL's own thread may ask for events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        step()
    return graph.replay


def times(step: Callable[[], None], num_steps: int, device: torch.device) -> list[float]:
    """Return the µs of each step, then of all with no pause between: those of the slowest rank."""
    for _ in range(WARM_UP):
        step()
    spans = []
    with timed(device) as whole:
        for _ in range(num_steps):
            with timed(device) as span:
                step()
            spans.append(span)
    us = [1e6 * span.seconds for span in (*spans, whole)]
    slowest_us = torch.tensor(us, dtype=torch.float64, device=device)
    dist.all_reduce(slowest_us, op=dist.ReduceOp.MAX)
    return slowest_us.tolist()


# --- What it says ---------------------------------------------------------------------------------


def report(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    """Print the table, and write the file that ``--json`` names."""
    num_ranks = dist.get_world_size()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU without graphs"
    title = (
        f"{num_ranks} × {where}, {options.tokens} tokens each: {options.layers} layers, "
        f"hidden {options.hidden}, top-{options.topk} of {options.experts} experts"
    )
    columns = ["µs a step", "p50", "p99", "alltoall ÷ this", "tokens/s", "same tokens"]
    rows = []
    for name, found in results.items():
        ratio = results["alltoall"]["p50_us"] / found["p50_us"] if "alltoall" in results else None
        num_tokens = options.tokens * num_ranks
        same = f"{found['same_tokens'] * num_tokens:.0f} of {num_tokens}"
        times = (f"{found[key]:,.0f}" for key in ("p50_us", "p99_us"))
        rows.append([name, *times, number(ratio, ".2f"), f"{found['tokens_per_s']:,.0f}", same])
    notes = ["a step: a token of each sequence; same tokens: as eager alltoall, of the first step"]
    if options.overlap:
        of_two, of_one = (
            results[name]["p50_us"] - results[OVERLAPPED]["p50_us"]
            for name in (IN_TURN, "low-latency")
        )
        notes.append(f"overlap saves {of_two:.0f} µs of two in turn, {of_one:.0f} of one batch")
    table = screen_table("", columns)
    for row in rows:
        table.add_row(*(cell or "–" for cell in row))
    Console(width=110).print(title, table, *notes, sep="\n", highlight=False)
    if options.json:
        settings = {name: getattr(options, name) for name in SIZES}
        document = {"title": title, **surroundings(), "settings": settings, "results": results}
        document |= {"tables": [{"columns": columns, "rows": rows}], "notes": notes}
        files.write_json(options.json, document)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    dispatchers = ["all", "alltoall", "normal", "low-latency"]
    parser.add_argument("--dispatcher", choices=dispatchers, default="all", help="what to time")
    parser.add_argument("--overlap", action="store_true", help="two micro-batches too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    for name, (on_gpu, on_cpu, text) in SIZES.items():
        default = on_gpu if torch.cuda.is_available() else on_cpu
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    options = parser.parse_args()
    with user_errors_exit():
        for name in SIZES:
            if getattr(options, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
        can_overlap = options.tokens % 2 == 0 and options.dispatcher in ("all", "low-latency")
        if options.overlap and not can_overlap:
            raise UserError("--overlap needs the low-latency dispatcher, and --tokens to be even")
        if not has_launcher():
            raise UserError("start it with torchrun --nproc_per_node=2 examples/decode_moe.py")
        results = run(options, join())
        on_rank_0(lambda: report(options, results))
    dist.destroy_process_group()
    for name, found in results.items():
        if found["same_tokens"] < LEAST_SAME:
            sys.exit(f"error: {name} gives other tokens than alltoall")


if __name__ == "__main__":
    main()
