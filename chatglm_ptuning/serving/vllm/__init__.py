"""Prefixes on stock vLLM: what runs inside it (`plugin/`), and the API of `serve` over it."""
