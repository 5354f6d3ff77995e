"""`moe_capacity=trained`: serving drops exactly what the trainer's evaluation drops, in whatever pieces it serves.

The expected counters are those of a plain loop over the trainer's forward pass; the served ones were chained through
pages. L MoE layers, S positions of one text, K choices, E experts, V vocabulary.
"""
# ruff: noqa: N802 (M2 is the name of a rule)

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from turnout import ConfigError
from turnout.inference.config import EngineConfig
from turnout.inference.core.blocks import BlockManager
from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.scheduler import Scheduler
from turnout.inference.core.step import Scheduled, StepPlan
from turnout.inference.run.experts import ExpertPages, check_routing, id_dtype, page_bytes
from turnout.inference.run.kv import plan_kv
from turnout.inference.run.runner import ModelRunner
from turnout.moe import Decoder, MoEConfig, RouteContext, VarlenContext

BLOCK, DECODED, BOUND = 4, 5, 1e-5
TIGHT = {"eval_capacity_factor": 0.35, "min_capacity": 1, "capacity_tokens": 24, "init_scale": 3.0}
ROUTERS = {
    "switch": {},
    "gshard": {"drop_order": "choice_major"},  # what training does; evaluation and serving fill token by token
    "topk_softmax": {"top_k": 2},
    "deepseek_v3": {"top_k": 2, "expert_groups": 2, "top_groups": 1},
}


@pytest.fixture(scope="module")
def tight(make_model) -> dict[str, Decoder]:
    """A small model a router, whose experts are soon full."""
    return {
        name: make_model(
            moe=MoEConfig(width=32, expert_width=32, num_experts=4, router=name, **TIGHT, **more),
            layers=4 if name == "switch" else 2,
        )
        for name, more in ROUTERS.items()
    }


def text_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, 321, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def evaluated(model: Decoder, text: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [S, V] and where each token went, [S, L, K] as the pages have it, in the trainer's evaluation."""
    ids, ends = torch.tensor(text), torch.tensor([0, len(text)])
    context = VarlenContext(ends, RouteContext(cu_groups=ends, token_ids_T=ids))
    logits = model(ids, torch.arange(len(text)), context)
    return logits, torch.stack([torch.where(r.kept_TK, r.ids_TK, -1 - r.ids_TK) for r in context.routings.values()], 1)


def stored(pages: ExpertPages, table: Sequence[int], count: int) -> Tensor:
    """[count, L, K]: what the blocks of a table say of a sequence's tokens."""
    return pages.ids.unflatten(0, (-1, BLOCK))[torch.tensor(table)].flatten(0, 1)[:count]


class Server:
    """Scheduler and runner with the tokens of the texts forced; every computed row is kept."""

    def __init__(self, model: Decoder, budget: int, num_blocks: int = 64, caching: bool = True) -> None:
        config = EngineConfig(
            max_num_seqs=min(4, budget), max_num_batched_tokens=budget, num_blocks=num_blocks, block_size=BLOCK,
            moe_capacity="trained",
        )  # fmt: skip
        blocks = BlockManager(num_blocks, BLOCK, enable_prefix_caching=caching)
        self.scheduler = Scheduler(config, blocks, lambda: 0.0)
        plan = plan_kv(model.cfg, config, model.cfg.max_seq_len, model.embed.weight.dtype, 1 << 30)
        self.runner = ModelRunner(model, plan, "trained")
        self.steps: list[StepPlan] = []

    def run(self, texts: Sequence[Sequence[int]]) -> list[tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """Each text as a prompt and `DECODED` forced tokens: logits by position, and where its tokens went."""
        found: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = [({}, {}) for _ in texts]
        for i, text in enumerate(texts):
            params = SamplingParams(max_tokens=DECODED + 1, ignore_eos=True)
            self.scheduler.add(Request(id=str(i), prompt_token_ids=text[:-DECODED], params=params))
        while self.scheduler.requests:
            plan = self.scheduler.schedule()
            self.steps.append(plan)
            _, logits = self.runner.forward(plan)
            rows, sampled = iter(logits), {}
            for item in plan.scheduled:
                at, end = int(item.request.id), item.start + item.count
                found[at][1].update(enumerate(stored(self.runner.pages, item.block_table, end)))
                if item.samples:
                    found[at][0][end - 1] = next(rows)
                    sampled[item.request.id] = [*texts[at], 0][end]
            self.scheduler.commit(plan, sampled)
        return found


def assert_evaluated(model: Decoder, text: Sequence[int], served: tuple[dict[int, Tensor], dict[int, Tensor]]) -> None:
    """Every token went where evaluation sent it, and the wanted logits are evaluation's."""
    expected, went = evaluated(model, text)
    assert (went < 0).any(), "the capacity is tight"
    logits, rows = served
    assert sorted(rows) == list(range(len(text)))
    assert torch.equal(torch.stack([rows[i] for i in sorted(rows)]).long(), went)
    assert len(logits) >= DECODED + 1
    for position, row in logits.items():
        error = (row - expected[position]).norm() / expected[position].norm()
        assert error <= BOUND, f"position {position}: {error:.1e}"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("budget", [1, 2, BLOCK, BLOCK + 1, 256])
def test_M2_chunked_and_batched_requests_drop_what_evaluation_drops(tight, router, budget):
    model = tight[router]
    texts = [text_of(length + DECODED, seed=length) for length in (19, 1, 16, 9)]
    for length in (31, 40):
        texts.append([texts[0][0]] * length + text_of(DECODED, seed=length))  # one expert's queue, far beyond its end
    long = [text for text in texts if len(text) > 12]
    served = Server(model, budget).run(texts)
    for text, result in zip(texts, served, strict=True):
        if text in long:
            assert_evaluated(model, text, result)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shared", [BLOCK, 2 * BLOCK, 4 * BLOCK + 3])
def test_a_prefix_hit_restores_the_counters(tight, router, shared):
    model, text = tight[router], text_of(20 + DECODED, seed=1)
    server = Server(model, budget=64)
    server.run([text])
    other = text[:shared] + text_of(22 + DECODED - shared, seed=2)
    (served,) = server.run([other])
    assert server.scheduler.stats().prefix_hits == shared // BLOCK * BLOCK
    assert_evaluated(model, other, served)


@pytest.mark.parametrize("router", ROUTERS)
def test_preempted_requests_drop_what_evaluation_drops(tight, router):
    model, texts = tight[router], [text_of(20 + DECODED, seed=seed) for seed in range(4)]
    for caching in (True, False):
        server = Server(model, budget=9, num_blocks=12, caching=caching)
        served = server.run(texts)
        assert server.scheduler.stats().preemptions > 0
        for text, result in zip(texts, served, strict=True):
            assert_evaluated(model, text, result)


def item(start: int, count: int, table: Sequence[int]) -> Scheduled:
    request = Request(id="x", prompt_token_ids=[0] * (start + count), params=SamplingParams())
    return Scheduled(request, start, count, request.token_ids[start:], table, samples=False)


class Pages:
    """Pages fed with random routings, beside a count from scratch over everything each request was given."""

    def __init__(self, model: Decoder, requests: int) -> None:
        self.pages = ExpertPages(model.cfg, 64, BLOCK, torch.device("cpu"), counted=True)
        self.shape = len(self.pages.layers), model.cfg.moe.top_k, model.cfg.moe.num_experts
        self.went = [torch.zeros(0, *self.shape[:2], dtype=torch.int64) for _ in range(requests)]
        self.tables = [list(range(1 + 8 * i, 9 + 8 * i)) for i in range(requests)]

    def counted(self, request: int, until: int) -> Tensor:
        """[L, E] from scratch."""
        layers, _, experts = self.shape
        kept = self.went[request][:until]
        return torch.stack([torch.bincount(kept[:, i][kept[:, i] >= 0], minlength=experts) for i in range(layers)])

    def step(self, counts: dict[int, int], generator: torch.Generator, padding: int = 0) -> None:
        """Compute so many more tokens of each request, and check what was taken before."""
        layers, top_k, experts = self.shape
        items = [item(len(self.went[i]), n, self.tables[i]) for i, n in counts.items()]
        taken = self.pages.taken_before(items)
        for row, i in zip(taken, counts, strict=True):
            assert torch.equal(row, self.counted(i, len(self.went[i])))
        total = sum(counts.values()) + padding
        ids = torch.randint(0, experts, (total, layers, top_k), generator=generator)
        kept = torch.rand(ids.shape, generator=generator) < 0.6
        kept[total - padding :] = False
        spans = [(one.block_table, at) for one in items for at in range(one.start, one.start + one.count)]
        slots = [table[at // BLOCK] * BLOCK + at % BLOCK for table, at in spans] + [0] * padding
        routings = {layer: Routed(ids[:, i], kept[:, i]) for i, layer in enumerate(self.pages.layers)}
        self.pages.store(items, torch.tensor(slots, dtype=torch.int64), routings, taken)
        went = torch.where(kept, ids, -1 - ids)
        for i, rows in zip(counts, went[: total - padding].split(list(counts.values())), strict=True):
            self.went[i] = torch.cat([self.went[i], rows])


class Routed:
    """What the pages read of a routing."""

    def __init__(self, ids_TK: Tensor, kept_TK: Tensor) -> None:
        self.ids_TK, self.kept_TK = ids_TK, kept_TK


@pytest.mark.parametrize("seed", range(6))
def test_counters_chained_through_pages_are_those_from_scratch(tight, seed):
    """Any chunks, requests coming and going, padding at the end of the batch."""
    generator = torch.Generator().manual_seed(seed)
    pages = Pages(tight["gshard"], requests=4)
    for _ in range(12):
        wanted = {i: int(torch.randint(0, 2 * BLOCK, (1,), generator=generator)) for i in range(4)}
        fits = {i: min(n, 8 * BLOCK - len(pages.went[i])) for i, n in wanted.items()}
        pages.step({i: n for i, n in fits.items() if n}, generator, padding=seed % 3)
    for i, went in enumerate(pages.went):
        assert torch.equal(stored(pages.pages, pages.tables[i], len(went)).long(), went)
        for block in range(len(went) // BLOCK):
            assert torch.equal(pages.pages.taken[pages.tables[i][block]], pages.counted(i, (block + 1) * BLOCK))
    assert not pages.pages.taken[0].any(), "padding counts in no block"


def test_a_fork_goes_on_from_a_copy_of_the_partly_filled_block(tight):
    generator = torch.Generator().manual_seed(0)
    pages = Pages(tight["gshard"], requests=2)
    pages.step({0: 2 * BLOCK + 3}, generator)
    shared, own = pages.tables[0][:2], pages.tables[1][2]
    pages.tables[1][:2] = shared
    pages.pages.copy([(pages.tables[0][2], own)])
    pages.went[1] = pages.went[0][:-1].clone()  # the fork computes the prompt's last token itself
    pages.step({0: 3, 1: 1}, generator)
    pages.step({0: BLOCK, 1: BLOCK}, generator)
    for i in (0, 1):
        went = pages.went[i]
        assert torch.equal(stored(pages.pages, pages.tables[i], len(went)).long(), went)


def test_a_step_of_no_tokens_stores_nothing(tight):
    pages = ExpertPages(tight["switch"].cfg, 4, BLOCK, torch.device("cpu"), counted=True)
    taken = pages.taken_before([])
    assert taken.shape == (0, 2, 4)
    empty = Routed(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.bool))
    pages.store([], torch.zeros(0, dtype=torch.int64), dict.fromkeys(pages.layers, empty), taken)
    assert not pages.ids.any()


@pytest.mark.parametrize("mode", ["dropless", "trained"])
@pytest.mark.parametrize("router", ["switch", "gshard", None])
def test_pages_take_the_bytes_that_the_plan_counts(make_model, router, mode):
    model = make_model(router) if router else make_model(moe=None)
    counted = mode == "trained"
    pages = ExpertPages(model.cfg, 9, BLOCK, torch.device("cpu"), counted=counted)
    taken = 0 if pages.taken is None else pages.taken.nbytes
    assert pages.ids.nbytes + taken == 9 * page_bytes(model.cfg, BLOCK, counted=counted)


@pytest.mark.parametrize(("experts", "dtype"), [(8, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_every_expert_and_its_drop_fit_the_type(experts, dtype):
    assert id_dtype(experts) == dtype
    assert -1 - (experts - 1) >= torch.iinfo(dtype).min


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (None, "moe_capacity (trained) needs a model of experts: use moe_capacity=dropless"),
        ({}, "moe_capacity (trained) needs moe.capacity_tokens, the training row length"),
        ({"router": "expert_choice", "noncausal": True, "capacity_tokens": 24}, "moe.router (expert_choice) chooses"),
    ],
)
def test_what_can_not_be_served_as_evaluated_is_refused(make_model, moe, message):
    own = None if moe is None else MoEConfig(width=32, expert_width=32, num_experts=4, **moe)
    model = make_model(moe=own, layers=2)
    with pytest.raises(ConfigError) as error:
        check_routing(model.cfg, "trained")
    assert str(error.value).startswith(message)


def test_evaluation_without_capacity_is_served_without(make_model):
    moe = MoEConfig(width=32, expert_width=32, num_experts=4, router="switch", eval_capacity_factor=None)
    model, text = make_model(moe=moe, layers=2), text_of(30, seed=1)
    (served,) = Server(model, budget=7).run([text])
    _, went = evaluated(model, text)
    assert (went >= 0).all()
    assert torch.equal(torch.stack([row for _, row in sorted(served[1].items())]).long(), went)
    assert all(i < j for i, j in itertools.pairwise(sorted(served[0])))
