"""`turnout VERB ...`: find the verb's module, run it, turn an error into one line and an exit code.

A verb is a module of this folder with `SUMMARY`, `HELP` and `main(args) -> exit code`. Modules are imported only when
asked for and import no torch at their top, so that help and a bad configuration are answered in a blink.
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from .. import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    PeerError,
    RequestError,
    __version__,
)

VERBS = ("quickstart", "plan", "train", "generate", "serve", "evaluate", "convert", "compress", "bench", "doctor")

PREEMPTED = 143
LOST = 5  # a peer
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2),
    (RequestError, 2),
    (DataError, 3),
    (NonFiniteError, 4),
    (PeerError, LOST),
    (CheckpointError, 6),
    (OSError, 6),
)

HELP = """\
Turnout trains and serves sparse Mixture-of-Experts transformers.

usage: turnout VERB [words ...] [key=value ...]

{verbs}

example: turnout train experiment=switch_pydocs nproc=2
`turnout VERB --help` shows what a verb takes. Settings are written key=value.
"""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(args: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<12}{_module(verb).SUMMARY}" for verb in VERBS)), end="")
        return 0
    if args[0] == "--version":
        print(f"turnout {__version__}")
        return 0
    verb, rest = args[0], list(args[1:])
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"did you mean `turnout {close[0]}`?" if close else "use one of " + ", ".join(VERBS)
        return _report(ConfigError(f"turnout {verb!r} is not a verb: {fix}"))
    module = _module(verb)
    if "-h" in rest or "--help" in rest:
        print(module.HELP.strip())
        return 0
    return run(module.main, rest)


def run(verb: Callable[[list[str]], int], args: list[str]) -> int:
    """`verb(args)`, with the errors a user can meet turned into one line on stderr and their exit code.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        return verb(args)
    except tuple(kind for kind, _ in EXIT_CODES) as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130


def exit_code(error: BaseException) -> int:
    """The exit code of an error: 2 configuration, 3 data, 4 non-finite, 5 peer lost, 6 storage, 1 a defect."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


def _report(error: Exception) -> int:
    print(f"turnout: {error}", file=sys.stderr)
    return exit_code(error)


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f".{verb}", __package__)
