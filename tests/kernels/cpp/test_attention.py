"""Attention in C++: against float64 over shapes around every border, and the same bits however it is divided.

H query heads, G key/value heads, d head dim. CHUNK keys are a chunk, ROWS rows a unit.
"""

import resource

import pytest
import torch

from turnout import kernels
from turnout.kernels import paged_attention, registry, store_kv, varlen_attention
from turnout.kernels.cpp import build
from turnout.kernels.reference.attention import quantise

CHUNK, ROWS, PAGE = 256, 128, 16
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 1e-3}
HEADS = {"grouped": (8, 2), "multi head": (3, 3), "multi query": (5, 1)}


@pytest.fixture(autouse=True)
def _cpp():
    with kernels.using("cpp"):
        yield


@pytest.fixture
def threads():
    """Sets their number; one again at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def paged(k, v, lengths, page=PAGE, to=None, head_major=False):
    """Shuffled pages of packed keys and values, all that nobody may read NaN (or huge): caches, tables, scales."""
    to = to or k.dtype
    most = max(-(-max(lengths) // page), 1)
    tables = (1 + torch.randperm(len(lengths) * most)).view(len(lengths), most).int()
    blocks, scales, caches = 1 + tables.numel(), [], []
    for x in (k, v):
        shape = (blocks, x.shape[1], page, x.shape[2]) if head_major else (blocks, page, *x.shape[1:])
        cache = torch.full(shape, 77 if to == torch.int8 else torch.nan, dtype=to)
        caches.append(cache.transpose(1, 2) if head_major else cache)
        scales.append(torch.full((blocks, page, x.shape[1]), torch.nan) if to == torch.int8 else None)
    cu = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for b, n in enumerate(lengths):
        at, rows = torch.arange(n), slice(cu[b], cu[b + 1])
        store_kv(k[rows], v[rows], *caches, tables[b, at // page].long() * page + at % page, *scales)
        tables[b, -(-n // page) :] = 2**30
    return caches, tables, {"scales_k": scales[0], "scales_v": scales[1]}


def random(lengths, heads, d, dtype, d_v=None):
    (H, G), T = heads, sum(lengths)
    return [torch.randn(T, *shape).to(dtype) for shape in ((H, d), (G, d), (G, d_v or d))]


def exact(q, k, v, lengths, **options):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    with kernels.using("reference"):
        return varlen_attention(q.double(), k.double(), v.double(), cu, **options)


def check(lengths, heads, d, d_v, dtype, page=PAGE, **options):
    """Packed rows, and the last row of each sequence from pages: float64's values, and the same bits."""
    q, k, v = random(lengths, heads, d, dtype, d_v)
    cu, options = torch.tensor([0, *lengths]).cumsum(0), {"scale": d**-0.5, **options}
    packed = varlen_attention(q, k, v, cu, **options)
    truth = exact(q, k, v, lengths, **options)
    assert (packed.double() - truth).norm() <= BOUNDS[dtype] * truth.norm() + 1e-12
    caches, tables, _ = paged(k, v, lengths, page)
    last = cu[1:][torch.tensor(lengths) > 0] - 1
    counts = torch.tensor([0, *(min(n, 1) for n in lengths)]).cumsum(0)
    found = paged_attention(q[last], *caches, tables, torch.tensor(lengths), counts, **options)
    assert torch.equal(found, packed[last])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_around_the_borders_of_chunks_and_units(dtype):
    check([CHUNK + 1, 0, 1, ROWS // 4 + 1], (8, 2), 24, 40, dtype)


@pytest.mark.parametrize("heads", [(4, 1), (6, 3), (7, 1), (12, 3)], ids=str)
def test_few_keys_give_the_bits_of_many_rows(heads):
    """Odd first and last keys, two heads together or one alone, any number of rows of a head."""
    lengths = [1, 2, 15, 16, 17, 33, 100, CHUNK - 1, CHUNK]
    check(lengths, heads, 64, 64, torch.bfloat16)
    check(lengths, heads, 32, 128, torch.bfloat16, window=31)
    check(lengths, heads, 96, 64, torch.bfloat16, page=7, window=CHUNK - 2)


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("d", "d_v"), [(1, 1), (15, 17), (32, 32), (64, 64), (65, 63), (128, 128), (576, 512)])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 1}, {"window": CHUNK - 1}, {"window": CHUNK + 1, "causal": False}],
    ids=str,
)
def test_every_way_around_every_border(heads, d, d_v, options, dtype):
    for lengths in ([2 * CHUNK + 1], [CHUNK - 1, CHUNK, 0, CHUNK + 1], [1, 15, 16, 17, 63, 64, 65]):
        if options.get("causal", True):
            check(lengths, heads, d, d_v, dtype, page=16 if d % 2 else 7, **options)
        else:
            q, k, v = random(lengths, heads, d, dtype, d_v)
            cu = torch.tensor([0, *lengths]).cumsum(0)
            truth = exact(q, k, v, lengths, scale=0.2, **options)
            found = varlen_attention(q, k, v, cu, scale=0.2, **options)
            assert (found.double() - truth).norm() <= BOUNDS[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_S0_threads_batches_and_prefill_chunks_do_not_show(threads, dtype):  # noqa: N802
    lengths = [3 * CHUNK + 5, 40, CHUNK]
    q, k, v = random(lengths, (8, 2), 64, dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    caches, tables, _ = paged(k, v, lengths)
    threads(1)
    packed = varlen_attention(q, k, v, cu, scale=0.1)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(varlen_attention(q, k, v, cu, scale=0.1), packed)
        for chunk in (1, 7, 39):  # the last rows of each, together and alone
            rows = torch.cat([torch.arange(end - chunk, end) for end in cu[1:].tolist()])
            starts = torch.arange(4) * chunk
            found = paged_attention(q[rows], *caches, tables, torch.tensor(lengths), starts, scale=0.1)
            assert torch.equal(found, packed[rows])
            for b in range(3):
                own = slice(b * chunk, (b + 1) * chunk)
                alone = paged_attention(
                    q[rows[own]], *caches, tables[b : b + 1], torch.tensor(lengths[b : b + 1]), starts[:2], scale=0.1
                )
                assert torch.equal(alone, found[own])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_key_or_value_that_is_not_finite_spoils_only_who_sees_it(dtype):
    q, k, v = random([CHUNK + 60], (4, 2), 32, dtype)
    cu, options = torch.tensor([0, CHUNK + 60]), {"scale": 0.2, "window": 20}
    clean = varlen_attention(q, k, v, cu, **options)
    for bad in (torch.nan, torch.inf):
        for x in (k, v):
            before = x[CHUNK + 3, 1].clone()
            x[CHUNK + 3, 1, 2] = bad
            found = varlen_attention(q, k, v, cu, **options)
            seen = slice(CHUNK + 3, CHUNK + 23)
            assert not found[seen, 2:].isfinite().all(-1).any() or x is k
            others = torch.ones(CHUNK + 60, 4, dtype=torch.bool)
            others[seen, 2:] = False
            assert torch.equal(found[others], clean[others])
            x[CHUNK + 3, 1] = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int8_pages_are_read_as_what_they_stand_for(dtype):
    lengths = [CHUNK + 9, 30, 1, 77]
    q, k, v = random(lengths, (8, 2), 64, dtype)
    caches, tables, scales = paged(k, v, lengths, to=torch.int8)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    k, v = (quantised.double() * scale[..., None] for quantised, scale in (quantise(x) for x in (k, v)))
    truth = exact(q, k, v, lengths, scale=0.125)
    found = paged_attention(q, *caches, tables, torch.tensor(lengths), cu, scale=0.125, **scales)
    assert (found.double() - truth).norm() <= BOUNDS[dtype] * truth.norm()
    last = cu[1:] - 1
    one = paged_attention(q[last], *caches, tables, torch.tensor(lengths), torch.arange(5), scale=0.125, **scales)
    assert torch.equal(one, found[last])


def test_pages_may_lie_head_after_head():
    lengths = [CHUNK + 9, 30]
    q, k, v = random(lengths, (8, 2), 64, torch.bfloat16)
    packed = varlen_attention(q, k, v, torch.tensor([0, *lengths]).cumsum(0), scale=0.125)
    caches, tables, _ = paged(k, v, lengths, head_major=True)
    last = torch.tensor(lengths).cumsum(0) - 1
    found = paged_attention(q[last], *caches, tables, torch.tensor(lengths), torch.arange(3), scale=0.125)
    assert torch.equal(found, packed[last])


def test_latent_pages_serve_many_heads_and_operands_may_be_views():
    n, H = CHUNK + 3, 16
    latents = torch.randn(n, 1, 72).bfloat16()
    q = torch.randn(72, H, n).bfloat16().permute(2, 1, 0)  # rows of strangers
    wide = torch.randn(n, 5, 72).bfloat16()
    wide[:, 2:3] = latents
    k = wide[:, 2:3]
    found = varlen_attention(q, k, k[..., :64], torch.tensor([0, n]), scale=0.1)
    truth = exact(q, latents, latents[..., :64], [n], scale=0.1)
    assert (found.double() - truth).norm() <= BOUNDS[torch.bfloat16] * truth.norm()
    caches, tables, _ = paged(latents, latents, [n])
    last = paged_attention(
        q[-1:], caches[0], caches[0][..., :64], tables, torch.tensor([n]), torch.arange(2), scale=0.1
    )  # fmt: skip
    assert torch.equal(last, found[-1:])


def test_bfloat16_is_as_exact_as_the_librarys():
    q, k, v = random([300], (4, 4), 64, torch.bfloat16)
    truth = exact(q, k, v, [300], scale=0.125)
    found = varlen_attention(q, k, v, torch.tensor([0, 300]), scale=0.125)
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    library = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.125)[0].transpose(0, 1)
    assert (found - truth).norm() <= 1.1 * (library - truth).norm()


@pytest.mark.full
@pytest.mark.parametrize("tier", range(4))
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_instruction_set_is_right(monkeypatch, tier, dtype):
    needed, flags = build.INSTRUCTIONS[tier]
    if not needed <= build._cpu():
        return
    library = build.load(flags)
    for module in ("call", "attention", "store"):
        monkeypatch.setattr(f"turnout.kernels.cpp.{module}.library", lambda: library)
    check([CHUNK + 1, 0, 33], (8, 2), 40, 24, dtype)
    check([CHUNK + 1, 70], (3, 3), 64, 64, dtype, window=50)
    test_int8_pages_are_read_as_what_they_stand_for(torch.bfloat16)


def test_it_runs_unasked_in_inference():
    q, k, v = random([5], (4, 2), 8, torch.bfloat16)
    cu = torch.tensor([0, 5])
    token = registry._forced.set(None)
    try:
        with torch.inference_mode():
            assert registry.choose("varlen_attention", q, k, v, cu, scale=1.0) == "cpp"
            assert registry.choose("varlen_attention", q.double(), k.double(), v.double(), cu, scale=1.0) == "torch"
        with torch.no_grad():
            assert registry.choose("varlen_attention", q, k, v, cu, scale=1.0) == "torch"
    finally:
        registry._forced.reset(token)


def test_steps_allocate_nothing_that_stays():
    q, k, v = random([CHUNK * 2], (8, 2), 64, torch.bfloat16)
    caches, tables, _ = paged(k, v, [CHUNK * 2])

    def step():
        paged_attention(q[:1], *caches, tables, torch.tensor([CHUNK * 2]), torch.arange(2), scale=0.125)

    for _ in range(100):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # KiB
