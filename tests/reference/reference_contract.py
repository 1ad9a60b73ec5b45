"""What nnU-Net's development branch asks of a checkpoint that it finetunes, written down from its documentation
(documentation/finetuning_from_nnssl_checkpoints.md) and the behaviour of its loading code; no code of it is used.

- The file loads with `torch.load(weights_only=True)` and has `network_weights` and `nnssl_adaptation_plan`.
- The adaptation plan has `architecture_plans` (arch_class_name, arch_kwargs, arch_kwargs_requiring_import),
  `pretrain_plan` (configurations → patch_size, spacing, normalisation), `pretrain_num_input_channels`,
  `recommended_downstream_patchsize`, `key_to_encoder`, `key_to_stem`, `keys_to_in_proj`, `key_to_lpe`.
- Only names that end in PlainConvUNet, ResidualEncoderUNet, PrimusS/B/M/L or ResEncL are built.
- Weights below `key_to_encoder` and `key_to_stem` load strictly into the network's modules of the same name; those at
  `keys_to_in_proj` are the ones that are repeated for more channels. `key_to_lpe` is None where no position is learnt.
- Its commands (`nnUNetv2_plan_like_dynamic`, `nnUNetv2_preprocess_like_nnssl`) write `pretrain_info` into plans: the
  path, and of the adaptation plan what `pretrain_info_of` lists.
"""

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

BUILT = ("PlainConvUNet", "ResidualEncoderUNet", "PrimusS", "PrimusB", "PrimusM", "PrimusL", "ResEncL")


def load_by_contract(path, num_classes):
    """A network for finetuning, with the encoder's weights of a checkpoint.

    Raises:
        AssertionError, KeyError, RuntimeError: the checkpoint breaks the contract.
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    plan, weights = stored["nnssl_adaptation_plan"], stored["network_weights"]
    block = plan["architecture_plans"]
    assert block["arch_class_name"].endswith(BUILT)
    channels = plan["pretrain_num_input_channels"]
    network = get_network_from_plans(
        block["arch_class_name"], block["arch_kwargs"], block["arch_kwargs_requiring_import"], channels, num_classes,
        deep_supervision=False,
    )  # fmt: skip
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {name.removeprefix(f"{key}."): value for name, value in weights.items() if name.startswith(f"{key}.")}
        assert part, f"nothing below {key}"
        network.get_submodule(key).load_state_dict(part, strict=True)
    for key in plan["keys_to_in_proj"]:
        assert weights[f"{key}.weight"].shape[1] == channels
    assert plan["key_to_lpe"] is None  # convolutional encoders learn no positions
    assert len(plan["recommended_downstream_patchsize"]) == 3
    for configuration in plan["pretrain_plan"]["configurations"].values():
        assert {"patch_size", "spacing", "normalization_schemes"} <= set(configuration)
    return network


def pretrain_info_of(path):
    """The block of plans that the branch's trainers read, as its commands make it from a checkpoint.

    Raises:
        KeyError: the checkpoint lacks something that the block needs.
    """
    plan = torch.load(path, map_location="cpu", weights_only=True)["nnssl_adaptation_plan"]
    configurations = plan["pretrain_plan"]["configurations"].values()
    return {
        "checkpoint_path": str(path),
        "pt_num_in_channels": plan["pretrain_num_input_channels"],
        "pt_used_patchsize": next(iter(configurations))["patch_size"],
        **{key: plan[key] for key in ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe")},
    }
