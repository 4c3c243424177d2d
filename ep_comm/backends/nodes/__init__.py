"""The backend of several hosts: NVLink inside each, a network between (csrc/PROTOCOL.md).

Not among `ep_comm.backends.BACKENDS` yet: its network is other GPUs of one host, or a test's.
"""
