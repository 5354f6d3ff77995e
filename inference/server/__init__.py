"""The OpenAI-compatible HTTP server over the engine. Torch-free: the engine is handed in."""
