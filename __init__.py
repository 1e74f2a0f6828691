"""evenlight: mends badly exposed photographs, learning from unlabelled photos."""

__version__ = "0.1.0"
