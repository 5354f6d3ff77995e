"""The tokenizer of a GGUF file as the files of an ordinary directory: `tokenizer.json` and `tokenizer_config.json`.

Two kinds of tokenizer are in use for Llamas: byte-level BPE (`gpt2`), whose way of cutting a text into words has a
name, and SentencePiece's BPE (`llama`), whose merges follow from its scores.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ... import CheckpointError, ConfigError
from .gguf import GgufFile

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How each `tokenizer.ggml.pre` cuts a text; None = as GPT-2 does.
SPLITS = {
    "gpt-2": None, "smollm": None, "llama3": LLAMA3, "llama-v3": LLAMA3, "llama-bpe": LLAMA3, "tekken": TEKKEN,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2,
}  # fmt: skip
WHOLE_FIRST = {"llama3", "llama-v3", "llama-bpe", "tekken"}  # a word that is a token is not merged; BOS by default


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`.

    Raises:
        ConfigError: a kind of tokenizer that is not understood. CheckpointError: one that is not whole.
    """
    tokens = file.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise CheckpointError(f"tokenizer.ggml.tokens is missing in {file.path}: give a file with a tokenizer")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens of {file.path} has a token twice: convert the model again")
    kind, kinds = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if kind not in ("gpt2", "llama"):
        raise ConfigError(f"tokenizer.ggml.model ({kind}) of {file.path} must be gpt2 or llama: give a directory")
    if len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type of {file.path} has {len(kinds)} entries, not {len(tokens)}")
    try:
        tokenizer = byte_level(file, tokens) if kind == "gpt2" else sentencepiece(file, tokens, kinds)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"tokenizer of {file.path} is broken ({error}): convert the model again") from error
    added = [(token, n == CONTROL) for token, n in zip(tokens, kinds, strict=True) if n in (CONTROL, USER_DEFINED)]
    for special in (True, False):
        tokenizer.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in added if s == special])
    settings = _settings(file, tokens)
    before, after = (settings[f"{end}_token"] if _adds(file, end) else None for end in ("bos", "eos"))
    around = [(token, tokens.index(token)) for token in (before, after) if token is not None]
    if around:
        spelled = " ".join(part for part in (before, "$A", after) if part is not None)
        tokenizer.post_processor = processors.TemplateProcessing(single=spelled, special_tokens=around)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def byte_level(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE, cutting words as `tokenizer.ggml.pre` says.

    Raises:
        ConfigError: it is missing or not known here. CheckpointError: there are no merges.
    """
    pre = file.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        known = ", ".join(SPLITS)
        raise ConfigError(f"tokenizer.ggml.pre ({pre}) of {file.path} must be one of {known}: give a directory")
    merges = [tuple(merge.split(" ")) for merge in _needed(file, "merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_FIRST))
    regex = SPLITS[pre]
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), words])
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    else:
        tokenizer.pre_tokenizer = words
    if regex is QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    """SentencePiece's BPE with byte fallback: of all pairs that make a token, the one of the highest score first.

    Control tokens, bytes and user-defined ones are never merged to: text can not spell them.
    """
    if file.get("tokenizer.ggml.remove_extra_whitespaces"):
        rule = "must be false: such texts are not normalized here"
        raise ConfigError(f"tokenizer.ggml.remove_extra_whitespaces (true) of {file.path} {rule}")
    scores, vocab = _needed(file, "scores"), {token: index for index, token in enumerate(tokens)}
    pieces = {token: index for token, index in vocab.items() if kinds[index] == NORMAL}
    found = []
    for token, index in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[index], -len(left), pieces[left], pieces[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(found)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    prefix = file.get("tokenizer.ggml.add_space_prefix") is not False
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    return tokenizer


def _needed(file: GgufFile, name: str) -> list[Any]:
    values = file.get(f"tokenizer.ggml.{name}")
    if values is None:
        raise CheckpointError(f"tokenizer.ggml.{name} is missing in {file.path}: convert the model again")
    found: list[Any] = values
    return found


def _adds(file: GgufFile, end: str) -> bool:
    """Whether every text begins (or ends) with that token: llama.cpp's defaults where the file does not say."""
    stated = file.get(f"tokenizer.ggml.add_{end}_token")
    by_default = file.get("tokenizer.ggml.model") == "llama" or file.get("tokenizer.ggml.pre") in WHOLE_FIRST
    wanted = stated if stated is not None else end == "bos" and by_default
    return bool(wanted) and file.get(f"tokenizer.ggml.{end}_token_id") is not None


def _settings(file: GgufFile, tokens: Sequence[str]) -> dict[str, Any]:
    """tokenizer_config.json.

    Raises:
        CheckpointError: a special token's number has no token.
    """
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is None:
            continue
        if index >= len(tokens):
            rule = f"must be below {len(tokens)}, the number of tokens"
            raise CheckpointError(f"tokenizer.ggml.{theirs}_token_id ({index}) of {file.path} {rule}: convert it again")
        settings[f"{name}_token"] = tokens[index]
    template = file.get("tokenizer.chat_template")
    return settings if template is None else {**settings, "chat_template": template}
