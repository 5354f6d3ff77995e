"""The house's floors: imports run only downwards, without cycles, and the light modules load no torch."""

import ast
import graphlib
import subprocess
import sys

FLOORS = {"": 0, "configs": 0, "kernels": 1, "parallel": 2, "moe": 3, "inference": 4, "launch": 5, "__main__": 6}


def test_imports_run_only_downwards(sources, known):
    up = []
    for source in sources:
        for target in source.imports(known):
            if FLOORS[target.partition(".")[0]] > FLOORS[source.folder]:
                up.append(f"{source.path} imports {target}")
    assert not up, up


def test_no_modules_import_each_other_in_a_circle(sources, known):
    graph = {source.name: source.imports(known) - {source.name, ""} for source in sources}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError naming the circle


def test_imports_inside_the_package_are_relative(sources):
    ours = set(FLOORS) - {"", "__main__"} | {"turnout"}
    wrong = [
        f"{source.path} imports {name}"
        for source in sources
        for name in source.absolute_imports()
        if name.partition(".")[0] in ours
    ]
    assert not wrong, wrong


def test_light_modules_load_no_torch(known):
    light = [
        name
        for name in known
        if name.startswith(("configs", "inference.core", "launch"))
        or name.rpartition(".")[2] in ("config", "plan")
        or name in ("", "kernels", "parallel", "moe", "inference", "inference.server.protocol")
    ]
    heavy_by_nature = {name for name in light if name.startswith("launch.") and name.count(".") > 1}
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"turnout.{name}".rstrip("."))
    assert "torch" not in sys.modules, f"importing turnout.{name} loads torch"
"""
    names = sorted(set(light) - heavy_by_nature)
    assert {"inference.core.scheduler", "moe.config", "launch.main", "configs.typed"} <= set(names)
    result = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_model_and_the_kernels_never_talk_to_other_processes(sources):
    wrong = [
        f"{source.path}:{line} {name}"
        for source in sources
        if source.folder in ("moe", "kernels")
        for line, name in [*source.dotted_names(), *((0, name) for name in source.absolute_imports())]
        if name.startswith("torch.distributed")
    ]
    assert not wrong, wrong


def test_serving_defines_no_layer(sources):
    layers = [
        f"{source.path}: {node.name}"
        for source in sources
        if source.folder == "inference"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases)
    ]
    assert not layers, layers
