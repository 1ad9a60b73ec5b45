"""Checkpoints that are damaged or written to do harm are refused in one line and at once, by all that reads them."""

import io
import json
import pickle
import struct
import time
import zipfile
from hashlib import sha256

import pytest
import torch

from nnunet_mim.checkpoint.format import PretrainedCheckpoint, load_checkpoint
from nnunet_mim.checkpoint.locate import CONFIG, WEIGHTS
from nnunet_mim.checkpoint.published import read_published
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.cli import main as mim_inspect
from nnunet_mim.inspection.convert_cli import main as mim_convert
from nnunet_mim.inspection.export_cli import main as mim_export

NAME = "encoder.norm.weight"
SECONDS = 1.0


@pytest.fixture
def refused(capfd):
    """refused(read, path): the one line with which something refuses a file within a second, without taking memory."""
    resource = pytest.importorskip("resource")

    def check(read, path):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(MiMError) as error:
            read(path)
        assert time.process_time() - began < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
        assert str(path) in str(error.value)
        assert str(error.value).isprintable()
        return str(error.value)

    return check


@pytest.fixture
def changed(make_checkpoint):
    """changed(tensor, name=NAME) → checkpoint in which a tensor of the network is another one."""

    def change(tensor, name=NAME):
        path, _ = make_checkpoint()
        stored = torch.load(path, weights_only=True)
        stored["network_weights"][name] = tensor
        torch.save(stored, path)
        return path

    return change


def nan(n=12):
    return torch.full((n,), float("nan"))


TENSORS = {
    "NaN": (nan(), "holds NaN or infinite"),
    "infinite": (torch.full((12,), float("inf")), "holds NaN or infinite"),
    "int8": (torch.ones(12, dtype=torch.int8), "is of torch.int8"),
    "int64": (torch.ones(12, dtype=torch.int64), "mim_config declares"),
    "complex": (torch.ones(12, dtype=torch.complex64), "is of torch.complex64"),
    "bool": (torch.ones(12, dtype=torch.bool), "is of torch.bool"),
    "sparse": (torch.ones(12).to_sparse(), "_rebuild_sparse_tensor"),
    "quantised": (torch.quantize_per_tensor(torch.ones(12), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    "expanded": (torch.zeros(1).expand(10**12), "claims the shape"),
    "expanded in its own shape": (torch.ones(1).expand(12), "claims the shape"),
    "shape": (torch.zeros(13), r"(13,) of torch.float32, and mim_config declares (12,)"),
    "meta": (torch.ones(12, device="meta"), "_rebuild_meta_tensor_no_storage"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_weights_are_named(changed, refused, kind):
    tensor, message = TENSORS[kind]
    path = changed(tensor)
    for read in (load_checkpoint, PretrainedCheckpoint.load):
        line = refused(read, path)
        assert NAME in line
        assert message in line


@pytest.mark.parametrize("name", ["encoder.vit_blocks.7.norm1.weight", "head\x1b[2J.weight"])
def test_a_tensor_that_the_network_does_not_have(changed, refused, name):
    assert "is not of the network in mim_config" in refused(load_checkpoint, changed(torch.ones(2), name))


def test_a_missing_tensor(make_checkpoint, refused):
    path, _ = make_checkpoint()
    stored = torch.load(path, weights_only=True)
    del stored["network_weights"]["decoder.mask_token"]
    torch.save(stored, path)
    assert "lacks the tensor decoder.mask_token (1 in all)" in refused(load_checkpoint, path)


@pytest.mark.parametrize(
    "sizes",
    [{"depths": [10**9] * 4}, {"decoder_depth": 10**12}, {"embed_dims": [6 * 10**15] * 4}, {"num_heads": 0},
     {"depths": ["a"] * 4}, {"mlp_ratio": float("inf")}, {"mlp_ratio": float("nan")}],
    ids=str,
)  # fmt: skip
def test_a_network_that_cannot_be(make_checkpoint, refused, sizes):
    path, _ = make_checkpoint()
    stored = torch.load(path, weights_only=True)
    stored["mim_config"]["network"] |= sizes
    torch.save(stored, path)
    assert "mim_config cannot be used" in refused(load_checkpoint, path)


@pytest.mark.parametrize("voxels", [513, 16 * 10**6, 32.5, "a"])
def test_a_view_that_fills_the_memory(make_checkpoint, refused, voxels):
    path, _ = make_checkpoint()
    stored = torch.load(path, weights_only=True)
    stored["mim_config"]["view_size"] = [voxels] * 3
    torch.save(stored, path)
    assert "view_size must be three whole numbers of at most 512 voxels" in refused(load_checkpoint, path)


@pytest.mark.parametrize("record", ["weights", "pickle"])
def test_a_flipped_bit(make_checkpoint, refused, record):
    path, _ = make_checkpoint()
    with zipfile.ZipFile(path) as archive:
        entry = max((e for e in archive.infolist() if ("data.pkl" in e.filename) == (record == "pickle")),
                    key=lambda e: e.file_size)  # fmt: skip
    content = bytearray(path.read_bytes())
    content[entry.header_offset + len(content[: entry.file_size]) // 2 + 200] ^= 1
    path.write_bytes(content)
    assert "has another checksum" in refused(load_checkpoint, path)


def rewritten(path, change=lambda name, content: content, compression=zipfile.ZIP_STORED):
    """The file with every record changed, its checksums right."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    return path


def test_a_zip_bomb(make_checkpoint, refused):
    path, _ = make_checkpoint()
    zeros = bytes(50 * 2**20)
    rewritten(path, lambda name, content: zeros if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10 * 2**20
    assert "claims to hold" in refused(load_checkpoint, path)


def test_records_that_lie_on_each_other(make_checkpoint, refused):
    """Many entries of the directory name the same bytes: no compression is needed for a bomb."""
    path = make_checkpoint()[0]
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(50):
            again = zipfile.ZipInfo(f"x/data/{number}")
            again.header_offset, again.CRC = largest.header_offset, largest.CRC
            again.file_size = again.compress_size = largest.file_size
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    assert "claims to hold" in refused(load_checkpoint, path)


@pytest.mark.parametrize("what", ["storage", "shape"])
def test_a_pickle_that_claims_more_than_the_file_holds(changed, refused, what):
    path = changed(torch.ones(12))
    for_storage, for_shape = b"K\x0ct", b"K\x0c\x85"  # 12 as the number of values of a storage, and as a shape
    old = for_storage if what == "storage" else for_shape
    claimed = b"\x8a\x06" + (10**12).to_bytes(6, "little") + old[2:]

    def change(name, content):
        if not name.endswith("data.pkl"):
            return content
        place = content.index(old, content.index(NAME.encode()))
        return content[:place] + claimed + content[place + len(old) :]

    line = refused(load_checkpoint, rewritten(path, change))
    assert ("claim more bytes" if what == "storage" else "is no readable checkpoint") in line


def test_the_format_before_pytorch_1_6(make_checkpoint, refused):
    path, _ = make_checkpoint()
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert "load and save an older file with PyTorch where you trust it" in refused(load_checkpoint, path)
    assert "since PyTorch 1.6" in refused(read_published, path)


@pytest.mark.parametrize("shape", ["deep", "wide"])
def test_containers_that_explode_when_they_are_read(make_checkpoint, refused, shape):
    path, _ = make_checkpoint()
    nested = []
    for _ in range(100 if shape == "deep" else 30):
        nested = [nested] if shape == "deep" else [nested] * 10
    stored = torch.load(path, weights_only=True)
    stored["provenance"]["note"] = nested
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    path.write_bytes(buffer.getvalue())
    assert "nested too deep or too large" in refused(load_checkpoint, path)


def test_every_command_refuses_it_in_one_line(changed, tmp_path, capsys):
    path = str(changed(nan()))
    out = str(tmp_path / "out")
    assert mim_inspect([path]) == mim_export([path, "-o", out]) == mim_convert([path, "-o", f"{out}.pth"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"error: {path}: tensor network_weights.{NAME} holds NaN") for line in lines)


@pytest.fixture
def exported(make_checkpoint, tmp_path):
    """Folder of mim_export; its JSON header of safetensors is changed by header(change)."""
    path, _ = make_checkpoint()
    stored = torch.load(path, weights_only=True)
    stored["provenance"] |= {"loss_history": [], "plans_name": "p", "configuration": "3d_fullres", "fold": 0}
    torch.save(stored, path)
    folder = tmp_path / "shared"
    assert mim_export([str(path), "-o", str(folder)]) == 0

    def change(header=lambda header: header, length=None):
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        new = json.dumps(header(json.loads(content[8 : 8 + size]))).encode()
        content = struct.pack("<Q", length or len(new)) + new + content[8 + size :]
        (folder / WEIGHTS).write_bytes(content)
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "sha256": sha256(content).hexdigest()}))
        return folder

    return change


def test_a_header_of_safetensors_that_claims_more_than_the_file_holds(exported, refused):
    load_checkpoint(exported())

    def larger(header):
        entry = max((e for e in header.values() if "data_offsets" in e), key=lambda e: e["data_offsets"][1])
        entry["data_offsets"][1] += 4 * 10**12
        entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4]
        return header

    assert "is no readable export" in refused(load_checkpoint, exported(larger))


@pytest.mark.parametrize("length", [2**62, 2**33])
def test_a_header_of_safetensors_longer_than_the_file(exported, refused, length):
    assert "is no readable export" in refused(load_checkpoint, exported(length=length))


@pytest.mark.parametrize(("dtype", "message"), [("I32", "is of torch.int32"), ("F8_E4M3", "is no readable export")])
def test_safetensors_of_another_kind(exported, refused, dtype, message):
    def change(header):
        header[NAME]["dtype"] = dtype
        return header

    assert message in refused(load_checkpoint, exported(change))


def test_pickle_of_the_content_alone(tmp_path, refused):
    path = tmp_path / "plain.pth"
    path.write_bytes(pickle.dumps({"network_weights": {}}))
    assert "no zip archive" in refused(load_checkpoint, path)
