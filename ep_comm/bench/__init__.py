"""``ep-comm bench``, ``bench train``, ``doctor``: measure, and describe a machine.

command.py      the commands

Dispatch and combine:

settings.py     what to measure, checked
routing.py      which experts the tokens select
cases.py        the calls that are measured
alltoall.py     the same work as Megatron's alltoall dispatcher does it, over NCCL
probe.py        what the links carry, measured in the same run
run.py          one run: probe, cases, results
report.py       results as table, JSON and picture
launch.py       joining torchrun's job, and failing together

Training steps:

train_settings.py  what to measure, checked
train_configs.py   the training example's configuration of each variant
train_model.py     a variant in memory: the example's model, optimizer and step
train_layer.py     one MoE layer alone
train_profile.py   launches, host waits and GPU-busy time, from a trace of torch's profiler
train.py           one run: the variants in turn, block by block
train_results.py   what was found, and the figures that follow
train_report.py    results as tables, JSON and picture
train_timeline.py  a picture of what the GPU did, stream by stream

Both:

timing.py       how a call is timed
environment.py  versions and devices
doctor.py       one screen about this machine
"""
