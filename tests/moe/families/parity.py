"""Parity with transformers, for every family: the same model, made by them, computes the same here and there.

`check(model_class, hf_config, tmp_path)` is the whole of it; its parts are for models that need some of them otherwise.
"""

import json
import math
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from turnout.inference.config import EngineConfig
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.text.tokenizer import TextTokenizer
from turnout.moe import Decoder, VarlenContext, load_model
from turnout.moe.families.directory import Foreign, read_foreign, save_foreign
from turnout.moe.families.place import check_cover

LENGTHS = (41, 23)  # of two packed sequences
PROMPTS = (37, 5)
NEW = 32


def check(model_class: Any, hf_config: Any, tmp_path: Path) -> Decoder:
    """Logits, greedy text through the paged engine, round trip and export, of one random model; returns ours."""
    theirs = randomise(model_class._from_config(hf_config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path / "theirs")
    found, ours = read_foreign(tmp_path / "theirs"), load_model(tmp_path / "theirs")
    assert found.unknown == ()
    check_cover(found.family.places(ours.cfg), ours.state_dict())
    check_logits(theirs, ours)
    check_greedy(theirs, ours)
    check_round_trip(tmp_path / "theirs", ours, found)
    check_export(model_class, theirs, ours, found, tmp_path / "anew")
    return ours


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    """Weights that make logits differ clearly: matrices that keep a vector's size, norms about one, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        drawn = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(1 + drawn / 4 if "norm" in name else drawn / 2)
        else:
            weight.copy_(drawn * (1.0 if "embed" in name else 1.5 / math.sqrt(max(weight.shape[-1], 1))))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of a size that changes choices
            buffer.copy_(torch.linspace(-0.4, 0.4, len(buffer)))
    return model.eval()


@torch.no_grad()
def check_logits(theirs: Any, ours: Decoder, lengths: tuple[int, ...] = LENGTHS, tolerance: float = 1e-4) -> None:
    """Packed sequences here give each one's logits there."""
    rows = tokens(ours.cfg.vocab_size, lengths)
    wanted = torch.cat([theirs(row[None]).logits[0] for row in rows])
    assert wanted.std() > 0.1, "logits that do not differ prove nothing"
    assert_logits(packed_logits(ours, rows), wanted, tolerance)


@torch.no_grad()
def packed_logits(ours: Decoder, rows: list[Tensor]) -> Tensor:
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return ours(torch.cat(rows), positions, VarlenContext(ends))


def assert_logits(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of the largest, and with the same best token everywhere."""
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@torch.no_grad()
def check_greedy(theirs: Any, ours: Decoder, lengths: tuple[int, ...] = PROMPTS, new: int = NEW) -> None:
    """The engine's greedy tokens, from a paged cache in small blocks and chunks, are those without any cache there."""
    engine = make_engine(ours)
    prompts = tokens(ours.cfg.vocab_size, lengths, seed=1)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        engine.add_request(str(i), prompt.tolist(), params)
    done: dict[str, list[int]] = {}
    while engine.has_unfinished:
        done.update({output.request_id: output.outputs[0].token_ids for output in engine.step()})
    for i, prompt in enumerate(prompts):
        row = prompt[None]
        for _ in range(new):
            row = torch.cat([row, theirs(row).logits[:, -1:].argmax(-1)], dim=1)
        assert done[str(i)] == row[0, len(prompt) :].tolist()
    assert len({token for row in done.values() for token in row}) > 2, "a text of one token proves nothing"


def make_engine(ours: Decoder, **config: Any) -> Engine:
    """An engine for token ids: its tokenizer knows bytes only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    sizes = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    return Engine(ours, TextTokenizer(tokenizer), EngineConfig(**(sizes | config)))


def check_round_trip(directory: Path, ours: Decoder, found: Foreign) -> None:
    """Written back, every tensor is there to the bit and config.json says the same."""
    again = directory.with_name("again")
    save_foreign(again, ours.cfg, ours.state_dict(), found.family.name, origin=found.data)
    assert_same_tensors(directory, again)
    assert _json(again) == _json(directory)


@torch.no_grad()
def check_export(model_class: Any, theirs: Any, ours: Decoder, found: Foreign, to: Path) -> None:
    """Written with a configuration made from ours alone, transformers loads it and computes what it did."""
    save_foreign(to, ours.cfg, ours.state_dict(), found.family.name)
    assert read_foreign(to).cfg == ours.cfg
    assert read_foreign(to).unknown == ()
    again, report = model_class.from_pretrained(to, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for row in tokens(ours.cfg.vocab_size, LENGTHS):
        assert_logits(again.eval()(row[None]).logits[0], theirs(row[None]).logits[0], 1e-6)


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = read_tensors(one), read_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's files."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def tokens(vocabulary: int, lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Rows of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


def _json(directory: Path) -> Any:
    return json.loads((directory / "config.json").read_text())
