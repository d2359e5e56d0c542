"""fp32 weights and optimizer state of single parameters, at any ZeRO stage, so that a checkpoint made on one number of
ranks at one stage loads on another. (DeepSpeed's own files are pickled, and tied to both.)"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class Masters:
    """Reads and writes the fp32 copy and the optimizer state of a parameter.

    Every method is collective for ZeRO 1 to 3: all ranks call it for the same parameters in the same order.
    """

    def __init__(self, ds: Any, stage: int, gathered: Callable[[list[nn.Parameter]], AbstractContextManager]):
        self.stage, self._gathered = stage, gathered
        self.zero = ds.optimizer
        self.optimizer: torch.optim.Optimizer = ds.basic_optimizer
        self.flat = self._flat_of_each_param()
        if stage in (1, 2) and self.optimizer.state:
            # DeepSpeed links parameters to their state after the first group has stepped, when others have none yet.
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def weight(self, param: nn.Parameter) -> Tensor:
        if self.stage == 0 or not param.requires_grad:
            return self._whole(param)
        if self.stage == 3:
            return self.zero.get_full_hp_param(param)
        return param.get_full_hp_param()  # type: ignore[attr-defined]

    def state(self, param: nn.Parameter) -> dict[str, Any]:
        """Optimizer state by key: tensors shaped like the parameter, and scalars."""
        held = self.optimizer.state.get(self.flat[param], {})
        found: dict[str, Any] = {}
        for key, value in held.items():
            if self.stage == 0 or not self._per_element(param, value):
                found[key] = value
            elif self.stage == 3:
                found[key] = self.zero.get_full_hp_param(param, key)
            else:
                found[key] = param.get_full_hp_param(key)  # type: ignore[attr-defined]
        return found

    def set_weight(self, param: nn.Parameter, value: Tensor) -> None:
        value = value.to(param.device)
        if self.stage < 3:
            param.data.copy_(value)
        if self.stage in (1, 2) and param.requires_grad:
            param.set_full_hp_param(value)  # type: ignore[attr-defined]
        elif self.stage == 3:
            if param.requires_grad:
                self.zero.set_local_hp_param(self._shard(param, value), param)
            param.ds_tensor.data.copy_(self._shard(param, value))  # type: ignore[attr-defined]
            if param.numel():  # small weights stay whole on every rank once they were gathered
                param.data.copy_(value)

    def set_state(self, param: nn.Parameter, state: dict[str, Any]) -> None:
        flat = self.flat[param]
        held = self.optimizer.state[flat]
        for key, value in state.items():
            if self.stage == 0:
                # In the weight's memory layout: fused optimizers walk through both side by side.
                held[key] = (
                    torch.empty_like(param, dtype=value.dtype).copy_(value) if _like(param, value) else _copy(value)
                )
            elif not _has_elements(value):
                held[key] = _copy(value)
            elif self.stage == 3:
                held.setdefault(key, torch.zeros_like(flat))
                self.zero.set_local_hp_param(self._shard(param, value.to(flat.device)), param, key)
            else:
                held.setdefault(key, torch.zeros_like(flat))
                if param._hp_mapping is not None:  # type: ignore[attr-defined]
                    param._hp_mapping.set_optim_state_fragment(flat, held)  # type: ignore[attr-defined]
                    param.set_full_hp_param(value.to(flat.device), key)  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Drop the optimizer's state, as it is before the first step."""
        self.optimizer.state.clear()
        if self.stage in (1, 2):
            self.zero._hp_optimizer_states_linked = False

    def _whole(self, param: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return param.detach()
        with self._gathered([param]):
            return param.detach().clone()

    def _per_element(self, param: nn.Parameter, value: Any) -> bool:
        return torch.is_tensor(value) and value.shape == self.flat[param].shape and value.dim() > 0

    def _shard(self, param: nn.Parameter, value: Tensor) -> Tensor:
        size = param.ds_tensor.numel()  # type: ignore[attr-defined]
        whole = value.flatten()
        padded = torch.nn.functional.pad(whole, (0, size * torch.distributed.get_world_size() - whole.numel()))
        return padded.narrow(0, size * torch.distributed.get_rank(), size)

    def _flat_of_each_param(self) -> dict[nn.Parameter, Tensor]:
        """The tensor the optimizer holds for each parameter: itself, or its group's flat partition."""
        if self.stage == 0:
            return {param: param for group in self.optimizer.param_groups for param in group["params"]}
        if self.stage == 3:
            groups, flats = self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat
        else:
            groups, flats = self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups
        return {param: flat for group, flat in zip(groups, flats, strict=True) for param in group}


def _has_elements(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def _like(param: Tensor, value: Any) -> bool:
    return _has_elements(value) and value.shape == param.shape


def _copy(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def read_share(task: nn.Module, masters: Masters, rank: int, world: int) -> dict[str, Tensor]:
    """This rank's share of a checkpoint: every world-th parameter's weight and optimizer state, and its own buffers.

    Keys are `weight|NAME`, `state|KEY|NAME`, `number|KEY|NAME` (a state that is a plain number) and `buffer|NAME`.
    Collective, since single parameters are gathered from their shards.
    """
    share: dict[str, Tensor] = {}
    for index, (name, param) in enumerate(task.named_parameters()):
        found: dict[str, Tensor] = {f"weight|{name}": masters.weight(param)}
        for key, value in masters.state(param).items() if param.requires_grad else ():
            if torch.is_tensor(value):
                found[f"state|{key}|{name}"] = value
            else:
                found[f"number|{key}|{name}"] = torch.tensor(float(value), dtype=torch.float64)
        if index % world == rank:
            share |= {key: value.detach().to("cpu", copy=True).contiguous() for key, value in found.items()}
    # Buffers can differ between ranks (statistics of a local batch norm), so each rank keeps its own.
    persistent = task.state_dict(keep_vars=True).keys()
    for name, buffer in task.named_buffers():
        if name in persistent:
            share[f"buffer|{name}"] = buffer.detach().to("cpu", copy=True).contiguous()
    return share


def write_all(task: nn.Module, masters: Masters, tensors: Callable[[str], Tensor], keys: Iterable[str]) -> None:
    """Set weights, optimizer state and buffers from a checkpoint's tensors, got by key."""
    params, buffers = dict(task.named_parameters()), dict(task.named_buffers())
    states: dict[str, dict[str, Any]] = {}
    for key in sorted(keys):
        kind, *middle, name = key.split("|")
        if kind == "weight":
            masters.set_weight(params[name], tensors(key))
        elif kind == "buffer":
            buffers[name].copy_(tensors(key))
        else:
            states.setdefault(name, {})[middle[0]] = tensors(key) if kind == "state" else _number(tensors(key))
    for name, state in states.items():
        masters.set_state(params[name], state)


def _number(value: Tensor) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number
