"""Pretraining of a Megatron-Core mixture-of-experts model: ``python -m ep_comm.pretrain``."""
