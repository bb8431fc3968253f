"""Answers many requests on one base at a time, each with its own prefix; knows token ids only."""
