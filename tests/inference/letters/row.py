"""A lettered line of the serving rules, the tests that prove it, and the mistake that one of them must find."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake: in `file` (from the repository's root) `old`, which is there exactly once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Row:
    """A letter and its proof.

    Args:
        letter: its name; a letter may have several rows.
        tests: `path::name` from the repository's root, with the letter in each name; the mutant turns the first red.
        mutant: the mistake.
    """

    letter: str
    tests: tuple[str, ...]
    mutant: Mutant
