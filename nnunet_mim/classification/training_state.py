"""The state of a network's training in one fold: what `checkpoint_latest.pth` holds, and `--c` restores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_mim.checkpoint.format import read_safely, save_atomically
from nnunet_mim.classification.network import Classifier
from nnunet_mim.errors import MiMError


@dataclass
class TrainingState:
    """Everything that changes while a fold is trained. Random numbers depend on seed and iteration alone."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    """steps done"""
    losses: list[float] = field(default_factory=list)
    """of the steps of this epoch"""
    skipped: int = 0
    """steps without a finite gradient, which changed nothing"""
    history: list[dict[str, float]] = field(default_factory=list)
    """a row per epoch"""
    best: dict[str, Tensor] = field(default_factory=dict)
    """weights, on the CPU, of the epoch with the lowest loss on the inner split"""

    @property
    def lowest(self) -> float:
        """The lowest loss on the inner split so far."""
        return min((row["inner_loss"] for row in self.history), default=float("inf"))

    def add_epoch(self, row: dict[str, float]) -> None:
        """Note an epoch, and keep the weights if its loss on the inner split is the lowest so far."""
        if row["inner_loss"] < self.lowest or not self.best:
            self.best = weights_of(self.model)
        self.history.append(row)
        self.losses = []

    def save(self, path: Path, run: Mapping[str, Any]) -> None:
        """Write a checkpoint that `restore` reads. `run`: what has to be the same when it goes on, plain values."""
        values = {name: getattr(self, name) for name in ("iteration", "losses", "skipped", "history", "best")}
        content = {"weights": weights_of(self.model), "optimizer": self.optimizer.state_dict(), "run": dict(run)}
        save_atomically({**content, **values}, path, "continue with --c")

    def restore(self, path: Path, run: Mapping[str, Any]) -> None:
        """Take over a checkpoint. Raises MiMError for one that is damaged, or of another training."""
        stored = read_safely(path)
        try:
            before = stored["run"]
            changed = [_change(name, before.get(name), run[name]) for name in run if before.get(name) != run[name]]
            if changed:
                what = "; ".join(changed)
                raise MiMError(f"--c: {path} was started with other settings ({what}): use the same, or delete it")
            self.model.load_state_dict(stored["weights"])
            self.optimizer.load_state_dict(stored["optimizer"])
            for name in ("iteration", "losses", "skipped", "history", "best"):
                setattr(self, name, stored[name])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, MiMError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise MiMError(f"{path} is no checkpoint of such a training ({reason}): delete it") from error


def _change(name: str, before: object, now: object) -> str:
    """A setting that has changed; long values are left out."""
    return name if isinstance(now, (list, dict)) else f"{name} {before} -> {now}"


def weights_of(model: Classifier) -> dict[str, Tensor]:
    """A copy of all weights on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
