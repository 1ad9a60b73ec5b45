"""nnU-Net v2 trainers that finetune MiM-pretrained encoders."""

from nnunet_mim.trainers.nnUNetTrainerMiM import nnUNetTrainerMiM, nnUNetTrainerMiMScratch

__all__ = ["nnUNetTrainerMiM", "nnUNetTrainerMiMScratch"]
