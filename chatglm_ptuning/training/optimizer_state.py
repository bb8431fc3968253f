"""Saves the optimizer state of a DeepSpeed run in the format of a run without DeepSpeed, and restores it.

A prefix is small, so its optimizer state fits on every process. Process 0 alone writes it, in the format of PyTorch's
`optimizer.state_dict()`. It is read without unpickling code, and a run resumes from it with any number of processes and
any ZeRO stage. DeepSpeed's own checkpoints also hold the frozen base, and are bound to both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from chatglm_ptuning.model.zero3 import whole_shape

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def collect(
    engine: DeepSpeedEngine, parameters: Sequence[torch.nn.Parameter], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The state in the format of `torch.optim.Optimizer.state_dict`, on the CPU. Must be called on every rank.

    Args:
        parameters: all that is trained, in the order of the optimizer's groups before DeepSpeed took it over.
        groups: those groups as in `state_dict()["param_groups"]`.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = _partitions(engine)
    _link_parts(engine)
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(parameters):
        if flat is None:
            entries = engine.basic_optimizer.state.get(parameter, {})
            state[index] = {key: _on_cpu(value) for key, value in entries.items()}
            continue
        example = next((entries for part in flat if (entries := engine.basic_optimizer.state.get(part))), {})
        state[index] = {
            key: _on_cpu(safe_get_full_optimizer_state(parameter, key)).view(whole_shape(parameter))
            if _is_per_number(value)
            else _on_cpu(value)
            for key, value in example.items()
        }
    saved = [
        {key: value if key == "params" else now.get(key, value) for key, value in group.items()}
        for group, now in zip(groups, engine.optimizer.param_groups, strict=True)
    ]
    return {"state": {index: entries for index, entries in state.items() if entries}, "param_groups": saved}


def restore(engine: DeepSpeedEngine, parameters: Sequence[torch.nn.Parameter], saved: Mapping[str, Any]) -> None:
    """Restores what `collect` or a run without DeepSpeed has saved. Must be called on every rank.

    Raises:
        ValueError: if the state is that of other parameters.
    """
    _check(parameters, saved)
    for now, before in zip(engine.optimizer.param_groups, saved["param_groups"], strict=True):
        now.update({key: value for key, value in before.items() if key != "params"})
    if not saved["state"]:
        return
    flat = _partitions(engine)
    if flat is None:
        for index, parameter in enumerate(parameters):
            engine.basic_optimizer.state[parameter] = {
                key: value.clone().to(parameter.device) if _is_per_number(value) else _copy(value)
                for key, value in saved["state"].get(index, {}).items()
            }
        return
    example = next(iter(saved["state"].values()))
    for part in flat:
        # The optimizer makes these at its first step.
        engine.basic_optimizer.state[part] = {
            key: torch.zeros_like(part) if _is_per_number(value) else _copy(value) for key, value in example.items()
        }
    _link_parts(engine)
    for index, parameter in enumerate(parameters):
        for key, value in saved["state"][index].items():
            if _is_per_number(value):
                _set(parameter, value, key)


def restore_full_precision(parameters: Mapping[str, torch.nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
    """Sets the optimizer's float32 copies of 16-bit parameters."""
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            _set(parameter, saved[name].float(), None)


def _partitions(engine: DeepSpeedEngine) -> list[torch.Tensor] | None:
    """This process's flat partitions of the parameters; None without ZeRO."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        if engine.optimizer is not engine.basic_optimizer:
            raise ValueError(
                "DeepSpeed's 16-bit modes without ZeRO keep no state that other numbers of processes can read: use "
                "ds_config/zero1.json instead, which trains the same."
            )
        return None
    optimizer = engine.optimizer
    return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


def _link_parts(engine: DeepSpeedEngine) -> None:
    """Maps every parameter to its part of the state.

    ZeRO-1 and -2 do so by themselves, but once, after the step of the first group of parameters, when the others (the
    bias of a linear head) have no state yet.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _is_per_number(value: Any) -> bool:
    """Whether the value has a number for each element (a moment), not one for all (a step count)."""
    return torch.is_tensor(value) and value.ndim > 0


def _set(parameter: torch.Tensor, value: torch.Tensor, key: str | None) -> None:
    """Sets the optimizer's value `key` of a parameter, or with None the float32 values that the optimizer works on."""
    from deepspeed import utils

    value = value.to(parameter.device)
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's own functions for full values assume here that the number of processes divides them.
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    flat = value.flatten()
    flat = torch.nn.functional.pad(flat, (0, part.ds_numel * world - flat.numel()))
    mine = flat.narrow(0, part.ds_numel * rank, part.ds_numel)
    if key is None:
        utils.safe_set_local_fp32_param(parameter, mine)
    else:
        utils.safe_set_local_optimizer_state(parameter, mine, key)


def _check(parameters: Sequence[torch.nn.Parameter], saved: Mapping[str, Any]) -> None:
    shapes = {index: whole_shape(parameter) for index, parameter in enumerate(parameters)}
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            if _is_per_number(value) and value.shape != shapes.get(index):
                raise ValueError(
                    f"The checkpoint's optimizer holds {key} of size {tuple(value.shape)} for the trained parameter "
                    f"{index}, which has {tuple(shapes.get(index, ()))} here: it belongs to another run."
                )


def _on_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def _copy(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
