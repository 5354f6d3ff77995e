"""`python -m turnout` is `turnout`."""

from .launch.main import entry

if __name__ == "__main__":
    entry()
