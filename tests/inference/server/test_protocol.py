"""The surface that clients depend on: it changes here first, on purpose."""

from turnout.inference.server.metrics import Metrics
from turnout.inference.server.neutral import CHAT, COMPLETION
from turnout.inference.server.protocol import ChatRequest, CompletionRequest

SHARED = {
    "model", "n", "stream", "stream_options", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "seed",
    "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words",
    "allowed_token_ids", "prompt_logprobs", "priority", "cache_salt",
    "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "max_tokens", "logprobs",
    "routed_experts", "return_token_ids", "structured_outputs",
    "response_format", "truncate_prompt_tokens", "add_special_tokens",
}  # fmt: skip


def test_the_served_fields_are_these():
    assert set(CompletionRequest.model_fields) == SHARED | {"prompt", "echo"}
    assert set(ChatRequest.model_fields) == SHARED | {
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    }


def test_no_field_is_both_served_and_neutral():
    assert not set(CompletionRequest.model_fields) & set(COMPLETION)
    assert not set(ChatRequest.model_fields) & set(CHAT)


def test_every_whole_number_has_its_bounds():
    for model in (CompletionRequest, ChatRequest):
        properties = model.model_json_schema()["properties"]
        for name in ("n", "top_k", "seed", "min_tokens", "max_tokens", "prompt_logprobs", "priority"):
            options = properties[name].get("anyOf", [properties[name]])
            numbers = [option for option in options if option.get("type") == "integer"]
            assert numbers, name
            assert all("minimum" in number and "maximum" in number for number in numbers), name


def test_the_metrics_have_these_names():
    names = {family.name.removeprefix("turnout:") for family in Metrics(lambda: None).registry.collect()}
    assert names == {
        "http_requests", "requests", "request_success", "prompt_tokens", "generation_tokens",
        "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
        "request_generation_tokens",
    }  # fmt: skip
