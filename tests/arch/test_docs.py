"""The documents describe the tree that is there."""

import importlib.util
import re

import pytest

from turnout.launch.main import VERBS

DOCS = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "architecture",
            "routing",
            "moe_layer",
            "adaptive",
            "training",
            "reliability",
            "serving",
            "api",
            "console",
            "engine",
            "planning",
            "families",
        )
    ),
)


def test_the_architecture_page_gives_every_source_file_its_sentence(root, sources):
    spec = importlib.util.spec_from_file_location("build_docs", root / "docs" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == build.page(), "the list of files is out of date: run `make docs`"
    described = dict(re.findall(r"^- `([\w./]+\.py)` – (.+)$", page, re.MULTILINE))
    assert {s.path for s in sources if s.folder and not s.path.endswith("__init__.py")} - {"__main__.py"} == set(
        described
    )
    assert all(len(sentence.split()) >= 2 for sentence in described.values()), described


def test_every_file_that_a_page_names_exists(root):
    for page in DOCS:
        for path in re.findall(r"`([\w/]+\.py)`", (root / page).read_text(encoding="utf-8")):
            assert (root / path).exists(), f"{page} names {path}"


def test_the_readme_is_short(root):
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", DOCS)
def test_links_and_commands_of_a_page_exist(root, page):
    text = (root / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((root / page).parent / target).exists(), f"{page} links to {target}"
    for verb in re.findall(r"^(?:\$ )?turnout (\w+)", text, re.MULTILINE):
        assert verb in VERBS, f"{page} shows turnout {verb}"
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} shows make {target}"


@pytest.mark.parametrize("page", DOCS)
def test_the_settings_that_a_page_shows_for_training_compose(root, page):
    from turnout.launch.compose import compose

    text = (root / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:turnout train|torchrun .*-m turnout\.launch\.train) (.*)$", text, re.MULTILINE):
        words = [word for word in line.split("#")[0].split() if word != "-m"]
        settings = [word for word in words if "," not in word]
        assert compose(settings, world=8 if "parallel.ep=8" in settings else 2).config
