"""nnU-Net compiles the network on a GPU: how often, counted by a backend that compiles nothing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from nnunet_mim.config import NetworkConfig
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture

NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2)


@pytest.fixture
def compiled():
    """A compiled HybridUNet, and what counts its graphs."""
    torch._dynamo.reset()
    counters.clear()
    kwargs = plans_architecture(NETWORK, (32, 32, 32))["arch_kwargs"]
    counter = CompileCounterWithBackend("eager")
    yield torch.compile(HybridUNet(1, 3, **kwargs, deep_supervision=True), backend=counter), counter
    torch._dynamo.reset()


def an_epoch(network, patches):
    """What nnUNetTrainer does in one: training, then validation on patches."""
    network.train()
    for _ in range(2):
        sum(logits.sum() for logits in network(patches)).backward()
    network.eval()
    with torch.no_grad():
        for _ in range(2):
            network(patches)


def test_a_training_and_its_validation_are_three_graphs(compiled):
    """Training, validation on patches, and the sliding window of whole cases: no break, and none compiled twice."""
    network, counter = compiled
    patches = torch.randn(2, 1, 32, 32, 32)
    for _ in range(2):
        an_epoch(network, patches)
    assert counter.frame_count == 2
    network.decoder.deep_supervision = False
    with torch.inference_mode():
        for _ in range(5):
            network(patches[:1])
    assert counter.frame_count == 3
    assert not counters["graph_break"]


def test_a_new_number_of_patches_costs_one_more_graph_at_most(compiled):
    """nnU-Net predicts one at a time, a trainer of the user's may predict several.

    PyTorch makes a graph for 1 alone, and one for all other numbers.
    """
    network, counter = compiled
    network.decoder.deep_supervision = False
    network.eval()
    with torch.inference_mode():
        for number in (1, 2, 3, 5, 4):
            network(torch.randn(number, 1, 32, 32, 32))
    assert counter.frame_count == 2
