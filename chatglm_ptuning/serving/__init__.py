"""Talking to a base and its prefixes: chat sessions and the programs around them."""
