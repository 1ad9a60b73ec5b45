"""Validation cases that a pretraining has seen, under another name, in another file and in other units."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.benchmarking import guard
from nnunet_mim.benchmarking.bench_file import ArmSpec
from nnunet_mim.benchmarking.cell import Arm
from nnunet_mim.benchmarking.guard import Findings, look_for_seen_cases, provenance_of, refuse_seen_cases, seen_cases
from nnunet_mim.benchmarking.matrix import Place
from nnunet_mim.checkpoint.fingerprint import fingerprint, to_text
from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.intensities import Intensities
from nnunet_mim.system import guarded

WIDE, NARROW = (
    {"0": {"percentile_00_5": low, "percentile_99_5": high, "mean": 0.0, "std": 100.0, "min": low, "max": high,
           "median": 0.0}}
    for low, high in ((-1000.0, 1000.0), (-100.0, 160.0))
)  # fmt: skip
READER = "SimpleITKIOWithReorient"
OLD = "no case of the pretraining has a fingerprint, so only exact copies were looked for"
"""of checkpoints of before there were fingerprints"""


def plans_of(spacing, intensity):
    resampling = {}
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        options = {"is_seg": kind == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        resampling |= {
            f"resampling_fn_{kind}": "resample_data_or_seg_to_shape", f"resampling_fn_{kind}_kwargs": options
        }  # fmt: skip
    configuration = {
        "spacing": spacing, "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "architecture": {}, "patch_size": [8, 8, 8], **resampling,
    }  # fmt: skip
    return {
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "image_reader_writer": READER,
        "foreground_intensity_properties_per_channel": intensity, "configurations": {"3d_fullres": configuration},
    }  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """Images are read in this process, which is faster."""

    def guarded_map(function, items, *_):
        yield from ((index, guarded._outcome(function, item)) for index, item in enumerate(items))

    monkeypatch.setattr(guard, "guarded_map", guarded_map)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """nnUNet_raw with a dataset of three images."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    folder = tmp_path / "raw" / "Dataset002_Test"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number, case in enumerate("abc"):
        voxels = np.random.default_rng(number).integers(-900, 900, (9, 10, 11)).astype(np.int16)
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((2.0, 2.0, 3.0))
        sitk.WriteImage(image, str(folder / "imagesTr" / f"{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.Cast(image > 0, sitk.sitkUInt8), str(folder / "labelsTr" / f"{case}.nii.gz"))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, "numTraining": 3,
               "file_ending": ".nii.gz"}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def units_of(plans):
    return Intensities(("CTNormalization",), plans["foreground_intensity_properties_per_channel"])


def prepared(path, plans):
    """Preprocessed by nnU-Net itself."""
    manager = PlansManager(plans)
    reader = manager.image_reader_writer_class()
    data, properties = reader.read_images([str(path)])
    configuration = manager.get_configuration("3d_fullres")
    return DefaultPreprocessor(verbose=False).run_case_npy(data, None, properties, manager, configuration, {})[0]


@pytest.fixture
def arm(raw, tmp_path, here):
    """arm(plans): the dataset preprocessed with these plans."""

    def make(plans):
        folder = tmp_path / f"preprocessed_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for case in "abc":
            data = prepared(raw / "imagesTr" / f"{case}_0000.nii.gz", plans)
            nnUNetDatasetBlosc2.save_case(data, np.zeros_like(data, np.int8), {}, str(folder / case))
        source = SimpleNamespace(
            dataset="Dataset002_Test", plans_name="P", configuration="3d_fullres", folder=folder, plans=plans,
            dataset_class=nnUNetDatasetBlosc2,
            intensities=units_of(plans), spacing=plans["configurations"]["3d_fullres"]["spacing"],
        )  # fmt: skip
        return Arm(ArmSpec("MiM", "nnUNetTrainerMiM"), source, str(tmp_path / "a.pth"))

    return make


def provenance(plans, *records):
    return {
        "cases": [{"dataset": "Dataset001_Pre", "case": f"case_{i}", **record} for i, record in enumerate(records)],
        "spacing": plans["configurations"]["3d_fullres"]["spacing"], "normalization": ["CTNormalization"],
        "intensity_properties": plans["foreground_intensity_properties_per_channel"], "configuration": "3d_fullres",
        "transpose_forward": [0, 1, 2], "image_reader_writer": READER,
    }  # fmt: skip


@pytest.fixture
def resaved(raw, tmp_path):
    """Image b under another name, as floating-point numbers in another format and with its axes turned."""
    image = sitk.ReadImage(str(raw / "imagesTr" / "b_0000.nii.gz"))
    turned = sitk.DICOMOrient(sitk.Cast(image, sitk.sitkFloat32), "RSA")
    sitk.WriteImage(turned, str(tmp_path / "patient_77.mha"))
    return tmp_path / "patient_77.mha"


def test_a_renamed_and_resaved_copy_in_the_same_units(arm, resaved):
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    seen = provenance(plans, {"sha256": voxel_sha256(prepared(resaved, plans))}, {"sha256": "0" * 64})
    assert seen_cases(seen, arm(plans), tuple("abc")) == Findings(("b",), note=OLD)


def test_in_other_units_the_image_is_prepared_as_the_pretraining_did(arm, resaved, raw):
    before, now = plans_of([4.0, 2.5, 2.5], WIDE), plans_of([3.0, 2.0, 2.0], NARROW)
    seen = provenance(before, {"sha256": voxel_sha256(prepared(resaved, before))})
    now_prepared = arm(now)
    assert seen_cases(seen, now_prepared, tuple("abc")) == Findings(("b",), note=OLD)
    (raw / "dataset.json").unlink()
    found = seen_cases(seen, now_prepared, tuple("abc"))
    assert found.seen == ()
    assert found.unknown.startswith("3 images are not in nnUNet_raw (a first)")


def test_a_spacing_that_is_nearly_the_same(arm, resaved):
    """Units count as equal up to 2 %; hashes of voxels differ with any difference."""
    before, now = plans_of([3.0, 2.0, 2.0], WIDE), plans_of([3.0, 2.03, 2.0], WIDE)
    seen = provenance(before, {"sha256": voxel_sha256(prepared(resaved, before))})
    assert seen_cases(seen, arm(now), tuple("abc")) == Findings(("b",), note=OLD)


def test_the_hash_of_the_image_where_mim_prepare_has_kept_it(arm, resaved):
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    reader = PlansManager(plans).image_reader_writer_class()
    image = voxel_sha256(reader.read_images([str(resaved)])[0])
    seen = provenance(plans, {"sha256": "1" * 64, "image_sha256": image})  # resampled by other code: another hash
    assert seen_cases(seen, arm(plans), tuple("abc")) == Findings(("b",), note=OLD)


def test_other_cases_are_not_seen(arm):
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    others = provenance(plans, {"sha256": "1" * 64, "image_sha256": "2" * 64})
    assert seen_cases(others, arm(plans), tuple("abc")) == Findings(note=OLD)
    named = provenance(plans, {"sha256": "1" * 64, "dataset": "Dataset002_Test", "case": "c"})
    assert seen_cases(named, arm(plans), tuple("abc")) == Findings(("c",), note=OLD)


def changed_copies(image, voxels):
    """Name → a copy of an image with these voxels that the hashes do not find."""

    def like(changed, spacing=(4.5, 4.5, 4.5)):
        copy = sitk.GetImageFromArray(np.ascontiguousarray(changed))
        copy.SetSpacing(spacing)
        return copy

    one = voxels.copy()
    one[30, 30, 30] += 1
    noise = np.random.default_rng(0).normal(size=voxels.shape)
    half = sitk.Resample(image, [n // 2 for n in image.GetSize()], sitk.Transform(), sitk.sitkLinear,
                         image.GetOrigin(), [2 * s for s in image.GetSpacing()])  # fmt: skip
    return {
        "header spacing": like(voxels, (4.5, 4.5, 6.0)),
        **{f"mirrored along {axis}": like(np.flip(voxels, axis)) for axis in range(3)},
        "one voxel by 1 HU": like(one),
        "crop of two voxels": like(voxels[1:-1, 1:-1, 1:-1]),
        "one slice less": like(voxels[:-1]),
        "padding": like(np.pad(voxels, 5, constant_values=-1024)),
        "resampling": half,
        "noise of 1 HU": like(voxels + noise),
        "rounding": like(voxels.astype(np.float16) + np.float32(0.01)),
        "HU offset": like(voxels + 10),
        "axes transposed": like(voxels.transpose(2, 0, 1)),
        "another orientation code": sitk.DICOMOrient(like(voxels), "SAR"),
    }


def test_changed_copies_are_probably_the_same(raw, arm, tmp_path):
    """Of bodies; the pretraining has another spacing and a wider window than the validation cases."""
    for number, case in enumerate("abc"):
        voxels = make_phantom(number, (64, 64, 64))[0]
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((4.5, 4.5, 4.5))
        sitk.WriteImage(image, str(raw / "imagesTr" / f"{case}_0000.nii.gz"))
    before, now = plans_of([4.5, 4.5, 4.5], WIDE), plans_of([5.0, 5.0, 5.0], NARROW)
    made = arm(now)
    missed = []
    for name, copy in changed_copies(image, voxels).items():
        sitk.WriteImage(copy, str(tmp_path / "copy.mha"))
        rows = fingerprint(prepared(tmp_path / "copy.mha", before), units_of(before), [4.5, 4.5, 4.5])
        record = {"sha256": "1" * 64, "fingerprint": to_text(rows)}
        if seen_cases(provenance(before, record), made, ("b", "c")) != Findings((), "", {"c": "Dataset001_Pre case_0"}):
            missed.append(name)
    assert missed == []


@pytest.mark.parametrize("lacks", ["pretraining", "validation"])
def test_what_has_no_fingerprint_is_said(arm, lacks):
    """The images are small; their voxels are compared all the same."""
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    rows = to_text(np.ones((2, 455), np.int8)) if lacks == "validation" else ""
    found = seen_cases(provenance(plans, {"sha256": "1" * 64, "fingerprint": rows}), arm(plans), tuple("abc"))
    assert found.seen == ()
    expected = {"pretraining": "no case of the pretraining has", "validation": "3 validation cases (a first) have no"}
    assert found.note.startswith(expected[lacks])


def test_the_refusal_says_which_case_is_like_which():
    likely = Findings(probably_same={"b": "Dataset001_Pre case_7"})
    with pytest.raises(MiMError, match=r"seen 1 of .* b first \(b is probably the same as Dataset001_Pre case_7\): "):
        refuse_seen_cases({("Dataset002_Test", 3, "MiM"): likely})


@pytest.mark.parametrize("content", [None, {}, {"cases": []}])
def test_a_checkpoint_that_does_not_say_what_it_has_seen(arm, content):
    found = seen_cases(content, arm(plans_of([3.0, 2.0, 2.0], WIDE)), tuple("abc"))
    assert found == Findings((), "the checkpoint does not say which cases it was trained on")


def test_what_a_checkpoint_says(tmp_path):
    torch.save({"provenance": {"cases": []}}, tmp_path / "a.pth")
    torch.save({"network_weights": {}}, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"something else")
    assert provenance_of(tmp_path / "a.pth") == {"cases": []}
    assert provenance_of(tmp_path / "b.pth") is None
    assert provenance_of(tmp_path / "c.pth") is None


@pytest.mark.parametrize("cases", [[1], [{"dataset": "D", "case": "c"}], "abc"])
def test_a_checkpoint_that_says_what_cannot_be(tmp_path, cases):
    torch.save({"provenance": {"cases": cases}}, tmp_path / "a.pth")
    with pytest.raises(MiMError, match=r"a\.pth, provenance"):
        provenance_of(tmp_path / "a.pth")


def test_a_checkpoint_that_does_not_say_its_units(arm):
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    before = provenance(plans, {"sha256": "1" * 64})
    del before["normalization"]
    found = seen_cases(before, arm(plans), ("a",))
    assert found.unknown == "the checkpoint does not say how to prepare images for it"


@pytest.mark.skipif(sys.platform != "linux", reason="pipes, and limits on memory")
def test_images_that_cannot_be_read_are_named_and_the_others_compared(raw, arm, resaved, monkeypatch):
    """In a worker process."""
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    made = arm(plans)
    monkeypatch.setattr(guard, "guarded_map", guarded.guarded_map)
    path = raw / "imagesTr" / "a_0000.nii.gz"
    path.unlink()
    os.mkfifo(path)
    (raw / "imagesTr" / "c_0000.nii.gz").write_bytes(b"nothing")
    other = plans_of([1.5, 1.5, 1.5], WIDE)
    sha256 = voxel_sha256(prepared(resaved, other))
    found = seen_cases(provenance(other, {"sha256": sha256}), made, tuple("abc"))
    assert found.same == ("b",)
    pipe, damaged = found.unknown.split("; ")
    assert pipe == "1 images are not in nnUNet_raw (a first), their preprocessed voxels are new"
    assert damaged.startswith("1 images cannot be read (c first, damaged (")


def test_a_file_of_findings_that_is_damaged_is_made_anew(arm, tmp_path):
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    torch.save({"provenance": provenance(plans, {"sha256": "1" * 64})}, tmp_path / "a.pth")
    place = Place("Dataset002_Test", 0, "all", 0, "MiM")
    matrix = SimpleNamespace(
        bench=SimpleNamespace(output=tmp_path / "out"),
        cells={place: SimpleNamespace(arm=arm(plans), val_cases=tuple("abc"))},
    )
    expected = look_for_seen_cases(matrix)
    file = tmp_path / "out" / "seen.json"
    (key,) = json.loads(file.read_text())
    for content in ({key: {"same": 3}}, {key: None}, [key], {key: {"same": [3]}}):
        file.write_text(json.dumps(content))
        assert look_for_seen_cases(matrix) == expected


def test_seen_cases_are_refused_by_name():
    place = ("Dataset002_Test", 3, "MiM")
    refuse_seen_cases({place: Findings(unknown="who knows")})
    with pytest.raises(
        MiMError, match=r"arm MiM has seen 2 of the validation cases of Dataset002_Test fold 3, a first: "
    ):
        refuse_seen_cases({place: Findings(("a", "b"))})


def test_looked_for_once(arm, tmp_path, monkeypatch):
    plans = plans_of([3.0, 2.0, 2.0], WIDE)
    made = arm(plans)
    torch.save({"provenance": provenance(plans, {"sha256": "1" * 64})}, tmp_path / "a.pth")
    place, control = (Place("Dataset002_Test", 0, "all", 0, arm) for arm in ("MiM", "Scratch"))
    scratch = SimpleNamespace(arm=SimpleNamespace(checkpoint=None), val_cases=("a",))
    matrix = SimpleNamespace(
        bench=SimpleNamespace(output=tmp_path / "out"),
        cells={place: SimpleNamespace(arm=made, val_cases=tuple("abc")), control: scratch},
    )  # fmt: skip
    expected = {("Dataset002_Test", 0, "MiM"): Findings(note=OLD), ("Dataset002_Test", 0, "Scratch"): Findings()}
    assert look_for_seen_cases(matrix) == expected
    monkeypatch.setattr(guard, "seen_cases", lambda *_: pytest.fail("looked again"))
    assert look_for_seen_cases(matrix) == expected
    torch.save({"provenance": {"cases": []}, "other": 1}, tmp_path / "a.pth")
    del made.__dict__["identity"]  # another process
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        look_for_seen_cases(matrix)


@pytest.mark.parametrize("name", ["np", "join", "Nothing", "../x"])
def test_only_a_reader_of_nnunet_is_made(name, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(guard, "recursive_find_reader_writer_by_name", lambda _: pytest.fail("looked it up"))
        with pytest.raises(MiMError, match="nnU-Net has no image reader"):
            guard._reader(name)
    assert type(guard._reader("SimpleITKIO")).__name__ == "SimpleITKIO"
