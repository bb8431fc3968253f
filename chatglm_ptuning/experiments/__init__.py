"""Many runs of `train`, started, resumed and reported: `search`, `compare`, and `tradeoff` over finished ones."""
