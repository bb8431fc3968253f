"""The devices of a model that accelerate has spread over several devices, or offloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import align_module_device
from torch import nn

from chatglm_ptuning.model.trained_module import FirstValues

TrainedModule = TypeVar("TrainedModule", bound=FirstValues)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a module; None if the module has no hook of accelerate."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def layer_devices(layers: Iterable[nn.Module]) -> tuple[torch.device, ...] | None:
    """The device on which each layer computes; None if the model is on one device."""
    devices = [execution_device(layer) for layer in layers]
    return None if None in devices else tuple(devices)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a tensor from the CPU without waiting for the work that a GPU still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def batch_on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Moves the tensors of a batch, see `on_device`; the rest stays as it is."""
    return {name: on_device(value, device) if torch.is_tensor(value) else value for name, value in batch.items()}


def out_of_offload(module: TrainedModule, fresh: TrainedModule, *, is_new: bool = False) -> TrainedModule:
    """Returns a trainable prefix or head in memory, in place of one that accelerate may have offloaded to the disk.

    Args:
        module: the one of the model; returned if it is in memory.
        fresh: an untrained one of the same size, which takes the offloaded values.
        is_new: whether to leave them: accelerate offloads to the base's own files, and takes what has the same name.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    values: dict[str, torch.Tensor] = {}
    try:
        for name, part in () if is_new else module.named_modules():
            with align_module_device(part):
                for leaf, parameter in part.named_parameters(recurse=False):
                    values[f"{name}.{leaf}".removeprefix(".")] = parameter.detach().clone()
    except KeyError:  # the base's files have no values for it, so nothing was written to the disk
        values = {}
    if values:
        fresh.load_state_dict(values)
    else:
        fresh.mark_untrained()
    device = next(filter(None, map(execution_device, module.modules())), None)
    return fresh.to(device).train(module.training)
