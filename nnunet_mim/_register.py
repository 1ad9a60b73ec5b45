"""Tells nnU-Net where the trainers of this package are.

nnU-Net looks for a trainer in its own tree first, then in the folders that the environment variable
`nnUNet_extTrainer` lists. `nnunet_mim.pth`, installed beside the package, calls `register()` whenever Python starts,
so this file uses the standard library only and `os` is all it needs.
"""

import os

EXT_TRAINER_VARIABLE = "nnUNet_extTrainer"
OPT_OUT_VARIABLE = "NNUNET_MIM_NO_AUTOREGISTER"
PLUGIN_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_nnunet_plugin")


def register() -> None:
    """Append the plugin folder to the folders in `nnUNet_extTrainer`.

    Entries that are already there stay, in front of ours; a second call changes nothing. With
    `NNUNET_MIM_NO_AUTOREGISTER` set (to anything but an empty string or 0) nothing happens.
    """
    if os.environ.get(OPT_OUT_VARIABLE, "0") not in ("", "0"):
        return
    folders = [folder for folder in os.environ.get(EXT_TRAINER_VARIABLE, "").split(os.pathsep) if folder.strip()]
    if PLUGIN_FOLDER not in folders:
        os.environ[EXT_TRAINER_VARIABLE] = os.pathsep.join([*folders, PLUGIN_FOLDER])
