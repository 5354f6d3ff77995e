"""A pass that was recorded gives, from other numbers in the same memory, what the pass itself would give: every bit."""

import gc
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from turnout.kernels import add_rms_norm, heads, linear, moe_mlp, paged_attention, rms_norm, store_kv, top_k_gates
from turnout.kernels.cpp import build
from turnout.kernels.cpp.record import Arena, Recorder

T, D = 5, 37
INDEX = torch.tensor([3, 0, 4, 3, 1])
LIBRARY = {
    "sum": lambda x, y: x + y,
    "in another type": lambda x, y: x.float() + y.float(),
    "half": lambda x, y: (x.to(torch.float16), y.to(torch.bfloat16)),
    "beside": lambda x, y: torch.cat((x, y[:, :7]), -1),
    "one after another": lambda x, y: torch.cat((x[:2], y)),
    "heads beside": lambda x, y: torch.cat((x[:, :36].view(T, 3, 12)[..., :5], y[:, :36].view(T, 3, 12)), -1),
    "above": lambda x, y: torch.stack((x, y), 1),
    "in one piece": lambda x, y: (x.mT.contiguous(), y[:, 3:9].clone()),
    "rows": lambda x, y: (x[INDEX], F.embedding(INDEX[:2], y)),
    "into": lambda x, y: torch.zeros(T, D, dtype=x.dtype).copy_(x),
    "one number": lambda x, y: x[:1, :1] + y[:1, :1],
}
REPEATED = {
    "elements": lambda x, y: (x.float() * 2).cos() - torch.arange(D).float() ** 2,
    "several results": lambda x, y: x.float().sort(dim=-1),
    "a constant that changes": lambda x, y: torch.zeros(T, D).scatter_add_(0, INDEX[:, None].expand(T, D), x.float()),
    "in place": lambda x, y: x.clone().mul_(y),
}
CASES = [(name, run, 0) for name, run in LIBRARY.items()] + [(name, run, 1) for name, run in REPEATED.items()]


def tensors(found):
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def numbers(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(T, D, generator=generator).to(dtype) for _ in range(2)]


def same(run, old, new):
    """Record with the old inputs, play with the new ones."""
    with torch.inference_mode():
        inputs = [t.clone() for t in old]
        with Recorder() as recorder:
            found = tensors(run(*inputs))
        for mine, wanted in zip(found, tensors(run(*old)), strict=True):
            assert torch.equal(mine, wanted), "a recorded pass is a pass"
        assert recorder.recording.void is None
        for _ in range(2):
            for t in found:
                if t.is_floating_point():
                    t.fill_(torch.nan)
            for mine, theirs in zip(inputs, new, strict=True):
                mine.copy_(theirs)
            recorder.recording.play()
            for mine, wanted in zip(found, tensors(run(*new)), strict=True):
                assert torch.equal(mine, wanted)
    return recorder.recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "run", "repeats"), CASES, ids=[name for name, *_ in CASES])
def test_operations_of_the_library_have_a_kernel_or_are_called_again(name, run, repeats, dtype):
    recording = same(run, numbers(dtype, 0), numbers(dtype, 1))
    assert bool(recording.repeated) == bool(repeats)


def layer(x_TD, w_q, w_k, w_o, w_in, w_out, norm, keys, values, lens, table):
    """A decode step of every kernel."""
    cu = torch.arange(len(x_TD) + 1, dtype=torch.int32)
    cos, sin = torch.ones(len(x_TD), 8), torch.zeros(len(x_TD), 8)
    q, k, v = heads(rms_norm(x_TD, norm, 1e-5), w_q, w_k, w_k, cos, sin)
    slots = table.long()[torch.arange(len(x_TD)), (lens.long() - 1) // 4] * 4 + (lens.long() - 1) % 4
    store_kv(k, v, keys, values, slots)
    y = linear(paged_attention(q, keys, values, table, lens, cu, scale=0.25).flatten(1), w_o)
    x_TD, normed = add_rms_norm(x_TD, y, norm, 1e-5)
    ids, weights = top_k_gates(linear(normed.float(), w_in[:, 0].float()), 2)
    return x_TD + moe_mlp(normed, ids, weights, None, w_in, w_out), ids, keys, values


def operands(seed, rows=3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    table = torch.randperm(7 * rows, generator=generator).view(rows, 7).int() + 1
    lens = torch.randint(1, 28, (rows,), generator=generator).int()
    pages = [draw(7 * rows + 1, 4, 2, 16) for _ in range(2)]
    weights = [draw(64, 48), draw(32, 48), draw(48, 64), draw(4, 64, 48), draw(4, 32, 48), draw(48)]
    return [draw(rows, 48), *weights, *pages, lens, table]


@pytest.mark.parametrize("rows", [1, 3])
def test_every_kernel_of_a_decode_step_reads_numbers_when_it_is_played(rows):
    recording = same(layer, operands(0, rows), operands(1, rows))
    assert recording.repeated


@pytest.mark.full
@pytest.mark.parametrize("place", range(len(build.INSTRUCTIONS)))
def test_every_instruction_set_does(place, monkeypatch):
    needed, flags = build.INSTRUCTIONS[place]
    if needed <= build._cpu():
        library = build.load(flags)
        for module in ("call", "record", "attention", "store", "moe"):
            monkeypatch.setattr(f"turnout.kernels.cpp.{module}.library", lambda: library)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for _, run, _ in CASES:
                same(run, numbers(dtype, 0), numbers(dtype, 1))


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("aten.item.default", lambda x: x * x.sum().item()),
        ("aten.nonzero.default", lambda x: x.nonzero()),
        ("tolist", lambda x: x * len(x.tolist())),
        ("numpy", lambda x: x + torch.from_numpy(x.numpy().copy())),
        ("aten.bernoulli.default", lambda x: torch.bernoulli(x.abs().clamp(max=1))),
    ],
)
def test_what_can_not_be_run_again_makes_it_void(name, run):
    with torch.inference_mode(), Recorder() as recorder:
        run(torch.ones(3))
    assert recorder.recording.void == name
    with torch.inference_mode(), Recorder() as recorder:
        torch.ones(3)
    assert recorder.recording.void is None, "each is its own"


def test_rows_outside_of_a_table_are_refused_and_nothing_is_written():
    x, index = torch.randn(4, 8), torch.tensor([1, 3])
    with torch.inference_mode():
        with Recorder() as recorder:
            y = F.embedding(index, x)
        before = y.clone()
        for bad in (4, -1):
            index.copy_(torch.tensor([0, bad]))
            with pytest.raises(IndexError, match="token ids within the vocabulary"):
                recorder.recording.play()
            assert torch.equal(y, before)


def test_an_arena_is_shared_and_begins_anew():
    arena, x = Arena(), torch.randn(3, 64)
    recordings, found = [], []
    with torch.inference_mode():
        for _ in range(3):
            with Recorder(arena) as recorder:
                found.append(rms_norm(x.bfloat16(), torch.ones(64), 1e-5))
            recordings.append(recorder.recording)
        assert len({y.data_ptr() for y in found}) == 1
        size = arena.bytes
        big = arena.take(torch.empty(3, size))
        assert big.shape == (3, size)
        assert arena.bytes > 4 * 3 * size
        odd = [arena.take(torch.empty_strided((2, 3), (1, 2), dtype=torch.bfloat16)) for _ in range(2)]
    assert odd[0].stride() == (1, 2)
    assert (odd[1].data_ptr() - odd[0].data_ptr()) % 64 == 0


def test_playing_allocates_nothing():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    with torch.inference_mode():
        values = operands(0)
        with Recorder() as recorder:
            layer(*values)
        for turn in range(1200):
            recorder.recording.play()
            if turn == 200:
                gc.collect()
                before = resident()
    assert resident() - before < 64, "pages of 4 KB"
