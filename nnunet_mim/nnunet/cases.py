"""nnU-Net's preprocessed cases, read without running what is in their files.

nnU-Net's own readers unpickle a case's properties, and a pickle can run any function. These read nothing but numbers,
texts, plain containers and arrays of numbers.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
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
FRAME_HEAD = 9
"""bytes of the step that says how many bytes follow; the unpickler in Python takes fewer, nnU-Net's does not"""


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
        for number, (operation, argument, place) in enumerate(pickletools.genops(content)):
            if number == MAX_OPCODES:
                raise ValueError("it holds more values than properties of a case have")
            if operation.name == "FRAME" and (place or 0) + FRAME_HEAD + int(argument or 0) > len(content):
                raise ValueError("it is cut short")
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


def _array(*_: Any) -> np.ndarray:
    """What NumPy's class of arrays stands for; a pickle names it, and does not call it."""
    raise ValueError("it calls for an array without content")


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """An empty array, which NumPy fills with its content afterwards."""
    if kind is not _array or shape != (0,) or dtype != b"b":
        raise ValueError("it calls for an array in another way than NumPy does")
    return np.ndarray((0,), np.int8)


def _scalar(dtype: np.dtype, content: bytes) -> Any:
    return np.frombuffer(content, _checked_dtype(dtype), 1)[0]


def _from_buffer(content: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(content, _checked_dtype(dtype)).reshape(shape, order=order)


def _checked_dtype(dtype: Any) -> np.dtype:
    if not isinstance(dtype, np.dtype):
        raise ValueError("it holds an array of no dtype")
    return dtype


def _check_state(value: Any, state: Any) -> None:
    """Raise ValueError unless a pickle gives a dtype or an array the state that NumPy itself would.

    NumPy believes the flags of a dtype, and with others takes numbers for addresses of objects.
    """
    if isinstance(value, np.dtype):
        if state != value.newbyteorder(state[1]).__reduce__()[2]:
            raise ValueError("it describes numbers in another way than NumPy does")
    elif type(value) is np.ndarray:
        _, shape, dtype, _, content = state
        size = _checked_dtype(dtype).itemsize * math.prod(shape)
        if any(type(n) is not int or n < 0 for n in shape) or type(content) is not bytes or len(content) != size:
            raise ValueError("it holds an array of another size than its content")
    else:
        raise ValueError(f"it changes a {type(value).__name__}")


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
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

    def load_build(self) -> None:
        """Give the value below the last one the last one as its state. Raises ValueError as `_check_state`."""
        value, state = self.stack[-2:]  # type: ignore[attr-defined]
        _check_state(value, state)
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8, pickle.BUILD[0]: load_build,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for. Raises MiMError for any other than those of NumPy's arrays."""
        if (module, name) not in ALLOWED:
            raise MiMError(
                f"reading it would run {printable(f'{module}.{name}')}, and only plain values and arrays of numbers "
                "are allowed; nothing was run. Preprocess the case again"
            )
        return ALLOWED[module, name]
