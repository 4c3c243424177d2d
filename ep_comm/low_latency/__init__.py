"""Low-latency dispatch and combine, for decoding: few tokens, fixed sizes, no wait of the host.

Names and meaning follow the low-latency part of DeepEP's published ``Buffer`` API. What differs:

* Sizes are the buffer's (`EPConfig.low_latency_tokens`), and normal operations may be mixed with
  these ones, without a call between them.
* Weights may travel with the dispatch. Combine then has one hop less to wait for.
* The rows of an expert stand by source rank, then by token.
* Hooks are called once.

The same bits on every backend, with any number of SMs:

* **BF16 rows arrive bit for bit**, but for NaN payloads: of 8 elements, from a multiple of 8 on,
  that all have the bits 0xFFFF, the first arrives as 0x7FFF. FP8: `ep_comm.fp8_low_latency`.
* **Combine sums in two levels**, whatever ``EPConfig.ranks_per_node`` says. On the experts' rank:
  weight times row, rounded to FP32, then added in FP32, by ascending expert; rounded to BF16 for
  the way. On the token's rank: these sums added in FP32, by ascending rank, rounded to BF16. A sum
  starts from its first term, so that -0 survives. A token that goes nowhere gives +0.

The two phases of an operation can be taken apart. With ``return_recv_hook=True`` a call only sends,
and the hook that it returns receives: between them nothing of ours runs. Of dispatches and of
combines the last two each may be *out*, sent but not yet received.
"""
