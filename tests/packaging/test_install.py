"""What a user installs works: a wheel and an editable install, each in a fresh environment away from the tree."""

import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "wandb", "outputs")


def run(*command: object, cwd: Path) -> str:
    """The output of a command that must succeed."""
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(python: Path, *arguments: object, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--python", python, *arguments, "--no-deps", "--no-build-isolation", cwd=cwd)


def fresh_environment(folder: Path) -> Path:
    """A new virtual environment that finds our dependencies, but not our own installation. Returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    Path(packages, "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, so that builds leave nothing behind in ours."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "project", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    pip(Path(sys.executable), "wheel", "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("turnout-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    python = fresh_environment(folder / "env")
    pip(python, "install", wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("editable")
    python = fresh_environment(folder / "env")
    pip(python, "install", "--editable", source, cwd=folder)
    return python


def test_the_wheel_holds_every_source_and_data_file_and_no_tests(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("turnout/")}
    folders = ("configs", "kernels", "parallel", "moe", "inference", "launch")
    files = [*ROOT.glob("*.py"), *(p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file())]
    assert names == {f"turnout/{p.relative_to(ROOT)}" for p in files if "__pycache__" not in p.parts}


def test_the_wheel_carries_its_licences(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith("dist-info/licenses/moe/data/pydocs/LICENSE") for name in names)


@pytest.mark.parametrize("form", ["installed", "editable"])
def test_both_ways_to_start_it_work_from_anywhere(form, source, request, tmp_path):
    python = request.getfixturevalue(form)
    where = Path(run(python, "-c", "import turnout; print(turnout.__file__)", cwd=tmp_path).strip())
    assert where.is_relative_to(source if form == "editable" else python.parents[1])
    help_text = run(python.parent / "turnout", "--help", cwd=tmp_path)
    assert "turnout train" in help_text
    assert run(python, "-m", "turnout", "--help", cwd=tmp_path) == help_text


@pytest.mark.parametrize("form", ["installed", "editable"])
def test_configurations_and_text_travel_with_the_package(form, request, tmp_path):
    code = """
from turnout.launch.compose import compose
from turnout.moe.data.corpus import read_documents
assert compose(["experiment=switch_pydocs", "nproc=2"]).world == 2
assert len(read_documents("pydocs", "validation")) > 10
"""
    run(request.getfixturevalue(form), "-c", code, cwd=tmp_path)


def test_a_command_line_with_a_bad_setting_exits_with_2_from_the_wheel(installed, tmp_path):
    command = [installed.parent / "turnout", "train", "experiment=switch_pydocs", "moe.num_expert=8"]
    result = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "did you mean moe.num_experts?" in result.stderr
