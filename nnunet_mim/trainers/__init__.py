"""nnU-Net v2 trainers that finetune MiM-pretrained encoders.

The trainers are imported when they are asked for: nnU-Net's own trainer takes seconds, which commands that only read a
recipe need not wait for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_mim.trainers.trainer import nnUNetTrainerMiM, nnUNetTrainerMiMScratch

__all__ = ["nnUNetTrainerMiM", "nnUNetTrainerMiMScratch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from nnunet_mim.trainers import trainer

    return getattr(trainer, name)
