"""One idea a file, one thought a function."""

import ast

FILE_LINES = 400
FUNCTION_LINES = 60
JIT_LINES = 120

# path::function or path → why it may be longer.
LONGER: dict[str, str] = {}


def _own_files(sources, root):
    tests = [(p.relative_to(root).as_posix(), p.read_text(encoding="utf-8")) for p in (root / "tests").rglob("*.py")]
    return [(source.path, source.text) for source in sources] + tests


def test_files_are_short(sources, root):
    long = [
        f"{path}: {len(text.splitlines())} lines"
        for path, text in _own_files(sources, root)
        if len(text.splitlines()) > FILE_LINES and path not in LONGER
    ]
    assert not long, long


def test_functions_are_short(sources, root):
    long = []
    for path, text in _own_files(sources, root):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                lines = node.end_lineno - node.lineno + 1
                if lines > (JIT_LINES if jit else FUNCTION_LINES) and f"{path}::{node.name}" not in LONGER:
                    long.append(f"{path}::{node.name}: {lines} lines")
    assert not long, long


def test_every_exception_is_still_needed_and_has_a_reason(root):
    for place, reason in LONGER.items():
        assert (root / place.partition("::")[0]).exists(), place
        assert len(reason.split()) > 3, place
