"""Hugging Face directories as others publish them: small random models with a tokenizer and its settings."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = [
    "The import statement combines two operations; it searches for the named module, then it binds the results.",
    "naïve café, Grüße, 日本語, emoji 👍🏽.",
]
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
SPECIAL = ["<s>", "</s>", "<|user|>", "<|bot|>"]
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def make(directory: Path, model_class: Any, config_class: Any, dtype: Any = torch.float32, **changes: Any) -> Any:
    """Write `directory` and return their model."""
    from turnout.tests.moe.families.parity import randomise

    config = config_class(**(SIZES | changes))
    model = randomise(model_class._from_config(config, attn_implementation="eager")).to(dtype)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


def write_tokenizer(directory: Path) -> None:
    """Byte-level BPE that begins a text with `<s>`; a second end of text stands in generation_config.json alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "</s>", "special": True}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": end,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
