"""Chat with a base and its prefixes."""
