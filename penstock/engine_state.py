"""fp32 weights and optimizer state of single parameters, at any ZeRO stage, so that a checkpoint made on one number of
ranks at one stage loads on another. (DeepSpeed's own files are pickled, and tied to both.)"""

from typing import Any

import torch
from torch import Tensor, nn


class Masters:
    """Reads and writes the fp32 copy and the optimizer state of a parameter.

    Every method is collective for ZeRO 1 to 3: all ranks call it for the same parameters in the same order.
    """

    def __init__(self, ds: Any, stage: int):
        self.stage = stage
        self.zero = ds.optimizer
        self.optimizer: torch.optim.Optimizer = ds.basic_optimizer
        self.flat = self._flat_of_each_param()
        if stage in (1, 2) and self.optimizer.state:
            self.zero._lazy_init_hp_params_optimizer_state()

    def weight(self, param: nn.Parameter) -> Tensor:
        if self.stage == 0:
            return param.detach()
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
        if self.stage in (1, 2):
            param.set_full_hp_param(value)  # type: ignore[attr-defined]
        elif self.stage == 3:
            self.zero.set_local_hp_param(self._shard(param, value), param)
            param.ds_tensor.data.copy_(self._shard(param, value))  # type: ignore[attr-defined]
            if param.ds_persist:  # type: ignore[attr-defined]
                param.data.copy_(value)

    def set_state(self, param: nn.Parameter, state: dict[str, Any]) -> None:
        flat = self.flat[param]
        held = self.optimizer.state[flat]
        for key, value in state.items():
            if self.stage == 0:
                held[key] = value.to(param.device, copy=True) if _has_elements(value) else _copy(value)
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


def _copy(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
