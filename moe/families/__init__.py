"""Other people's checkpoints, in and out: the Hugging Face directory format, one table a family."""
