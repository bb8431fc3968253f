"""How much memory and time a training run takes, computed without weights."""
