"""nnU-Net trainers that finetune a MiM-pretrained network, and their control from random weights.

They differ from stock nnU-Net in the network (HybridUNet), its initial weights and the biases of its heads, the
optimiser with its schedule, and the mirroring axes. All numbers come from `mim_finetune` in the plans.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.checkpoint.identity import LeakedCases, comparison_note, leak_warning, leaked_cases
from nnunet_mim.checkpoint.locate import ENV_CHECKPOINT, find_checkpoint, no_checkpoint_error
from nnunet_mim.checkpoint.units import unit_differences, units_warning
from nnunet_mim.errors import MiMError, one_line_errors, printable_lines
from nnunet_mim.networks.hybrid_unet import HybridUNet
from nnunet_mim.nnunet.datasets import required_folder
from nnunet_mim.nnunet.intensities import Intensities
from nnunet_mim.trainers.finetune_config import default_mirror_axes
from nnunet_mim.trainers.optim import IterationSchedule, build_optimizer
from nnunet_mim.trainers.resolve_plans import resolve_plans
from nnunet_mim.trainers.transfer import (
    TransferReport,
    check_architecture,
    read_record,
    start_from_prior,
    transfer_weights,
)

TRANSFER_FILE = "mim_transfer.json"


class nnUNetTrainerMiM(nnUNetTrainer):
    """Finetunes a HybridUNet whose encoder, and with `--decoder unet` all but the heads, `mim_pretrain` trained.

    The pretraining checkpoint is read only when a training starts: `--c`, `--val` and prediction work without it.
    """

    load_pretrained = True

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the base class's signature)
    ) -> None:
        with one_line_errors():
            _refuse_pretrained_weights(self.__class__.__name__)
            resolved = resolve_plans(
                plans, configuration, fold, dataset_json, self.__class__.__name__, self.load_pretrained
            )
        resolved.plans.setdefault("continue_training", False)
        super().__init__(resolved.plans, configuration, fold, dataset_json, device)
        self.finetune = resolved.finetune
        self.initial_lr = self.finetune.lr
        self.weight_decay = self.finetune.weight_decay
        self.num_epochs = self.finetune.num_epochs
        self.num_iterations_per_epoch = self.finetune.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.finetune.val_iterations_per_epoch
        self.oversample_foreground_percent = self.finetune.oversample_foreground
        self.enable_deep_supervision = self.finetune.deep_supervision
        self._checkpoint: PretrainedCheckpoint | None = resolved.checkpoint
        self._fresh = self.load_pretrained
        self._report: TransferReport | None = None
        for note in resolved.notes:
            self._log(note)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, IterationSchedule]:
        """Set the heads, transfer the weights, and make AdamW with its schedule.

        nnU-Net calls this once, on every rank, after building (and compiling) the network and before DDP wraps it: the
        only place to load pretrained weights.
        """
        network: HybridUNet = getattr(self.network, "_orig_mod", self.network)  # type: ignore[assignment]
        if self.finetune.foreground_prior:
            start_from_prior(network.decoder.heads, self.finetune.foreground_prior, self.label_manager.has_regions)
        if self._fresh:
            with one_line_errors():
                self._load_pretrained_weights(network)
        if not self.enable_deep_supervision:
            network.decoder.heads[1:].requires_grad_(False)  # unused, and DDP wants a gradient for every parameter
        recipe = self.finetune if self.load_pretrained else replace(self.finetune, decoder_first_fraction=0.0)
        return build_optimizer(network, recipe)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore a finetuning run, which needs no pretrained weights."""
        self._fresh = False
        super().load_checkpoint(filename_or_checkpoint)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._report is not None and self.local_rank == 0:
            self._check_provenance()
        self._checkpoint = None

    def train_step(self, batch: dict) -> dict:
        self.lr_scheduler.advance()
        return super().train_step(batch)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (the base class's name)
        """Choices of nnU-Net, with the mirroring axes of the recipe (default: all but left-right)."""
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        axes = self.finetune.mirror_axes
        if axes is None:
            axes = default_mirror_axes(self.plans_manager.transpose_forward)
        self.inference_allowed_mirroring_axes = axes or None  # nnU-Net's prediction takes None, not an empty tuple
        self._log(f"Mirroring axes (array order): {axes}")
        return rotation, dummy_2d, initial_patch_size, axes

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        super().perform_actual_validation(save_probabilities)
        record = Path(self.output_folder, TRANSFER_FILE)
        if self.local_rank == 0 and self.load_pretrained and record.is_file():
            stored = read_record(record)
            leaked = LeakedCases(tuple(stored["leaked_cases"]), stored.get("probably_leaked_cases", {}))
            if leaked:
                self._log(leak_warning(leaked, stored["n_val_cases"], stored["source"]))

    def _load_pretrained_weights(self, network: HybridUNet) -> None:
        if self._checkpoint is None:  # a fold is trained once more, over an old result
            results = required_folder("nnUNet_results")
            plans, where = self.plans_manager.plans, (self.configuration_name, self.fold, results)
            path = find_checkpoint(plans, *where)
            if path is None:
                raise no_checkpoint_error(plans, *where)
            self._checkpoint = PretrainedCheckpoint.load(path)
        channels = network.encoder.in_channels
        check_architecture(self._checkpoint, self.configuration_manager.network_arch_init_kwargs, channels)
        self._report = transfer_weights(network, self._checkpoint)
        for line in self._report.lines():
            self._log(line)

    def _check_provenance(self) -> None:
        """Warn about validation cases that pretraining has seen and about other units; record what was transferred."""
        assert self._checkpoint is not None
        assert self._report is not None
        provenance, leaked = self._checkpoint.provenance, LeakedCases()
        properties = self.plans_manager.foreground_intensity_properties_per_channel
        _, val_cases = self.do_split()
        if self.fold != "all":  # there the validation cases are training cases anyway
            cases = self.dataset_class(self.preprocessed_dataset_folder, val_cases)
            leaked = leaked_cases(
                provenance, self.plans_manager.dataset_name, val_cases, lambda case: cases.load_case(case)[0][:],
                Intensities(tuple(self.configuration_manager.normalization_schemes), properties),
                self.configuration_manager.spacing,
            )  # fmt: skip
            if note := comparison_note(provenance.get("cases") or [], leaked.not_compared):
                self._log(f"Validation cases seen in pretraining: {note}")
        if leaked:
            self._log(leak_warning(leaked, len(val_cases), self._checkpoint.path))
        differences = unit_differences(
            provenance,
            self.configuration_manager.configuration,
            properties,
            self.plans_manager.transpose_forward,
        )
        if differences:
            self._log(units_warning(differences))
        record = {
            **{name: getattr(self._report, name) for name in ("source", "loaded", "adapted", "fresh", "unfit")},
            "leaked_cases": list(leaked.same),
            "probably_leaked_cases": leaked.probably_same,
            "not_compared_cases": list(leaked.not_compared),
            "n_val_cases": len(val_cases),
            "unit_differences": differences,
            "pretraining": {k: v for k, v in provenance.items() if k not in ("cases", "loss_history")},
        }
        Path(self.output_folder, TRANSFER_FILE).write_text(json.dumps(record, indent=2))

    def _log(self, text: str) -> None:
        if self.local_rank == 0:
            self.print_to_log_file(printable_lines(text))


def _refuse_pretrained_weights(trainer: str) -> None:
    """Raise MiMError where the command has nnU-Net's -pretrained_weights, which would overwrite the whole network.

    argparse takes it as -pretrained_weights=FILE, and shortened, too.
    """
    flags = [word.partition("=")[0] for word in sys.argv[1:]]
    if any(flag.startswith("-pr") and "-pretrained_weights".startswith(flag) for flag in flags):
        raise MiMError(
            f"-pretrained_weights is not for {trainer}, which finds its weights itself: leave it out; to name the "
            f"checkpoint of nnUNetTrainerMiM put {ENV_CHECKPOINT}=FILE before the command"
        )


class nnUNetTrainerMiMScratch(nnUNetTrainerMiM):
    """The control: same network, same recipe, random weights; without the first phase that trains no encoder."""

    load_pretrained = False
