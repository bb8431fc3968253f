"""Training of prefixes."""
