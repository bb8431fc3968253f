"""Scoring answers: metrics, batched generation, and the `evaluate` command."""
