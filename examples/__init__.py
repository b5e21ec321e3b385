"""Examples that run as they are, each with ``python -m examples.<name>``."""
