"""On which device each layer of a model computes that accelerate has spread over several, or offloaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.utils import align_module_device
from torch import nn

from chatglm_ptuning.model.prefix_encoder import PrefixEncoder


def execution_device(module: nn.Module) -> torch.device | None:
    """The device to which accelerate brings a module's inputs, and its weights if they are elsewhere; None if it has
    no hook there."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def layer_devices(layers: Iterable[nn.Module]) -> tuple[torch.device, ...] | None:
    """The device on which each layer computes; None if nothing was spread."""
    devices = [execution_device(layer) for layer in layers]
    return None if None in devices else tuple(devices)


def out_of_offload(encoder: PrefixEncoder, fresh: PrefixEncoder) -> PrefixEncoder:
    """A trainable prefix that is never offloaded, for one that accelerate may have put on the disk.

    Args:
        encoder: the prefix of the model.
        fresh: one of the same size with the values that an untrained one has.
    """
    if not any(parameter.is_meta for parameter in encoder.parameters()):
        return encoder
    values = {}
    try:
        for name, module in encoder.named_modules(prefix="encoder"):
            with align_module_device(module):
                for leaf, parameter in module.named_parameters(recurse=False):
                    values[f"{name}.{leaf}".removeprefix("encoder.")] = parameter.detach().clone()
    except KeyError:  # the files of the base hold no prefix, so none was written to the disk
        fresh.mark_untrained()
    else:
        fresh.load_state_dict(values)
    return fresh.to(execution_device(encoder.embedding)).train(encoder.training)
