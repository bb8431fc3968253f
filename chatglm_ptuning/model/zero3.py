"""Reads and uses parameters that DeepSpeed's ZeRO-3 has partitioned among processes.

Where parameters are partitioned, these functions must be called on every rank, in the same order. Otherwise they cost
nothing, and DeepSpeed is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import distributed, nn


def is_partitioned(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether ZeRO-3 manages any of these parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The full shape of a parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def most_of_processes(model: nn.Module, count: int) -> int:
    """The maximum of `count` over all processes if the model is partitioned; otherwise `count`.

    Every process has to call the modules equally often, also with less data: a call gathers parameters from all.
    """
    if not is_partitioned(model.parameters()):
        return count
    most = torch.tensor(count, device=model.device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)


def gathered(parameters: Iterable[torch.Tensor], *, modify: bool = False) -> AbstractContextManager[None]:
    """A context that gathers partitioned parameters on every process.

    Args:
        modify: the block changes the parameters; afterwards all processes have the values of process 0.
    """
    parameters = list(parameters)
    if not is_partitioned(parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


@contextmanager
def gathering_modules(model: nn.Module) -> Iterator[None]:
    """A context in which a partitioned model can be called without an engine of DeepSpeed.

    Every module's own parameters are gathered during its call only, as in the engine.
    """
    open_gatherings: dict[nn.Module, list[AbstractContextManager[None]]] = {}

    def enter(module: nn.Module, _: object) -> None:
        gathering = gathered(module.parameters(recurse=False))
        gathering.__enter__()
        open_gatherings.setdefault(module, []).append(gathering)

    def leave(module: nn.Module, *_: object) -> None:
        open_gatherings[module].pop().__exit__(None, None, None)

    hooks = []
    for module in model.modules():
        if is_partitioned(module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
