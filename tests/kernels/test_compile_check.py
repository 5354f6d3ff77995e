"""Production kernels fit an sm_90 GPU, proven without one."""

import dataclasses
import os
import subprocess
import sys

import pytest

from turnout.kernels import compile_check
from turnout.kernels.configs import FLOAT_TILES, HALF_TILES, Tile, grouped_gemm_tile

MODULE = [sys.executable, "-m", "turnout.kernels.compile_check"]


SAMPLE = ("grouped_gemm bf16", "tile_map", "place")


def fits(*names):
    done = subprocess.run([*MODULE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_sample_of_the_production_kernels_fits_sm_90_without_spilling():
    assert len(fits(*SAMPLE)) == sum(case.name.startswith(SAMPLE) for case in compile_check.cases()) == 8


@pytest.mark.full
def test_every_production_kernel_fits_sm_90_without_spilling():
    assert len(fits()) == len(list(compile_check.cases())) >= 99


def worst_of(tile, **changes):
    case = next(compile_check.cases())
    return "; ".join(compile_check.check(dataclasses.replace(case, tile=tile, **changes)).failures)


def test_a_tile_that_spills_or_overflows_is_reported():
    constants = next(compile_check.cases()).constants | {"ROWS": 128, "COLUMNS": 256}
    big = Tile(rows=128, columns=256, depth=64, warps=4, stages=5)
    failures = worst_of(big, constants=constants)
    assert "shared memory (" in failures
    assert "registers spill" in failures


def test_a_tile_without_tensor_core_groups_is_reported():
    assert "HGMMA (0)" in worst_of(HALF_TILES[0][1], hgmma=True)


def test_interpreted_kernels_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(MODULE, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "TRITON_INTERPRET (1) must be unset" in done.stderr


def test_tiles_grow_with_the_rows_of_an_expert_and_share_their_depth():
    for tiles, size in ((HALF_TILES, 2), (FLOAT_TILES, 4)):
        chosen = [grouped_gemm_tile(rows, 8, size) for rows in (1, 8, 100, 256, 500, 768, 5000, 10**6)]
        assert [tile.rows for tile in chosen] == sorted(tile.rows for tile in chosen)
        assert set(chosen) == {tile for _, tile in tiles}
        assert len({tile.depth for tile in chosen}) == 1
