"""Memory in huge pages: zeros that cost nothing until they are written, and pages given back."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from turnout.kernels import memory


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def flags(tensor: torch.Tensor) -> set[str]:
    """What the kernel knows of the mapping that a tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if borders := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(border, 16) for border in borders.groups())
            inside = low <= tensor.data_ptr() < high
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1025, 2048), (2, 1024, 1024)])
def test_zeros_are_zeros(shape, dtype):
    tensor = memory.zeros(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(1)
    assert torch.equal(tensor, torch.ones(shape, dtype=dtype))


def test_large_ones_take_memory_when_written_and_in_huge_pages():
    before = resident()
    tensor = memory.zeros((256, 2**20), torch.int8)
    assert tensor.data_ptr() % memory.HUGE == 0
    assert "hg" in flags(tensor)
    assert resident() - before < 2**24
    tensor[:128].fill_(1)
    assert 2**26 < resident() - before < 160 * 2**20
    del tensor
    assert resident() - before < 2**24


def test_populated_ones_have_their_memory_and_keep_what_is_in_them():
    tensor = memory.zeros((4, 2**25), torch.int8)
    tensor[1, 5] = 7
    before = resident()
    memory.populate(tensor[1])
    assert 2**24 < resident() - before <= 2**25 + 2 * memory.HUGE, "of one row and no other"
    assert tensor[1, 5] == 7
    assert tensor.sum() == 7
    memory.populate(tensor[:, ::2])  # not in one piece: left as it is
    memory.populate(torch.zeros(3))


def test_forgotten_pages_of_a_file_go_and_come_back(tmp_path):
    kept = torch.arange(2**23, dtype=torch.int32)
    save_file({"kept": kept}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        tensor = file.get_tensor("kept")
        assert torch.equal(tensor, kept)
        before = resident()
        memory.forget(tensor)
        assert before - resident() > 2**24
        assert torch.equal(tensor, kept)


def test_what_is_smaller_than_a_page_stays():
    tensor = torch.arange(5)
    memory.forget(tensor)
    memory.forget(torch.ones(2**12, 2**10).T)
    assert tensor.tolist() == [0, 1, 2, 3, 4]
