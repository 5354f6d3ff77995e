"""The digest of the code changes with the code, and with nothing else."""

from turnout.configs.source import OWN, PACKAGE, source_digest


def tree(root, text="x = 1\n"):
    (root / "moe" / "deep").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "moe" / "deep" / "a.py").write_text(text)
    (root / "__init__.py").write_text("")
    (root / "tests" / "test_a.py").write_text("")
    return root


def test_the_digest_is_of_the_sources_that_run(tmp_path):
    one, same, other = (tree(tmp_path / name) for name in ("one", "same", "other"))
    assert source_digest(one) == source_digest(same)
    (same / "tests" / "test_b.py").write_text("y = 2\n")
    (same / "notes.md").write_text("notes")
    source_digest.cache_clear()
    assert source_digest(one) == source_digest(same)
    (other / "moe" / "deep" / "a.py").write_text("x = 2\n")
    (same / "moe" / "deep" / "a.py").rename(same / "moe" / "a.py")
    source_digest.cache_clear()
    assert len({source_digest(one), source_digest(same), source_digest(other)}) == 3


def test_every_folder_of_the_package_is_in_it():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(OWN)
