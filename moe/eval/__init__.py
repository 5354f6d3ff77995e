"""What a model is worth: held-out loss, its experts, and the plain models it must beat. Import from the submodules."""
