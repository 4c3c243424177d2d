"""The network between nodes: its settings, and what a host has for it."""
