"""What people and tools depend on is written down in surfaces.json, and changes only on purpose.

A name that goes missing breaks somebody; a new one is a promise. To change a surface, change surfaces.json with it.
"""

import dataclasses
import importlib
import json

import pytest

from turnout.launch import compose, main
from turnout.launch.bench import BenchOptions
from turnout.launch.bench_serve import ServeBenchOptions
from turnout.launch.cli import Options
from turnout.launch.compress import CompressOptions
from turnout.launch.convert import ConvertOptions
from turnout.launch.doctor import DoctorOptions
from turnout.launch.evaluate import EvaluateOptions
from turnout.launch.generate import GenerateOptions
from turnout.launch.plan import PlanOptions
from turnout.launch.quickstart import QuickstartOptions
from turnout.launch.ray_serve import RayOptions
from turnout.launch.serve import ServeOptions

OPTIONS = {
    "plan": PlanOptions,
    "quickstart": QuickstartOptions,
    "generate": GenerateOptions,
    "serve": ServeOptions,
    "evaluate": EvaluateOptions,
    "convert": ConvertOptions,
    "compress": CompressOptions,
    "bench": BenchOptions,
    "doctor": DoctorOptions,
}


def public_imports() -> dict[str, list[str]]:
    packages = ("turnout", "turnout.moe", "turnout.parallel", "turnout.kernels")
    modules = {name: importlib.import_module(name) for name in packages}
    return {name: sorted(getattr(module, "__all__", None) or dir(module)) for name, module in modules.items()}


def config_keys() -> dict[str, list[str]]:
    groups = {name: sorted(f.name for f in dataclasses.fields(cls)) for name, cls in compose.GROUPS.items()}
    return {**groups, "": sorted(compose.ROOT_KEYS)}


def options() -> dict[str, list[str]]:
    classes = OPTIONS | {"bench serve": ServeBenchOptions}
    names = {verb: sorted(f.name for f in dataclasses.fields(cls)) for verb, cls in classes.items()}
    return names | {"serve, by its replicas": sorted(ray_options())}


def ray_options() -> set[str]:
    """Those that `turnout serve` does not have."""
    return {f.name for f in dataclasses.fields(RayOptions)} - {f.name for f in dataclasses.fields(ServeOptions)}


def http_fields() -> dict[str, list[str]]:
    from turnout.inference.server import messages, protocol, tokens

    requests = {
        "completions": protocol.CompletionRequest,
        "chat": protocol.ChatRequest,
        "message": messages.Message,
        "tokenize": tokens.TokenizeText,
        "tokenize chat": tokens.TokenizeChat,
        "detokenize": tokens.Detokenize,
    }
    return {name: sorted(model.model_fields) for name, model in requests.items()}


def server_metrics() -> list[str]:
    import torch

    from turnout.inference.core.gauge import Histogram
    from turnout.inference.server.metrics import Metrics
    from turnout.inference.stats import EngineStats
    from turnout.moe.routing.stats import RoutingStats

    zeros = dict.fromkeys((f.name for f in dataclasses.fields(EngineStats)), 0)
    routing = RoutingStats((), 0, torch.device("cpu")).snapshot()
    stats = EngineStats(**{**zeros, "routing": routing, "step_tokens": Histogram(())})
    return sorted(family.name for family in Metrics(lambda: stats).registry.collect())


def exit_codes() -> dict[str, int]:
    return {kind.__name__: code for kind, code in main.EXIT_CODES} | {"preempted": main.PREEMPTED}


SURFACES = {
    "public imports": public_imports,
    "config keys": config_keys,
    "verbs": lambda: list(main.VERBS),
    "options": options,
    "http fields": http_fields,
    "server metrics": server_metrics,
    "exit codes": exit_codes,
}


@pytest.mark.parametrize("surface", SURFACES)
def test_a_surface_is_as_it_was_promised(root, surface):
    promised = json.loads((root / "tests" / "arch" / "surfaces.json").read_text(encoding="utf-8"))
    assert promised.keys() == SURFACES.keys()
    assert SURFACES[surface]() == promised[surface]


def test_every_promised_import_works():
    for package, names in public_imports().items():
        module = importlib.import_module(package)
        missing = [name for name in names if not hasattr(module, name)]
        assert not missing, missing


def test_every_verb_writes_json_where_asked():
    assert set(OPTIONS) | {"train"} == set(main.VERBS)
    assert all(issubclass(cls, Options) for cls in OPTIONS.values())
