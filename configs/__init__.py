"""Hydra's configuration groups (YAML) and the typed, frozen dataclasses' machinery (`typed.py`)."""
