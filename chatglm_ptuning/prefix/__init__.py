"""Prefix checkpoints, and the prefixes loaded beside one base."""
