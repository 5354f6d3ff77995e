"""Writes the list of files in architecture.md from the first sentence of every module's docstring: `make docs`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("launch", "inference", "moe", "parallel", "kernels", "configs")
BEGIN, END = "<!-- files:begin (make docs) -->\n", "<!-- files:end -->\n"


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    words = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", words)[0]


def file_list() -> str:
    """One list a folder, with a sentence a file; an `__init__.py` counts only when it holds code."""
    lines = []
    for folder in FOLDERS:
        lines.append(f"\n### {folder}/\n")
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda p: (len(p.parts), p)):
            if path.name != "__init__.py":
                lines.append(f"- `{path.relative_to(ROOT).as_posix()}` – {sentence(path)}")
    return "\n".join(lines) + "\n\n"


def page() -> str:
    """The whole page with its list brought up to date."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + file_list() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
