"""What no file may contain: ways to run planted bytes, hidden configuration, noise, unfinished work."""

import ast
import re

# Our own variables are configuration: at most five. The others are what torchrun and the system hand to a process.
OUR_VARIABLES: set[str] = set()
GIVEN_VARIABLES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT", "TRITON_INTERPRET", "WANDB_API_KEY", "WANDB_MODE",
}  # fmt: skip

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    "eval", "exec", "torch.load", "torch.save", "hydra.utils.instantiate", "instantiate",
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
}  # fmt: skip
UNSAFE_ARGUMENTS = {"trust_remote_code", "allow_pickle"}


def _calls(source):
    for node in source.runtime_nodes():
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_nothing_can_run_code_from_a_file(sources):
    wrong = []
    for source in sources:
        wrong += [f"{source.path}: import {m}" for m in source.absolute_imports() if m.split(".")[0] in UNSAFE_MODULES]
        for node, name in _calls(source):
            if name in UNSAFE_CALLS or (name.rpartition(".")[2] in UNSAFE_CALLS and "dist" in name):
                wrong.append(f"{source.path}:{node.lineno} {name}")
            arguments = [keyword for keyword in node.keywords if keyword.arg in UNSAFE_ARGUMENTS]
            if any(ast.unparse(keyword.value) != "False" for keyword in arguments):
                wrong.append(f"{source.path}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, wrong


def test_only_programs_print(sources):
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in sources
        if source.folder not in ("launch", "__main__")
        for node, name in _calls(source)
        if name == "print"
    ]
    assert not wrong, wrong


def test_no_function_writes_global_variables(sources):
    wrong = [f"{s.path}:{n.lineno}" for s in sources for n in ast.walk(s.tree) if isinstance(n, ast.Global)]
    assert not wrong, wrong


def test_no_configuration_is_probed(sources):
    wrong = [
        f"{source.path}:{node.lineno} {ast.unparse(node)}"
        for source in sources
        for node, name in _calls(source)
        if name == "getattr" and len(node.args) == 3 and re.search(r"(cfg|config)$", ast.unparse(node.args[0]))
    ]
    assert not wrong, wrong


def test_environment_variables_are_few_and_listed(sources):
    read = {}
    pattern = re.compile(r"""(?:environ(?:\.\w+\(|\[)|getenv\()['"](\w+)|['"](\w+)['"] (?:not )?in os\.environ""")
    for source in sources:
        read |= {match[1] or match[2]: source.path for match in pattern.finditer(source.text)}
    unlisted = {name: path for name, path in read.items() if name not in OUR_VARIABLES | GIVEN_VARIABLES}
    assert not unlisted, unlisted
    assert len(OUR_VARIABLES) <= 5
    assert set(read) >= OUR_VARIABLES


def test_nothing_is_left_unfinished(sources, root):
    abstract = {"moe/routing/router.py"}
    pattern = re.compile(r"TODO|FIXME|XXX|NotImplementedError|pytest\.(mark\.)?(skip|xfail)\b(?!if)")
    tests = [(p.relative_to(root).as_posix(), p.read_text(encoding="utf-8")) for p in (root / "tests").rglob("*.py")]
    wrong = [
        f"{path}: {match[0]}"
        for path, text in [*((s.path, s.text) for s in sources), *tests]
        if not path.startswith("tests/arch/") and path not in abstract
        for match in pattern.finditer(text)
    ]
    assert not wrong, wrong
