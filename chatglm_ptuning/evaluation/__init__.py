"""Predictions in batches, their scores and reports; the `evaluate` and `lm_eval` commands."""
