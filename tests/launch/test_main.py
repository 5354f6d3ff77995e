"""`turnout` answers help and mistakes in a blink (no torch), and every error has its exit code."""

import subprocess
import sys

import pytest

from turnout import CheckpointError, ConfigError, DataError, NonFiniteError, PeerError, RequestError
from turnout.launch import main as cli

VERBS = list(cli.VERBS)


def without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter and let it end with an assertion that torch was never imported."""
    check = "\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    return subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, timeout=60)


def test_importing_turnout_loads_no_torch():
    result = without_torch("import turnout; turnout.ConfigError; turnout.__version__")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_shows_an_example_and_loads_no_torch(words):
    result = without_torch(f"from turnout.launch.main import main; assert main({words!r}) == 0")
    assert result.returncode == 0, result.stderr
    assert "example" in result.stdout.lower()
    assert f"turnout {words[0].replace('--help', 'train')} " in result.stdout


def test_help_lists_every_verb_with_what_it_does(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        line = next(line for line in text.splitlines() if line.strip().startswith(verb + " "))
        assert len(line.split()) > 3, line


def test_an_unknown_verb_is_answered_with_the_nearest_one(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean `turnout train`?" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("turnout 0.")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (RequestError("x", "n"), 2),
        (DataError("x"), 3),
        (NonFiniteError("x"), 4),
        (PeerError("x"), 5),
        (CheckpointError("x"), 6),
        (FileNotFoundError("x"), 6),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_and_its_exit_code(error, code, capsys):
    def verb(args: list[str]) -> int:
        raise error

    assert cli.run(verb, []) == code
    assert capsys.readouterr().err.count("\n") == (0 if code == 130 else 1)


def test_a_defect_of_ours_keeps_its_traceback():
    def verb(args: list[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(verb, [])
