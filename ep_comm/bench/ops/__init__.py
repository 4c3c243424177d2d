"""``ep-comm bench``: dispatch and combine.

settings.py     what to measure, checked
routing.py      which experts the tokens select
cases.py        the calls that are measured
alltoall.py     the same work as Megatron's alltoall dispatcher does it, over NCCL
probe.py        what the links carry, measured in the same run
run.py          one run: probe, cases, results
report.py       results as table, JSON and picture
"""
