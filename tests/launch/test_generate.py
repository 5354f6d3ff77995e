"""`turnout generate`: the text streams to stdout, the result goes to JSON, bad values end with code 2."""

import json
import subprocess
import sys

import pytest

from turnout import LLM, SamplingParams
from turnout.launch.main import main
from turnout.moe import Decoder, ModelConfig, save_model
from turnout.moe.attention_config import AttentionConfig, EncoderConfig
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.models.init import init_weights

PROMPT = "The module, a=b"


@pytest.fixture(scope="module")
def servable(tmp_path_factory):
    """A small dense model with random weights and its tokenizer."""
    return build(tmp_path_factory.mktemp("generate"))


def build(folder, **changes):
    tokenizer = train_tokenizer(["The import statement combines two operations."], 280)
    tokenizer.save(folder)
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_width=64,
        max_seq_len=128, eos_token_id=tokenizer.eos_id, **changes,
    )  # fmt: skip
    model = Decoder(cfg)
    init_weights(model, seed=0)
    return save_model(folder / "model", cfg, model.state_dict(), folder)


@pytest.fixture
def generate(servable, capsys):
    def run(*args: str) -> tuple[int, str, str]:
        code = main(["generate", str(servable), *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_stdout_is_the_completion_and_json_has_the_rest(servable, generate, tmp_path):
    code, out, err = generate(f"prompt={PROMPT}", "max_tokens=12", "temperature=0", f"json={tmp_path}/sub/out.json")
    expected = LLM(servable).generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    assert (code, out) == (0, expected.text + "\n")
    assert "12 tokens in" in err
    result = json.loads((tmp_path / "sub" / "out.json").read_text())
    assert result["token_ids"] == expected.token_ids
    assert (result["prompt"], result["text"], result["finish_reason"]) == (PROMPT, expected.text, "length")


def test_the_prompt_of_an_encoder_decoder_is_what_its_encoder_reads(tmp_path, capsys):
    path = build(tmp_path, attention=AttentionConfig(positions="relative"), encoder=EncoderConfig(layers=2))
    assert main(["generate", str(path), f"prompt={PROMPT}", "max_tokens=9", f"json={tmp_path}/out.json"]) == 0
    expected = LLM(path).generate(PROMPT, SamplingParams(temperature=0.8, seed=0, max_tokens=9))[0]
    assert capsys.readouterr().out == expected.outputs[0].text + "\n"
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["token_ids"] == expected.outputs[0].token_ids
    assert result["prompt_tokens"] == len(expected.prompt_token_ids) > 1


def test_equal_seeds_give_equal_texts_and_others_differ(generate):
    one, again, other = (generate(f"prompt={PROMPT}", "max_tokens=24", f"seed={seed}")[1] for seed in (7, 7, 8))
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "prompt is missing"),
        (("prompt=x", "temprature=1"), "did you mean temperature?"),
        (("prompt=x", "temperature=-1"), "temperature (-1.0)"),
        (("prompt=x", "max_tokens=100000"), "max_model_len"),
        (("prompt=x", "engine.block_size=0"), "block_size (0)"),
    ],
)
def test_a_bad_value_is_one_line_and_code_2(generate, args, message):
    code, out, err = generate(*args)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_it_runs_as_a_command(servable):
    command = [sys.executable, "-m", "turnout", "generate", str(servable), f"prompt={PROMPT}", "max_tokens=3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "3 tokens in" in result.stderr


def test_help_shows_an_example_and_loads_no_torch():
    code = (
        "import sys; from turnout.launch.main import main; main(['generate', '--help']); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "example: turnout generate" in result.stdout
    assert result.stdout.endswith("False\n")
