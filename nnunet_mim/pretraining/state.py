"""The state of a run: what a checkpoint holds is what is here, and `--c` restores it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from nnunet_mim.checkpoint.format import UNET_PREFIX, build_checkpoint, load_checkpoint, run_provenance, save_atomically
from nnunet_mim.checkpoint.identity import merged_records
from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.build import PretrainingNetwork, build_network
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.stopping import SkippedSteps


@dataclass
class TrainingState:
    """Everything that changes while a run trains. Random numbers depend on seed and iteration alone."""

    model: PretrainingNetwork
    optimizer: torch.optim.AdamW
    iteration: int
    """optimiser steps done"""
    history: list[dict[str, float]]
    """rows of the measurements on held-out cases, oldest first"""
    skipped: SkippedSteps
    """steps without a finite gradient"""
    crops_seen: Counter[str]
    """crops drawn of each dataset"""
    earlier_cases: list[dict[str, str]]
    """records of the cases that the weights were trained on before this process; those of the run are made when a
    checkpoint is, as many of them take much memory"""

    def checkpoint(self, run: Run, resumable: bool = False) -> dict[str, Any]:
        """The content of a checkpoint.

        Args:
            run: that the state is of.
            resumable: with the optimiser's state, so that `--c` can continue.
        """
        records = run.data.train.records()
        cases = merged_records(self.earlier_cases, records) if self.earlier_cases else records
        provenance = run_provenance(run.data.sources, cases, run.data.fold, self.iteration, self.history)
        provenance["skipped_steps"] = self.skipped.steps
        provenance["crops_seen"] = dict(self.crops_seen)
        checkpoint = build_checkpoint(self.model.state_dict(), run.config, provenance)
        if resumable:
            checkpoint["resume_state"] = {"optimizer": _optimizer_state(self.model, self.optimizer)}
        return checkpoint

    def save(self, run: Run, file: Path, resumable: bool = False) -> None:
        """Write a checkpoint; arguments as in `checkpoint`."""
        save_atomically(self.checkpoint(run, resumable), file, "continue with --c")


def initial_state(run: Run, fabric: Fabric) -> TrainingState:
    """The state that a run starts from: random weights, those of `init_checkpoint`, or the checkpoint it continues."""
    config, stored = run.config, run.stored
    torch.manual_seed(config.seed)
    model = build_network(config)
    source = stored or (load_checkpoint(config.init_checkpoint) if config.init_checkpoint else None)
    if source is not None:
        load_weights(model, source["network_weights"])
    fabric.to_device(model)
    optimizer = build_optimizer(model, config)
    earlier_cases = source["provenance"]["cases"] if source is not None else []
    crops_seen = Counter({source.dataset: 0 for source in run.data.sources})
    if stored is None:
        return TrainingState(model, optimizer, 0, [], SkippedSteps([], config.max_skipped), crops_seen, earlier_cases)
    provenance = stored["provenance"]
    _load_optimizer_state(model, optimizer, stored["resume_state"]["optimizer"])
    crops_seen.update(provenance.get("crops_seen", {}))
    skipped = SkippedSteps(provenance["skipped_steps"], config.max_skipped)
    return TrainingState(
        model, optimizer, provenance["iterations"], provenance["loss_history"], skipped, crops_seen, earlier_cases
    )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a network of pretraining. The U-Net around the encoder, on either side, may be missing or of
    another size: its weights are taken where they fit.
    """
    own = model.state_dict()
    fitting = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith(UNET_PREFIX) or (name in own and own[name].shape == weight.shape)
    }
    missing = {name: weight for name, weight in own.items() if name.startswith(UNET_PREFIX) and name not in fitting}
    model.load_state_dict({**missing, **fitting})


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and other vectors. Groups of the U-Net around the encoder have `unet`."""
    parts: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, False): [], (False, True): []}
    for name, parameter in model.named_parameters():
        vector = parameter.ndim < 2 or name.endswith("mask_token")
        parts.setdefault((name.startswith(UNET_PREFIX), vector), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": 0.0 if vector else config.weight_decay, "unet": unet}
        for (unet, vector), parameters in parts.items()
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """State by parameter name, on the CPU."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: value.detach().cpu().clone() for key, value in state.items()}
        for parameter, state in optimizer.state.items()
    }


def _load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, dict[str, Tensor]]
) -> None:
    """Inverse of `_optimizer_state`."""
    for name, parameter in model.named_parameters():
        if name in stored:
            values = {key: value.to(parameter.device, copy=True) for key, value in stored[name].items()}
            optimizer.state[parameter] = values
