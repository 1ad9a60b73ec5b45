"""Enhanced CT with elements or bytes changed at random: what is taken without a word is what its frames say."""

import struct
import time

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_mim.nnunet import image_files
from nnunet_mim.nnunet.dicom import read_series
from nnunet_mim.preparation import finding
from nnunet_mim.preparation.screening import read_header
from nnunet_mim.system import guarded

SHARED, PER_FRAME, DELIMITERS = "5200|9229", "5200|9230", ("fffe|e00d", "fffe|e0dd")
POSITION, ORIENTATION, SPACING, INTERCEPT, SLOPE = "0020|0032", "0020|0037", "0028|0030", "0028|1052", "0028|1053"
RESCALING, PIXELS, ENDLESS = "0028|9145", "7fe0|0010", 0xFFFFFFFF
VALUES = (
    b"", b"0 ", b"1 ", b"2 ", b"-1", b"0.5 ", b"-1024 ", b"nan ", b"inf ", b"x ", b"2\\2 ", b"24\\12 ", b"0\\0 ",
    b"nan\\nan ", b"1\\2\\3 ", b"nan\\0\\0 ", b"1\\0\\0\\0\\1\\0 ", b"1\\0\\0\\1\\0\\0 ", b"2\\0\\0\\0\\2\\0 ",
    b"\x01\0", b"\x03\0", b"\x0c\0", b"\xff\xff", b"MR", b"MONOCHROME1 ", b"RGB ", b"DERIVED\\SECONDARY ",
    b"\xe4\xff\x1b[2J\n ", b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.840.10008.5.1.4.1.1.7.2\0", b"9" * 300,
)  # fmt: skip
TAGS = (
    POSITION, ORIENTATION, SPACING, INTERCEPT, SLOPE, "0018|0088", "0008|0008", "0008|0016", "0008|0060", "0020|000e",
    "0028|0004", "0028|0008", "0028|0010", "0028|0011", "0028|0100", "0028|0101", "0028|0102", "0028|0103", RESCALING,
)  # fmt: skip


def parsed(content, at=0, end=None):
    """(place of the tag, tag, value) of the elements in Implicit VR Little Endian, the value of a sequence a list."""
    end, found = len(content) if end is None else end, []
    while at < end:
        group, number, length = struct.unpack_from("<HHI", content, at)
        tag, start = f"{group:04x}|{number:04x}", at + 8
        if tag in DELIMITERS:
            return found, start
        if length == ENDLESS:
            value, after = parsed(content, start, end)
        else:
            assert start + length <= end
            value, after = content[start : start + length], start + length
        found.append((at, tag, value))
        at = after
    return found, at


def body_of(content):
    """Where the elements after the meta information begin."""
    return 144 + struct.unpack_from("<I", content, 140)[0]


def all_of(elements, tag):
    """(place, value) of an element wherever it stands."""
    nested = [e for _, _, value in elements if isinstance(value, list) for e in all_of(value, tag)]
    return [(at, value) for at, name, value in elements if name == tag] + nested


def numbers(text, n):
    values = [float(part) for part in text.decode().split("\\")]
    assert len(values) == n
    assert np.isfinite(values).all()
    return values


def statement(content):
    """Voxels (Z, Y, X), spacing (x, y, z), direction and origin that the frames of a file say by themselves."""
    elements, _ = parsed(content, body_of(content))
    top = {tag: value for _, tag, value in elements}
    (_, _, shared), *_ = top[SHARED]
    frames = [value for _, _, value in top[PER_FRAME]]

    def of_frame(frame, tag, n):
        (value,) = {v for _, v in all_of(frame, tag)} or {v for _, v in all_of(shared, tag)}
        return numbers(value, n)

    places, turns, pixels, lows, slopes = (
        [of_frame(frame, tag, n) for frame in frames]
        for tag, n in ((POSITION, 3), (ORIENTATION, 6), (SPACING, 2), (INTERCEPT, 1), (SLOPE, 1))
    )
    assert all(np.allclose(turn, turns[0], atol=0.01) for turn in turns)
    assert all(np.allclose(pixel, pixels[0], rtol=1e-3) for pixel in pixels)
    rows, columns, bits, signed = (struct.unpack("<H", top[f"0028|{n}"])[0] for n in ("0010", "0011", "0101", "0103"))
    stored = np.frombuffer(top[PIXELS], "<u2").astype(np.int64).reshape(int(top["0028|0008"]), rows, columns)
    stored &= 2**bits - 1
    stored -= (stored >> (bits - 1) & signed) << bits
    assert len(stored) == len(frames)
    normal = np.cross(*np.reshape(turns[0], (2, 3)))
    gaps = np.diff([normal @ place for place in places])
    direction = np.stack([*np.reshape(turns[0], (2, 3)), normal], axis=1)
    voxels = stored * np.reshape(slopes, (-1, 1, 1)) + np.reshape(lows, (-1, 1, 1))
    return voxels, (*pixels[0][::-1], np.median(gaps)), direction, places[0]


def taken(files):
    """What a file is read as, like `statement`."""
    image = read_series(files)
    direction = np.reshape(image.GetDirection(), (3, 3))
    return sitk.GetArrayFromImage(image), image.GetSpacing(), direction, image.GetOrigin()


@pytest.fixture(scope="module")
def enhanced(shared_data, tmp_path_factory):
    """The bytes of a small real CT as one file."""
    image = sitk.Cast(sitk.ReadImage(str(shared_data / "single" / "abdomen_image.nii.gz")), sitk.sitkInt16)
    image = image[::8, ::8, ::20]
    image.SetSpacing((11.0, 12.0, 13.0))
    for key, value in {
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2.1", "0008|0060": "CT", "0020|000e": "1.7", "0020|000d": "1.2.3",
        "0008|0018": "1.7.1", "0008|0008": "ORIGINAL\\PRIMARY\\VOLUME", INTERCEPT: "-1024", SLOPE: "1",
    }.items():  # fmt: skip
        image.SetMetaData(key, value)
    path = tmp_path_factory.mktemp("enhanced") / "all.dcm"
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)
    return path.read_bytes()


def check(enhanced, folder, content):
    """Read a file as mim_prepare does. Returns what it says: a reason, or doubts."""
    path = folder / "all.dcm"
    path.write_bytes(content)
    began = time.monotonic()
    volumes = finding.find_volumes([folder])
    results = [read_header(volume, 3) for volume in volumes]
    assert time.monotonic() - began < 5 + 2, "the time limit, and a process"
    assert [file for volume in volumes for file in volume.files] == [str(path)], "it is taken or named"
    text = results[0] if isinstance(results[0], str) else " ".join(results[0].warnings)
    assert text.isprintable()
    if text:
        return text
    ((_, found),) = guarded.guarded_map(taken, [volumes[0].files], 1, guarded.Limits(20, 1 << 30))
    if not isinstance(found, tuple):
        return found.reason
    try:
        expected = statement(content)
    except (AssertionError, KeyError, ValueError, struct.error):  # not to be read by hand: then nothing has changed
        expected = statement(enhanced)
    for one, other in zip(found, expected, strict=True):
        assert np.shape(one) == np.shape(other)
        assert np.allclose(one, other, rtol=1e-4, atol=2e-2), "something else is read than the file says"
    return ""


def mutated(content, tag, which, value):
    """The file with the value (None: left out) of one of the elements with a tag changed."""
    elements, _ = parsed(content, body_of(content))
    found = all_of(elements, tag)
    if not found:
        return content
    at, old = found[which % len(found)]
    end = parsed(content, at + 8)[1] if isinstance(old, list) else at + 8 + len(old)
    new = b"" if value is None else content[at : at + 4] + struct.pack("<I", len(value)) + value
    return content[:at] + new + content[end:]


def with_own_rescaling(content, texts):
    """The file with a rescale intercept of each frame in place of the one that all share."""
    elements, _ = parsed(content, body_of(content))
    ((at, _),) = all_of(elements, RESCALING)
    sequence = content[at : parsed(content, at + 8)[1]]
    top = {tag: value for _, tag, value in elements}
    frames = [value[-1][0] for _, _, value in top[PER_FRAME]]
    for place, text in sorted(zip(frames, texts, strict=True), reverse=True):
        content = content[:place] + mutated_bytes_of(sequence, text) + content[place:]
    return content.replace(sequence, b"", 1)


def mutated_bytes_of(sequence, text):
    """A rescale sequence with another intercept."""
    at = sequence.index(b"\x28\x00\x52\x10")
    length = struct.unpack_from("<I", sequence, at + 4)[0]
    return sequence[: at + 4] + struct.pack("<I", len(text)) + text + sequence[at + 8 + length :]


def mutated_bytes(content, changes, keep):
    """The file with some bytes before the pixels changed, and only a share of it kept."""
    head, content = content.rindex(struct.pack("<HH", 0x7FE0, 0x10)) + 8, bytearray(content)
    for share, byte in changes:
        content[132 + int(share * (head - 132))] = byte
    return bytes(content[: int(keep * len(content))])


QUIET = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
ELEMENTS = {"tag": st.sampled_from(TAGS), "which": st.integers(0, 5), "value": st.sampled_from([None, *VALUES])}
BYTES = {
    "changes": st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    "keep": st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.6, 0.1]),
}


@pytest.fixture
def without_workers(monkeypatch):
    """Everything is read in this process, which is twenty times faster."""

    def guarded_map(function, items, *_):
        yield from enumerate([guarded._outcome(function, item) for item in items])

    monkeypatch.setattr(guarded, "guarded_map", guarded_map)
    monkeypatch.setattr(finding, "read_headers", lambda paths, *_: [image_files._read_header(p) for p in paths])


def test_the_file_as_it_is(enhanced, tmp_path):
    assert check(enhanced, tmp_path, enhanced) == ""
    assert statement(enhanced)[0].min() < -900


@pytest.mark.usefixtures("without_workers")
def test_a_file_that_ends_early_and_begins_without_meta_information(enhanced, tmp_path):
    """GDCM reads zeros where its pixels are missing."""
    text = check(enhanced, tmp_path, mutated_bytes(enhanced, [(0.0, 0)], 0.99))
    assert text.startswith("damaged (its header promises 2496 bytes of pixels, the file has 24")


@pytest.mark.usefixtures("without_workers")
def test_an_intercept_of_each_frame(enhanced, tmp_path):
    assert check(enhanced, tmp_path, with_own_rescaling(enhanced, [b"-1024 "] * 6)) == ""
    text = check(enhanced, tmp_path, with_own_rescaling(enhanced, [b"-1024 "] * 3 + [b"0 "] * 3))
    assert text.startswith("no HU (the rescale intercept in the DICOM header is -1024; 0)")


FOUND = {
    "no intercept": ((INTERCEPT, 0, None), "no HU (no rescale intercept in the DICOM header)"),
    "an intercept of NaN": ((INTERCEPT, 0, b"nan "), "no HU (the rescale intercept in the DICOM header is nan)"),
    "a slope of 0": ((SLOPE, 0, b"0 "), "no HU (the rescale slope in the DICOM header is 0)"),
    "no slope": ((SLOPE, 0, None), "its DICOM header says no rescale slope, for which a default is taken"),
    "no spacing": ((SPACING, 0, None), "no usable pixel spacing in the DICOM header (there is none)"),
    "a spacing of NaN": ((SPACING, 0, b"nan\\nan "), "no usable pixel spacing in the DICOM header (nan\\nan)"),
    "a frame without place": ((POSITION, 2, None), "the positions of its 6 frames cannot be read"),
    "a frame at no place": ((POSITION, 2, b"nan\\0\\0 "), "the positions of its 6 frames cannot be read"),
    "a frame elsewhere": ((POSITION, 2, b"1\\2\\3 "), "slices are shifted against each other (gantry tilt)"),
    "white to black": (("0028|0004", 0, b"MONOCHROME1 "), "no HU (MONOCHROME1, grey values from white to black)"),
    "too few bits": (("0028|0101", 0, b"\x0c\0"), "its bits do not fit each other (allocated, stored, high bit"),
}


@pytest.mark.usefixtures("without_workers")
@pytest.mark.parametrize("name", FOUND)
def test_what_is_named(enhanced, tmp_path, name):
    mutation, expected = FOUND[name]
    text = check(enhanced, tmp_path, mutated(enhanced, *mutation))
    assert text.startswith(expected), text


@pytest.mark.usefixtures("without_workers")
@settings(max_examples=30, **QUIET)
@given(**ELEMENTS)
def test_elements(enhanced, tmp_path, tag, which, value):
    check(enhanced, tmp_path, mutated(enhanced, tag, which, value))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("without_workers")
@settings(max_examples=600, **QUIET)
@given(**ELEMENTS)
def test_elements_at_length(enhanced, tmp_path, tag, which, value):
    check(enhanced, tmp_path, mutated(enhanced, tag, which, value))


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(max_examples=100, **QUIET)
@given(**BYTES)
def test_bytes_at_length(enhanced, tmp_path, changes, keep):
    check(enhanced, tmp_path, mutated_bytes(enhanced, changes, keep))
