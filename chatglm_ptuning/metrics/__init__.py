"""Scores of predictions against what is expected; knows nothing of models or tasks."""
