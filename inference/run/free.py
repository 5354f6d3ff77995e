"""How much memory there is: of a GPU, or of this machine and of the control group that this process is confined to."""

from collections.abc import Iterator
from pathlib import Path

import torch

GROUPS = Path("/sys/fs/cgroup")
LAYOUTS = (  # where version 2 and version 1 have limit and use, and what use counts that can be dropped
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        return torch.cuda.mem_get_info(device)[0] + kept
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    machine = next(int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:")
    return min([machine, *group_memory(Path("/proc/self/cgroup").read_text(), GROUPS)])


def group_memory(membership: str, root: Path) -> Iterator[int]:
    """Bytes left in each control group around this process that has a limit; the smallest counts.

    Args:
        membership: lines `id:controllers:path`, as in /proc/self/cgroup.
        root: where the groups are mounted.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, limit_file, use_file, droppable = LAYOUTS[bool(controllers)]
        group = root / mount / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root / mount):
                break
            limit = _text(folder / limit_file)
            if limit.isdigit():
                stat = dict(words.split()[:2] for words in _text(folder / "memory.stat").splitlines())
                yield max(int(limit) - int(_text(folder / use_file) or 0) + int(stat.get(droppable, 0)), 0)


def _text(path: Path) -> str:
    """What a file says; nothing when it is not there (a group's files are hidden in some containers)."""
    return path.read_text().strip() if path.is_file() else ""
