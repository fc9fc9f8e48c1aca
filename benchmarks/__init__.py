"""Scripts that measure speed: ``python -m benchmarks.NAME [--json FILE]``."""
