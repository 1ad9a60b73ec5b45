from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_mim.checkpoint.fingerprint import FINGERPRINT_SHAPE, to_text
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.pretraining.data import case_index
from nnunet_mim.pretraining.data import crops as dataset_module
from nnunet_mim.pretraining.data.case_index import CaseIndex, CaseInfo, read_index, write_index
from nnunet_mim.pretraining.data.crops import CropDataset, UnreadCases, _open_voxels, dataset_shares, read_crop
from nnunet_mim.pretraining.data.run_data import index_sources


def cases_of(number=900):
    return index_sources([find_source(str(number), "tinyPlans", "3d_fullres")])[0]


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
        assert dataset.case_of(i) == again.case_of(i)
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
    cases = cases_of()

    def share(body_fraction):
        dataset = CropDataset(cases, (32, 32, 32), body_fraction, seed=1)
        return np.mean([float((dataset[i][0] > -2).any()) for i in range(60)])

    assert share(1.0) == 1.0
    assert share(0.0) < 0.5


def test_mirroring_flips_crop_and_valid_box_together(write_dataset):
    write_dataset(n=1, shape=(24, 40, 40))
    cases = cases_of()
    plain = CropDataset(cases, (48, 32, 32), mirror_axes=(), seed=0)
    mirrored = CropDataset(cases, (48, 32, 32), mirror_axes=(0,), seed=0)
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
    cases, asked, original = cases_of(), [], dataset_module._open_voxels

    class Recorder:
        def __init__(self, data):
            assert not isinstance(data, np.ndarray), "the whole case has been decompressed"
            self.data = data

        def __getitem__(self, box):
            asked.append(self.data[box].shape)
            return self.data[box]

    monkeypatch.setattr(dataset_module, "_open_voxels", lambda case: Recorder(original(case)))
    CropDataset(cases, (32, 16, 32))[0]
    assert asked == [(1, 32, 16, 32)]


@pytest.mark.parametrize("storage", ["b2nd", "npz"])
def test_voxels_are_those_of_nnunets_class(write_dataset, storage):
    write_dataset(n=1, storage=storage)
    (case,) = cases_of()
    assert np.array_equal(_open_voxels(case)[:], voxels_of(case))


def test_another_case_takes_the_place_of_one_that_breaks_after_the_check(write_dataset):
    """All crops but those of the broken case stay what they were; the broken one is named once."""
    folder = write_dataset(n=4)
    cases = cases_of()
    dataset = CropDataset(cases, (32, 32, 32))
    before = [dataset[i] for i in range(20)]
    drawn = [dataset.case_of(i).info.case for i in range(20)]
    (folder / "case_01.b2nd").write_bytes(b"no blosc")
    after = [dataset[i] for i in range(20)]
    unread, new = UnreadCases(cases), []
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        broken = drawn[i] == "case_01"
        assert (dataset.case_of(i).info.case == drawn[i]) != broken, "the case is named that the crop is cut from"
        assert (b[2] >= 0).any() == broken
        assert torch.equal(a[0], b[0]) != broken
        assert torch.isfinite(b[0]).all()
        new += unread.add(b[2][None])
    assert new == ["Dataset900_Tiny case_01"]
    assert unread.failed >= drawn.count("case_01") > 0
    assert all(torch.equal(a[0], dataset[i][0]) for i, a in enumerate(after)), "again the same"


def test_a_case_that_has_become_smaller_counts_as_unreadable(write_dataset, save_case):
    folder = write_dataset(n=1)
    (case,) = cases_of()
    save_case(folder, "case_00", np.zeros((1, 20, 20, 20), np.float32))
    with pytest.raises(MiMError, match=r"case_00\.b2nd as it was when the run began"):
        read_crop(case, np.array([0, 0, 0]), np.array([32, 32, 32]))


def test_nothing_that_can_be_read_is_an_error_that_names_a_file(write_dataset):
    folder = write_dataset(n=2)
    cases = cases_of()
    for path in folder.glob("*.b2nd"):
        path.unlink()
    with pytest.raises(MiMError, match=r"20 cases in a row cannot be read; cannot read .*case_0\d\.b2nd"):
        CropDataset(cases, (32, 32, 32))[0]


def test_share_of_datasets_by_temperature():
    assert dataset_shares(np.array([300, 100]), 1.0) == pytest.approx([0.75, 0.25])
    assert dataset_shares(np.array([900, 100]), 2.0) == pytest.approx([0.75, 0.25])
    assert dataset_shares(np.array([900, 0, 100]), 1e9) == pytest.approx([0.5, 0, 0.5])


def test_crops_come_from_each_dataset_by_its_share_and_from_each_case_alike(write_dataset):
    write_dataset(n=9, shape=(24, 24, 24), number=900)
    write_dataset(n=1, shape=(24, 24, 24), number=950)
    cases, _ = index_sources([find_source(str(n), "tinyPlans", "3d_fullres") for n in (900, 950)])
    dataset = CropDataset(cases, (16, 16, 16), temperature=2.0)
    numbers = range(4000)
    counts = dataset.counts(numbers)
    assert counts == {"Dataset900_Tiny": counts["Dataset900_Tiny"], "Dataset950_Tiny": 4000 - counts["Dataset900_Tiny"]}
    assert counts["Dataset950_Tiny"] == pytest.approx(1000, abs=120)  # 4 standard deviations
    drawn = Counter(dataset.case_of(i).info.case for i in numbers if dataset.case_of(i).source.dataset[7:10] == "900")
    assert min(drawn.values()) > 333 - 75
    assert max(drawn.values()) < 333 + 75
    assert sum(drawn.values()) == counts["Dataset900_Tiny"]


def test_the_index_is_cached_until_a_file_changes(write_dataset, save_case, monkeypatch):
    folder = write_dataset(n=3)
    source = find_source("900", "tinyPlans", "3d_fullres")
    first, bad = read_index(source)
    assert bad == {}
    described = []
    original = case_index._describe_case
    monkeypatch.setattr(case_index, "_describe_case", lambda s, c: described.append(c) or original(s, c))
    assert list(read_index(source)[0]) == list(first)
    assert described == []
    save_case(folder, "case_01", np.ones((1, 20, 20, 20), dtype=np.float32))
    changed, _ = read_index(source)
    assert described == ["case_01"]
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False, True]
    assert set(folder.iterdir()) == set(folder.glob("case_*")), "nothing may be added to nnU-Net's folder"


def test_a_trusted_index_asks_for_no_file_that_it_describes(write_dataset, save_case, monkeypatch):
    folder = write_dataset(n=3)
    source = find_source("900", "tinyPlans", "3d_fullres")
    first, _ = read_index(source)
    write_index(source, [*list(first)[:2], replace(first[2], fingerprint=None)])  # as before there were any
    save_case(folder, "case_01", np.ones((1, 20, 20, 20), dtype=np.float32))
    save_case(folder, "case_03", np.ones((1, 20, 20, 20), dtype=np.float32))
    source = find_source("900", "tinyPlans", "3d_fullres")
    asked = []
    original = type(source).file_stamp
    monkeypatch.setattr(type(source), "file_stamp", lambda self, case: asked.append(case) or original(self, case))
    trusted, bad = read_index(source, trusted=True)
    assert set(asked) == {"case_02", "case_03"}
    assert list(trusted.names) == [f"case_0{i}" for i in range(4)]
    assert bad == {}
    assert trusted[1] == first[1]
    assert read_index(source)[0][1] != first[1], "without trust the file is read again"


def test_a_changed_case_of_a_trusted_index_is_noticed_when_it_is_read(write_dataset, save_case):
    folder = write_dataset(n=2)
    index_sources([find_source("900", "tinyPlans", "3d_fullres")])
    save_case(folder, "case_01", np.ones((1, 20, 20, 20), dtype=np.float32))
    cases, _ = index_sources([find_source("900", "tinyPlans", "3d_fullres")], trust_index=True)
    with pytest.raises(MiMError, match="case_01"):
        read_crop(cases[1], np.array([0, 0, 0]), np.array([8, 8, 8]))


def test_the_index_gives_back_what_was_put_in(write_dataset):
    points = tuple((i, 2 * i, 500 + i) for i in range(case_index.N_BODY_POINTS))
    rows = np.arange(np.prod(FINGERPRINT_SHAPE)).astype(np.int8).reshape(FINGERPRINT_SHAPE)
    infos = [
        CaseInfo("b", (10, 20, 30), "ab" * 32, (-4.0, 0.1), (4.0, 7.25), points, "", to_text(rows)),
        CaseInfo("a_with_a_longer_name", (1, 2, 3000), "00" * 32, (-1.5, 0.0), (2.0, 0.0), (), "", ""),
    ]
    index = CaseIndex.of(infos, channels=2)
    assert list(index) == infos
    assert list(index.take([1])) == infos[1:]
    write_dataset(n=2)
    source = find_source("900", "tinyPlans", "3d_fullres")
    known, _ = read_index(source)
    source.index_file.unlink()
    write_index(source, list(known)[::-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case_index, "_describe_case", lambda *_: pytest.fail("read again"))
        assert list(read_index(source)[0]) == list(known)


def test_an_index_without_fingerprints_is_made_anew_and_keeps_the_hashes_of_images(write_dataset, monkeypatch):
    write_dataset(n=2)
    source = find_source("900", "tinyPlans", "3d_fullres")
    known = [replace(info, image_sha256="ab" * 32) for info in read_index(source)[0]]
    assert all(info.fingerprint for info in known)
    write_index(source, known)
    with np.load(source.index_file) as stored:
        values = {name: stored[name] for name in stored.files if name != "fingerprints"}
    np.savez(source.index_file, **values | {"version": 3})
    assert list(read_index(source)[0]) == known
    monkeypatch.setattr(case_index, "_describe_case", lambda *_: pytest.fail("read again"))
    assert list(read_index(source)[0]) == known


def test_a_case_that_an_earlier_version_has_prepared_is_read_once_more(write_dataset):
    write_dataset(n=1)
    source = find_source("900", "tinyPlans", "3d_fullres")
    (known,), _ = read_index(source)
    write_index(source, [replace(known, fingerprint=None)])
    assert list(read_index(source)[0]) == [known]


@pytest.fixture
def vanished(write_dataset):
    """A dataset of three cases of which the last one is gone since the index was made."""
    folder = write_dataset(n=3)
    read_index(find_source("900", "tinyPlans", "3d_fullres"))
    for path in folder.glob("case_02*"):
        path.unlink()
    return find_source("900", "tinyPlans", "3d_fullres")


def test_a_vanished_case_is_named_once(vanished):
    index, bad = read_index(vanished)
    assert list(index.names) == ["case_00", "case_01"]
    assert list(bad) == ["case_02"]
    assert "case_02.b2nd has vanished" in bad["case_02"]
    assert read_index(vanished)[1] == {}


def test_a_vanished_case_is_named_every_time_where_that_is_an_error(vanished):
    for _ in range(2):
        with pytest.raises(MiMError, match=r"case_02.*has vanished"):
            index_sources([vanished], strict=True)
    assert len(index_sources([vanished])[0]) == 2


def test_an_index_of_other_channels_is_made_anew(write_dataset):
    write_dataset(n=1)
    source = find_source("900", "tinyPlans", "3d_fullres")
    known, _ = read_index(source)
    two = [replace(info, low=(0.0, 0.0), high=(1.0, 1.0)) for info in known]
    write_index(replace(source, normalization=("CTNormalization",) * 2), two)
    assert list(read_index(source)[0]) == list(known)


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 half a zip"])
def test_a_damaged_index_is_made_anew(write_dataset, content):
    write_dataset(n=2)
    source = find_source("900", "tinyPlans", "3d_fullres")
    first, _ = read_index(source)
    source.index_file.write_bytes(content)
    assert list(read_index(source)[0]) == list(first)
