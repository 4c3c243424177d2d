"""``ep-comm bench``, ``bench low-latency`` and ``bench train``: measure.

ops/           dispatch and combine
low_latency/   the same for decoding
train/         whole training steps
timing.py      how a call is timed
"""
