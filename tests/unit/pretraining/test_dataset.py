import numpy as np
import pytest
import torch

from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining import case_index
from nnunet_mim.pretraining.case_index import read_index
from nnunet_mim.pretraining.dataset import Case, CropDataset, read_crop
from nnunet_mim.pretraining.run import index_sources
from nnunet_mim.pretraining.sources import find_source


def cases_of(number=900):
    source = find_source(str(number), "tinyPlans", "3d_fullres")
    return [Case(source, info) for info in index_sources([source])[0]]


def voxels_of(case):
    return np.asarray(
        case.source.dataset_class(str(case.source.folder), [case.info.case]).load_case(case.info.case)[0][:]
    )


@pytest.mark.parametrize("storage", ["b2nd", "npz"])
def test_a_crop_holds_the_voxels_of_its_box_and_zero_outside(write_dataset, storage):
    write_dataset(n=1, shape=(30, 40, 50), storage=storage)
    (case,) = cases_of()
    volume = voxels_of(case)[0]
    start, size = np.array([-5, 10, 20]), np.array([48, 16, 48])
    crop, valid = read_crop(case, start, size)
    assert crop.shape == (1, 48, 16, 48)
    assert valid.tolist() == [[5, 35], [0, 16], [0, 30]]
    for z in range(48):
        for y in range(16):
            for x in range(0, 48, 7):
                zz, yy, xx = z + start[0], y + start[1], x + start[2]
                inside = 0 <= zz < 30 and 0 <= yy < 40 and 0 <= xx < 50
                assert crop[0, z, y, x] == (volume[zz, yy, xx] if inside else 0)


def test_npz_and_b2nd_give_the_same_crops(write_dataset):
    write_dataset(n=3, storage="b2nd", number=900)
    folder = write_dataset(n=3, storage="npz", number=901)
    first, second = cases_of(900), cases_of(901)
    assert [c.source.case_file(c.info.case).suffix for c in second] == [".npy"] * 3, "npz must have been unpacked"
    # other phantoms in 901: write the voxels of 900 there
    for a, b in zip(first, second, strict=True):
        np.save(folder / f"{b.info.case}.npy", voxels_of(a))
    second = cases_of(901)
    assert [a.info.sha256 for a in first] == [b.info.sha256 for b in second]
    one, two = CropDataset(first, (32, 32, 32), seed=3), CropDataset(second, (32, 32, 32), seed=3)
    for i in range(10):
        assert torch.equal(one[i][0], two[i][0])
        assert torch.equal(one[i][1], two[i][1])


def test_a_crop_depends_on_seed_and_number_only(write_dataset):
    write_dataset(n=4)
    cases = cases_of()
    dataset = CropDataset(cases, (32, 32, 32), seed=7)
    again = CropDataset(cases, (32, 32, 32), seed=7)
    forward = [dataset[i] for i in range(6)]
    for i in reversed(range(6)):
        assert torch.equal(forward[i][0], again[i][0])
        assert forward[i][2] == again[i][2]
    other = CropDataset(cases, (32, 32, 32), seed=8)
    assert any(not torch.equal(forward[i][0], other[i][0]) for i in range(6))
    held_out = CropDataset(cases, (32, 32, 32), seed=7, stream=1)
    assert any(not torch.equal(forward[i][0], held_out[i][0]) for i in range(6))


def test_crops_prefer_the_body(write_dataset, save_case):
    folder = write_dataset(n=1, shape=(24, 24, 24))
    case = cases_of()[0]
    # a volume of air with a small body in one corner
    volume = np.full((1, 128, 128, 128), -4.0, dtype=np.float32)
    volume[:, 100:120, 100:120, 100:120] = 0.2
    save_case(folder, case.info.case, volume)
    case = cases_of()[0]

    def share(body_fraction):
        dataset = CropDataset([case], (32, 32, 32), body_fraction, seed=1)
        return np.mean([float((dataset[i][0] > -2).any()) for i in range(60)])

    assert share(1.0) == 1.0
    assert share(0.0) < 0.5


def test_mirroring_flips_crop_and_valid_box_together(write_dataset):
    write_dataset(n=1, shape=(24, 40, 40))
    case = cases_of()[0]
    plain = CropDataset([case], (48, 32, 32), mirror_axes=(), seed=0)
    mirrored = CropDataset([case], (48, 32, 32), mirror_axes=(0,), seed=0)
    flipped = 0
    for i in range(12):
        a, valid_a, _ = plain[i]
        b, valid_b, _ = mirrored[i]
        if torch.equal(a, b):
            continue
        flipped += 1
        assert torch.equal(a.flip(1), b)
        assert valid_b[0].tolist() == [48 - valid_a[0, 1], 48 - valid_a[0, 0]]
        assert torch.equal(valid_a[1:], valid_b[1:])
    assert 0 < flipped < 12


def test_only_the_crop_is_read(write_dataset, monkeypatch):
    """A case is opened lazily and asked for the crop's box, never for the whole volume."""
    write_dataset(n=1, shape=(64, 64, 64))
    case = cases_of()[0]
    asked = []
    original = case.source.dataset_class.load_case

    class Recorder:
        def __init__(self, data):
            assert not isinstance(data, np.ndarray), "the whole case has been decompressed"
            self.data = data

        def __getitem__(self, box):
            asked.append(self.data[box].shape)
            return self.data[box]

    def recorded(self, identifier):
        data, *rest = original(self, identifier)
        return Recorder(data), *rest

    monkeypatch.setattr(case.source.dataset_class, "load_case", recorded)
    CropDataset([case], (32, 16, 32))[0]
    assert asked == [(1, 32, 16, 32)]


def test_a_case_that_breaks_after_the_check_is_named(write_dataset):
    folder = write_dataset(n=1)
    case = cases_of()[0]
    (folder / "case_00.b2nd").write_bytes(b"no blosc")
    with pytest.raises(MiMError, match=r"case_00\.b2nd"):
        CropDataset([case], (32, 32, 32))[0]


def test_the_index_is_cached_until_a_file_changes(write_dataset, save_case, monkeypatch):
    folder = write_dataset(n=3)
    source = find_source("900", "tinyPlans", "3d_fullres")
    first = read_index(source)
    described = []
    original = case_index.describe_case
    monkeypatch.setattr(case_index, "describe_case", lambda s, c: described.append(c) or original(s, c))
    assert read_index(source) == first
    assert described == []
    save_case(folder, "case_01", np.ones((1, 20, 20, 20), dtype=np.float32))
    changed = read_index(source)
    assert described == ["case_01"]
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False, True]
    assert set(folder.iterdir()) == set(folder.glob("case_*")), "nothing may be added to nnU-Net's folder"
