"""The version of the package; CHANGELOG.md says what came with which."""

__version__ = "0.2.0"
