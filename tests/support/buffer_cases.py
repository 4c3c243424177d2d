"""Cases of dispatch and combine, for any backend: run on a rank, then checked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from cases import Case, assert_same, to_numpy, to_torch
from oracle import combine, expert_rows, fp32_to_bf16, local_experts, rank_rows
from ranks import run_ranks

from ep_comm import Buffer, EPConfig

CASES = [
    Case(tokens=(7,)),
    Case(tokens=(7, 5), dtype="fp32"),
    Case(tokens=(9, 6), dtype="fp16", num_topk=5),
    Case(tokens=(9, 0, 7, 6), dtype="fp16", ranks_per_node=2, num_topk=6, experts_per_rank=3),
    Case(tokens=(7, 5), layout="rank"),
    Case(tokens=(0, 9), drop=0.3),
    Case(tokens=(0, 0)),
    Case(tokens=(6, 0, 11), num_topk=5, experts_per_rank=3, idx_dtype="int32"),
    Case(tokens=(6, 8, 11), routing="one_expert", layout="rank"),
    Case(tokens=(6, 8, 11), ranks_per_node=1, num_topk=8, experts_per_rank=4),
    Case(tokens=(9, 8, 7, 6), ranks_per_node=2, num_topk=8, experts_per_rank=2),
    Case(tokens=(9, 8, 7, 6), ranks_per_node=1, num_topk=6, experts_per_rank=2, seed=1),
    Case(tokens=(9, 8, 7, 6), num_topk=6, experts_per_rank=2, as_routing_map=True, drop=0.2),
    Case(tokens=(40, 1, 33, 2), routing="zipf", hidden=1, alignment=16, drop=0.1),
    Case(tokens=(5, 5, 5, 5), routing="last_rank", alignment=1, hidden=130),
    Case(tokens=(9, 0, 7, 30, 1, 12, 5, 8), ranks_per_node=4, num_topk=8, drop=0.1),
    Case(tokens=(9, 4, 0, 7, 11, 2), ranks_per_node=3, num_topk=7, experts_per_rank=2, drop=0.1),
    Case(tokens=(1, 12, 6, 0, 7, 5), ranks_per_node=2, num_topk=6, layout="rank", dtype="fp32"),
    Case(tokens=(3, 14, 0, 6, 9, 2, 21, 4), layout="rank", routing="zipf", num_topk=6),
]


def run_case(
    rank: int, case: Case, buffer: Buffer | None = None
) -> dict[str, np.ndarray | list[int] | int]:
    """Everything that one rank gets from one routing, forward and backward."""
    buffer = buffer or Buffer(None, case.config())
    with calls_noted(buffer):
        return _run_case(rank, case, buffer)


@contextlib.contextmanager
def calls_noted(buffer: Buffer) -> Iterator[None]:
    """The records of operations in here say when they were called."""
    before, start = buffer.records.num_operations, time.monotonic()
    yield
    called_s = [record.called_s for record in buffer.records.since(before)]
    times = [start, *called_s, time.monotonic()]
    assert called_s and all(a <= b for a, b in itertools.pairwise(times)), times


def _run_case(rank: int, case: Case, buffer: Buffer) -> dict[str, np.ndarray | list[int] | int]:
    device, before = case.device, buffer.records.num_operations
    topk = to_torch(case.topk_idx(rank), device).to(getattr(torch, case.idx_dtype))
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), device).requires_grad_()
    probs = to_torch(case.probabilities(rank, tuple(topk.shape), salt=3), device)
    routing = dict(topk_idx=topk, topk_weights=probs.requires_grad_())
    if case.as_routing_map:
        routing = as_routing_map(case, topk, probs)
    weights_leaf = routing["topk_weights"]

    out = buffer.dispatch(x, **routing, layout=case.layout, expert_alignment=case.alignment)
    handle = out.handle
    dispatch_record = list(buffer.records)[-1]

    y = case.rows(rank, handle.num_rows, salt=4)
    if case.layout == "expert":  # garbage in padding must not reach any sum
        y[to_numpy(out.recv_topk_weights) == 0] = case.rows(rank, 1, salt=4).max()
    y = to_torch(y, device).requires_grad_()
    back = buffer.combine(y, handle)
    combine_record = list(buffer.records)[-1]

    grad_rows = to_torch(case.rows(rank, handle.num_rows, salt=5), device)
    grad_probs = to_torch(
        case.probabilities(rank, tuple(out.recv_topk_weights.shape), salt=6), device
    )
    torch.autograd.backward([out.recv_x, out.recv_topk_weights], [grad_rows, grad_probs])
    grad_out = to_torch(case.rows(rank, case.tokens[rank], salt=7), device)
    back.combined_x.backward(grad_out)

    cached = buffer.dispatch(x, handle=handle)
    again = buffer.combine(y, handle)
    assert_same(to_numpy(cached.recv_x), to_numpy(out.recv_x), "cached dispatch")
    assert cached.recv_topk_idx is out.recv_topk_idx
    assert_same(to_numpy(again.combined_x), to_numpy(back.combined_x), "repeated combine")
    check_kinds_of_records(buffer, before, tuple(handle.tokens_per_expert.tolist()))
    return dict(
        added_weights=added_weights(case, rank, buffer, y, handle),
        x=to_numpy(out.recv_x),
        probs=to_numpy(out.recv_topk_weights),
        topk=None if out.recv_topk_idx is None else to_numpy(out.recv_topk_idx),
        topk_dtype=str(topk.dtype),
        counts=handle.tokens_per_expert.tolist(),
        padded=out.num_recv_tokens_per_expert_list,
        y=to_numpy(y),
        combined=to_numpy(back.combined_x),
        grad_x=to_numpy(x.grad),
        grad_y=to_numpy(y.grad),
        grad_weights=to_numpy(weights_leaf.grad),
        dispatch_wire_bytes=dispatch_record.wire_bytes_to_rank,
        combine_wire_bytes=combine_record.wire_bytes_to_rank,
    )


def check_kinds_of_records(buffer: Buffer, before: int, counts: tuple[int, ...]) -> None:
    """Those of `_run_case`, which began behind `before` operations."""
    records = [record for record in buffer.records.since(before) if record.op != "plan"]
    assert [(each.op, each.is_backward, each.rows_of_experts) for each in records] == [
        ("dispatch", False, counts),
        ("combine", False, ()),
        ("combine", True, ()),
        ("dispatch", True, counts),
        ("dispatch", False, counts),
        ("combine", False, ()),
    ]


def added_weights(case: Case, rank: int, buffer: Buffer, y, handle) -> np.ndarray | None:
    """Weights that combine adds up: what a rank has for experts of other ranks counts too."""
    if case.layout == "expert":
        return None
    weights = case.probabilities(rank, (handle.num_rows, handle.num_topk), salt=8)
    with torch.no_grad():
        back = buffer.combine(y, handle, to_torch(weights, case.device), add_weights=True)
    return to_numpy(back.combined_topk_weights)


def as_routing_map(case: Case, topk: torch.Tensor, probs: torch.Tensor) -> dict:
    """The same routing in Megatron's form."""
    columns = torch.where(topk < 0, case.num_experts, topk).long()
    dense = torch.zeros(len(topk), case.num_experts + 1, device=topk.device)
    weights = dense.scatter(1, columns, probs.detach())[:, :-1].contiguous()
    routing_map = dense.bool().scatter(1, columns, True)[:, :-1].contiguous()
    return dict(routing_map=routing_map, topk_weights=weights.requires_grad_())


def check_case(case: Case) -> None:
    backend = "gloo" if case.device == "cpu" else "nccl"
    check_results(case, run_ranks(case.num_ranks, run_case, case, backend=backend))


def check_results(
    case: Case, results: list[dict], check_bytes: Callable[..., None] | None = None
) -> None:
    """Against the oracle."""
    ranks = range(case.num_ranks)
    topk_idx = [case.topk_idx(r) for r in ranks]
    x = [case.rows(r, case.tokens[r], salt=2) for r in ranks]
    probs = [case.probabilities(r, topk_idx[r].shape, salt=3) for r in ranks]
    grad_out = [case.rows(r, case.tokens[r], salt=7) for r in ranks]
    per_rank = case.experts_per_rank

    layouts, grad_rows, grad_probs = [], [], []
    for r in ranks:
        got = results[r]
        if case.layout == "expert":
            rows, counts = expert_rows(topk_idx, r, per_rank, case.alignment)
            assert got["counts"] == counts
            assert got["padded"] == [-(-c // case.alignment) * case.alignment for c in counts]
        else:
            rows = rank_rows(topk_idx, r, per_rank)
            check_recv_topk(case, topk_idx, rows, r, got)
            _, counts = expert_rows(topk_idx, r, per_rank, 1)
            assert got["padded"] == got["counts"] == counts  # nothing is padded there
        layouts.append(rows)
        zero = np.zeros(case.hidden, case.np_dtype)
        for name, source in (("x", x), ("grad_y", grad_out)):
            want = [source[row.source][row.token] if row else zero for row in rows]
            assert_same(
                got[name], np.array(want, case.np_dtype).reshape(-1, case.hidden), f"{name} on {r}"
            )
        check_recv_probs(case, topk_idx, probs, rows, r, got["probs"])
        grad_rows.append(case.rows(r, len(rows), salt=5))
        grad_probs.append(case.probabilities(r, got["probs"].shape, salt=6))

    sums = [
        ("combined", [results[r]["y"] for r in ranks], case.hidden, case.np_dtype),
        ("grad_x", grad_rows, case.hidden, case.np_dtype),
    ]
    if case.layout == "rank":
        added = [case.probabilities(r, (len(layouts[r]), case.num_topk), salt=8) for r in ranks]
        sums.append(("added_weights", added, case.num_topk, np.dtype(np.float32)))
    for r in ranks:
        for name, rows, width, dtype in sums:
            want = [
                combine(
                    topk_idx[r][token],
                    rows_of_token(case, layouts, rows, r, token),
                    case.node_size,
                    case.num_ranks,
                    width,
                    dtype,
                )
                for token in range(case.tokens[r])
            ]
            assert_same(
                results[r][name],
                np.array(want, dtype).reshape(-1, width),
                f"{name} on rank {r}",
            )
        check_grad_weights(case, topk_idx[r], layouts, grad_probs, r, results[r]["grad_weights"])
        (check_bytes or check_wire_bytes)(case, topk_idx, r, results[r])


def check_recv_topk(case, topk_idx, rows, rank, got) -> None:
    assert str(got["topk"].dtype) == ("int32" if case.as_routing_map else case.idx_dtype)
    for i, row in enumerate(rows):
        for k, expert in enumerate(sent_topk(case, topk_idx[row.source][row.token])):
            local = expert >= 0 and expert // case.experts_per_rank == rank
            assert got["topk"][i, k] == (expert % case.experts_per_rank if local else -1)


def sent_topk(case: Case, topk: np.ndarray) -> np.ndarray:
    """What one token's entries become on the way: a routing map knows them in ascending order."""
    if not case.as_routing_map:
        return topk
    chosen = np.sort(topk[topk >= 0])
    return np.concatenate([chosen, np.full(len(topk) - len(chosen), -1)])


def probability(case: Case, topk: np.ndarray, probs: np.ndarray, expert: int) -> np.float32:
    return probs[list(topk).index(expert)]


def check_recv_probs(case, topk_idx, probs, rows, rank, got) -> None:
    want = np.zeros_like(got)
    for i, row in enumerate(rows):
        if row is None:
            continue
        topk, p = topk_idx[row.source][row.token], probs[row.source][row.token]
        if case.layout == "expert":
            want[i] = probability(case, topk, p, row.expert + rank * case.experts_per_rank)
            continue
        for k, expert in enumerate(sent_topk(case, topk)):
            if expert >= 0 and expert // case.experts_per_rank == rank:
                want[i, k] = probability(case, topk, p, expert)
    assert_same(got, want, f"probabilities on rank {rank}")


def rows_of_token(case, layouts, rows, source, token) -> dict[int, dict[int, np.ndarray]]:
    found: dict[int, dict[int, np.ndarray]] = {}
    for r, layout in enumerate(layouts):
        for i, row in enumerate(layout):
            if row and (row.source, row.token) == (source, token):
                found.setdefault(r, {})[row.expert or 0] = rows[r][i]
    return found


def check_grad_weights(case, topk, layouts, grad_probs, source, got) -> None:
    want = np.zeros_like(got)
    for r, layout in enumerate(layouts):
        for i, row in enumerate(layout):
            if row is None or row.source != source:
                continue
            for k, expert in enumerate(topk[row.token]):
                if expert < 0 or expert // case.experts_per_rank != r:
                    continue
                if row.expert not in (None, expert % case.experts_per_rank):
                    continue
                k_sent = list(sent_topk(case, topk[row.token])).index(expert)
                grad = grad_probs[r][i] if row.expert is not None else grad_probs[r][i, k_sent]
                want[row.token, expert if case.as_routing_map else k] = grad
    assert_same(got, want, f"gradient of the probabilities on rank {source}")


def check_wire_bytes(case, topk_idx, rank, got) -> None:
    """One copy of a token per destination rank, however many experts it hits there."""
    hits = [
        [sum(bool(local_experts(t, dst, case.experts_per_rank)) for t in topk_idx[src])
         for dst in range(case.num_ranks)]
        for src in range(case.num_ranks)
    ]  # fmt: skip
    for dst in range(case.num_ranks):
        sent = 0 if dst == rank else hits[rank][dst] * case.row_bytes
        returned = 0 if dst == rank else hits[dst][rank] * case.row_bytes
        assert got["dispatch_wire_bytes"][dst] == sent
        assert got["combine_wire_bytes"][dst] == returned


def on_gpus(case: Case, backend: str) -> Case:
    """The same case with rows that the kernels take: multiples of 16 bytes."""
    return dataclasses.replace(
        case, device="cuda", backend=backend, hidden=max(8, case.hidden // 8 * 8)
    )


def random_case(seed: int, num_ranks: int | tuple[int, int]) -> Case:
    """Sizes that cross chunks, stages and blocks."""
    rng = np.random.default_rng(seed)
    if not isinstance(num_ranks, int):
        num_ranks = int(rng.integers(num_ranks[0], num_ranks[1] + 1))
    experts_per_rank = int(rng.choice([1, 3, 8, 32]))
    case = Case(
        tokens=tuple(int(n) for n in rng.choice([0, 1, 31, 70, 300], num_ranks)),
        experts_per_rank=experts_per_rank,
        num_topk=int(min(rng.choice([1, 2, 5, 8, 16]), num_ranks * experts_per_rank)),
        hidden=int(rng.choice([8, 64, 520, 2048])),
        dtype=str(rng.choice(["bf16", "fp16", "fp32"])),
        layout=str(rng.choice(["expert", "expert", "rank"])),
        alignment=int(rng.choice([1, 16, 128])),
        ranks_per_node=[None, 1][int(rng.integers(2))],
        routing=str(rng.choice(["uniform", "zipf", "last_rank", "one_expert"])),
        drop=float(rng.choice([0.0, 0.3, 1.0])),
        idx_dtype=str(rng.choice(["int32", "int64"])),
        as_routing_map=bool(rng.integers(2)),
        seed=seed,
    )
    print(f"case: {case}")
    return on_gpus(case, "nvlink")


def changing_operations(
    rank: int,
    buffer: Buffer,
    num_operations: int,
    device: str,
    sms: Sequence[int] = (),
    beside: Callable[[], None] = lambda: None,
) -> list[str]:
    """Digests of what `num_operations` dispatches give, each repeated beside its combine.

    Shapes change with every one, and nothing is reset between. Before each the SMs become one of
    `sms`, and `beside` is called; no result depends on either.
    """
    shared, own, of_sms = (np.random.default_rng(seed) for seed in (1, [2, rank], [3, rank]))
    config, digests = buffer.config, []
    for i in range(num_operations):
        settings = dict(
            layout=str(shared.choice(["expert", "rank"])),
            expert_alignment=int(shared.choice([1, 16])),
            async_finish=i % 3 == 0,
        )
        num_topk = int(shared.integers(1, config.num_topk + 1))
        num_tokens = int(own.choice([0, 1, 17, config.max_tokens_per_rank]))
        topk = own.random((num_tokens, config.num_experts)).argsort(1)[:, :num_topk]
        topk = to_torch(topk.astype(np.int32), device)
        x = to_torch(random_rows(own, num_tokens, config.hidden), device)
        if sms:
            buffer.set_num_sms(int(of_sms.choice(sms)))
        beside()
        out = buffer.dispatch(x, topk, **settings)
        out.event.current_stream_wait()
        y = to_torch(random_rows(own, out.handle.num_rows, config.hidden), device)
        # A dispatch is started before the combine on the other stream has been waited for.
        back = buffer.combine(y, out.handle, async_finish=True)
        again = buffer.dispatch(x, handle=out.handle)
        back.event.current_stream_wait()
        recv_x = to_numpy(out.recv_x)
        assert_same(to_numpy(again.recv_x), recv_x, f"cached dispatch {i}")
        digests += [digest(recv_x), digest(to_numpy(back.combined_x))]
    return digests


def random_rows(rng: np.random.Generator, num_rows: int, hidden: int) -> np.ndarray:
    return fp32_to_bf16(rng.standard_normal((num_rows, hidden), np.float32))


def digest(rows: np.ndarray) -> str:
    return f"{rows.shape} {hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()}"


def changing_config(num_ranks: int, backend: str) -> EPConfig:
    return EPConfig(
        num_experts=4 * num_ranks,
        hidden=64,
        max_tokens_per_rank=96,
        num_topk=4,
        timeout_s=20,
        backend=backend,
    )


def changing_on_reference(rank: int, num_operations: int) -> list[str]:
    buffer = Buffer(None, changing_config(dist.get_world_size(), "reference"))
    return changing_operations(rank, buffer, num_operations, "cpu")
