"""Data: read, shape, judge, tokenize and batch. No training, no service; torch only in `batches`."""
