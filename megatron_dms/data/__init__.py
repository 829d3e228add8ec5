"""From JSONL to batches: chat encoding, token files, and the data set in an order that no layout changes."""
