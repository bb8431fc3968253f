"""From data files to padded batches: reading rows, chat formats, cutting to length, collation."""
