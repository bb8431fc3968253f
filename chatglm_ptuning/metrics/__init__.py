"""Scores of predictions against gold answers; independent of models and tasks."""
