"""Blocks of large tensors go from one to the next, in a process of its own: an allocator is the whole process's."""

import json
import subprocess
import sys

PROGRAM = """
import gc, json, torch
from turnout.kernels.cpp.blocks import keep_blocks, release_blocks
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
there = keep_blocks()
small, lasting = torch.ones(3), torch.full((2**20,), 7.0)
start, places = held(), []
for turn in range(50):
    some = [torch.ones(2**20 + turn) for _ in range(4)]
    places += [tensor.data_ptr() for tensor in some]
    del some
kept = held()
release_blocks()
print(json.dumps({"there": there, "places": len(set(places)), "kept": kept - start, "after": held() - start,
                  "same": bool((lasting == 7).all() and (small == 1).all())}))
"""


def test_a_tensor_takes_the_block_of_one_that_is_gone_and_release_gives_them_back():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["there"]
    assert found["same"], "what lives is not touched"
    assert found["places"] <= 12, "200 tensors of 4 MB in few blocks"
    assert found["kept"] < 40, "MB"
    assert found["after"] < found["kept"] - 10
