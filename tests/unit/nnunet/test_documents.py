"""nnU-Net's JSON files: what is refused, in one line that names the field; nothing mistyped gets through."""

import contextlib
import io
import json
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing import normalization

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.components import known
from nnunet_mim.nnunet.documents import read_dataset_json, read_fingerprint, read_plans
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.preparation.cli import main
from nnunet_mim.trainers.resolve_plans import resolve_plans

DATASET = "Dataset007_Toy"
DESCRIPTION = {
    "channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "whole": [1, 2]}, "numTraining": 2,
    "file_ending": ".nii.gz", "regions_class_order": [1, 2],
}  # fmt: skip
FINGERPRINT = {
    "spacings": [[3.0, 1.0, 1.0], [3.0, 2.0, 1.0]], "shapes_after_crop": [[60, 180, 180], [60, 90, 180]],
    "median_relative_size_after_cropping": 1.0,
}  # fmt: skip
DOCUMENTS = ("nnUNetPlans", "dataset_fingerprint", "dataset")
SHARES = st.floats(0, 1, exclude_max=True)
JUNK = (
    ..., None, True, -1, 0, 7, 1.5, float("nan"), float("inf"), 10**30, "", "x", "../..", "\0", [], [[]], [1, 2], {},
)  # fmt: skip


@pytest.fixture
def toy(tmp_path, monkeypatch, plans):
    """Folder of a dataset with one preprocessed case; `documents` are the contents of its three files."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    (folder / "nnUNetPlans_3d_fullres").mkdir(parents=True)
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        (folder / "nnUNetPlans_3d_fullres" / f"case{ending}").touch()
    documents = {"nnUNetPlans": plans, "dataset_fingerprint": FINGERPRINT, "dataset": DESCRIPTION}
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder, documents


def refused(read, path, content, *words):
    path.write_text(json.dumps(content))
    with pytest.raises(MiMError) as error:
        read(path)
    (line,) = str(error.value).splitlines()
    assert all(word in line for word in (str(path), *words)), line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file_ending": "nii.gz"}, ("file_ending", "'nii.gz'")),
        ({"labels": ["background", "liver"]}, ("labels",)),
        ({"labels": {"background": 0, "liver": "1"}}, ("labels.liver", "'1'")),
        ({"channel_names": ["CT"]}, ("channel_names",)),
        ({"dataset": {"a": {"label": "a.nii.gz"}}}, ("dataset.a.images",)),
        ({"dataset": {"a": {"images": ["a\0.nii.gz"]}}}, ("dataset.a.images.0", r"a\x00.nii.gz")),
        ({"dataset": {"a": {"images": ["a.nii.gz"], "label": "\0"}}}, ("dataset.a.label",)),
        ({"numTraining": "two"}, ("numTraining", "'two'")),
        ({"numTraining": 0}, ("numTraining", "0")),
        ({"numTraining": -3}, ("numTraining", "-3")),
        ({"numTraining": 10**12}, ("numTraining", "1000000000000")),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path, change, words):
    refused(read_dataset_json, tmp_path / "dataset.json", DESCRIPTION | change, *words)


def test_a_dataset_json_of_the_first_version_names_the_command_that_converts(tmp_path):
    old = {
        "name": "Liver", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "numTraining": 1,
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }  # fmt: skip
    refused(read_dataset_json, tmp_path / "dataset.json", old, "nnUNetv2_convert_old_nnUNet_dataset")


def test_the_old_name_of_channel_names_is_read(tmp_path):
    content = {k: v for k, v in DESCRIPTION.items() if k != "channel_names"} | {"modality": {"0": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert read_dataset_json(tmp_path / "dataset.json") == content


def test_axes_windows_and_spacings_of_plans(tmp_path, plans):
    def wrong(*words, **change):
        refused(read_plans, tmp_path / "plans.json", deepcopy(plans) | change, *words)

    wrong("transpose_forward", transpose_forward=[0, 0, 1])
    windows = deepcopy(plans["foreground_intensity_properties_per_channel"])
    windows["0"]["std"] = 0.0
    wrong("channel 0", foreground_intensity_properties_per_channel=windows)
    wrong("channel 0", foreground_intensity_properties_per_channel={})
    fullres = plans["configurations"]["3d_fullres"]
    for spacing in ([2.0, 0.0, 2.0], [2.0, float("nan"), 2.0], [2.0], "2"):
        wrong("configurations.c.spacing", configurations={"c": fullres | {"spacing": spacing}})


FOREIGN = [
    ("image_reader_writer", "deepcopy"), ("image_reader_writer", "BaseReaderWriter"), ("label_manager", "np"),
    ("preprocessor_name", "os"), ("preprocessor_name", "PlansManager"), ("resampling_fn_data", "resize_segmentation"),
    ("resampling_fn_seg", "map_coordinates"), ("resampling_fn_probabilities", "partial"),
    ("normalization_schemes", ["np"]), ("normalization_schemes", ["ImageNormalization"]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "name"), FOREIGN)
def test_names_of_anything_else_in_nnunet_are_refused(tmp_path, plans, field, name):
    """nnU-Net takes any attribute of its modules, such as a function that they import."""
    changed = deepcopy(plans)
    (changed if field in changed else changed["configurations"]["3d_fullres"])[field] = name
    word = name if isinstance(name, str) else name[0]
    refused(read_plans, tmp_path / "plans.json", changed, f"{field}: nnU-Net has no ", f" {word} (")


def test_a_reader_in_dataset_json_is_one_of_nnunets(tmp_path):
    content = DESCRIPTION | {"overwrite_image_reader_writer": "deepcopy"}
    refused(read_dataset_json, tmp_path / "dataset.json", content, "no image reader deepcopy (", "SimpleITKIO")
    for name in ("None", "NibabelIOWithReorient", "Tiff3DIO"):
        (tmp_path / "dataset.json").write_text(json.dumps(DESCRIPTION | {"overwrite_image_reader_writer": name}))
        assert read_dataset_json(tmp_path / "dataset.json")["overwrite_image_reader_writer"] == name


NNUNETS_OWN = {
    "image reader": {"SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"},
    "preprocessor": {"DefaultPreprocessor"},
    "normalization": {"CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization"},
    "label manager": {"LabelManager"},
    "resampling": {"resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"},
}


@pytest.mark.parametrize("kind", NNUNETS_OWN)
def test_all_that_nnunet_has_is_known(kind):
    assert known(kind) >= NNUNETS_OWN[kind]


def test_what_users_have_added_to_nnunet_is_known(tmp_path, monkeypatch):
    """A module in its package of normalisations, as its documentation says."""
    (tmp_path / "own_schemes.py").write_text(
        "from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization\n"
        "class OwnNormalization(ZScoreNormalization):\n    pass\n"
    )
    monkeypatch.setattr(normalization, "__path__", [*normalization.__path__, str(tmp_path)])
    known.cache_clear()
    assert "OwnNormalization" in known("normalization")
    known.cache_clear()


def test_a_fingerprint_with_a_spacing_of_0_is_refused(tmp_path):
    content = FINGERPRINT | {"spacings": [[3.0, 0.0, 1.0]]}
    refused(read_fingerprint, tmp_path / "f.json", content, "spacings.0.1", "nnUNetv2_extract_fingerprint")


def quietly(run, *arguments):
    """Return code and what went to the standard error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        code = run(*arguments)
    return code, error.getvalue()


def take_or_refuse(toy, name, content):
    """mim_plan, the source of a pretraining and the start of a finetuning take a file, or refuse it in one line."""
    folder, documents = toy
    try:
        (folder / f"{name}.json").write_text(json.dumps(content))
        code, error = quietly(main, ["-d", "7", "--preset", "tiny"])
        assert (code, len(error.splitlines())) in ((0, 0), (2, 1)), error
        if code == 0:
            read_plans(folder / "nnUNetMiMPlans.json")
        if name == "nnUNetPlans":
            with contextlib.suppress(MiMError):
                find_source("7", "nnUNetPlans", "3d_fullres")
            with contextlib.suppress(MiMError):
                resolve_plans(content, "3d_fullres", 0, DESCRIPTION, "nnUNetTrainerMiMScratch", pretrained=False)
    finally:
        (folder / f"{name}.json").write_text(json.dumps(documents[name]))
        (folder / "nnUNetMiMPlans.json").unlink(missing_ok=True)


FULLRES = ("configurations", "3d_fullres")
FOUND = [
    ((*FULLRES, "median_image_size_in_voxels", 0), ...), ((*FULLRES, "median_image_size_in_voxels"), ...),
    (FULLRES, {}),
    ((*FULLRES, "architecture", "network_class_name"), None), ((*FULLRES, "data_identifier"), ""),
]  # fmt: skip
"""mutations of plans that once ended in a traceback"""


@pytest.mark.parametrize(("path", "value"), FOUND)
def test_mutations_that_once_ended_in_a_traceback(toy, junk, path, value):
    take_or_refuse(toy, "nnUNetPlans", junk.put(toy[1]["nnUNetPlans"], path, value))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=st.sampled_from(DOCUMENTS), share=SHARES, value=st.sampled_from(JUNK))
def test_no_mutation_ends_in_a_traceback(toy, junk, name, share, value):
    content = toy[1][name]
    take_or_refuse(toy, name, junk.put(content, junk.at(content, share), value))


@pytest.mark.long
def test_every_mutation(toy, junk):
    """All places of all documents with all junk."""
    for name, content in toy[1].items():
        for path in junk.places(content):
            for value in JUNK:
                take_or_refuse(toy, name, junk.put(content, path, value))
