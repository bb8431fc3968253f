"""The dataset formats of instruction rows: how each is recognised, and what its rows mean."""
