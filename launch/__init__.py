"""The programs a person starts: one verb a file, found by `main.py`."""
