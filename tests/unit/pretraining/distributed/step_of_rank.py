"""One process of a step, which writes its figures and gradients.

python step_of_rank.py OUT RANK WORLD PORT ALIGNMENT VIEWS
"""

import os
import sys
from dataclasses import replace

import torch

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.distributed.launch import end_process_group
from nnunet_mim.pretraining.distributed.ranks import Ranks
from nnunet_mim.pretraining.monitoring.figures import TrainingFigures
from nnunet_mim.pretraining.objective.levels import add_pass, level_losses
from nnunet_mim.pretraining.objective.views import nested_views

NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), 2, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2)
CONFIG = PretrainConfig(network=NETWORK, view_size=(32, 32, 32), n_children=(2, 2), batch_size=4)


def step(ranks, alignment, views_per_pass):
    """Figures and gradients of this rank's part of a batch of four crops, in float64; 0 views: all in one pass."""
    config = replace(CONFIG, alignment=alignment)
    levels = levels_of(config)
    torch.manual_seed(0)
    model = MaskInMask(NETWORK, alignment=alignment).double()
    torch.manual_seed(1)
    crops = torch.randn(4, 1, *levels[0].fov, dtype=torch.float64)
    crops[1, :, :40] *= 0.01  # flat tokens: ranks have different numbers of targets
    valid = torch.tensor([[[0, n] for n in levels[0].fov]] * 4)
    valid[3, 0, 1] = 40  # and of views outside the volume
    n = 4 // ranks.world
    mine = slice(ranks.rank * n, (ranks.rank + 1) * n)
    flat = torch.tensor([0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    views = nested_views(crops[mine], valid[mine], torch.zeros(1), levels, generator, flat, ranks)
    figures = []
    for loss, parts in level_losses(model, views, flat, config, views_per_pass or None, ranks=ranks):
        loss.backward()
        for part in parts:
            add_pass(figures, part.figures)
    ranks.sum_all([p.grad for p in model.parameters() if p.grad is not None])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    row = TrainingFigures(levels=tuple(figures)).row()
    return {name: ranks.sum(value) for name, value in row.items()}, gradients


def main(out, rank, world, port, alignment, views_per_pass):
    torch.set_num_threads(1)
    if int(world) > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=world)
        torch.distributed.init_process_group("gloo")
    ranks = Ranks(int(rank), int(world))
    fitting = ranks.least(int(views_per_pass) + ranks.rank, torch.device("cpu"))  # more fit on the second rank
    result = step(ranks, alignment, fitting)
    if rank == "0":
        torch.save(result, out)
    end_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
