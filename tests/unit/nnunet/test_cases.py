"""Preprocessed cases are read as nnU-Net reads them, and nothing in their files is run."""

import contextlib
import io
import os
import pickle
import pickletools
import time

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.cases import dataset_class_of, read_properties

PROPERTIES = {
    "sitk_stuff": {"spacing": (1.0, 1.0, 3.0), "origin": (-120.5, 37.0, 4.0), "direction": (1.0, 0.0, 0.0) * 3},
    "spacing": [3.0, 1.0, 1.0],
    "shape_before_cropping": (40, np.int64(36), 34),
    "bbox_used_for_cropping": [[0, 40], [0, 36], [0, 34]],
    "class_locations": {1: np.arange(12).reshape(3, 4), (1, 2): np.zeros((0, 4), np.int64), 3: []},
    "mean": np.float32(0.5),
    "affine": np.asfortranarray(np.eye(4, dtype=">f8") * 3),
    "names": np.array([["a", "bcd"]]),
    "bytes": np.array([b"a", b"bcd"]),
}


def same(a, b):
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.fixture(params=["b2nd", "npz", "npy"])
def folder(tmp_path, request):
    """A folder with one case, as nnU-Net's preprocessing leaves it or as its training has unpacked it."""
    data = np.random.default_rng(0).normal(size=(1, 8, 9, 10)).astype(np.float32)
    seg = (data > 1).astype(np.int8)
    if request.param == "b2nd":
        nnUNetDatasetBlosc2.save_case(data, seg, PROPERTIES, str(tmp_path / "a"), (1, 8, 8, 8), (1, 8, 8, 8))
    else:
        nnUNetDatasetNumpy.save_case(data, seg, PROPERTIES, str(tmp_path / "a"))
    if request.param == "npy":
        nnUNetDatasetNumpy.unpack_dataset(str(tmp_path), False, 1, True)
    return tmp_path


def test_the_same_as_nnunets_own_reader(folder):
    ours = dataset_class_of(folder)
    theirs = ours.__mro__[1]
    found, wanted = (kind(str(folder), ["a"]).load_case("a") for kind in (ours, theirs))
    assert ours.get_identifiers(str(folder)) == ["a"]
    for a, b in zip(found[:2], wanted[:2], strict=True):
        np.testing.assert_array_equal(a[:], b[:])
    assert found[2] is wanted[2] is None
    assert same(found[3], wanted[3])
    assert same(found[3], PROPERTIES)


DTYPES = arrays.integer_dtypes() | arrays.floating_dtypes(sizes=(32, 64)) | arrays.boolean_dtypes()


@given(
    array=DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))),
    protocol=st.sampled_from([3, 4, 5]),
)
def test_arrays_of_any_kind(tmp_path_factory, array, protocol):
    path = tmp_path_factory.getbasetemp() / "array.pkl"
    path.write_bytes(pickle.dumps({"array": array, "turned": array.T}, protocol))
    read = read_properties(path)
    np.testing.assert_array_equal(read["array"], array)
    np.testing.assert_array_equal(read["turned"], array.T)
    assert read["array"].dtype == pickle.loads(path.read_bytes())["array"].dtype


class Trap:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Nested:
    """A pickle that calls what a NumPy array's pickle calls, with arguments of its own."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


TRAPS = {
    "alone": lambda trap: trap,
    "among properties": lambda trap: {"spacing": [1.0, trap]},
    "as a key": lambda trap: {("a", trap): 1},
    "in an array of objects": lambda trap: {"array": np.array([trap, None], object)},
    "as an argument of NumPy's dtype": lambda trap: {"dtype": Nested(np.dtype, (trap,))},
    "as the state of an array": lambda trap: {"array": Nested(*np.zeros(2).__reduce__()[:2], (1, trap))},
    "as a scalar": lambda trap: {"scalar": Nested(np.float64(1).__reduce__()[0], (np.dtype("f8"), trap))},
    "a function of NumPy": lambda trap: {"load": Nested(np.load, ("a.npy",))},
    "a function of pickle": lambda trap: {"loads": Nested(pickle.loads, (pickle.dumps(trap),))},
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("where", TRAPS)
def test_nothing_is_run(tmp_path, where, protocol):
    path, trap = tmp_path / "a.pkl", tmp_path / "trap"
    path.write_bytes(pickle.dumps(TRAPS[where](Trap(trap)), protocol))
    with pytest.raises(MiMError, match=r"a\.pkl is refused: .*nothing was run") as error:
        read_properties(path)
    assert str(error.value).isprintable()
    assert not trap.exists()


BOMBS = {
    "a place in the memo": b"\x80\x04}r\xff\xff\xff\x7f.",
    "a bytearray": b"\x80\x05\x96" + (10**12).to_bytes(8, "little") + b".",
    "bytes": b"\x80\x04\x8e" + (10**12).to_bytes(8, "little") + b".",
    "an array": b"\x80\x04cnumpy\nndarray\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftR.",
    "a number": b"\x80\x04I" + b"9" * 10**6 + b"\n.",
    "nothing": b"",
    "many marks": b"\x80\x04" + b"(" * 5_000_000 + b".",
    "many lists": b"\x80\x04" + b"]" * 5_000_000 + b".",
    "many arrays": pickle.dumps([np.zeros(n % 3) for n in range(40_000)]),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_no_memory_is_taken_for_what_is_only_claimed(tmp_path, kind):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.pkl"
    path.write_bytes(BOMBS[kind])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with contextlib.suppress(MiMError):
        assert read_properties(path) == {}
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_properties_of_a_thousand_classes_are_read(tmp_path):
    path = tmp_path / "a.pkl"
    wanted = {"class_locations": {number: np.full((50, 4), number) for number in range(1000)}}
    path.write_bytes(pickle.dumps(wanted))
    assert same(read_properties(path), wanted)


def test_properties_larger_than_any(tmp_path):
    path = tmp_path / "a.pkl"
    with path.open("wb") as file:
        file.truncate(10**10)  # a hole: nothing is on the disk
    with pytest.raises(MiMError, match=r"a\.pkl .*larger than"):
        read_properties(path)


def test_code_in_an_array_of_blosc2_is_not_run(tmp_path):
    """blosc2 can keep a Python function in the place of voxels."""
    nnUNetDatasetBlosc2.save_case(
        np.zeros((1, 8, 8, 8), np.float32), np.zeros((1, 8, 8, 8), np.int8), {}, str(tmp_path / "a"), (1, 8, 8, 8),
        (1, 8, 8, 8),
    )  # fmt: skip
    operand = blosc2.asarray(np.zeros(4), urlpath=str(tmp_path / "operand"), mode="w")
    blosc2.lazyudf(_function, (operand,), np.float64, shape=(4,)).save(urlpath=str(tmp_path / "a.b2nd"), mode="w")
    (tmp_path / "operand").rename(tmp_path / "operand.pkl")
    with pytest.raises(Exception, match=r"(?i)lazyarray|deserial"):
        dataset_class_of(tmp_path)(str(tmp_path), ["a"]).load_case("a")


def _function(inputs, output, offset):
    output[:] = inputs[0]


class Stated:
    """A pickle of something of NumPy's with a state of its own."""

    def __init__(self, made, arguments, state):
        self.parts = made, arguments, state

    def __reduce__(self):
        return self.parts


ARRAY = np.zeros(2).__reduce__()[:2]
REFERENCES = 1 | 2 | 4 | 8 | 16
"""flags of a dtype of objects: NumPy takes its numbers for addresses"""
STATES = {
    "flags of objects": Stated(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, REFERENCES)),
    "another size": Stated(np.dtype, ("f8", False, True), (3, "<", None, None, None, 10**6, 1, 0)),
    "fields": Stated(np.dtype, ("f8", False, True), (3, "<", None, ("a",), {"a": (np.dtype("f8"), 10**6)}, 8, 1, 0)),
    "of arrays": Stated(np.dtype, ("f8", False, True), (3, "<", (np.dtype("f8"), (9,)), None, None, -1, -1, 0)),
    "a short content": Stated(*ARRAY, (1, (2,), np.dtype("f8"), False, bytes(8))),
    "negative sizes": Stated(*ARRAY, (1, (-1, -2), np.dtype("f8"), False, bytes(16))),
    "no dtype": Stated(*ARRAY, (1, (2,), "O", False, bytes(16))),
    "a function": Stated(*ARRAY, {"x": 1}),
}


@pytest.mark.parametrize("kind", STATES)
def test_states_that_numpy_would_not_write(tmp_path, kind):
    """NumPy believes a state: it reads beyond the content, or follows numbers as addresses."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"a": STATES[kind]}))
    with pytest.raises(MiMError, match=r"cannot read .*a\.pkl .*: preprocess the case again"):
        read_properties(path)


def reads_plainly(content):
    """What Python's own unpickler in C reads, where it may look up NumPy's arrays and nothing else."""

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            assert module.split(".")[0] == "numpy"
            assert name in ("dtype", "ndarray", "_reconstruct", "scalar", "_frombuffer")
            return super().find_class(module, name)

    return Plain(io.BytesIO(content)).load()


def is_plain(value):
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(child) for key, child in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind in "biufSU"
    return value is None or type(value) in (bool, int, float, complex, str, bytes, bytearray)


def test_bytes_of_properties(tmp_path, junk, examples):
    """Whatever byte is changed: what is read holds nothing but values, and those that pickle itself reads."""
    path = tmp_path / "a.pkl"
    wholes = {protocol: pickle.dumps(PROPERTIES, protocol) for protocol in (2, 4, 5)}
    share, byte = st.floats(0, 1, exclude_max=True), st.integers(0, 255)

    @examples(150, 1500)
    @given(protocol=st.sampled_from([2, 4, 5]), changes=st.lists(st.tuples(share, byte), min_size=1, max_size=3))
    def holds(protocol, changes):
        content = bytearray(wholes[protocol])
        for place, value in changes:
            content[int(place * len(content))] = value
        path.write_bytes(content)
        found = junk.taken(read_properties, path)
        if found is not None:
            assert is_plain(found)
            steps = pickletools.genops(bytes(content))
            places = [int(argument) for operation, argument, _ in steps if "PUT" in operation.name]
            if max(places, default=0) < 100_000:  # for more the unpickler in C takes gigabytes
                assert same(found, reads_plainly(bytes(content)))

    holds()
