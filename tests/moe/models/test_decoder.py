"""The decoder: causal, blind to row-mates, the same for any packing; and it learns."""

import itertools

import pytest
import torch

from turnout.kernels import cross_entropy
from turnout.moe import RouteContext, VarlenContext
from turnout.parallel.plan import match

GSHARD = {"router": "gshard", "top_k": 2}


def run(model, *documents, route=None, **options):
    """Logits of each document, packed into one row."""
    lengths = [len(document) for document in documents]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    context = VarlenContext(cu, route or RouteContext(cu_groups=cu), **options)
    return model(torch.cat(documents), positions, context).split(lengths), context


def tokens(n, seed=0):
    return torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "moe", [{"capacity_factor": 0.7}, GSHARD | {"eval_capacity_factor": 0.7}], ids=["switch", "gshard"]
)
def test_no_logit_sees_a_later_token(make_model, moe, mode):
    model = make_model(moe | {"capacity_tokens": 20, "min_capacity": 1}).train(mode == "train")
    document = tokens(20)
    (whole,), _ = run(model, document)
    for cut in (1, 7, 19):
        changed = torch.cat((document[:cut], (document[cut:] + 1) % 50))
        (other,), _ = run(model, changed)
        torch.testing.assert_close(other[:cut], whole[:cut], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(other[cut], whole[cut], rtol=1e-2)


@pytest.mark.parametrize("moe", [{"eval_capacity_factor": 0.7}, GSHARD], ids=["switch", "gshard"])
def test_a_documents_logits_do_not_depend_on_its_row_mates(make_model, moe):
    model = make_model(moe | {"capacity_tokens": 16, "min_capacity": 1}).eval()
    documents = [tokens(n, seed=n) for n in (9, 1, 16, 5)]
    alone = [run(model, document)[0][0] for document in documents]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0)):
        together, _ = run(model, *(documents[i] for i in order))
        for i, logits in zip(order, together, strict=True):
            torch.testing.assert_close(logits, alone[i], rtol=1e-4, atol=1e-5)


def test_a_prefix_has_the_logits_of_the_whole(make_model):
    model = make_model({"eval_capacity_factor": 0.7, "capacity_tokens": 16, "min_capacity": 1}).eval()
    document = tokens(16)
    (whole,), _ = run(model, document)
    for length in (1, 4, 15):
        (prefix,), _ = run(model, document[:length])
        torch.testing.assert_close(prefix, whole[:length], rtol=1e-4, atol=1e-5)


def test_wanted_rows_are_the_same_rows(make_model):
    model = make_model().eval()
    (whole,), _ = run(model, tokens(12))
    rows = torch.tensor([11, 0, 5])
    cu = torch.tensor([0, 12])
    context = VarlenContext(cu, RouteContext(cu_groups=cu), logit_rows=rows)
    torch.testing.assert_close(model(tokens(12), torch.arange(12), context), whole[rows])


def test_position_shifts_change_nothing(make_model):
    model, document, cu = make_model().eval(), tokens(8), torch.tensor([0, 8])
    near, far = (model(document, torch.arange(8) + shift, VarlenContext(cu)) for shift in (0, 40))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_key_heads_equal_repeated_ones(make_model, kv_heads):
    model, wide = make_model(kv_heads=kv_heads).eval(), make_model(kv_heads=4).eval()
    state = model.state_dict()
    for name, weight in state.items():
        if ".wk." in name or ".wv." in name:
            heads = weight.view(kv_heads, 6, 24)
            state[name] = heads.repeat_interleave(4 // kv_heads, dim=0).reshape(24, 24)
    wide.load_state_dict(state)
    torch.testing.assert_close(run(wide, tokens(10))[0][0], run(model, tokens(10))[0][0], rtol=1e-4, atol=1e-5)


def test_routings_are_observed_of_sparse_blocks_only(make_model):
    _, context = run(make_model({"every": 2}), tokens(10))
    assert list(context.routings) == [1, 3]
    assert all(routing.ids_TK.shape == (10, 1) for routing in context.routings.values())


def test_no_tokens_give_no_logits(make_model):
    none = torch.empty(0, dtype=torch.int64)
    assert make_model()(none, none, VarlenContext(torch.tensor([0]))).shape == (0, 50)


def test_every_parameter_learns_from_one_step(make_model):
    model = make_model(GSHARD, tie_embeddings=False)
    (logits,), _ = run(model, tokens(60))
    cross_entropy(logits, tokens(60, seed=1)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_small_model_learns_a_cycle(make_model):
    model = make_model(GSHARD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(48) % 6
    for _ in range(60):
        (logits,), _ = run(model, text[:-1])
        loss = cross_entropy(logits, text[1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_tied_embeddings_are_one_parameter(make_model):
    tied, untied = (dict(make_model(tie_embeddings=tie).named_parameters()) for tie in (True, False))
    assert untied.keys() - tied.keys() == {"head.weight"}


def test_the_plan_places_every_matrix_and_nothing_else(make_model):
    model = make_model(tie_embeddings=False)
    plan = model.plan()
    placed = {name: match(plan, name) for name, _ in model.named_parameters()}
    for name, placement in placed.items():
        replicated = "norm" in name or "router" in name
        assert (placement == "replicate") == replicated, name
        assert (placement == "expert") == (".experts." in name), name


def test_autocast_trains_close_to_float32(make_model):
    grads = []
    for enabled in (False, True):
        model = make_model({"capacity_factor": None})
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (logits,), _ = run(model, tokens(40))
        cross_entropy(logits, tokens(40, seed=1)).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 0 < (grads[1] - grads[0]).norm() < 0.1 * grads[0].norm()


@pytest.mark.full
@pytest.mark.parametrize(
    ("router", "every", "tie"), list(itertools.product(("switch", "gshard"), (1, 2, 4), (True, False)))
)
def test_packing_is_invisible_for_every_shape(make_model, router, every, tie):
    moe = {"router": router, "top_k": 1 + (router == "gshard"), "every": every, "capacity_tokens": 12}
    model = make_model(moe, tie_embeddings=tie).eval()
    documents = [tokens(n, seed=n) for n in (3, 12, 1, 7)]
    together, _ = run(model, *documents)
    for document, logits in zip(documents, together, strict=True):
        torch.testing.assert_close(run(model, document)[0][0], logits, rtol=1e-4, atol=1e-5)
