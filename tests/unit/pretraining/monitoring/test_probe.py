"""Label probe: closed forms against slow twins, encoders whose features say everything or nothing, and odd labels."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnunet_mim.config import NetworkConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.pretraining.data.case_index import read_index
from nnunet_mim.pretraining.data.crops import Cases
from nnunet_mim.pretraining.monitoring import probe as probe_module
from nnunet_mim.pretraining.monitoring.figures import ProbeFigures
from nnunet_mim.pretraining.monitoring.probe import (
    IGNORED,
    LabelProbe,
    _best_dice,
    _box_start,
    _common_labels,
    _features_at,
    _LabelledBox,
    _read_box,
    _read_labels,
    _ridge,
    _sample_voxels,
    _voxel_scores,
    probe_cases,
)

SHAPE = (24, 20, 27)
FILL = (-4.0,)


class ImageEncoder(nn.Module):
    """Features that are the image itself, or a constant, at full resolution, and a coarse map that says nothing."""

    token_size = (4, 4, 4)

    def __init__(self, constant=False):
        super().__init__()
        self.constant = constant
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward_features(self, x):
        x = self.dropout(x * self.scale)
        coarse = nn.functional.avg_pool3d(x, 4) * 0
        if self.constant:
            return [x * 0 + 3, coarse]
        return [torch.cat([(x - label).abs().neg() for label in range(4)], dim=1), coarse]


def labels_with(*corners, shape=SHAPE, side=6):
    """One cube of label 1, 2, … at each corner; None leaves a label out."""
    labels = np.zeros(shape, dtype=np.int8)
    for label, corner in enumerate(corners, start=1):
        if corner is not None:
            labels[tuple(slice(a, a + side) for a in corner)] = label
    return labels


@pytest.fixture
def cases_of(write_dataset, save_case):
    """cases_of([labels, …], number=900): a dataset whose images are the labels themselves, as cases."""

    def make(labels, number=900, storage="b2nd"):
        folder = write_dataset(n=len(labels), number=number, storage=storage, shape=(24, 24, 24))
        for i, seg in enumerate(labels):
            save_case(folder, f"case_{i:02d}", seg[None].astype(np.float32), seg[None].astype(np.int8), storage)
        source = find_source(str(number), "tinyPlans", "3d_fullres")
        return Cases([source], [read_index(source, show_progress=False)[0]])

    return make


@pytest.fixture
def cubes(cases_of):
    """Six cases of two labels, in other places in every case."""
    return cases_of([labels_with((2 + i, 3, 5), (12, 12 - i, 15 + i)) for i in range(6)])


def encoder_of_pretraining():
    torch.manual_seed(0)
    return HybridEncoder(1, NetworkConfig((6, 6, 6, 6), (1, 1, 1, 1), num_heads=1), drop_path=0.5)


# The arithmetic


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 0.5])
def test_ridge_is_least_squares_on_the_augmented_system(reference, strength):
    random = np.random.default_rng(0)
    features = random.normal(3, [1, 10, 0.1, 2], size=(60, 4)) @ random.normal(size=(4, 4))
    targets, weights = random.normal(1, 1, size=(60, 2)), random.uniform(0, 2, size=60)
    found = _ridge(*(torch.from_numpy(a) for a in (features, targets, weights)), strength)
    np.testing.assert_allclose(found, reference.probe.ridge(features, targets, weights, strength), rtol=1e-8)


def test_ridge_by_hand():
    # x = ±1, t = x: standardised already; b = 1 / (1 + strength)
    x = torch.tensor([[-1.0], [1.0]])
    assert _ridge(x, x, torch.ones(2), 0.25).item() == pytest.approx(0.8)
    # a hundred times the feature: a hundredth of the coefficient, the same prediction
    assert _ridge(100 * x, x, torch.ones(2), 0.25).item() == pytest.approx(0.008)
    # a voxel of weight 0 is not there
    assert _ridge(torch.cat([x, x[:1] * 50]), torch.cat([x, x[1:]]), torch.tensor([1, 1, 0]), 0.25).item() == (
        pytest.approx(0.8)
    )


def test_ridge_gives_nothing_to_a_feature_that_does_not_vary():
    x = torch.tensor([[0.0, 7.1], [1.0, 7.1], [2.0, 7.1]])
    found = _ridge(x, x[:, :1], torch.ones(3), 1e-3)
    assert found[0, 0] == pytest.approx(1, abs=1e-2)
    assert found[1, 0] == pytest.approx(0, abs=1e-6)


def test_best_dice_by_hand():
    inside = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.6, 0.0])
    # thresholds 0.9: 2/(1+3), 0.7: 4/(3+3), 0.1: 6/(5+3)
    assert _best_dice(scores, inside) == pytest.approx(0.75)
    assert _best_dice(inside.float(), inside) == 1
    assert _best_dice(-inside.float(), inside) == pytest.approx(6 / 9)  # all voxels
    assert _best_dice(scores, torch.zeros(6, dtype=torch.bool)) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_best_dice_with_ties_against_its_twin(reference, voxels):
    scores, is_label = zip(*voxels, strict=True)
    found = _best_dice(torch.tensor(scores).float(), torch.tensor(is_label))
    assert found == pytest.approx(reference.probe.best_dice(scores, is_label))


def test_best_dice_of_a_rare_label_is_a_bound_below_two_percent():
    is_label = torch.arange(100_000) < 10
    assert _best_dice(torch.zeros(100_000), is_label) < 0.02
    scores = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) + 0.9 * is_label
    exact = max(2 * int((is_label & (scores >= t)).sum()) / (int((scores >= t).sum()) + 10) for t in scores[:10])
    assert exact > 0.02
    assert _best_dice(scores, is_label) == pytest.approx(exact)


def test_features_at_voxels_and_dense_scores_agree_with_the_twin(reference):
    generator = torch.Generator().manual_seed(0)
    strides = [(1, 2, 2), (2, 4, 4)]
    maps = [torch.randn(3, 8, 6, 4, generator=generator), torch.randn(2, 4, 3, 2, generator=generator)]
    voxels = torch.tensor([[0, 0, 0], [7, 11, 7], [3, 5, 2], [4, 1, 6], [6, 10, 5]])
    features = _features_at(maps, voxels, (8, 12, 8))
    for row, voxel in zip(features, voxels.tolist(), strict=True):
        twin = [
            reference.probe.interpolated(channel.numpy(), stride, voxel)
            for m, stride in zip(maps, strides, strict=True) for channel in m
        ]  # fmt: skip
        np.testing.assert_allclose(row, twin, atol=1e-5)

    coefficients = torch.randn(5, generator=generator)
    parts = [torch.einsum("cxyz,c->xyz", m, c) for m, c in zip(maps, coefficients.split([3, 2]), strict=True)]
    dense = _voxel_scores(parts, (2, 4, 4), (7, 11, 8))
    assert dense.shape == (7, 11, 8)
    inside = (voxels < torch.tensor([7, 11, 8])).all(dim=1)
    torch.testing.assert_close(dense[tuple(voxels[inside].T)], (features @ coefficients)[inside])


# Cases, boxes and voxels


def test_a_dataset_without_labels_has_no_probe(cases_of):
    cases = cases_of([np.full(SHAPE, value) for value in (0, -1, 0, 0)])
    assert probe_cases(cases[:2], cases[2:]) is None


def test_cases_without_a_segmentation_file_are_unlabelled(cubes):
    for case in cubes[:3]:
        (case.source.folder / f"{case.info.case}_seg.b2nd").unlink()
    (cubes[3].source.folder / f"{cubes[3].info.case}_seg.b2nd").write_bytes(b"damaged")
    assert probe_cases(cubes[:4], cubes[4:]) is None
    train, held_out = probe_cases(cubes[2:5], cubes[5:])
    assert (train, held_out) == ([cubes[4]], [cubes[5]])
    with pytest.raises(MiMError, match=r"case_00.*no labels"):
        LabelProbe(cubes[:1], held_out, FILL)


def test_as_many_labelled_cases_as_asked_for_each_chosen_by_the_seed(cubes):
    train, held_out = probe_cases(cubes[:4], cubes[4:], (2, 4))
    assert len(train) == 2
    assert sorted(c.info.case for c in held_out) == ["case_04", "case_05"]
    assert probe_cases(cubes[:4], cubes[4:], (2, 4)) == (train, held_out)
    choices = [probe_cases(cubes[:4], cubes[4:], (2, 1), seed)[0] for seed in range(8)]
    assert any(choice != train for choice in choices)


def test_few_cases_of_a_large_unlabelled_dataset_are_looked_at(cubes, monkeypatch):
    looked_at = []
    monkeypatch.setattr(probe_module, "_has_labels", lambda case: looked_at.append(case))
    many = Cases(cubes.sources, cubes.indexes, np.repeat(cubes.numbers, 10, axis=0))
    assert probe_cases(many, many, (3, 2)) is None
    assert len(looked_at) == 4 * (3 + 2)


def test_cases_of_one_dataset_only(cases_of):
    unlabelled = cases_of([np.zeros(SHAPE)] * 2, number=901)
    first = cases_of([labels_with((2, 2, 2))] * 2, number=902)
    second = cases_of([labels_with((2, 2, 2))] * 2, number=903)
    parts = unlabelled, first, second
    mixed = Cases([p.sources[0] for p in parts], [p.indexes[0] for p in parts])
    assert probe_cases(mixed.take(np.array([0, 4])), mixed.take(np.array([1, 3, 5]))) == ([second[0]], [second[1]])


@pytest.mark.parametrize("storage", ["b2nd", "npz"])
def test_labels_are_read_with_the_ignore_label_left_out(cases_of, storage):
    seg = labels_with((2, 2, 2), (10, 10, 10))
    seg[0], seg[1] = -1, 3
    case = cases_of([seg], storage=storage)[0]
    assert _read_labels(case).tolist() == np.where(seg < 0, 0, seg).tolist()
    (case.source.folder.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ignore": 3}}))
    labels = _read_labels(case)
    assert (labels[0] == 0).all()
    assert (labels[1] == IGNORED).all()
    assert set(np.unique(labels[2:])) == {0, 1, 2}


@given(st.data())
def test_a_box_lies_in_the_volume_and_holds_the_labels_where_they_fit(data):
    axis = st.integers(1, 12)
    shape = np.array([data.draw(axis) for _ in range(3)])
    size = np.array([data.draw(st.integers(1, int(n))) for n in shape])
    foreground = np.zeros(shape, dtype=bool)
    for _ in range(data.draw(st.integers(1, 3))):
        foreground[tuple(data.draw(st.integers(0, int(n) - 1)) for n in shape)] = True
    start = _box_start(foreground, size, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert (start >= 0).all()
    assert (start + size <= shape).all()
    inside = foreground[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
    points = np.argwhere(foreground)
    fits = points.max(axis=0) - points.min(axis=0) < size
    for a in np.flatnonzero(fits):
        assert (points[:, a] >= start[a]).all()
        assert (points[:, a] < start[a] + size[a]).all()
    assert inside.any()


def test_a_box_shows_image_and_labels_of_the_same_place(cubes):
    box = _read_box(cubes[0], (16, 24, 20), seed=0)
    assert box.image.shape == (1, 16, 20, 20)
    assert box.labels.shape == (16, 20, 20)
    torch.testing.assert_close(box.image[0], box.labels.float())
    assert set(box.labels.unique().tolist()) > {0}


def box_with(*labels):
    return _LabelledBox(torch.zeros(1, 4, 4, 4), torch.tensor([*labels, *[0] * (64 - len(labels))]).reshape(4, 4, 4))


def test_labels_of_both_sides_are_probed(monkeypatch):
    train, held_out = [box_with(1, 2, 3), box_with(2, 3), box_with(3, IGNORED)], [box_with(2, 4), box_with(3, 1)]
    assert _common_labels(train, held_out) == [1, 2, 3]
    assert _common_labels(train, [box_with(2)]) == [2]
    monkeypatch.setattr(probe_module, "MAX_LABELS", 2)
    assert _common_labels(train, held_out) == [2, 3]


def test_sampled_voxels():
    labels = torch.zeros(40, 40, 40, dtype=torch.int64)
    labels[5:8, 5:8, 5:8], labels[20:31, 20:31, 20:31], labels[:, :, 39] = 1, 2, IGNORED
    voxels = _sample_voxels(labels, [1, 2], seed=0)
    found = labels[tuple(voxels.T)]
    assert found.bincount().tolist() == [6000, 27, 1000]  # all of label 1
    near = voxels[27 + 1000 :][:2000]
    by_label = [((near >= low - 3) & (near < high + 3)).all(dim=1) for low, high in ((5, 8), (20, 31))]
    assert (by_label[0] | by_label[1]).all()
    assert torch.equal(voxels, _sample_voxels(labels, [1, 2], seed=0))
    assert not torch.equal(voxels, _sample_voxels(labels, [1, 2], seed=1))


# The probe


def test_features_that_show_the_labels_give_dice_one(cubes):
    figures = LabelProbe(cubes[:3], cubes[3:], FILL).evaluate(ImageEncoder())
    assert list(figures.labels) == [1, 2]
    assert min(figures.labels.values()) > 0.99
    assert figures.dice == pytest.approx((figures.labels[1] + figures.labels[2]) / 2)


def test_constant_features_give_no_more_than_all_voxels_as_label(cubes):
    probe = LabelProbe(cubes[:3], cubes[3:], FILL)
    figures = probe.evaluate(ImageEncoder(constant=True))
    n_label, n_voxels = 6**3, 24 * 20 * 27
    assert figures.dice == pytest.approx(2 * n_label / (n_label + n_voxels), abs=1e-6)


def test_labels_that_only_one_side_has_do_not_count(cases_of):
    train = [labels_with((2, 2, 2), (12, 12, 12)), labels_with((4, 3, 5), (10, 12, 14))]
    cases = cases_of([*train, labels_with((2, 9, 9)), labels_with((9, 2, 2), None, (14, 12, 14))])
    figures = LabelProbe(cases[:2], cases[2:], FILL).evaluate(ImageEncoder())
    assert list(figures.labels) == [1]
    assert figures.dice == figures.labels[1]
    only_third = cases_of([labels_with(None, None, (14, 12, 14))], number=901)
    assert LabelProbe(cases[:2], only_third, FILL).evaluate(ImageEncoder()) == ProbeFigures()


def test_voxels_of_the_ignore_label_do_not_count(cubes, save_case):
    folder, shown = cubes[0].source.folder, labels_with((2, 3, 5), (12, 12, 15))
    (folder.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ignore": 7}}))
    wrong = shown.copy()
    wrong[18:, :8, :8] = 1  # looks like label 1 and is not
    for seg_there, exact in ((0, False), (7, True)):
        seg = shown.copy()
        seg[18:, :8, :8] = seg_there
        save_case(folder, "case_05", wrong[None].astype(np.float32), seg[None])
        changed = replace(cubes[5], info=replace(cubes[5].info, stamp=cubes[5].source.file_stamp("case_05")))
        figures = LabelProbe(cubes[:3], [changed], FILL).evaluate(ImageEncoder())
        assert (figures.labels[1] > 0.99) == exact


@pytest.mark.parametrize("training", [True, False])
def test_same_encoder_same_figures_and_nothing_left_behind(cubes, training):
    encoder = encoder_of_pretraining().train(training)
    state = torch.random.get_rng_state()
    first = LabelProbe(cubes[:2], cubes[5:], FILL)
    figures = first.evaluate(encoder)
    assert figures == first.evaluate(encoder) == LabelProbe(cubes[:2], cubes[5:], FILL).evaluate(encoder)
    assert all(module.training == training for module in encoder.modules())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert 0 < figures.dice <= 1


def test_the_mode_comes_back_after_an_error(cubes):
    encoder = ImageEncoder().train()
    with torch.no_grad():
        encoder.scale.fill_(float("nan"))
    with pytest.raises(MiMError, match="not finite"):
        LabelProbe(cubes[:2], cubes[5:], FILL).evaluate(encoder)
    assert encoder.training


def test_works_under_autocast(cubes):
    probe = LabelProbe(cubes[:2], cubes[5:], FILL)
    encoder = encoder_of_pretraining()
    exact = probe.evaluate(encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        figures = probe.evaluate(encoder)
        assert figures == probe.evaluate(encoder)
    assert figures.dice == pytest.approx(exact.dice, abs=0.1)
