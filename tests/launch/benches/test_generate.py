"""transformers is asked in the environment in which it is installed; without one there is a note."""

import sys

import pytest

from turnout.launch.benches import generate
from turnout.launch.workload import Job
from turnout.tests.inference.conftest import byte_level, model, model_dir  # noqa: F401  (fixtures)


def test_what_is_not_installed_or_fails_is_a_note(tmp_path):
    job = Job(prompt=(1, 2, 3), tokens=2)
    assert generate.ask(tmp_path, "model", [job])["note"] == "not installed"
    python = tmp_path / "venvs" / "hf" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    python.chmod(0o755)
    assert generate.ask(tmp_path, "model", [job])["note"] == "no such model"


@pytest.mark.full
def test_a_model_is_measured_in_batches_and_alone(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    python = tmp_path / "venvs" / "hf" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    jobs = [Job(prompt=(1, 2, 3 + i), tokens=2 + i) for i in range(3)]
    row = generate.ask(tmp_path, str(tmp_path / "model"), jobs)
    assert row["tokens_per_second"] > 0
    assert row["ttft_alone"] > 0
    assert row["peak_mb"] > 100
