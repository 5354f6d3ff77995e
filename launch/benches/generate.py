"""transformers' `generate` on a workload, in the environment in which it is installed.

As a program: a model's path in argv, `{"jobs": [[ids, tokens], ...], "long": ids}` on stdin, figures (JSON) on stdout.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH = 16
ALONE, AFTER, REPEATS = 512, 33, 3  # tokens of a prompt alone, tokens generated after it, how often
LIMIT = 900.0  # seconds


def ask(peers: Path, path: str, jobs: Sequence[Any]) -> dict[str, Any]:
    """The row of static batches of 16, and of one request alone; a note where it is not installed.

    Args:
        peers: the folder of other engines, whose `venvs/hf` it is in.
        path: the model.
        jobs: with `prompt` and `tokens` each.
    """
    name, python = "transformers, batches of 16", peers / "venvs" / "hf" / "bin" / "python"
    if not python.exists():
        return {"server": name, "note": "not installed"}
    long = [token for job in jobs for token in job.prompt][:ALONE]
    asked = json.dumps({"jobs": [[job.prompt, job.tokens] for job in jobs], "long": long})
    command = (str(python), "-P", str(Path(__file__)), path)
    done = subprocess.run(  # noqa: S603 (a program that the user has installed)
        command, input=asked, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    if done.returncode:
        return {"server": name, "note": (done.stderr.strip().splitlines() or ["failed"])[-1][:100]}
    return {"server": name, **json.loads(done.stdout.splitlines()[-1])}


def main(path: str, jobs: Sequence[tuple[list[int], int]], long: list[int]) -> None:
    """Measure and print."""
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ready = time.perf_counter() - start
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def run(batch: Sequence[list[int]], tokens: int) -> float:
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - began

    run([long], 1)
    first, whole = (statistics.median(run([long], tokens) for _ in range(REPEATS)) for tokens in (1, AFTER))
    batches = [jobs[at : at + BATCH] for at in range(0, len(jobs), BATCH)]
    seconds = sum(run([prompt for prompt, _ in batch], max(tokens for _, tokens in batch)) for batch in batches)
    figures = {
        "tokens_per_second": sum(tokens for _, tokens in jobs) / seconds,
        "ttft_alone": first,
        "tpot_alone": (whole - first) / (AFTER - 1),
        "ready_seconds": ready,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    main(sys.argv[1], asked["jobs"], asked["long"])
