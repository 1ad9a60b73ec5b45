"""Headers with bytes or fields changed at random: no crash, no hang, and no geometry that is taken without a word."""

import re
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_mim.nnunet.image_files import FileHeader, damaged, read_headers
from nnunet_mim.preparation.finding import Volume
from nnunet_mim.preparation.screening import Header, read_header
from nnunet_mim.system.guarded import Failure, Limits, guarded_map

TEXTS = ("mha", "nrrd", "mhd", "nhdr")
VALUES = ("", "-1", "0", "1", "2", "3.5", "7", "16", "23", "nan", "inf", "1e9", "99999999999", "x", "0 0 0", "1 2")
KINDS = ("nii", "mha", "nrrd", "hdr", "mhd", "nhdr")
VOXELS = {"hdr": "img", "mhd": "raw", "nhdr": "raw"}
"""ending of the file with the voxels, where they are in one of their own"""


@pytest.fixture(scope="module")
def files(shared_data, tmp_path_factory):
    """A small real CT in each format, not compressed: (path, number of bytes of its header) by ending."""
    image = sitk.ReadImage(str(shared_data / "single" / "abdomen_image.nii.gz"))[::4, ::4, ::4]
    image.SetSpacing((11.0, 12.0, 13.0))
    found = {}
    n_bytes = 2 * image.GetNumberOfPixels()
    for kind in KINDS:
        path = tmp_path_factory.mktemp(kind) / f"a.{kind}"
        sitk.WriteImage(image, str(path), False)
        found[kind] = path, path.stat().st_size - (0 if kind in VOXELS else n_bytes)
    read_headers([str(path)], 1)  # what starts workers has imported everything from now on
    return found


def statement(path):
    """Size and steps (columns) that a file says by itself, read without SimpleITK."""
    if path.suffix in (".nii", ".hdr"):
        return nifti_statement(path.read_bytes())
    text = path.read_bytes().split(b"LOCAL\n")[0].split(b"\n\n")[0].decode("latin-1")

    def numbers(field):
        (value,) = re.findall(rf"^{field} ?[=:] ?(.*)$", text, re.MULTILINE)
        return [float(n) for n in re.sub(r"[(),]", " ", value).split()]

    if path.suffix in (".mha", ".mhd"):
        return numbers("DimSize"), np.reshape(numbers("TransformMatrix"), (3, 3)).T * numbers("ElementSpacing")
    assert "space: left-posterior-superior" in text
    return numbers("sizes"), np.reshape(numbers("space directions"), (3, 3)).T


def nifti_statement(head):
    """Size and steps from the bytes of a NIfTI-1 header, as the standard says; nibabel mends what it loads."""
    order = "<" if struct.unpack("<i", head[:4]) == (348,) or 1 <= struct.unpack("<h", head[40:42])[0] <= 7 else ">"
    n, *size = struct.unpack(f"{order}8h", head[40:56])
    qfac, *pixdim = struct.unpack(f"{order}4f", head[76:92])
    qform_code, sform_code, b, c, d = struct.unpack(f"{order}2h3f", head[252:268])
    if sform_code > 0:
        steps = np.reshape(struct.unpack(f"{order}12f", head[280:328]), (3, 4))[:, :3]
    else:
        assert qform_code > 0
        a = max(0.0, 1 - b * b - c * c - d * d) ** 0.5
        rotation = [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
        steps = np.array(rotation) * pixdim * [1, 1, -1 if qfac < 0 else 1]
    return size[:n], np.diag([-1, -1, 1]) @ steps


def whole(path):
    """Why the voxels of a file cannot be read, or None."""
    problem = damaged(Path(path))
    sitk.ReadImage(path)
    return problem


def check(path):
    """Read a file as mim_prepare does; what is taken without a warning has to be what the file says."""
    began = time.monotonic()
    (header,) = read_headers([str(path)], 1)
    result = read_header(Volume("a", (str(path),), header=header), 16)
    assert time.monotonic() - began < 5 + 2, "the time limit, and a process"
    if not isinstance(result, Header) or result.warnings:
        return
    ((_, problem),) = guarded_map(whole, [str(path)], 1, Limits(20, 1 << 30))
    if problem is None:
        assert isinstance(header, FileHeader)
        size, steps = statement(path)
        assert list(size) == list(header.size)
        taken = np.reshape(header.direction, (3, 3)) * header.spacing
        assert np.isfinite(steps).all()
        assert np.linalg.norm(steps, axis=0).min() > 0
        assert np.allclose(taken, steps, rtol=0, atol=0.02 * np.linalg.norm(steps, axis=0).min())
    else:
        assert isinstance(problem, (str, Failure))


def mutated_bytes(files, folder, kind, changes):
    path, head = files[kind]
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * head)] = value
    return written(folder, path, content)


def mutated_field(files, folder, kind, field, place, value):
    """Change one number or word of one line of a text header."""
    path, head = files[kind]
    lines = path.read_bytes()[:head].split(b"\n")
    line = int(field * (len(lines) - 1))
    words = lines[line].split(b" ")
    words[int(place * len(words))] = value.encode()
    lines[line] = b" ".join(words)
    return written(folder, path, b"\n".join(lines) + path.read_bytes()[head:])


def written(folder, path, content):
    """A file of this content, with the voxels of `path` beside it if they are in a file of their own."""
    if path.suffix[1:] in VOXELS:
        shutil.copy(path.with_suffix(f".{VOXELS[path.suffix[1:]]}"), folder)
    (folder / path.name).write_bytes(content)
    return folder / path.name


SHARES = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(st.tuples(SHARES, st.integers(0, 255)), min_size=1, max_size=3)
QUIET = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_as_it_is_and_what_it_says(files, kind):
    path, _ = files[kind]
    (header,) = read_headers([str(path)], 1)
    assert header.warnings == ()
    size, steps = statement(path)
    assert list(size) == list(header.size)
    assert np.allclose(np.linalg.norm(steps, axis=0), (11, 12, 13))
    check(path)


@settings(max_examples=25, **QUIET)
@given(kind=st.sampled_from(KINDS), changes=CHANGES)
def test_bytes(files, tmp_path, kind, changes):
    check(mutated_bytes(files, tmp_path, kind, changes))


@settings(max_examples=25, **QUIET)
@given(kind=st.sampled_from(TEXTS), field=SHARES, place=SHARES, value=st.sampled_from(VALUES))
def test_fields(files, tmp_path, kind, field, place, value):
    check(mutated_field(files, tmp_path, kind, field, place, value))


@pytest.mark.long
@settings(max_examples=500, **QUIET)
@given(kind=st.sampled_from(KINDS), changes=CHANGES)
def test_bytes_at_length(files, tmp_path, kind, changes):
    check(mutated_bytes(files, tmp_path, kind, changes))


@pytest.mark.long
@settings(max_examples=500, **QUIET)
@given(kind=st.sampled_from(TEXTS), field=SHARES, place=SHARES, value=st.sampled_from(VALUES))
def test_fields_at_length(files, tmp_path, kind, field, place, value):
    check(mutated_field(files, tmp_path, kind, field, place, value))


@pytest.mark.parametrize("kind", ["mhd", "nhdr"])
def test_a_smaller_size_beside_a_file_of_voxels_is_damage(files, tmp_path, kind):
    """SimpleITK reads the first of the voxels, and shears the image."""
    path, _ = files[kind]
    before, after = (b"DimSize = 31", b"DimSize = 30") if kind == "mhd" else (b"sizes: 31", b"sizes: 30")
    content = path.read_bytes()
    assert before in content
    problem = damaged(written(tmp_path, path, content.replace(before, after)))
    assert re.fullmatch(r"damaged \(\d+ bytes of voxels more than its header promises\)", problem)
    assert damaged(written(tmp_path, path, content)) is None
