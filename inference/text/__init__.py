"""Text in and out of the engine: tokens to characters, stop strings, chat templates."""
