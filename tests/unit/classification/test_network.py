import torch

from nnunet_mim.classification.network import AttentionPool, Classifier, by_case, place_weights
from nnunet_mim.networks.hybrid_encoder import HybridEncoder


def trained_classifier(network_config):
    torch.manual_seed(0)
    model = Classifier(HybridEncoder(1, network_config), (6, 6, 12, 12), {"sick": 2, "stage": 3}).eval()
    for parameter in [*model.pools.parameters(), *model.heads.parameters()]:
        torch.nn.init.normal_(parameter)
    return model


def test_tokens_that_do_not_count_are_ignored():
    torch.manual_seed(0)
    pool = AttentionPool(12)
    torch.nn.init.normal_(pool.scores.weight)
    tokens, weights = torch.randn(2, 5, 12), torch.tensor([[1.0, 0.5, 1, 0, 0]] * 2)
    changed = tokens.clone()
    changed[:, 3:] = 1e4
    torch.testing.assert_close(pool(tokens, weights), pool(changed, weights))
    torch.testing.assert_close(pool(tokens, weights), pool(tokens[:, :3], weights[:, :3]))


def test_the_pooling_starts_as_a_weighted_mean():
    pool = AttentionPool(12)
    tokens, weights = torch.randn(1, 4, 12), torch.tensor([[1.0, 0.5, 0.25, 0.25]])
    torch.testing.assert_close(pool(tokens, weights), (weights[..., None] * tokens).sum(dim=1) / 2)


def test_logits_per_target_and_of_several_windows(network_config):
    model = trained_classifier(network_config)
    images, places = torch.randn(3, 1, 16, 32, 16), torch.ones(3, 2, 16, 32, 16, dtype=torch.bool)
    logits = model(images, places)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {"sick": (3, 2), "stage": (3, 3)}
    tokens, weights = model.tokens(images, places)
    together = model.classify(tokens.reshape(1, -1, 37), weights.reshape(1, -1, 2))
    assert together["sick"].shape == (1, 2)
    alone = model.classify(tokens[:1], weights[:1])
    torch.testing.assert_close(alone["stage"], logits["stage"][:1])


def test_logits_are_0_at_the_start(network_config):
    model = Classifier(HybridEncoder(1, network_config), (6, 6, 12, 12), {"sick": 2})
    assert not model(torch.randn(2, 1, 16, 16, 16), torch.ones(2, 2, 16, 16, 16, dtype=torch.bool))["sick"].any()


def test_weights_of_places():
    counts = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    counts[0, :1, :2] = True
    weights = place_weights(counts, (2, 2, 2))
    torch.testing.assert_close(weights, torch.tensor([[[[0.5, 0.5], [0, 0]], [[0, 0], [0, 0]]]]))


def test_windows_of_a_case_are_joined_and_the_rest_is_padding():
    tokens, weights = torch.randn(3, 4, 12), torch.rand(3, 4, 2) + 0.1
    joined, both = by_case(tokens, weights, [1, 2])
    assert joined.shape == (2, 8, 12)
    assert not both[0, 4:].any()
    counts, weights = both[..., 1], weights[..., 1]
    pool = AttentionPool(12)
    torch.nn.init.normal_(pool.scores.weight)
    pooled = pool(joined, counts)
    torch.testing.assert_close(pooled[:1], pool(tokens[:1], weights[:1]))
    torch.testing.assert_close(pooled[1:], pool(tokens[1:].reshape(1, 8, 12), weights[1:].reshape(1, 8)))


def test_a_token_holds_the_mean_of_each_map_over_its_part_of_the_mask(network_config):
    model = trained_classifier(network_config)
    images, places = torch.randn(1, 1, 16, 16, 32), torch.zeros(1, 2, 16, 16, 32, dtype=torch.bool)
    places[:, 0, :, :8] = True
    places[:, 1, 4:8, 2:6, 20:28] = True  # in the second of the two tokens
    with torch.no_grad():
        tokens, weights = model.tokens(images, places)
        first, *_, last = model.encoder.forward_features(images)  # half of the resolution
    share = 4 * 4 * 8 / 16**3
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.0], [0.5, share]]]))
    expected = model.norms[0](first[0, :, 2:4, 1:3, 10:14].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(tokens[0, 1, :6], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[0, 1, 24:36], model.norms[-1](last[0, :, 0, 0, 1]))
    torch.testing.assert_close(tokens[0, :, -1], torch.tensor([0.0, share ** (1 / 3)]))
    outside = images.clone()
    outside[..., 16:] += 100 * ~places[0, 1, ..., 16:]
    assert not torch.equal(model(outside, places)["sick"], model(images, places)["sick"])  # it sees the surroundings


def test_without_any_mask_the_box_stands_for_it(network_config):
    model = trained_classifier(network_config)
    tokens = torch.randn(1, 4, 37)
    box = torch.rand(1, 4) + 0.1
    none, same = (torch.stack([box, mask], dim=-1) for mask in (torch.zeros(1, 4), box))
    torch.testing.assert_close(model.classify(tokens, none)["sick"], model.classify(tokens, same)["sick"])
