"""The objective of an iteration against a twin in loops, on a network small enough for it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.mask_in_mask import MaskInMask, Reconstruction
from nnunet_mim.pretraining.objective.levels import (
    _place_features,
    _place_index,
    add_pass,
    level_losses,
)
from nnunet_mim.pretraining.objective.masks import mask_of
from nnunet_mim.pretraining.objective.views import nested_views

NETWORK = NetworkConfig((3, 4, 3, 6), (1, 1, 1, 1), 2, 2.0, ((2, 1, 1), (1, 2, 1), (1, 1, 1), (1, 1, 2)), 12, 1, 2)
PUBLISHED = PretrainConfig(
    network=NETWORK, view_size=(4, 8, 4), in_channels=2, n_children=(3, 2), alignment_weight=0.7, temperature=0.5,
    level_weights=(1.0, 0.5, 2.0),
)  # fmt: skip
NATIVE = replace(PUBLISHED, ladder="native", scale=(1, 2, 2))
SKIPPED = replace(PUBLISHED, scale=(1, 1, 1))
CONFIGS = {
    "published": PUBLISHED,
    "native": NATIVE,
    "skipped": SKIPPED,
    "cosine": replace(PUBLISHED, alignment="cosine"),
    "none": replace(NATIVE, alignment="none"),
}
THRESHOLD = torch.tensor([0.3, 0.3], dtype=torch.float64)


def make_model(config):
    torch.manual_seed(0)
    model = MaskInMask(config.network, config.in_channels, alignment=config.alignment).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def make_crops(config, seed=1):
    """Two crops with quiet parts (air); most of the second lies outside the volume."""
    fov = levels_of(config)[0].fov
    torch.manual_seed(seed)
    crops = torch.randn(2, config.in_channels, *fov, dtype=torch.float64)
    crops[:, :, : fov[0] // 2, : fov[1] // 4] *= 0.01
    valid = torch.tensor([[[0, n] for n in fov], [[0, fov[0]], [fov[1] - 3, fov[1]], [0, fov[2] // 2 + 1]]])
    return crops, valid


def make_views(config, crops=None, seed=1):
    own, valid = make_crops(config)
    fill = torch.tensor([-4.0, -2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    crops = own if crops is None else crops
    return nested_views(crops, valid, fill, levels_of(config), generator, THRESHOLD)  # children prefer tissue: default


def twin_terms(reference, encode_dense, model, views, config):
    """[(number, reconstruction, alignment or None, top-1, targets)] of all levels, from dense encoding and loops."""
    losses, geometry = reference.losses, reference.geometry
    terms, parents = [], None
    for number, view in enumerate(views):
        mask = mask_of(view.ids_masked, view.level.n_tokens)
        latent = encode_dense(model.encoder, view.images, mask)
        features = model.decoder(latent, torch.stack([(~m).nonzero().flatten() for m in mask]), view.level.grid)
        predictions, tokens, is_target = [], [], []
        for n in range(len(view.images)):
            hidden = view.ids_masked[n].tolist()
            voxels = [geometry.token_voxels(view.images[n], config.network.token_size, t) for t in hidden]
            predictions.append([model.decoder.head(features[n, t]) for t in hidden])
            tokens.append([torch.stack(v) for v in voxels])
            is_target.append(
                [
                    not view.padded[n, t] and not losses.is_flat(v, THRESHOLD.tolist())
                    for t, v in zip(hidden, voxels, strict=True)
                ]
            )
        alignment = top1 = None
        if parents is not None and config.alignment != "none":
            above = views[number - 1]
            edge = number + 2 - len(views)  # 0: levels 1-2, 1: levels 2-3, whatever is skipped
            projectors = {side: reference_projector(reference, model, side, edge) for side in ("child", "parent")}
            child = [projectors["child"](sum(f) / len(f)) for f in features]
            n_children = above.places.shape[1]
            own = [
                (n // n_children) * above.level.n_places + int(above.places[n // n_children, n % n_children])
                for n in range(len(child))
            ]
            weights = [0.0 if outside else 1.0 for outside in view.outside.tolist()]
            if config.alignment == "infonce":
                above_features = [projectors["parent"](p) for p in parents]
                alignment, top1 = losses.infonce(child, above_features, own, weights, config.temperature)
            else:
                alignment = losses.cosine_alignment(child, parents, own, weights)
        level = number + 4 - len(views)  # outer levels are the skipped ones
        terms.append(
            (level, losses.reconstruction(predictions, tokens, is_target), alignment, top1, is_target)
        )
        parents = losses.place_features(features.detach(), view.level.tokens_of_region.tolist())
    return terms


def reference_projector(reference, model, side, edge):
    prefix = f"projectors.{side}.{edge}."
    state = {name.removeprefix(prefix): p for name, p in model.named_parameters() if name.startswith(prefix)}
    return lambda x: reference.network.projector(x, state)


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def by_level(model, views, config, views_per_pass=1000, **how):
    """`level_losses`, each level in passes of its own: loss, figures and prediction of each."""
    for loss, (part,) in level_losses(model, views, THRESHOLD, config, views_per_pass, **how):
        yield loss, *part


def values_of(figures):
    """Attribute → value of the figures that there are."""
    return {name: value for name, value in vars(figures).items() if torch.is_tensor(value)}


def assert_close(found, wanted, relative=1e-4):
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name in wanted:
        bound = relative * max(float(wanted[name].abs().max()), 1e-3 * largest)
        assert float((found[name] - wanted[name]).abs().max()) <= bound, name


@pytest.mark.parametrize("name", list(CONFIGS))
def test_losses_and_gradients_match_the_twin(reference, encode_dense, name):
    config = CONFIGS[name]
    model, views = make_model(config), make_views(config)
    terms = twin_terms(reference, encode_dense, model, views, config)
    total = 0.0
    for number, reconstruction, alignment, _, _ in terms:
        total = total + config.level_weights[number - 1] * reconstruction
        if alignment is not None:
            total = total + config.alignment_weight * alignment
    total.backward()
    wanted = gradients(model)

    model.zero_grad()
    for (number, reconstruction, alignment, top1, is_target), (loss, figures, _) in zip(
        terms, by_level(model, views, config), strict=True
    ):
        assert figures.number == number
        assert figures.reconstruction.item() == pytest.approx(reconstruction.item(), rel=1e-9)
        weighted = config.level_weights[number - 1] * reconstruction.item()
        assert (figures.alignment is not None) == (alignment is not None)
        if alignment is not None:
            assert figures.alignment.item() == pytest.approx(alignment.item(), rel=1e-9)
            weighted += config.alignment_weight * alignment.item()
        if top1 is not None:
            assert figures.alignment_top1.item() == pytest.approx(top1)
        assert loss.item() == pytest.approx(weighted, rel=1e-9)
        assert figures.loss.item() == pytest.approx(weighted, rel=1e-9)
        flattened = [counts for view in is_target for counts in view]
        shares = figures.padded_share + figures.flat_share
        assert shares.item() == pytest.approx(1 - sum(flattened) / len(flattened), abs=1e-6)
        loss.backward()  # level by level: a gradient into the parent's pass would need its freed graph
    assert_close(gradients(model), wanted)


def test_the_case_has_padding_air_and_views_outside():
    """What the twin is compared on really occurs."""
    views = make_views(PUBLISHED)
    figures = [part for _, part, _ in by_level(make_model(PUBLISHED), views, PUBLISHED)]
    assert [level.number for level in figures] == [1, 2, 3]
    assert all(level.padded_share > 0 for level in figures)
    assert any(level.flat_share > 0 for level in figures)
    assert views[1].outside.any()
    assert not views[1].outside.all()


@pytest.mark.parametrize("views_per_pass", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_passes_of_a_few_views_of_a_level_equal_one_pass_of_all_levels(name, views_per_pass):
    config = CONFIGS[name]
    model, views = make_model(config), make_views(config)

    def run(views_per_pass):
        model.zero_grad()
        figures, sizes = [], []
        for loss, parts in level_losses(model, views, THRESHOLD, config, views_per_pass):
            loss.backward()  # pass by pass: nothing of one pass is needed by the next
            for part in parts:
                add_pass(figures, part.figures)
            sizes.append(sum(len(part.prediction) for part in parts))
        return figures, gradients(model), sizes

    (whole, whole_gradients, whole_sizes), (found, found_gradients, sizes) = run(None), run(views_per_pass)
    assert max(sizes) <= views_per_pass
    assert whole_sizes == [sum(sizes)] == [sum(len(view.images) for view in views)]
    assert len(found) == len(whole) == len(views)
    for level, wanted in zip(found, whole, strict=True):
        assert values_of(level).keys() == values_of(wanted).keys()
        for key, value in values_of(wanted).items():
            assert values_of(level)[key].tolist() == pytest.approx(value.tolist(), rel=1e-9, abs=1e-7), key
    assert_close(found_gradients, whole_gradients, 1e-9)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradients_of_the_levels_add_up_to_one_backward_of_the_total(name):
    config = CONFIGS[name]
    model, views = make_model(config), make_views(config)
    for loss, _, _ in by_level(model, views, config):
        loss.backward()
    one_by_one = gradients(model)
    model.zero_grad()
    sum(loss for loss, _, _ in by_level(model, views, config)).backward()
    assert_close(one_by_one, gradients(model), 1e-9)


def test_alignment_sends_no_gradient_into_the_parent_pass():
    """With level 2's alignment alone, the encoder's gradient is the same whatever made the parent's features."""
    config = replace(PUBLISHED, level_weights=(0.0, 0.0, 0.0))
    model, views = make_model(config), make_views(config)
    seen = []

    class Recording(nn.Module):
        def forward(self, groups, recompute):
            return model(groups, recompute)

        def align(self, features, edge, parent_features):
            seen.append(parent_features)
            return model.align(features, edge, parent_features)

    losses = [loss for loss, _, _ in by_level(Recording(), views, config)]
    assert seen[0] is None
    assert all(not features.requires_grad for features in seen[1:])
    losses[1].backward()
    found = gradients(model)
    model.zero_grad()
    child, parent = model.align(model([views[1].masked()])[0].features, 0, seen[1].clone())
    logits = nn.functional.normalize(child, dim=1) @ nn.functional.normalize(parent, dim=1).T
    inside = ~views[1].outside
    target = _place_index(views[0])[inside]
    (config.alignment_weight * nn.functional.cross_entropy(logits[inside] / config.temperature, target)).backward()
    assert_close(found, gradients(model))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
@pytest.mark.parametrize("name", ["published", "native", "skipped", "cosine"])
def test_what_lies_under_the_padding_cannot_change_the_loss(name, garbage):
    config = CONFIGS[name]
    crops, valid = make_crops(config)
    changed = torch.full_like(crops, garbage)
    for crop, box in enumerate(valid.tolist()):
        x, y, z = (slice(low, high) for low, high in box)
        changed[crop, :, x, y, z] = crops[crop, :, x, y, z]
    model = make_model(config)

    def run(crops):
        model.zero_grad()
        figures = {}
        for loss, parts in level_losses(model, make_views(config, crops), THRESHOLD, config):
            loss.backward()
            for part, _ in parts:
                figures.update({(part.number, name): value for name, value in values_of(part).items()})
        return figures, gradients(model)

    (first, first_gradients), (second, second_gradients) = run(crops), run(changed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.isfinite(value).all() for value in second.values())
    assert all(torch.equal(first_gradients[key], second_gradients[key]) for key in first_gradients)


def test_a_perfect_prediction_has_no_reconstruction_loss(reference):
    config = replace(PUBLISHED, alignment="none")

    class Oracle(nn.Module):
        def forward(self, groups, recompute):
            return [self.reconstruct(*group) for group in groups]

        def align(self, features, edge, parent_features):
            return None, None

        def reconstruct(self, images, keep, masked):
            rows = []
            for image, ids in zip(images, masked, strict=True):
                voxels = [reference.geometry.token_voxels(image, config.network.token_size, int(t)) for t in ids]
                rows.append([reference.losses.normalized([float(v) for v in values]) for values in voxels])
            return Reconstruction(torch.tensor(rows, dtype=torch.float64), torch.zeros(len(images), 16, 12))

    for loss, figures, _ in by_level(Oracle(), make_views(config), config):
        assert loss < 1e-10
        assert figures.reconstruction < 1e-10


def test_level_weights_scale_their_own_level_only():
    model, views = make_model(PUBLISHED), make_views(PUBLISHED)

    def run(weights, alignment_weight):
        config = replace(PUBLISHED, level_weights=weights, alignment_weight=alignment_weight)
        return [(loss.item(), figures) for loss, figures, _ in by_level(model, views, config)]

    for number, (loss, figures) in enumerate(run((1.0, 2.0, 3.0), 0.0)):
        assert figures.number == number + 1
        assert loss == pytest.approx((number + 1) * figures.reconstruction.item(), rel=1e-6)
    for number, (loss, figures) in enumerate(run((0.0, 0.0, 0.0), 0.1)):
        wanted = 0.1 * figures.alignment.item() if number else 0.0
        assert loss == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("base", "changes", "counted"),
    [
        (PUBLISHED, {}, 3),
        (PUBLISHED, {"level_weights": (1.0, 0.0, 0.0)}, 3),  # the others are aligned
        (PUBLISHED, {"level_weights": (1.0, 0.0, 0.0), "alignment_weight": 0.0}, 1),
        (PUBLISHED, {"level_weights": (1.0, 0.0, 0.0), "alignment": "none"}, 1),
        (PUBLISHED, {"level_weights": (0.0, 1.0, 0.0), "alignment": "none"}, 2),
        (PUBLISHED, {"level_weights": (0.0, 0.0, 1.0), "alignment": "none"}, 3),
        (SKIPPED, {"level_weights": (1.0, 1.0, 0.0), "alignment": "none"}, 1),  # level 2 is the outermost here
        (SKIPPED, {"level_weights": (1.0, 0.0, 0.0), "alignment": "none"}, 2),  # nothing counts: as if all did
    ],
)
def test_levels_that_are_left_out_would_have_changed_no_gradient(base, changes, counted):
    config = replace(base, **changes)
    views = make_views(config)
    assert config.levels_that_count(len(views)) == counted

    def run(n_computed):
        model = make_model(config)
        numbers = []
        for loss, figures, _ in by_level(model, views, config, n_computed=n_computed):
            loss.backward()
            numbers.append(figures.number)
        return numbers, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (numbers, found), (_, wanted) = run(counted), run(None)
    assert numbers == [position + 4 - len(views) for position in range(counted)]
    for name, gradient in wanted.items():
        assert torch.equal(found.get(name, torch.zeros_like(gradient)), gradient), name


def test_skipped_levels_keep_their_numbers():
    model, views = make_model(SKIPPED), make_views(SKIPPED)
    assert [figures.number for _, figures, _ in by_level(model, views, SKIPPED)] == [2, 3]


@pytest.mark.parametrize("name", ["published", "native"])
def test_place_features_and_index_point_at_the_place_a_child_was_cut_from(reference, name):
    config = CONFIGS[name]
    for parent, child in zip(make_views(config), make_views(config)[1:], strict=False):
        features = torch.randn(len(parent.images), parent.level.n_tokens, 5, dtype=torch.float64)
        places = _place_features(features, parent.level)
        regions = reference.geometry.tokens_of_regions(
            config.view_size, config.network.token_size, parent.level.n_regions
        )
        wanted = torch.stack(reference.losses.place_features(features, regions))
        torch.testing.assert_close(places, wanted)
        index = _place_index(parent)
        assert len(index) == len(child.images)
        for n, row in enumerate(index.tolist()):
            view, place = divmod(row, len(regions))
            assert int(child.crop[n]) == int(parent.crop[view])
            offset = parent.offset[view] + torch.as_tensor(parent.level.region_offsets[place])
            assert torch.equal(child.offset[n], offset)
