"""The C++ kernels are compiled once, by one process, for this CPU; without a compiler the slow forms run."""

import logging
import multiprocessing

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry
from turnout.kernels.cpp import build

COMPILER = """#!/bin/sh
[ "$1" = --version ] && {{ echo fake 1; exit; }}
case " $* " in *" -shared "*) echo run >> {log}; sleep 0.2;; esac
while [ "$1" != -o ]; do shift; done
{action}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compiler that notes what it links, and a cache of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    build._folder.cache_clear()
    folder, log = tmp_path / "bin", tmp_path / "runs"
    folder.mkdir()

    def make(action):
        (folder / "g++").write_text(COMPILER.format(log=log, action=action))
        (folder / "g++").chmod(0o755)
        return lambda: log.read_text().count("run") if log.exists() else 0

    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    yield make
    build._folder.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    build.library.cache_clear()
    yield
    build.library.cache_clear()


REAL = f"cp {torch.__path__[0]}/lib/libc10.so $2"  # what a compiler may make: some library


def test_it_is_compiled_once_and_then_found(fake):
    runs = fake(REAL)
    build.load(())
    build.load(())
    assert runs() == 1
    build.load(("-mavx2",))
    assert runs() == 2, "other flags are another library"
    names = [path.name for path in build._folder().iterdir()]
    assert len([name for name in names if name.endswith(".so")]) == 2
    assert len(names) == 3, "nothing half-made is left"


def _load() -> None:
    build._folder.cache_clear()
    build.load(())


def test_processes_that_come_together_compile_once(fake):
    runs = fake(REAL)
    processes = [multiprocessing.get_context("fork").Process(target=_load) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert runs() == 1


def test_a_compiler_that_fails_says_why_and_leaves_nothing(fake):
    fake("echo 'no such instruction' >&2; exit 1")
    with pytest.raises(build.UnbuiltError, match="no such instruction"):
        build.load(())
    assert [path.name for path in build._folder().iterdir()] == ["lock"]


def test_a_cache_that_others_can_write_to_is_not_trusted(fake):
    folder = build._folder()
    assert folder.name == "kernels"
    folder.chmod(0o777)
    build._folder.cache_clear()
    assert build._folder().name.startswith("turnout-kernels-")


def test_without_a_compiler_the_rows_form_runs_and_one_warning_tells(no_compiler, caplog):
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    with caplog.at_level(logging.WARNING), kernels.using("invariant"):
        assert registry.choose("linear", x, w) == "rows"
        torch.testing.assert_close(kernels.linear(x, w), x @ w.mT)
    assert [record.message for record in caplog.records if "no compiler" in record.message][1:] == []
    assert "install one of g++" in caplog.text


@pytest.mark.parametrize(
    ("has", "flag"),
    [({"avx2", "fma", "f16c"}, "-mavx2"), (set(build.INSTRUCTIONS[0][0]) | {"sse"}, "-mavx512f"), ({"sse2"}, None)],
)
def test_the_flags_are_the_best_that_the_cpu_has(has, flag):
    flags = build.instructions(has)
    assert flags[:1] == ((flag,) if flag else ())


@pytest.mark.full
def test_every_cpu_with_fma_gives_the_same_bits_and_others_nearly(monkeypatch):
    if not build.INSTRUCTIONS[0][0] <= build._cpu():
        return
    x, w, k = torch.randn(37, 100), torch.randn(70, 100), torch.randn(37, 2, 24)
    found = []
    for _, flags in build.INSTRUCTIONS:
        library = build.load(flags)
        monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda library=library: library)
        with kernels.using("cpp"):
            attended = kernels.varlen_attention(k.repeat(1, 2, 1), k, k, torch.tensor([0, 30, 37]), scale=0.2)
            half, brain = (kernels.linear(x.to(t), w.to(t)).float() for t in (torch.float16, torch.bfloat16))
            found.append((kernels.linear(x, w), kernels.swiglu(x), attended, half, brain))
    for tiers in list(zip(*found, strict=True))[:-1]:
        best, wide, narrow, plain = tiers
        assert torch.equal(best, wide)
        assert torch.equal(wide, narrow)
        torch.testing.assert_close(plain, wide, rtol=1e-2, atol=1e-4)
    pairs, wide, narrow, plain = (brain for *_, brain in found)  # the best multiplies bfloat16 two by two
    assert torch.equal(wide, narrow)
    for brain in (pairs, plain):
        torch.testing.assert_close(brain, wide, rtol=1e-2, atol=1e-2)
