"""``ep-comm bench train``: training steps.

settings.py  what to measure, checked, and the training example's configuration of each variant
model.py     a variant in memory: the example's model, optimizer and step
layer.py     one MoE layer alone
profile.py   launches, host waits and GPU-busy time, from a trace of torch's profiler
run.py       one run: the variants in turn, block by block
results.py   what was found, and the figures that follow
report.py    results as tables, JSON and picture
timeline.py  a picture of what the GPU did, stream by stream
"""
