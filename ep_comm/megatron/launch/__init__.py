"""Run Megatron-LM's own scripts: ``python -m ep_comm.megatron.launch SCRIPT``, see `main`."""
