from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import pdist

from nnunet_mim.classification.baselines import SIZE, SIZE_HU, baseline_features, largest_diameter
from nnunet_mim.classification.regions import CaseReader


def test_the_largest_diameter_is_that_of_all_pairs_of_corners():
    rng = np.random.default_rng(0)
    for spacing in ((1.0, 1.0, 1.0), (2.5, 0.7, 0.7)):
        blob = ndimage.gaussian_filter(rng.normal(size=(9, 9, 9)), 1.5) > 0
        corners = [np.argwhere(blob) + offset for offset in np.ndindex(2, 2, 2)]
        expected = pdist(np.unique(np.concatenate(corners), axis=0) * spacing).max()
        assert largest_diameter(blob, spacing) == pytest.approx(expected, rel=0.005)


def test_the_largest_diameter_of_a_bar_and_a_voxel():
    bar = np.zeros((20, 20, 20), bool)
    bar[2:12, 3:6, 4:5] = True
    assert largest_diameter(bar, (2.0, 1.0, 3.0)) == pytest.approx(np.sqrt(20**2 + 3**2 + 3**2), rel=0.005)
    assert largest_diameter(np.ones((1, 1, 1), bool), (1.0, 1.0, 1.0)) == pytest.approx(np.sqrt(3), rel=0.005)


@pytest.mark.parametrize("roi", ["labels", ""])
def test_sizes_and_hounsfield_units(source, roi):
    cases = source.cases[:4]
    table = SimpleNamespace(cases=cases, covariates=np.zeros((4, 0)))
    reader = CaseReader(source, roi)
    found = baseline_features(SimpleNamespace(source=source, table=table, reader=reader))
    assert sorted(found) == ["baseline_prevalence", "baseline_size", "baseline_size_hu"]
    for row, name in enumerate(cases):
        case = reader.read(name)
        voxels = np.asarray(case.voxels[0])
        hu = voxels[case.mask if roi else np.ones(voxels.shape, bool)] * 250.0
        volume, log_volume, diameter = found[SIZE][row]
        assert volume == pytest.approx(hu.size * 8.0)  # 2 mm voxels
        assert log_volume == pytest.approx(np.log(volume))
        assert diameter >= (6 * volume / np.pi) ** (1 / 3) * 0.995  # no body of this volume is shorter than a ball
        assert found[SIZE_HU][row, 3:6] == pytest.approx([hu.mean(), hu.std(), np.percentile(hu, 5)], rel=1e-4)
        if roi:
            assert (hu.mean() > 0) == (int(name[-2:]) % 2 == 0)  # lesions are bright
