"""The packages listed in pyproject.toml are the tree: a new folder can not be left out of the wheel."""

import tomllib

import pytest


@pytest.fixture(scope="module")
def setuptools(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_of_code_is_a_listed_package(setuptools, sources):
    folders = {source.path.rpartition("/")[0] for source in sources}
    assert sorted(setuptools["packages"]) == sorted(".".join(["turnout", *filter(None, f.split("/"))]) for f in folders)


def test_every_package_has_an_init(setuptools, root):
    missing = [p for p in setuptools["packages"] if not (root.joinpath(*p.split(".")[1:]) / "__init__.py").exists()]
    assert not missing, missing


def test_every_data_file_is_packaged(setuptools, root):
    covered = set()
    for package, globs in setuptools["package-data"].items():
        folder = root.joinpath(*package.split(".")[1:])
        matched = {path for pattern in globs for path in folder.glob(pattern)}
        assert matched, f"nothing matches {package} {globs}"
        covered |= matched
    folders = {p.split(".")[1] for p in setuptools["packages"] if "." in p}
    data = {p for f in folders for p in (root / f).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data - covered == set()
