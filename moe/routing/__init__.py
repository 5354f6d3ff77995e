"""Routing: which token goes to which expert, decided once per layer and forward pass, kept as data."""
