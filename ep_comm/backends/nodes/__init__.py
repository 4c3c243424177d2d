"""The backend of several nodes: NVLink inside each, a network between (csrc/PROTOCOL.md)."""
