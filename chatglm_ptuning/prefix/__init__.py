"""Prefix checkpoints of any format, whether they fit a base, and the prefixes loaded beside it."""
