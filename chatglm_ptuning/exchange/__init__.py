"""Prefixes and bases in the formats of other programs: the `export` and `import` commands."""
