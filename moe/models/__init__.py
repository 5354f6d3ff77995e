"""Whole models, their training context, initialisation, and the servable directory."""
