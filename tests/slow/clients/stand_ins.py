"""Stand-ins for packages that other programs import at the top and that the drivers' jobs do not call."""

import importlib.machinery
import types
from typing import Any, cast


class Anything(types.ModuleType):
    """A stand-in for packages that the engine imports and these jobs do not call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return Anything("called")

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)


class Finder:
    """Finds every module below the packages that are stood in for."""

    packages = ("torchvision", "torchaudio", "av", "kornia", "spandrel")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, cast(Any, self), is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = Anything(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        return None
