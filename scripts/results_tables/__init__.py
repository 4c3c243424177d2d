"""The tables that ``scripts/results.py`` makes: a module for each kind of file."""
