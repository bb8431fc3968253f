"""Memory and time of a training run, estimated without weights."""
