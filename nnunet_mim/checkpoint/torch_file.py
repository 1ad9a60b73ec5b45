"""Reads files of `torch.save` without trust: nothing in them is run, and memory is taken only for what they hold."""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import threading
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nnunet_mim.errors import MiMError, printable
from nnunet_mim.system.untrusted import check_extent, leaves

ALLOWED = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor(_v2)?|parameter)|torch\.\w+Storage|torch\.\w+\d"
)
"""what a file of dense tensors in plain containers refers to"""
NAMESPACE = "argparse.Namespace"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
"""of weights, and of counters beside them"""
ALLOWING = threading.Lock()
"""held while PyTorch's list of what a file may refer to is longer than usual: all threads have the same list"""
MAX_PICKLE = 64 * 2**20
"""bytes of the part of a file that is not tensors"""


def read_torch_file(path: Path, namespaces: bool = False) -> Any:
    """The content of a file of `torch.save`: dense tensors of finite numbers in plain containers.

    Every byte's checksum is verified first, and what the file would run when it is loaded is looked for.

    Args:
        path: of the zip format that PyTorch writes since version 1.6.
        namespaces: allow `argparse.Namespace` as well; it is read as a SimpleNamespace.

    Raises:
        MiMError: damaged, of the older format, or holding anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = _checked_pickle(path, archive)
    except MiMError:
        raise
    except Exception as error:  # zipfile has many
        raise _unreadable(path, namespaces, error) from error
    _check_names(path, pickled, namespaces)
    allowed: list[Any] = [(SimpleNamespace, NAMESPACE)] if namespaces else []
    try:
        with ALLOWING, torch.serialization.safe_globals(allowed):
            # mapped, so that sizes which a tensor only claims to have take no memory
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise MiMError(
            f"{path} is no readable checkpoint: it is damaged, or needs more than PyTorch's safe loading does "
            f"({type(error).__name__}); take another copy or an earlier checkpoint"
        ) from error
    check_tensors(path, stored)
    storages = {s._cdata: s.nbytes() for _, t in leaves(stored) if isinstance(t, Tensor) for s in [t.untyped_storage()]}
    if sum(storages.values()) > path.stat().st_size:
        raise MiMError(f"{path} is refused: its tensors claim more bytes than the file holds; take another copy")
    return deepcopy(stored)


def _unreadable(path: Path, namespaces: bool, error: Exception) -> MiMError:
    """The error of a file that is no zip archive. What an older file would run is named."""
    if isinstance(error, OSError) and error.filename is not None:
        return MiMError(f"cannot read {path} ({error.strerror}): give yourself the right to it, or another file")
    with path.open("rb") as file:
        start = file.read(MAX_PICKLE)
    if start.startswith(b"PK"):
        return MiMError(f"{path} is no readable checkpoint: it is truncated or damaged; take another copy")
    _check_names(path, start, namespaces)
    return MiMError(
        f"{path} is no readable checkpoint: no zip archive, as torch.save writes them since PyTorch 1.6; take another "
        "copy, or load and save an older file with PyTorch where you trust it"
    )


def check_tensors(path: Path, content: Any) -> None:
    """Raise MiMError, naming the first, unless all tensors in plain containers are whole, dense, finite numbers."""
    try:
        check_extent(content)
    except ValueError as error:
        raise MiMError(f"{path} is refused: {error}; take another copy") from None
    for name, value in leaves(content):
        if isinstance(value, Tensor) and (wrong := _wrong_with(value)):
            raise MiMError(f"{path}: tensor {printable(name)} {wrong}: take another copy or an earlier checkpoint")


def _wrong_with(tensor: Tensor) -> str:
    """What makes a tensor no weight; empty for a sound one."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return f"is not dense ({tensor.layout}, {tensor.dtype})"
    if tensor.dtype not in DTYPES:
        return f"is of {tensor.dtype}, and weights are decimal numbers"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims the shape {tuple(tensor.shape)}, and the file holds less"
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return "holds NaN or infinite values"
    return ""


def _checked_pickle(path: Path, archive: zipfile.ZipFile) -> bytes:
    """The pickle in an archive, once all sizes are plausible and all checksums are right."""
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    claimed = sum(entry.file_size for entry in entries)
    if claimed > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise MiMError(
            f"{path} is refused: it is compressed or claims to hold {claimed:,} bytes, more than its size, and "
            "torch.save does neither: take another copy"
        )
    folder = PurePosixPath(entries[0].filename if entries else "").parts[:1]
    pickled = str(PurePosixPath(*folder, "data.pkl"))
    if len(names) < len(entries) or pickled not in names or archive.getinfo(pickled).file_size > MAX_PICKLE:
        raise MiMError(f"{path} is no readable checkpoint: not an archive of torch.save; take another copy")
    if damaged := archive.testzip():
        raise MiMError(f"{path} is damaged ({printable(damaged)} has another checksum): take another copy")
    return archive.read(pickled)


def _check_names(path: Path, pickled: bytes, namespaces: bool) -> None:
    """Raise MiMError where a pickle refers to anything but dense tensors and plain containers."""
    refused = {
        name: text
        for name, text in _names_in(pickled)
        if not ALLOWED.fullmatch(name) and not (namespaces and name == NAMESPACE)
    }
    if refused:
        place = next(iter(refused.values()))
        raise MiMError(
            f"{path} is refused: loading it would run {printable(', '.join(refused))} (first after "
            f"{printable(repr(place))}), and only dense tensors in plain containers are allowed; nothing was run. Get "
            "the file from its authors"
        )


def _names_in(pickled: bytes) -> Iterator[tuple[str, str]]:
    """Classes and functions that pickles refer to, as far as they can be read, each with the text before it."""
    texts = ["", ""]
    stream = io.BytesIO(pickled)
    with contextlib.suppress(Exception):  # what cannot be read is refused afterwards
        while stream.tell() < len(pickled):  # the older format is several pickles, one after the other
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", "."), texts[-1]
                elif operation.name == "STACK_GLOBAL":
                    yield ".".join(texts[-2:]), texts[-3] if len(texts) > 2 else ""
                elif isinstance(argument, str):
                    texts = [*texts[-2:], argument]
