"""The source tree as the architecture tests read it: every module, parsed once."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "kernels", "parallel", "moe", "inference", "launch")


@dataclass(frozen=True)
class Source:
    """One file: `name` is its dotted module name below the package ("" is the root), `path` is relative to the root."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.name.partition(".")[0]

    def runtime_nodes(self) -> Iterator[ast.AST]:
        """Every node except those that only a type checker sees (`if TYPE_CHECKING:`)."""
        stack: list[ast.AST] = [self.tree]
        while stack:
            node = stack.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                stack.extend(node.orelse)
                continue
            yield node
            stack.extend(ast.iter_child_nodes(node))

    def imports(self, known: frozenset[str]) -> set[str]:
        """The modules of the package that this one imports, now or later; `known` are all module names."""
        package = self.name.split(".") if self.path.endswith("__init__.py") else self.name.split(".")[:-1]
        package = [part for part in package if part]
        found = set()
        for node in self.runtime_nodes():
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    target = ".".join([*base, alias.name])
                    found.add(target if target in known else ".".join(base))
        return found

    def absolute_imports(self) -> set[str]:
        """The dotted names of what it imports from outside the package."""
        found = set()
        for node in self.runtime_nodes():
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        return found

    def dotted_names(self) -> Iterator[tuple[int, str]]:
        """Line and text of every `a.b.c` and plain name in it."""
        for node in self.runtime_nodes():
            if isinstance(node, ast.Attribute | ast.Name):
                yield node.lineno, ast.unparse(node)


@functools.cache
def read_sources() -> tuple[Source, ...]:
    paths = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]
    sources = []
    for path in sorted(paths):
        relative = path.relative_to(ROOT)
        parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
        text = path.read_text(encoding="utf-8")
        sources.append(Source(".".join(parts), relative.as_posix(), text, ast.parse(text)))
    return tuple(sources)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    return read_sources()


@pytest.fixture(scope="session")
def known(sources: tuple[Source, ...]) -> frozenset[str]:
    return frozenset(source.name for source in sources)
