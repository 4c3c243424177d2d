"""``ep-comm bench`` and ``bench train``: measure.

ops/        dispatch and combine
train/      whole training steps
timing.py   how a call is timed
"""
