"""On which device each layer of a model computes that accelerate has spread over several, or offloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from accelerate.utils import align_module_device
from torch import nn

from chatglm_ptuning.model.trained_module import FirstValues

TrainedModule = TypeVar("TrainedModule", bound=FirstValues)


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


def out_of_offload(module: TrainedModule, fresh: TrainedModule) -> TrainedModule:
    """A trainable prefix or head that is never offloaded, for one that accelerate may have put on the disk.

    Args:
        module: of the model.
        fresh: one of the same size with the values that an untrained one has.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    values = {}
    try:
        for name, part in module.named_modules(prefix="module"):
            with align_module_device(part):
                for leaf, parameter in part.named_parameters(recurse=False):
                    values[f"{name}.{leaf}".removeprefix("module.")] = parameter.detach().clone()
    except KeyError:  # the files of the base hold neither, so none was written to the disk
        fresh.mark_untrained()
    else:
        fresh.load_state_dict(values)
    device = next(filter(None, map(execution_device, module.modules())), None)
    return fresh.to(device).train(module.training)
