"""The folder for PYTHONPATH, see `ep_comm.deep_ep.path`."""
