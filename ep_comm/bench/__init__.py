"""``ep-comm bench``, ``bench low-latency``, ``bench overlap`` and ``bench train``: measure.

ops/           dispatch and combine
low_latency/   the same for decoding
overlap/       what operations cost the GEMMs beside them
train/         whole training steps
timing.py      how a call is timed
"""
