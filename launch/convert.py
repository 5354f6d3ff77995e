"""`turnout convert`: a model from one format to another, exactly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..configs.typed import check
from ..moe.upcycle_config import UpcycleConfig
from .cli import Options, parse, write_json

SUMMARY = "a Hugging Face directory to a model of ours, and back"
HELP = """\
usage: turnout convert SRC DST [key=value ...]

SRC is a run, a model directory, a Hugging Face directory with safetensors, or a GGUF file (also package:NAME). DST must
not exist yet, or hold a model. Weights are copied, never computed: back in the format that it came from, every tensor
is the same to the bit.

  to=KIND       turnout, or the model_type of a family (docs/families.md lists them); by default turnout for what is
                foreign, and for a model of ours the family it came from, or the first that can compute it
  dtype=null    float32, bfloat16, float16 or float64; null = as stored
  upcycle.KEY   make a dense model sparse on the way (docs/upcycling.md): num_experts, top_k, granularity, ...
  json=PATH     write the report there

example: turnout convert Mixtral-8x7B-v0.1 models/mixtral
         turnout convert Llama-3.2-1B models/sparse upcycle.num_experts=8 upcycle.granularity=2
         turnout convert runs/x exported to=qwen2_moe dtype=bfloat16
"""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """What `turnout convert` takes; see HELP."""

    to: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)


def main(args: list[str]) -> int:
    """The verb."""
    (source, target), options = parse(ConvertOptions, args, words=("src", "dst"))
    result = convert(Path(source), Path(target), options)
    for line in lines(result):
        print(line)
    write_json(options.json, result)
    return 0


def convert(path: Path, target: Path, options: ConvertOptions) -> dict[str, Any]:
    """Read, write and report.

    Raises:
        ConfigError: a model that can not be computed on the other side. CheckpointError: files are broken.
    """
    free_place(path, target)
    from ..moe.families.conversion import describe, make_sparse, read_whole, target_kind, write_whole

    source = read_whole(path)
    if options.upcycle.num_experts is not None:
        source = make_sparse(source, options.upcycle)
    to = target_kind(source, options.to)
    written = write_whole(source, target, to, options.dtype)
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    report = describe(source, options.dtype or source.dtype)
    return {"source": str(path), "target": str(target), "written_as": to, **report, "bytes": size}


def free_place(path: Path, target: Path) -> None:
    """Refuse to write over the source, or over what is no model.

    Raises:
        ConfigError: naming DST.
    """
    rule, fix = "must be another directory than the source's model", "name a new one"
    check(target.resolve() not in (path.resolve(), (path / "model").resolve()), "DST", target, rule, fix)
    free = not target.exists() or (
        target.is_dir() and (not any(target.iterdir()) or (target / "config.json").is_file())
    )
    check(free, "DST", target, "holds something that is no model", "name a new directory")


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    window = f", window {report['window']}" if report["window"] else ""
    found = [
        f"{report['source']} ({report['read_as']}) -> {report['target']} ({report['written_as']})",
        f"parameters    {report['parameters']:,}, of which a token uses {report['active_parameters']:,}",
        f"attention     {report['attention']}{window}, {report['kv_bytes_per_token']:,} bytes of cache a token",
        f"on disk       {report['bytes']:,} bytes as {report['dtype']}",
    ]
    for name, what in (("unknown_keys", "keys that nobody here reads"), ("ignored_tensors", "tensors left out")):
        if report[name]:
            found.append(f"{what}: {', '.join(report[name])}")
    return found
