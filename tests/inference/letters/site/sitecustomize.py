"""The import hook that makes a mistake: with `TURNOUT_MUTANT` ({"file", "old", "new"} as JSON) in the environment, the
module of that file is compiled from the changed text. Every Python process with this folder on its path has it, so a
test's own processes make the mistake too; the package knows nothing of it."""

import importlib.machinery
import importlib.util
import json
import os
import sys


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name, path, old, new):
        super().__init__(name, path)
        self._change = old, new

    def get_code(self, fullname):
        text = self.get_data(self.path).decode()
        assert text.count(self._change[0]) == 1, f"the text to change is not there once: {self.path}"
        return compile(text.replace(*self._change), self.path, "exec")


class _Finder:
    """Finds one module as everybody does, and gives it the loader that changes its text."""

    def __init__(self, module, old, new):
        self._module = module
        self._change = old, new
        self._searching = False

    def find_spec(self, name, path=None, target=None):
        if name != self._module or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None:
            spec.loader = _Loader(name, spec.origin, *self._change)
        return spec


def install():
    mutant = json.loads(os.environ["TURNOUT_MUTANT"])
    module = "turnout." + mutant["file"].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert module not in sys.modules, f"{module} was imported before its mistake"
    sys.meta_path.insert(0, _Finder(module, mutant["old"], mutant["new"]))


if "TURNOUT_MUTANT" in os.environ:
    install()
