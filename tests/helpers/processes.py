"""The processes of this machine, as `/proc` has them."""

from pathlib import Path

PARENT, SESSION = 1, 3
"""Places of `/proc/PID/stat` behind the name, whose first is the state."""


def processes_with(place: int, value: int) -> dict[int, str]:
    """Process → its state ("Z": it has ended), of those that have this value at a place."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[place]) == value:
            found[int(path.parent.name)] = fields[0]
    return found
