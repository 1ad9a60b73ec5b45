"""nnU-Net's preprocessed cases, read without running what is in their files.

nnU-Net's own readers unpickle a case's properties, and a pickle can run any function. These read nothing but numbers,
texts, plain containers and arrays of numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunet_mim.errors import MiMError, printable
from nnunet_mim.system.untrusted import limited

Case = tuple[Any, Any, None, dict[str, Any]]
"""voxels (C, X, Y, Z), segmentation (1, X, Y, Z), no segmentation of a previous stage, properties"""
MAX_BYTES = 256 * 2**20
"""of a case's properties; the places of 100 classes take 32 MB"""
MAX_OPCODES = 200_000
"""steps of a pickle, a few for every value and every array; 100 classes take 3,000"""


class Blosc2Cases(nnUNetDatasetBlosc2):
    """Reads a folder of `.b2nd` files as nnU-Net's class does."""

    def load_case(self, identifier: str) -> Case:
        """Open a case. Raises MiMError for properties that hold more than plain values, and whatever blosc2 raises."""
        base = f"{self.source_folder}/{identifier}"
        options = {"mode": "r", "dparams": {"nthreads": 1}, **self.mmap_kwargs}
        data, seg = (blosc2.open(f"{base}{end}.b2nd", **options) for end in ("", "_seg"))
        return data, seg, None, read_properties(Path(f"{base}.pkl"))


class NumpyCases(nnUNetDatasetNumpy):
    """Reads a folder of `.npz` files, unpacked or not, as nnU-Net's class does."""

    def load_case(self, identifier: str) -> Case:
        """Open a case. Raises MiMError for properties that hold more than plain values, and whatever NumPy raises."""
        base = f"{self.source_folder}/{identifier}"
        parts = []
        for part, end in (("data", ""), ("seg", "_seg")):
            if Path(f"{base}{end}.npy").is_file():
                parts.append(np.load(f"{base}{end}.npy", mmap_mode="r", allow_pickle=False))
            else:
                with np.load(f"{base}.npz", allow_pickle=False) as archive:
                    parts.append(archive[part])
        return parts[0], parts[1], None, read_properties(Path(f"{base}.pkl"))


def dataset_class_of(folder: Path) -> type[Blosc2Cases] | type[NumpyCases]:
    """The reader of a folder of preprocessed cases. Raises what nnU-Net's `infer_dataset_class` does."""
    return Blosc2Cases if infer_dataset_class(str(folder)) is nnUNetDatasetBlosc2 else NumpyCases


def read_properties(path: Path) -> dict[str, Any]:
    """The properties of a preprocessed case, the `.pkl` beside its voxels; nothing in it is run.

    Raises:
        MiMError: it cannot be read, is too large, or holds more than numbers, texts, containers and arrays of them.
    """
    try:
        content = limited(path, MAX_BYTES)
        if next(islice(pickletools.genops(content), MAX_OPCODES, None), None):
            raise ValueError("it holds more values than properties of a case have")
        properties = _PlainUnpickler(io.BytesIO(content)).load()
    except MiMError as error:
        raise MiMError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {printable(error)}"
        raise MiMError(f"cannot read {path} ({reason}): preprocess the case again") from error
    if not isinstance(properties, dict):
        raise MiMError(f"{path} holds no properties of a case: preprocess the case again")
    return properties


def _dtype(name: Any, *_: Any) -> np.dtype:
    """NumPy's dtype, of numbers and texts only: arrays of objects hold pickles of their own."""
    if not isinstance(name, str) or not re.fullmatch(r"[<>=|]?[biufUS]\d{0,4}", name):
        raise MiMError(f"it holds an array of {printable(name)}, and only numbers are allowed; nothing was run")
    return np.dtype(name, False, True)  # type: ignore[call-overload]  # a copy, which the pickle may turn


def _empty_array(*_: Any) -> np.ndarray:
    """What NumPy fills with the content of an array afterwards, whatever size is asked for."""
    return np.ndarray((0,), np.int8)


def _scalar(dtype: np.dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype, 1)[0]


def _from_buffer(content: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(content, dtype).reshape(shape, order=order)


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _empty_array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
"""what the name of a pickle stands for, in place of NumPy's own functions"""


class _PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler, in Python: the one in C takes memory for any number that a pickle names."""

    def load_bytearray8(self) -> None:
        """Read a bytearray of as many bytes as there are, which may be fewer than are claimed."""
        content = self.read(int.from_bytes(self.read(8), "little"))  # type: ignore[attr-defined]
        self.append(bytearray(content))  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for. Raises MiMError for any other than those of NumPy's arrays."""
        if (module, name) not in ALLOWED:
            raise MiMError(
                f"reading it would run {printable(f'{module}.{name}')}, and only plain values and arrays of numbers "
                "are allowed; nothing was run. Preprocess the case again"
            )
        return ALLOWED[module, name]
