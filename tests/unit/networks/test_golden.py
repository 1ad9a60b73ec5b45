"""The stored outputs of the published base model, reproduced from its parameters and inputs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_mim.checkpoint.published import convert_weights
from nnunet_mim.config import PRESETS
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.objective.losses import reconstruction_loss
from nnunet_mim.pretraining.objective.masks import mask_of

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def published_shapes(golden_folder):
    return {key: tuple(shape) for key, shape in json.loads((golden_folder / "published_keys.json").read_text()).items()}


@pytest.fixture(scope="module")
def stored(golden_folder):
    with np.load(golden_folder / "published_architecture.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file}


@pytest.fixture(scope="module")
def ours(published_shapes, stored, reference):
    """One run of our modules with the published parameters, converted, on the same images in our units."""
    golden = reference.golden
    model = MaskInMask(PRESETS["base"], in_channels=1, n_edges=2, alignment="infonce").eval()
    published = golden.checkpoint(published_shapes, reference.network.sincos)["model"]
    model.load_state_dict(convert_weights(published), strict=True)
    images = golden.images(float(stored["shift"]))
    ids_keep = stored["ids_keep"]
    with torch.no_grad():
        hounsfield = images * 2000 - 1000
        latent = model.encoder(hounsfield / 250, ids_keep)
        features = model.decoder(latent, ids_keep, model.encoder.grid(images))
        prediction = model.decoder.head(features)
    return SimpleNamespace(model=model, images=images, latent=latent, features=features, prediction=prediction)


def test_stored_mask_follows_the_design(stored):
    n_tokens = stored["mask"].shape[1]
    masked = torch.stack([mask.nonzero().flatten() for mask in stored["mask"]])
    assert torch.equal(mask_of(masked, n_tokens), stored["mask"])
    kept = mask_of(stored["ids_keep"], n_tokens)
    assert torch.equal(kept, ~stored["mask"])
    assert stored["ids_keep"].shape[1] == int(n_tokens * (1 - float(stored["ratio"])))


def test_encoder(ours, stored):
    assert (ours.latent - stored["latent"]).abs().max() < TOLERANCE


def test_decoder_features(ours, stored):
    first = ours.features[..., : stored["decoder_features_first8"].shape[-1]]
    assert (first - stored["decoder_features_first8"]).abs().max() < TOLERANCE


def test_prediction(ours, stored):
    first = ours.prediction[..., : stored["pred_first16"].shape[-1]]
    assert (first - stored["pred_first16"]).abs().max() < TOLERANCE
    assert (ours.prediction.mean(dim=-1) - stored["pred_mean"]).abs().max() < TOLERANCE
    assert (ours.prediction.std(dim=-1) - stored["pred_std"]).abs().max() < TOLERANCE


def test_loss(ours, stored):
    masked = torch.stack([mask.nonzero().flatten() for mask in stored["mask"]])
    rows = torch.arange(2)[:, None]
    size = ours.model.encoder.token_size
    grid = ours.model.encoder.grid(ours.images)
    boxes = ours.images.reshape(2, *(n for pair in zip(grid, size, strict=True) for n in pair))
    tokens = boxes.permute(0, 1, 3, 5, 2, 4, 6).reshape(2, -1, size[0] * size[1] * size[2])  # C order
    every = torch.ones(masked.shape, dtype=torch.bool)
    loss = reconstruction_loss(ours.prediction[rows, masked], tokens[rows, masked], every)
    assert abs(float(loss) - float(stored["loss"])) < TOLERANCE
