"""From data files to padded batches: sources, dataset formats, tasks, truncation, cache, collation."""
