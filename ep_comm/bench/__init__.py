"""``ep-comm bench`` and ``ep-comm doctor``: measure dispatch and combine, and describe a machine.

settings.py     what to measure, checked
routing.py      which experts the tokens select
cases.py        the calls that are measured
alltoall.py     the same work as Megatron's alltoall dispatcher does it, over NCCL
probe.py        what the links carry, measured in the same run
timing.py       how a call is timed
run.py          one run: probe, cases, results
report.py       results as table, JSON and picture
launch.py       joining torchrun's job, and failing together
environment.py  versions and devices
doctor.py       one screen about this machine
"""
