"""``ep-comm compare``: the same training with several dispatchers, and what became of the loss."""
