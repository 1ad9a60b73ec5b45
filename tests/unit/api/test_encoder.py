"""An encoder in Python: which images it takes, and features against a loop by hand."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_mim.api import Encoder, features, load_encoder
from nnunet_mim.checkpoint.format import build_checkpoint, save_atomically
from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.mask_in_mask import MaskInMask

NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2)
WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small checkpoint, pretrained at 3 x 3 x 3 mm."""
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32))
    provenance = {
        "datasets": ["Dataset900_Tiny"], "plans_name": "tinyPlans", "configuration": "3d_fullres", "fold": 0,
        "spacing": [3.0, 3.0, 3.0], "transpose_forward": [0, 1, 2], "normalization": ["CTNormalization"],
        "image_reader_writer": "SimpleITKIOWithReorient", "intensity_properties": {"0": WINDOW}, "iterations": 5,
        "loss_history": [], "cases": [],
    }  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("api") / "checkpoint_final.pth"
    save_atomically(build_checkpoint(MaskInMask(NETWORK, 1).state_dict(), config, provenance), path)
    return path


@pytest.fixture(scope="module")
def encoder(path):
    return load_encoder(path)


@pytest.fixture(scope="module")
def hu():
    """A made-up CT (z, y, x) whose size is a multiple of the tokens of 16 voxels."""
    return make_phantom(0, (32, 48, 32))[0].astype(np.float32)


def test_features_are_means_and_maxima_of_the_maps(encoder, hu):
    """At the spacing of pretraining nothing is resampled."""
    x = torch.from_numpy(np.clip(hu, -1000, 1000) / 250)[None, None]
    with torch.no_grad():
        maps = encoder.forward_features(x)
        assert torch.equal(encoder(x), maps[-1])
    wanted = []
    for stage in maps:
        rows = [[float(v) for v in channel.flatten()] for channel in stage[0]]
        wanted += [sum(row) / len(row) for row in rows] + [max(row) for row in rows]
    found = features(encoder, hu, spacing=(3.0, 3.0, 3.0))
    assert found.dtype == np.float32
    assert len(found) == 2 * sum(encoder.dims) == 2 * (6 + 6 + 12 + 12)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_image_is_resampled_to_the_spacing_of_pretraining(encoder, hu):
    assert encoder.spacing == (3.0, 3.0, 3.0)
    assert encoder.prepare(hu, (6.0, 1.5, 3.0)).shape == (1, 64, 24, 32)
    assert features(encoder, hu, (6.0, 1.5, 3.0)).shape == (72,)


@pytest.mark.parametrize("ending", ["nii.gz", "mha", "nrrd"])
def test_a_file_is_the_array_turned_as_in_pretraining(encoder, hu, tmp_path, ending):
    """The file lies to left and back, as DICOM does; RAS turns x and y around."""
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((3.0, 3.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / f"ct.{ending}"))
    turned = np.ascontiguousarray(hu[:, ::-1, ::-1])
    np.testing.assert_allclose(encoder.prepare(tmp_path / f"ct.{ending}"), encoder.prepare(turned, (3.0, 3.0, 3.0)))
    found = features(encoder, tmp_path / f"ct.{ending}")
    np.testing.assert_allclose(found, features(encoder, turned, (3.0, 3.0, 3.0)), rtol=1e-5)


def test_a_large_image_is_seen_in_windows(encoder, hu):
    """Maxima and means of the windows' maps together: of the first stage the same, but for what borders on a cut."""
    whole, cut = features(encoder, hu, (3.0, 3.0, 3.0)), features(encoder, hu, (3.0, 3.0, 3.0), window=(16, 16, 16))
    assert cut.shape == whole.shape
    assert np.isfinite(cut).all()
    assert not np.allclose(cut, whole)
    assert np.corrcoef(cut[:12], whole[:12])[0, 1] > 0.9


def test_bad_images(encoder, hu, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    holes = hu.copy()
    holes[0, 0, 0] = np.nan
    for arguments, message in {
        (tmp_path / "none.nii.gz",): "none.nii.gz",
        (bad,): "bad.nii.gz",
        (bad, (1.0, 1.0, 1.0)): "none with a file",
    }.items():
        with pytest.raises(MiMError, match=message):
            features(encoder, *arguments)
    for image, spacing, message in [
        (hu, None, "give spacing"),
        (hu[0], (3, 3, 3), "give \\(Z, Y, X\\)"),
        (hu, (3, 0, 3), "with spacing"),
        (holes, (3, 3, 3), "NaN"),
        (np.stack([hu, hu]), (3, 3, 3), "2 channels, the encoder takes 1"),
    ]:
        with pytest.raises(MiMError, match=message):
            features(encoder, image, spacing)


def test_a_saved_encoder_is_loaded_again(encoder, path, hu, tmp_path):
    pytest.importorskip("huggingface_hub")
    encoder.save_pretrained(tmp_path / "mine")
    again = Encoder.from_pretrained(tmp_path / "mine")
    assert {"README.md", "config.json", "model.safetensors"} == {p.name for p in (tmp_path / "mine").iterdir()}
    spacing = (3.0, 3.0, 3.0)
    assert np.array_equal(features(again, hu, spacing), features(encoder, hu, spacing))
    assert again.provenance["spacing"] == encoder.provenance["spacing"]


def test_no_checkpoint(tmp_path):
    with pytest.raises(MiMError, match="does not exist"):
        load_encoder(tmp_path / "none.pth")
