"""``ep-comm bench low-latency``: dispatch and combine of a few tokens.

settings.py     what to measure, checked
inputs.py       tokens, routings and what the experts make of them, for all ranks
check.py        what must come out, and how many rows do not
calls.py        the calls that are measured, and their bytes
clocks.py       how long they take: in CUDA graphs, eagerly, phase by phase, on the host
floors.py       what no operation can beat, measured in the same run
run.py          one run: floors, then every size
report.py       results as tables, JSON and picture
"""
