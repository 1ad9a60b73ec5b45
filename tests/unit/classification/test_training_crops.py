import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.regions import CaseReader, CaseVoxels, window_starts
from nnunet_mim.classification.training_crops import Augmentation, TrainingCrops, random_start, training_batches
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.distributed.ranks import ALONE


class OneCase:
    """A reader of a single made-up case."""

    def __init__(self, shape, box):
        voxels = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
        mask = np.zeros(shape, bool)
        mask[tuple(slice(*bounds) for bounds in box)] = True
        self.case = CaseVoxels("case", voxels, mask, (1.0, 1.0, 1.0), {})

    def read(self, name):
        return self.case


def crops_of(reader, window, cell, **settings):
    settings = {"mode": "scratch", "roi": "labels", "margin": 0.0, "window": window, **settings}
    return TrainingCrops(
        reader, ["case"], np.zeros((1, 1), np.int64), None, ClassifyConfig(**settings), cell,
        Augmentation(window, (0, 1, 2)),
    )  # fmt: skip


@given(
    st.integers(1, 60), st.integers(0, 59), st.integers(1, 60), st.sampled_from([8, 16]), st.integers(1, 3), st.data()
)
def test_a_random_window_lies_where_it_should(length, low, extent, cell, n_cells, data):
    """It holds the box, or is held by it; never further than half a cell from prediction's own window."""
    low = min(low, length - 1)
    high, window = min(low + extent, length), cell * n_cells
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    starts, size = window_starts(low, high, length, window, cell, one_size=True)
    assert size == window
    for _ in range(5):
        start = random_start(rng, low, high, length, window, cell)
        if high - low > window:
            assert low <= start <= high - window
        else:
            assert start <= low
            assert high <= start + window
            assert abs(start - starts[0]) <= cell // 2


@pytest.mark.parametrize("shape", [(1, 9, 30), (2, 2, 2), (40, 5, 12)])
def test_thin_and_small_cases_are_padded(shape):
    """Every sample has the window's size and only places of the case count; noise in the padding never enters."""
    crops = crops_of(OneCase(shape, [(0, n) for n in shape]), (16, 16, 32), (16, 16, 16))
    for number in range(8):
        item = crops[number]
        assert item.images.shape[1:] == (1, 16, 16, 32)
        assert item.images.dtype == torch.float32
        assert torch.isfinite(item.images).all()
        assert item.places[:, 0].any()
        inside = np.prod([min(n, w) for n, w in zip(shape, (16, 16, 32), strict=True)])
        assert item.places[:, 0].sum() <= 3.5 * inside + 200  # scaled by at most 1/0.7 per axis, and edges rounded


def test_a_sample_depends_on_seed_and_number_alone(source):
    reader = CaseReader(source, "labels")
    labels = np.zeros((4, 1), np.int64)
    config = ClassifyConfig(mode="scratch", roi="labels", window=(16, 16, 16), mask_channel=True)
    window = (16, 16, 16)

    def make(**changes):
        settings = ClassifyConfig(**{**config.to_dict(), "window": window, "covariate": (), **changes})
        return TrainingCrops(
            reader, source.cases[:4], labels, None, settings, (8, 8, 8), Augmentation(window, (0, 1, 2))
        )

    crops, state = make(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    first = [crops[i] for i in range(8)]
    again = make()
    torch.manual_seed(5)
    np.random.seed(5)
    for i in (7, 3, 0):
        assert torch.equal(again[i].images, first[i].images)
        assert torch.equal(again[i].places, first[i].places)
    assert not torch.equal(make(seed=1)[0].images, first[0].images)
    torch.set_rng_state(state[0])
    crops[1]
    assert torch.equal(torch.get_rng_state(), state[0])  # the generators of all else are left alone
    for turn in range(3):
        assert sorted(crops.case_number(4 * turn + i) for i in range(4)) == [0, 1, 2, 3]
    channel = first[0].images[:, -1]
    assert set(channel.unique().tolist()) <= {0.0, 1.0}
    assert 0 < channel.mean() < 0.5


def test_a_case_that_a_worker_cannot_read_ends_in_one_line(source):
    path = source.case_file("case_35")
    path.write_bytes(path.read_bytes()[:100])
    crops = crops_of(CaseReader(source, "labels"), (16, 16, 16), (8, 8, 8))
    crops.cases = ["case_35"]
    with pytest.raises(MiMError, match=r"^cannot read .*case_35\.b2nd [^\n]*$"):
        next(training_batches(crops, 0, 1, 1, torch.device("cpu"), ALONE))


def test_augmentation_is_nnunets_and_always_the_same_way():
    augmentation = Augmentation((16, 32, 32), (0, 1))
    names = [type(getattr(each, "transform", each)).__name__ for each in augmentation.transforms.transforms]
    assert names[0] == "SpatialTransform"
    assert {"GaussianNoiseTransform", "GammaTransform", "MirrorTransform"} <= set(names)
    blurs = [each.transform for each in augmentation.transforms.transforms if hasattr(each, "transform")]
    assert not any(getattr(blur, "benchmark", False) for blur in blurs)
    assert all(a >= b for a, b in zip(augmentation.size_before, (16, 32, 32), strict=True))
    flat = Augmentation((8, 32, 32), (0, 1))  # anisotropic: rotated in the plane only
    assert type(flat.transforms.transforms[0]).__name__ == "Convert3DTo2DTransform"
    assert flat.size_before[0] == 8
