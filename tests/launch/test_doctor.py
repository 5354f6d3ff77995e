"""`turnout doctor` says what is there, what is missing and what to do about it; its exit code is the sum of it."""

import json
import resource

import pytest
import torch

from turnout.kernels import registry
from turnout.launch import doctor
from turnout.launch.benches import cases as shapes

EPYC = "processor : 0\nmodel name : AMD EPYC\nflags : fpu avx2 fma f16c avx512f\nprocessor : 1\nmodel name : AMD EPYC\n"


@pytest.fixture
def _small(monkeypatch):
    for name, value in {
        "MOST": 1 << 20, "ROWS": (1, 3), "D": 64, "F": 32, "VOCABULARY": 96, "E": 4, "HIDDEN": 64, "H": 4, "G": 2,
        "HEAD": 32, "CONTEXTS": (20,), "PROMPTS": (7,), "K": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(shapes, name, value)


@pytest.mark.parametrize(
    ("finding", "verdict", "words"),
    [
        (doctor.processor(EPYC, 2), "ok", "AMD EPYC, 2 cores, avx2 fma f16c avx512f"),
        (doctor.processor("model name : old\nflags : sse2\n", 1), "slow", "no vector instructions"),
        (doctor.memory("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n"), "ok", "4.0 of 8.0 GiB free"),
        (doctor.memory("MemTotal: 8388608 kB\nMemAvailable: 1048576 kB\n"), "slow", "1.0 of 8.0 GiB free"),
        (doctor.huge_pages("always [madvise] never"), "ok", "madvise"),
        (doctor.huge_pages("always madvise [never]"), "slow", "never"),
        (doctor.huge_pages(""), "slow", "unknown"),
        (doctor.files(256), "slow", "256"),
        (doctor.files(20000), "ok", "20000"),
        (doctor.files(resource.RLIM_INFINITY), "ok", "any number"),
    ],
)
def test_each_thing_has_its_verdict_and_what_is_missing_its_fix(finding, verdict, words):
    assert finding.verdict == verdict
    assert words in finding.found
    assert bool(finding.fix) == (verdict != "ok")
    assert str(finding).startswith("  " if verdict == "ok" else "! ")


def test_shared_memory_that_is_not_there_is_said(tmp_path):
    assert doctor.shared_memory(tmp_path).verdict in ("ok", "slow")
    assert doctor.shared_memory(tmp_path / "none").verdict == "slow"


@pytest.mark.usefixtures("_small")
def test_a_machine_that_runs_these_tests_is_fit(tmp_path, capfd):
    assert doctor.main(["quick=true", f"json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fit"]
    said = {finding["what"]: finding["found"] for finding in found["findings"]}
    assert said["torch"] == torch.__version__ or said["torch"] in torch.__version__
    assert said["2 processes"].startswith("exchange 1 MiB over gloo in ")
    assert "speed" not in said
    assert set(found["operations"]) == set(registry.FORMS)
    assert all("reference" in one["run"] for one in found["operations"].values())
    assert all(set(one["unasked"].values()) <= set(one["run"]) for one in found["operations"].values())
    assert {"reference", "torch"} <= set(found["operations"]["linear"]["run"])
    out = capfd.readouterr().out.splitlines()
    assert out[-1] == "fit"
    assert any(line.split()[:1] == ["moe_mlp"] for line in out)


@pytest.mark.usefixtures("_small")
def test_what_is_needed_and_missing_makes_it_unfit(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "LIBRARIES", {"turnip-kernels": (True, "soup: pip install turnip-kernels")})
    monkeypatch.setattr(doctor, "computing", lambda quick: iter(()))
    assert doctor.main(["quick=true"]) == doctor.UNFIT == 2
    out = capsys.readouterr().out
    assert "not fit: turnip-kernels" in out
    assert "-> needed for soup: pip install turnip-kernels" in out


def test_without_a_compiler_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.compiler().verdict == "slow"
    assert "install one of g++" in doctor.compiler().fix
    assert "no compiler" in doctor.compiled().found


def test_the_rows_for_a_person_name_shapes_only_where_forms_differ():
    same = {"forms": ["torch"], "run": ["torch"], "unasked": {"1": "torch", "2": "torch"}}
    other = {**same, "unasked": {"1 row": "cpp", "2 rows": "torch"}}
    text = doctor.lines({"a": same, "b": other})
    assert text[-2].split() == ["a", "torch", "torch"]
    assert text[-1].endswith("cpp at 1 row; torch at 2 rows")
