"""Which classes and functions plans and dataset.json may name: those of their kind in the installed nnU-Net.

nnU-Net takes any attribute of its modules that has the name. Its own modules are searched here, and what users have
added to them too. Nothing that a file names is imported.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from nnunet_mim.errors import MiMError, printable

PLACES = {
    "image reader": ("nnunetv2.imageio", "base_reader_writer.BaseReaderWriter"),
    "preprocessor": ("nnunetv2.preprocessing.preprocessors", "default_preprocessor.DefaultPreprocessor"),
    "normalization": ("nnunetv2.preprocessing.normalization", "default_normalization_schemes.ImageNormalization"),
    "label manager": ("nnunetv2.utilities.label_handling", "label_handling.LabelManager"),
    "resampling": ("nnunetv2.preprocessing.resampling", ""),
}
"""by kind: nnU-Net's package, and the class in it that all of the kind come from; functions have none"""
RESAMPLING_ARGUMENTS = {"new_shape", "current_spacing", "new_spacing"}


@cache
def known(kind: str) -> frozenset[str]:
    """Names of everything of a kind of PLACES."""
    package, base_name = PLACES[kind]
    modules = list(_modules(package))
    if not base_name:
        return frozenset(name for module in modules for name in _resampling_functions(module))
    module_name, _, class_name = base_name.rpartition(".")
    base = getattr(import_module(f"{package}.{module_name}"), class_name)
    return frozenset(
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and not inspect.isabstract(value)
    )


def _modules(package: str) -> Iterator[ModuleType]:
    """A package of nnU-Net's and all modules in it, but those that need what is not installed."""
    top = import_module(package)
    yield top
    for info in pkgutil.walk_packages(top.__path__, f"{package}."):
        try:
            yield import_module(info.name)
        except ImportError:
            continue


def _resampling_functions(module: ModuleType) -> Iterator[str]:
    for name, value in inspect.getmembers(module, inspect.isfunction):
        if inspect.signature(value).parameters.keys() >= RESAMPLING_ARGUMENTS:
            yield name


def check_name(where: str, kind: str, name: Any, remedy: str) -> None:
    """Raise MiMError unless `name`, which stands at `where` (a file and a field), is of a kind of PLACES."""
    if name not in known(kind):
        names = ", ".join(sorted(known(kind)))
        raise MiMError(f"{where}: nnU-Net has no {kind} {printable(str(name), 60)} ({names}): {remedy}")


def check_names(path: str, plans: Mapping[str, Any], remedy: str) -> None:
    """Raise MiMError where plans, whose file is `path`, name what is not of its kind in nnU-Net."""
    for field, kind in (("image_reader_writer", "image reader"), ("label_manager", "label manager")):
        if plans.get(field) is not None:
            check_name(f"{path}: {field}", kind, plans[field], remedy)
    for title, configuration in plans["configurations"].items():
        place = f"{path}: configurations.{printable(title)}"
        if "preprocessor_name" in configuration:
            check_name(f"{place}.preprocessor_name", "preprocessor", configuration["preprocessor_name"], remedy)
        for scheme in configuration.get("normalization_schemes", ()):
            check_name(f"{place}.normalization_schemes", "normalization", scheme, remedy)
        for field in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
            if field in configuration:
                check_name(f"{place}.{field}", "resampling", configuration[field], remedy)
