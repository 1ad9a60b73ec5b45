from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_mim.classification import features as features_module
from nnunet_mim.classification.encoders import load_encoder
from nnunet_mim.classification.features import CACHE_FOLDER, FeatureExtractor, Pooling
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.regions import CaseReader, CaseVoxels

CONFIG = ClassifyConfig(checkpoint="none", roi="labels", margin=6.0)


@pytest.fixture
def encoder(source):
    return load_encoder(source, CONFIG, "all")


def whole(voxels):
    return CaseVoxels("case", voxels.astype(np.float32), None, (2.0, 2.0, 2.0), {})


def test_features_are_means_and_maxima_of_all_stages(encoder):
    """A case of whole tokens in one window: plain means and maxima of the encoder's maps."""
    voxels = np.random.default_rng(0).normal(size=(1, 16, 16, 16))
    with torch.no_grad():
        maps = encoder.module.forward_features(torch.from_numpy(voxels).float()[None])
    expected = np.concatenate([f(m[0].numpy(), axis=(1, 2, 3)) for m in maps for f in (np.mean, np.max)])
    found = FeatureExtractor(encoder, replace(CONFIG, roi="")).of_case(whole(voxels))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == (2 * (6 + 6 + 12 + 12),)


def test_padding_is_not_pooled():
    """Maps that are huge wherever an image is padded change neither mean nor maximum."""
    counts = torch.zeros(8, 16, 16, dtype=torch.bool)
    counts[3:5, :12] = True
    maps = torch.rand(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps[:, 0] = maps[:, 3] = maps[:, :, 6:] = 1e6
    pooling = Pooling()
    pooling.add(maps, counts)
    inside = maps[:, 1:3, :6].flatten(1)
    np.testing.assert_allclose(pooling.result(), torch.cat([inside.mean(dim=1), inside.amax(dim=1)]), rtol=1e-6)


def test_windows_are_pooled_together(encoder):
    """Two windows count by their numbers of places; a window of nothing that counts is left out."""
    first, second = torch.full((1, 2, 2, 2), 1.0), torch.full((1, 4, 2, 2), 4.0)
    pooling = Pooling()
    pooling.add(first, torch.ones(2, 2, 2, dtype=torch.bool))
    pooling.add(second, torch.ones(4, 2, 2, dtype=torch.bool))
    pooling.add(second + 9, torch.zeros(4, 2, 2, dtype=torch.bool))
    np.testing.assert_allclose(pooling.result(), [3.0, 4.0])


def test_features_are_computed_once(encoder, source, monkeypatch):
    extractor, reader = FeatureExtractor(encoder, CONFIG), CaseReader(source, "labels")
    cases = source.cases[:4]
    first = extractor.of_cases(reader, cases)
    assert (source.folder.parent / CACHE_FOLDER).is_dir()
    calls = []
    original = FeatureExtractor.of_case
    monkeypatch.setattr(FeatureExtractor, "of_case", lambda self, case: calls.append(case.name) or original(self, case))
    np.testing.assert_array_equal(extractor.of_cases(reader, cases[:2] + source.cases[5:6])[:2], first[:2])
    assert calls == [source.cases[5]]
    np.testing.assert_array_equal(extractor.of_cases(reader, cases), first)
    assert calls == [source.cases[5]]
    source.case_file(cases[0]).touch()  # as a case that was preprocessed anew
    np.testing.assert_array_equal(extractor.of_cases(reader, cases), first)
    assert calls == [source.cases[5], cases[0]]


def test_other_weights_regions_or_plans_are_other_features(encoder, source, monkeypatch):
    reader = CaseReader(source, "labels")
    other = load_encoder(source, replace(CONFIG, seed=1), "all")
    keys = {
        FeatureExtractor(encoder, CONFIG)._key(source),
        FeatureExtractor(other, CONFIG)._key(source),
        FeatureExtractor(encoder, replace(CONFIG, margin=7.0))._key(source),
        FeatureExtractor(encoder, replace(CONFIG, roi=""))._key(source),
        FeatureExtractor(encoder, CONFIG)._key(replace(source, plans={**source.plans, "transpose_forward": [0, 1, 2]})),
    }
    assert len(keys) == 5
    again = load_encoder(source, CONFIG, "all")
    assert FeatureExtractor(again, replace(CONFIG, folds=3))._key(source) in keys
    monkeypatch.setattr(features_module, "FEATURES_VERSION", 0)
    assert FeatureExtractor(encoder, CONFIG)._key(source) not in keys
    assert len(reader.stamp_files("case_00")) == 2


def test_a_damaged_cache_is_made_anew(encoder, source):
    extractor, reader = FeatureExtractor(encoder, CONFIG), CaseReader(source, "labels")
    first = extractor.of_cases(reader, source.cases[:2])
    (path,) = (source.folder.parent / CACHE_FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:200])
    np.testing.assert_array_equal(extractor.of_cases(reader, source.cases[:2]), first)
