"""The reference backend, in plain torch over any process group."""
