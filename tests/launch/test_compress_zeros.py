"""`turnout compress` with zeros: as many as asked in every matrix that it prunes, and everything else as it was."""

import json

import pytest
import torch

from turnout.launch.main import main
from turnout.moe import Decoder, ModelConfig, MoEConfig, load_model, save_model
from turnout.moe.compress.watch import places
from turnout.moe.data.corpus import read_documents
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.eval.perplexity import limit_bytes

MOE = MoEConfig(width=16, expert_width=16, num_experts=4, capacity_tokens=64)
MODEL = ModelConfig(
    vocab_size=300, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_width=32, max_seq_len=128, moe=MOE
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """An untrained model with weights large enough for its experts to differ, its first block larger than the other."""
    folder = tmp_path_factory.mktemp("dense")
    train_tokenizer(limit_bytes(read_documents("pydocs", "train"), 50_000), 300).save(folder / "tokenizer")
    torch.manual_seed(0)
    tensors = {name: (2 if ".1." in name else 4) * w.detach() for name, w in Decoder(MODEL).named_parameters()}
    return save_model(folder / "model", MODEL, tensors, folder / "tokenizer")


def pruned(model):
    return {f"{i}.{name}": w for i, block in enumerate(model.blocks) for name, w, *_ in places(block)}


@pytest.mark.parametrize("words", [["method=magnitude", "pattern=2:4"], ["method=wanda"], ["method=sparsegpt"]])
def test_every_matrix_has_its_share_of_zeros_and_the_rest_is_untouched(dense, tmp_path, words):
    (tmp_path / "some.txt").write_text(limit_bytes(read_documents("pydocs", "train"), 4000)[0], encoding="utf-8")
    said = ["speed=false", "max_bytes=2000", f"calibration={tmp_path / 'some.txt'}", "samples=8", "min_rows=4"]
    assert main(["compress", str(dense), str(tmp_path / "slim"), *words, *said]) == 0
    before, after = load_model(dense), load_model(tmp_path / "slim")
    found = pruned(after)
    assert {float((w == 0).double().mean()) for w in found.values()} == {0.5}
    if "pattern=2:4" in words:
        assert all(((w == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all() for w in found.values())
    stacked = {f"blocks.{name.partition('[')[0]}" for name in found}
    for name, w in after.named_parameters():
        if name.removesuffix(".weight") not in stacked:
            assert torch.equal(w, before.get_parameter(name)), name
    report = json.loads((tmp_path / "slim" / "compress.json").read_text())
    assert [notes["zeros"] for notes in report["layers"]] == [0.5, 0.5]
    assert report["perplexity_after"] != report["perplexity_before"]


def test_what_is_measured_is_what_is_stored_also_of_half_precision(dense, tmp_path):
    tensors = {name: w if ".router." in name else w.bfloat16() for name, w in load_model(dense).state_dict().items()}
    save_model(tmp_path / "half", MODEL, tensors, dense)
    (tmp_path / "some.txt").write_text(limit_bytes(read_documents("pydocs", "train"), 4000)[0], encoding="utf-8")
    common = ["speed=false", "max_bytes=500", f"calibration={tmp_path / 'some.txt'}", "samples=8", "min_rows=4"]
    for source, target, words in (
        ("half", "slim", ["method=sparsegpt", "sparsity=0.3"]),
        ("slim", "same", ["method=layers", "num_layers=2"]),
    ):
        assert main(["compress", str(tmp_path / source), str(tmp_path / target), *words, *common]) == 0
    slim, same = (json.loads((tmp_path / name / "compress.json").read_text()) for name in ("slim", "same"))
    assert slim["loss_after"] == same["loss_before"] == same["loss_after"]
    assert slim["settings"]["how"]["sparsity"] == 0.3


def test_one_threshold_over_the_model_takes_more_where_weights_are_small(dense, tmp_path):
    words = ["method=magnitude", "scope=global", "sparsity=0.3", "speed=false", "max_bytes=2000"]
    assert main(["compress", str(dense), str(tmp_path / "slim"), *words]) == 0
    before, after = pruned(load_model(dense)), pruned(load_model(tmp_path / "slim"))
    gone = torch.cat([before[name][w == 0].abs() for name, w in after.items()])
    kept = torch.cat([w[w != 0].abs() for w in after.values()])
    assert gone.max() < kept.min()
    assert len(gone) == round(0.3 * (len(gone) + len(kept)))
