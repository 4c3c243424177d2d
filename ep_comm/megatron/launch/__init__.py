"""``python -m ep_comm.megatron.launch SCRIPT``: Megatron-LM's own scripts, see `main`."""
