"""Messages between hosts, checked and timed: ``ep-comm doctor --network``."""
