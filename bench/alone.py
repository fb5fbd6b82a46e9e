"""A module of a package without the package: for a peer's Triton file, which needs none of its compiled extensions.

Every package on the way is an empty one that only finds its modules, so their `__init__.py` do not run: they would load
the extensions, or change other libraries' settings for all the contenders. What else the file imports and the kernels
do not need can be given stand-ins.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

StandIns = Mapping[str, Mapping[str, Any]]  # module: its names


class Empty:
    """Finds the packages of that name, and in it, as empty ones."""

    def __init__(self, top: str) -> None:
        self.top = top

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.split(".")[0] != self.top:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.submodule_search_locations is not None:
            folders = list(spec.submodule_search_locations)
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = folders
        return spec


def import_alone(name: str, stand_ins: StandIns | None = None) -> ModuleType:
    """The module, which `sys.modules` does not know afterwards: whoever imports the package gets the real one."""
    finder = Empty(name.split(".")[0])
    tops = {finder.top, *(other.split(".")[0] for other in stand_ins or {})}

    def taken() -> dict[str, ModuleType]:
        return {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] in tops}

    before = taken()
    for other, names in (stand_ins or {}).items():
        parts = other.split(".")
        if parts[0] != finder.top:
            for i in range(1, len(parts)):
                package = sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
                package.__path__ = []
        sys.modules[other] = ModuleType(other)
        vars(sys.modules[other]).update(names)
    sys.meta_path.insert(0, finder)
    try:
        return import_module(name)
    finally:
        sys.meta_path.remove(finder)
        taken()
        sys.modules.update(before)
