"""`turnout generate`: complete one prompt and stream the text to stdout."""

import sys
import time
from dataclasses import dataclass, field

from ..inference.config import EngineConfig
from ..inference.core.sampling import SamplingParams
from . import main as cli
from . import ranks
from .cli import Options, parse, write_json
from .ranks import Several

SUMMARY = "complete a prompt and stream the text"
HELP = """\
usage: turnout generate CKPT prompt=TEXT [key=value ...]

CKPT is a run, a model directory or a GGUF file. The text streams to stdout, a line about its speed goes to stderr.

  prompt          the text to complete, taken literally
  chat            false   the prompt is a user's message: answer it, through the model's chat template
  max_tokens      128     tokens to generate at most
  min_tokens      0       end-of-sequence and stop are suppressed until then
  temperature     0.8     0 = greedy
  top_k, top_p    0, 1    keep the k most probable tokens (0 = all), the smallest set of probability p
  seed            0       equal seeds give equal texts
  stop            null    a string that ends the text
  ignore_eos      false   go on after the end-of-sequence token
  engine.*                the engine's settings, such as engine.dtype=bfloat16 or engine.kernels=reference
  nproc, parallel.* 1     ranks that compute together, and what they divide: nproc=2 parallel.tp=2
  json            null    write text, tokens, finish reason and timing there

example: turnout generate runs/x prompt="The import statement" max_tokens=64 temperature=0
"""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options, Several):
    """What `turnout generate` takes; see HELP."""

    prompt: str
    chat: bool = False
    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: str | None = None
    ignore_eos: bool = False
    engine: EngineConfig = field(default_factory=EngineConfig)

    def sampling(self) -> SamplingParams:
        """The request's parameters."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )


def main(args: list[str]) -> int:
    (path,), options = parse(GenerateOptions, args, words=("ckpt",))
    options.sampling()  # refuse bad values before torch is loaded
    if ranks.is_rank():
        return ranks.play(lambda: generate(path, options), lambda: ranks.follow(path, options.engine, options))
    if options.nproc > 1:
        return ranks.run(f"{__package__}.generate", args, options.nproc, options.parallel.timeout)
    return generate(path, options)


def generate(path: str, options: GenerateOptions) -> int:
    """Complete the prompt in this process, which may be rank 0 of several."""
    from ..inference.engine import Engine
    from ..inference.outputs import FailedOutput
    from ..inference.ranks import Ranks

    params = options.sampling()
    several = Ranks.join(options.parallel, options.engine)
    engine = Engine.from_path(path, options.engine, ranks=several)
    start = time.perf_counter()
    asked = engine.chat.encode([{"role": "user", "content": options.prompt}]) if options.chat else options.prompt
    engine.add_request("generate", asked, params)
    print(engine.memory_plan, file=sys.stderr)
    first, shown = 0.0, 0
    while engine.has_unfinished:
        for output in engine.step():
            first = first or time.perf_counter() - start
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()
    if several is not None:
        several.end()
    if isinstance(output, FailedOutput) and output.error is not None:
        raise output.error
    seconds, completion = time.perf_counter() - start, output.outputs[0]
    tokens = len(completion.token_ids)
    line = f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s), {completion.finish_reason}"
    print(line, file=sys.stderr)
    result = {
        "prompt": options.prompt,
        "text": completion.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "ttft_seconds": first,
        "seconds": seconds,
        "memory": engine.memory_plan.to_dict(),
    }
    write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
