"""How a run is configured and trained; the `train` command."""
