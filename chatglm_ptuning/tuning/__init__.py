"""Tuning methods: what each of them trains and saves, and how a checkpoint of any of them is loaded."""
