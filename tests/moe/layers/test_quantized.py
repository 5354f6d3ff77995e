"""Layers of eight and four bits compute with their dequantized weights, and are loaded as they were saved."""

import pytest
import torch
from safetensors.torch import save_file

from turnout import CheckpointError, ConfigError
from turnout.moe import Decoder, ModelConfig, MoEConfig, load_model, save_model
from turnout.moe.compress.methods import stacked
from turnout.moe.layers.experts import Experts
from turnout.moe.layers.quantized import (
    Matrix,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    fixed_names,
    matrices,
    round_to,
    stacks,
)
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.init import init_weights
from turnout.moe.models.store import WEIGHTS
from turnout.moe.quantization_config import QuantizationConfig

KINDS = [
    QuantizationConfig(),
    QuantizationConfig(bits=4, group=64),
    QuantizationConfig(group=64, zero=True, embedding=False),
    QuantizationConfig(kind="float"),
]


def config(activation="swiglu", **more) -> ModelConfig:
    moe = MoEConfig(width=64, expert_width=64, num_experts=4, shared_experts=1, activation=activation)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_width": 128, "max_seq_len": 64}
    return ModelConfig(vocab_size=97, width=64, layers=2, moe=moe, activation=activation, **sizes, **more)


def rounded(cfg: ModelConfig, how: QuantizationConfig) -> tuple[Decoder, Decoder]:
    """A model of rounded layers, and one of whole layers with the same, dequantized, weights."""
    model = Decoder(cfg)
    init_weights(model, 0)
    with torch.device("meta"):
        ours = Decoder(ModelConfig(**{**vars(cfg), "quantization": how}))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in ours.state_dict()}

    def put(name, w):
        for part, tensor in Matrix(w).named_buffers():
            state[f"{name}.{part}"] = tensor
        return w.dequantized()

    with torch.no_grad():
        for name, linear in list(matrices(model)):
            linear.weight.copy_(put(name, round_to(linear.weight, how)))
        for name, experts in list(stacks(model)):
            experts.w_in.copy_(put(f"{name}.w_in", round_to(experts.w_in, how)))
            experts.w_out.copy_(put(f"{name}.w_out", round_to(experts.w_out.mT, how)).mT)
        if how.embedding:
            for name in ("embed", "head"):
                if (end := getattr(model, name)) is not None:
                    end.weight.copy_(put(name, round_to(end.weight, how.of_vocabulary)))
    ours.load_state_dict(state, assign=True)
    ours.tell_dtype()
    return ours.eval().requires_grad_(False), model.eval().requires_grad_(False)


def logits(model: Decoder) -> torch.Tensor:
    tokens_T = torch.arange(24) * 5 % 97
    return model(tokens_T, torch.arange(24), VarlenContext(torch.tensor([0, 24])))


@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_rounded_model_computes_with_its_dequantized_weights(how, activation):
    ours, whole = rounded(config(activation, tie_embeddings=activation == "relu"), how)
    torch.testing.assert_close(logits(ours), logits(whole), rtol=1e-4, atol=1e-4)


def test_losses_are_those_of_the_logits():
    ours, whole = rounded(config(), KINDS[0])
    x_TD, targets_T = torch.randn(600, 64, generator=torch.Generator().manual_seed(0)), torch.arange(600) % 97
    targets_T[5] = -1
    found_T, wanted_T = ours.embed.losses(x_TD, targets_T), whole.embed.losses(x_TD, targets_T)
    torch.testing.assert_close(found_T, wanted_T, rtol=1e-4, atol=1e-4)
    assert found_T[5] == 0


def test_every_matrix_is_rounded_and_routers_norms_and_the_latent_one_are_not():
    ours, _ = rounded(config(), KINDS[0])
    kinds = {type(module) for module in ours.modules()}
    assert {QuantizedLinear, QuantizedEmbedding, QuantizedExperts} <= kinds
    assert Experts not in kinds
    left = [name for name, _ in ours.named_parameters()]
    assert all("norm" in name or ".router." in name for name in left), left
    router = next(name for name in left if ".router." in name)
    assert ours.get_parameter(router).dtype == torch.float32


def test_a_width_that_groups_do_not_divide_is_stored_in_eight_bits_a_row():
    how = QuantizationConfig(bits=4, group=64, zero=True).of_width(96)
    assert (how.bits, how.group, how.zero) == (8, None, True)


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_what_is_saved_is_loaded_and_a_dtype_changes_no_stored_number(how, tmp_path):
    ours, _ = rounded(config(), how)
    save_model(tmp_path / "m", ours.cfg, ours.state_dict())
    again = load_model(tmp_path / "m", "bfloat16")
    before, after = ours.state_dict(), again.state_dict()
    assert after["norm.weight"].dtype == torch.bfloat16
    for name in fixed_names(ours):
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    assert again.embed(torch.tensor([3])).dtype == torch.bfloat16
    torch.testing.assert_close(logits(load_model(tmp_path / "m")), logits(ours), rtol=0, atol=0)
    moved = again.to(torch.float32).state_dict()
    assert all(moved[name].dtype == before[name].dtype for name in fixed_names(ours))


def test_files_that_hold_other_types_are_refused_by_name(tmp_path):
    ours, whole = rounded(config(), KINDS[0])
    wrong = {
        name: tensor.float() if name == "blocks.0.attention.wq.q" else tensor
        for name, tensor in ours.state_dict().items()
    }
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.wq\.q \(torch\.float32\).*torch\.int8"):
        save_model(tmp_path / "m", ours.cfg, wrong)
    with pytest.raises(CheckpointError, match="exactly the tensors"):
        save_model(tmp_path / "m", ours.cfg, whole.state_dict())


def test_e4m3_that_is_no_number_is_refused_by_name(tmp_path):
    ours, _ = rounded(config(), KINDS[-1])
    save_model(tmp_path / "m", ours.cfg, ours.state_dict())
    broken, name = ours.state_dict(), "blocks.0.attention.wq.q"
    broken[name] = broken[name].clone()
    broken[name].view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.wq\.q \(NaN\) .* must be finite"):
        save_model(tmp_path / "m", ours.cfg, broken)
    save_file(broken, tmp_path / "m" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.wq\.q \(NaN\) .* must be finite"):
        load_model(tmp_path / "m")


def test_a_stack_is_its_matrices():
    w_EFD = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
    for how in KINDS:
        whole = round_to(w_EFD, how)
        parts = stacked([round_to(w_FD, how) for w_FD in w_EFD])
        assert torch.equal(parts.dequantized(), whole.dequantized())
        assert torch.equal(whole[1].dequantized(), round_to(w_EFD[1], how).dequantized())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bits": 4}, r"quantization\.group \(None\) is needed"),
        ({"group": 48}, r"quantization\.group \(48\)"),
        ({"kind": "float", "zero": True}, r"quantization\.kind \(float\)"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        QuantizationConfig(**wrong)
