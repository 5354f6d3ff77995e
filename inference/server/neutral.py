"""Fields of OpenAI's and vLLM's requests that are known but not served.

Each is accepted with the values that change nothing, because real clients send them, and refused by name with any
other. A null is the same as leaving it out.
"""

from collections.abc import Sequence

from .strict import ANYTHING

Neutral = dict[str, Sequence[object]]

REASONS = {
    "chat_template": "templates come from the checkpoint only",
    "logits_processors": "code does not come over HTTP: logit_bias, bad_words and structured_outputs are served",
    "use_beam_search": "beam search is the library's: LLM.beam_search",
    "length_penalty": "beam search is the library's: LLM.beam_search",
    "early_stopping": "beam search is the library's: LLM.beam_search",
    "best_of": "n gives every completion",
    "suffix": "the model only continues text",
    "request_id": "send the header X-Request-Id",
    "functions": "tools are served",
    "function_call": "tool_choice is served",
} | {
    f"guided_{kind}": f'structured_outputs: {{"{kind}": ...}} is served'
    for kind in ("json", "regex", "choice", "grammar")
}
"""What to say beside a refusal, where there is more to say."""

LABELS: Neutral = dict.fromkeys(
    ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), ANYTHING
)
BOTH: Neutral = LABELS | {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncation_side": ("left",),
    "return_tokens_as_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "return_mm_kwargs": (False,),
    "routed_experts_prompt_start": (0,),
    "watermarking": (False,),
    "stream_interval": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "request_id": (),
    "session_id": (),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    "mm_payload": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
}
COMPLETION: Neutral = BOTH | {"suffix": ("",), "prompt_embeds": ()}
RENDERED: Neutral = {
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}
"""Of whatever is rendered by a chat template."""
CHAT: Neutral = (
    BOTH
    | RENDERED
    | {
        "audio": (),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "include_reasoning": (True,),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)
STREAM_OPTIONS: Neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
MESSAGE: Neutral = {
    "name": ANYTHING,
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "reasoning": (),
    "reasoning_content": (),
}
