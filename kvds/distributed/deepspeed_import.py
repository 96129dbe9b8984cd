"""DeepSpeed's import without MLflow, which its autotuner brings into every process, launchers and ranks that write no
records included. It is the half of what ``import deepspeed`` takes beside torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AUTOTUNER, _MLFLOW = "deepspeed.autotuning.autotuner", "mlflow"


class _Deferred(ModuleType):
    """A module that is imported when the first of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class _AutotunerLoader(SourceFileLoader):
    """The autotuner's own loader; while its file runs, ``import mlflow`` gives what is imported later."""

    def exec_module(self, module: ModuleType) -> None:
        if _MLFLOW in sys.modules or find_spec(_MLFLOW) is None:
            return super().exec_module(module)
        deferred = sys.modules[_MLFLOW] = _Deferred(_MLFLOW)
        try:
            super().exec_module(module)
        finally:  # whoever else imports MLflow gets the whole of it
            if sys.modules.get(_MLFLOW) is deferred:
                del sys.modules[_MLFLOW]


class _AutotunerFinder(MetaPathFinder):
    """Finds the autotuner, and leaves every other module to the finders after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTOTUNER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _AutotunerLoader(spec.loader.name, spec.loader.path)
        return spec


def defer_mlflow() -> None:
    """Let the import of DeepSpeed, where it is still to come, leave MLflow to whoever writes records."""
    if not any(isinstance(finder, _AutotunerFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutotunerFinder())
