"""The pretraining that ``examples/pretrain_moe.py`` starts, see `loop`."""
