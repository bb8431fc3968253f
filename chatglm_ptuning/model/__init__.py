"""The network of the family, its tokenizer, and the prefix in front of it."""
