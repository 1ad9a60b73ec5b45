"""What nnU-Net finds when it looks through `nnUNet_extTrainer`.

nnU-Net imports this file as a top-level module and drops it from `sys.modules` afterwards. So it re-exports only: a
class defined here would exist twice and could not be pickled.
"""

from nnunet_mim.trainers import nnUNetTrainerMiM, nnUNetTrainerMiMScratch

__all__ = ["nnUNetTrainerMiM", "nnUNetTrainerMiMScratch"]
