"""Loads the server with many clients: `python -m benchmarks.serving` (docs/serving.md)."""
