"""What the README's tables come from; each module is run as ``python -m benchmarks.NAME``."""
