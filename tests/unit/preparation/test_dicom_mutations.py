"""DICOM with elements or bytes changed at random: what is taken without a word is what the files say by themselves."""

import contextlib
import locale
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet import image_files, raw_image
from nnunet_mim.nnunet.dicom import read_series
from nnunet_mim.preparation import finding
from nnunet_mim.preparation.screening import read_header
from nnunet_mim.system import guarded

KINDS = {
    "0002|0000": "UL", "0002|0001": "OB", "0008|0008": "CS", "0008|0020": "DA", "0008|0030": "TM", "0008|0060": "CS",
    "0020|0011": "IS", "0020|0013": "IS", "0020|0032": "DS", "0020|0037": "DS", "0028|0004": "CS", "0028|0030": "DS",
    "0028|1052": "DS", "0028|1053": "DS", "7fe0|0010": "OW",
    **dict.fromkeys(["0002|0002", "0002|0003", "0002|0010", "0002|0012", "0008|0016", "0008|0018"], "UI"),
    **dict.fromkeys(["0020|000d", "0020|000e"], "UI"),
    **dict.fromkeys(["0028|0002", "0028|0010", "0028|0011"], "US"),
    **dict.fromkeys(["0028|0100", "0028|0101", "0028|0102", "0028|0103"], "US"),
}  # fmt: skip
"""value representation of what is written"""
LONG = ("OB", "OW", "SQ", "UN", "UT", "OF")
N_SLICES, PIXELS = 6, "7fe0|0010"
VALUES = (
    b"", b"0 ", b"1 ", b"2 ", b"-1", b"0.5 ", b"-1024 ", b"3.0 ", b"nan ", b"inf ", b"1e300 ", b"x ", b"2\\2 ",
    b"3\\4 ", b"0\\0 ", b"nan\\nan ", b"-3\\-3 ", b"1\\2\\3 ", b"1e300\\0\\0 ", b"1\\0\\0\\0\\1\\0 ",
    b"1\\0\\0\\1\\0\\0 ", b"0\\0\\0\\0\\0\\0 ", b"2\\0\\0\\0\\2\\0 ", b"\0\0", b"\x01\0", b"\x03\0", b"\x07\0",
    b"\x08\0", b"\x0b\0", b"\x0c\0", b"\x10\0", b"\x20\0", b"\xff\xff", b"\xff\xff\xff\xff", b"CT", b"MR",
    b"MONOCHROME1 ", b"RGB ", b"PALETTE COLOR ", b"ORIGINAL\\PRIMARY\\LOCALIZER ", b"DERIVED\\SECONDARY ",
    b"\xe4\xff\x1b[2J\n ", b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.5.1.4.1.1.481.3",
    b"9" * 5000,
)  # fmt: skip


def elements(content):
    """(tag, value representation, value) of every element of a file in Explicit VR Little Endian."""
    at, found = 132, []
    while at < len(content):
        tag, kind = "{:04x}|{:04x}".format(*struct.unpack_from("<HH", content, at)), content[at + 4 : at + 6].decode()
        start, form = (at + 12, "<I") if kind in LONG else (at + 8, "<H")
        (n,) = struct.unpack_from(form, content, start - struct.calcsize(form))
        assert kind.isalpha()
        assert start + n <= len(content)
        found.append((tag, kind, content[start : start + n]))
        at = start + n
    return found


def written(parts):
    """A file of these elements."""
    content = bytes(128) + b"DICM"
    for tag, kind, value in parts:
        length = b"\0\0" + struct.pack("<I", len(value)) if kind in LONG else struct.pack("<H", len(value) % 2**16)
        content += struct.pack("<HH", *(int(part, 16) for part in tag.split("|"))) + kind.encode() + length + value
    return content


@pytest.fixture(scope="module")
def series(shared_data):
    """Contents of the files of a series, a small real CT."""
    image = sitk.ReadImage(str(shared_data / "single" / "abdomen_image.nii.gz"))[::8, ::8, ::20]
    image.SetSpacing((11.0, 12.0, 13.0))
    stored = sitk.GetArrayFromImage(image).astype(np.int16) + 1024
    contents = []
    for number in range(N_SLICES):
        place = image.TransformIndexToPhysicalPoint((0, 0, number))
        texts = {
            "0002|0002": "1.2.840.10008.5.1.4.1.1.2", "0002|0003": f"1.5.{number}", "0002|0010": "1.2.840.10008.1.2.1",
            "0002|0012": "1.5", "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.5.{number}", "0008|0020": "20200101", "0008|0030": "100000", "0008|0060": "CT",
            "0020|000d": "1.2.3", "0020|000e": "1.5", "0020|0011": "1", "0020|0013": str(number),
            "0020|0032": "\\".join(f"{mm:.6f}" for mm in place), "0020|0037": "-1\\0\\0\\0\\-1\\0",
            "0028|0004": "MONOCHROME2", "0028|0030": "12\\11", "0028|1052": "-1024", "0028|1053": "1",
        }  # fmt: skip
        shorts = {"0028|0002": 1, "0028|0010": image.GetHeight(), "0028|0011": image.GetWidth(), "0028|0100": 16,
                  "0028|0101": 16, "0028|0102": 15, "0028|0103": 1}  # fmt: skip
        values = {tag: text.encode() + (b"\0" if KINDS[tag] == "UI" else b" ") * (len(text) % 2)
                  for tag, text in texts.items()}  # fmt: skip
        values |= {tag: struct.pack("<H", value) for tag, value in shorts.items()}
        values |= {"0002|0001": b"\0\x01", PIXELS: stored[number].tobytes()}
        meta = [(tag, KINDS[tag], values[tag]) for tag in sorted(values) if tag.startswith("0002")]
        head = ("0002|0000", "UL", struct.pack("<I", len(written(meta)) - 132))
        contents.append(written([head, *meta, *((t, KINDS[t], values[t]) for t in sorted(values) if t > "0003")]))
    assert elements(contents[0])[-1][0] == PIXELS
    before = locale.setlocale(locale.LC_ALL)
    yield contents
    locale.setlocale(locale.LC_ALL, before)


def statement(contents):
    """Voxels (Z, Y, X), spacing (x, y, z), direction and origin that files say by themselves, ordered by place."""
    slices = []
    for content in contents:
        value = {tag: value for tag, _, value in reversed(elements(content))}
        texts = ("0020|0037", "0020|0032", "0028|0030", "0028|1052", "0028|1053")
        turn, place, pixel, low, slope = ([float(n) for n in value[tag].decode().split("\\")] for tag in texts)
        shorts = ("0028|0010", "0028|0011", "0028|0100", "0028|0101", "0028|0103")
        rows, columns, allocated, bits, signed = (struct.unpack("<H", value[tag])[0] for tag in shorts)
        stored = np.frombuffer(value[PIXELS], f"<u{allocated // 8}").astype(np.int64).reshape(rows, columns)
        stored &= 2**bits - 1
        stored -= (stored >> (bits - 1) & signed) << bits
        assert (len(turn), len(place), len(pixel), len(low), len(slope)) == (6, 3, 2, 1, 1)
        slices.append((turn, place, pixel, stored * slope[0] + low[0]))
    turn = np.reshape(slices[0][0], (2, 3))
    normal = np.cross(*turn)
    slices.sort(key=lambda part: normal @ part[1])
    gaps = np.diff([normal @ part[1] for part in slices])
    direction = np.stack([*turn, normal], axis=1)
    spacing = (*slices[0][2][::-1], np.median(gaps))
    return np.stack([part[3] for part in slices]), spacing, direction, slices[0][1]


def taken(files):
    """What a series is read as, like `statement`."""
    image = read_series(files)
    direction = np.reshape(image.GetDirection(), (3, 3))
    return sitk.GetArrayFromImage(image), image.GetSpacing(), direction, image.GetOrigin()


def same(one, other):
    pairs = list(zip(one, other, strict=True))
    return all(np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=2e-2) for a, b in pairs)


def check(series, folder, contents):
    """Read files as mim_prepare and mim_inspect do. Returns what mim_prepare says of each: a reason, or doubts."""
    for old in folder.iterdir():
        old.unlink()
    names = {str(folder / f"slice_{number}.dcm"): content for number, content in enumerate(contents)}
    for name, content in names.items():
        Path(name).write_bytes(content)
    began, texts = time.monotonic(), []
    volumes = finding.find_volumes([folder])
    results = [read_header(volume, 3) for volume in volumes]
    assert time.monotonic() - began < 5 + 2, "the time limit, and a process"
    assert sorted(file for volume in volumes for file in volume.files) == sorted(names), "each is taken or named"
    for volume, result in zip(volumes, results, strict=True):
        text = result if isinstance(result, str) else " ".join(result.warnings)
        assert text.isprintable()
        assert volume.series.isprintable()
        texts.append(text)
        if text:
            continue
        ((_, found),) = guarded.guarded_map(taken, [volume.files], 1, guarded.Limits(20, 1 << 30))
        if not isinstance(found, tuple):
            continue  # it is left out with this reason
        try:
            expected = statement([names[file] for file in volume.files])
        except (AssertionError, KeyError, ValueError, struct.error):  # not to be read by hand: then nothing has changed
            whole = dict(zip(names, series, strict=True))
            expected = statement([whole[file] for file in volume.files])
        assert same(found, expected), "something else is read than the files say"
        assert tuple(result.size) == found[0].shape
        assert np.allclose(sorted(result.spacing), sorted(found[1]))
    with contextlib.suppress(MiMError):
        raw_image.read_image([folder])
    return texts


def mutated_element(series, place, tag, value, kind=""):
    """The series with the value (None: left out) and kind of an element changed in one slice, or in all (-1)."""

    def changed(content):
        parts = [(t, kind or k, value) if t == tag else (t, k, v) for t, k, v in elements(content)]
        return written(part for part in parts if part[2] is not None)

    return [changed(content) if place in (-1, number) else content for number, content in enumerate(series)]


def mutated_bytes(series, place, changes, keep):
    """The series with some bytes before the pixels of one slice, or of all, changed, and only a share of it kept."""

    def changed(content):
        head, content = content.rindex(struct.pack("<HH", 0x7FE0, 0x10)) + 12, bytearray(content)
        for share, byte in changes:
            content[132 + int(share * (head - 132))] = byte
        return bytes(content[: int(keep * len(content))])

    return [changed(content) if place in (-1, number) else content for number, content in enumerate(series)]


PLACES = st.sampled_from([-1, 0, 3])
ELEMENTS = {"place": PLACES, "tag": st.sampled_from(sorted(KINDS)), "value": st.sampled_from([None, *VALUES])}
SHARES = st.floats(0, 1, exclude_max=True)
BYTES = {"place": PLACES, "changes": st.lists(st.tuples(SHARES, st.integers(0, 255)), min_size=1, max_size=3),
         "keep": st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.6, 0.1])}  # fmt: skip
QUIET = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.fixture
def without_workers(monkeypatch):
    """Everything is read in this process, which is twenty times faster."""

    def guarded_map(function, items, *_):
        yield from enumerate([guarded._outcome(function, item) for item in items])

    for module in (guarded, raw_image):
        monkeypatch.setattr(module, "guarded_map", guarded_map)
    for module in (finding, raw_image):
        monkeypatch.setattr(module, "read_headers", lambda paths, *_: [image_files._read_header(p) for p in paths])


def test_the_series_as_it_is(series, tmp_path):
    image_files.read_headers([__file__], 1)  # what starts workers has imported everything from now on
    assert check(series, tmp_path, series) == [""]
    assert statement(series)[0].min() < -900


FOUND = {
    "a slice without intercept": (3, "0028|1052", None, "no HU (no rescale intercept in the DICOM header): slice_3"),
    "a slice of another intercept": (3, "0028|1052", b"0 ", "its slices have different rescale slopes or intercepts"),
    "no number": (-1, "0028|1052", b"x ", "no HU (the rescale intercept in the DICOM header is x)"),
    "a slope of NaN": (-1, "0028|1053", b"nan ", "no HU (the rescale slope in the DICOM header is nan)"),
    "a slope of 0": (-1, "0028|1053", b"0 ", "no HU (the rescale slope in the DICOM header is 0)"),
    "no slope": (-1, "0028|1053", None, "its DICOM header says no rescale slope, for which a default is taken"),
    "no spacing": (-1, "0028|0030", None, "no usable pixel spacing in the DICOM header (there is none)"),
    "one spacing": (-1, "0028|0030", b"3.0 ", "no usable pixel spacing in the DICOM header (3.0)"),
    "a spacing of NaN": (-1, "0028|0030", b"nan\\nan ", "no usable pixel spacing in the DICOM header (nan\\nan)"),
    "a slice of another spacing": (3, "0028|0030", b"2\\2 ", "slices are missing: 26 mm instead of 13"),
    "a slice of MR": (3, "0008|0060", b"MR", "not a CT (modality MR): slice_3.dcm"),
    "a slice that was computed": (3, "0008|0008", b"DERIVED ", "made of other images (DERIVED in its DICOM header)"),
    "white to black": (-1, "0028|0004", b"MONOCHROME1 ", "no HU (MONOCHROME1, grey values from white to black)"),
    "a slice in colour": (3, "0028|0004", b"RGB ", "slices are missing: 26 mm instead of 13"),
    "too few columns": (-1, "0028|0011", b"\x0c\0", "damaged (its header promises"),
    "too few bits": (-1, "0028|0101", b"\x0c\0", "its bits do not fit each other (allocated, stored, high bit"),
    "another class": (-1, "0008|0016", b"0 ", "no usable pixel spacing in the DICOM header (12\\11)"),
    "a name of any bytes": (3, "0020|000e", b"1.\xff\xe4\n ", "slices are missing: 26 mm instead of 13"),
}
"""what was once taken without a word, or ended in a traceback"""


@pytest.mark.usefixtures("without_workers")
@pytest.mark.parametrize("name", FOUND)
def test_what_is_named(series, tmp_path, name):
    *mutation, expected = FOUND[name]
    texts = check(series, tmp_path, mutated_element(series, *mutation))
    assert any(text.startswith(expected) for text in texts), texts


@pytest.mark.usefixtures("without_workers")
@settings(max_examples=30, **QUIET)
@given(**ELEMENTS)
def test_elements(series, tmp_path, place, tag, value):
    check(series, tmp_path, mutated_element(series, place, tag, value))


@settings(max_examples=4, **QUIET)
@given(**BYTES)
def test_bytes(series, tmp_path, place, changes, keep):
    check(series, tmp_path, mutated_bytes(series, place, changes, keep))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("without_workers")
@settings(max_examples=800, **QUIET)
@given(**ELEMENTS, kind=st.sampled_from(["", "", "US", "SS", "UL", "DS", "CS", "UN", "SQ", "OB"]))
def test_elements_at_length(series, tmp_path, place, tag, value, kind):
    check(series, tmp_path, mutated_element(series, place, tag, value, kind))


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(max_examples=200, **QUIET)
@given(**BYTES)
def test_bytes_at_length(series, tmp_path, place, changes, keep):
    check(series, tmp_path, mutated_bytes(series, place, changes, keep))
