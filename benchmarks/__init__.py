"""Measures the kit beside other ways to fine-tune a ChatGLM: `python -m benchmarks` (docs/performance.md)."""
