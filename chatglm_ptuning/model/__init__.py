"""The network of the family with its prefix argument, its tokenizer, and loading of bases."""
