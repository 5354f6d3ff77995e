"""Text to batches: documents, tokenizer, token stream, rows in a resumable global order. Import from the submodules."""
