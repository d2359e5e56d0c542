"""A folder of components is its own registry: a new file in it is a new component, and nothing else changes.

Each file holds one component: the class defined there that has a nested `Config`. A file whose name starts with an
underscore is a helper. Names come from the file system, so listing them imports nothing.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from penstock.errors import InputError, nearest


class Registry:
    """The components in the package `package`, by file name."""

    def __init__(self, package: str):
        self.package = package

    def names(self) -> list[str]:
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        return sorted(file.stem for folder in folders for file in Path(folder).glob("[!_]*.py"))

    def get(self, name: str) -> Any:
        """The component class called `name`."""
        if name not in self.names():
            raise InputError(f"no {self.package} is called {name!r}{nearest(name, self.names())}")
        module = importlib.import_module(f"{self.package}.{name}")
        found = [
            item
            for item in vars(module).values()
            if isinstance(item, type) and item.__module__ == module.__name__ and "Config" in vars(item)
        ]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must define one class with a nested Config; it defines {found}")
        return found[0]
