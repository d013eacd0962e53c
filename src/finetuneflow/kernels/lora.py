"""LoRA as a plain linear layer: the reference that every faster path must equal.

    y = W x + b + s · B A dropout(x)        A: r × in (down-projection), B: out × r (up-projection)

W and b are frozen and owned once, by the wrapped `nn.Linear`; s is α/r, or α/√r for rank-stabilised LoRA.
Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA). Weights convert to and from PEFT's file format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank change.

    A starts Kaiming uniform (a = √5, the default of `nn.Linear`), B at zero: the layer starts as its base.
    A and B are fp32 whatever the base's type; the adapter path computes in their type and its result is cast to the base's.
    Dropout acts on the adapter's input only.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, *, rslora: bool = False) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"the rank must be at least 1, not {r}")
        self.base = base.requires_grad_(False)
        self.r = r
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base: torch.Tensor = self.base(x)
        if self.merged:
            return base
        low_rank = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)
        change = F.linear(low_rank, self.lora_B) * self.scaling
        return (base + change).to(base.dtype)

    def delta(self) -> torch.Tensor:
        """The change of the weight, s·BA: out × in, in the adapter's type."""
        return (self.lora_B @ self.lora_A) * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to the base weight; the layer is then a plain linear one. Doing it twice changes nothing."""
        if not self.merged:
            self.base.weight += self.delta().to(self.base.weight.dtype)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the change out again; the base weight returns to within one rounding of what it was."""
        if self.merged:
            self.base.weight -= self.delta().to(self.base.weight.dtype)
            self.merged = False


class ParameterCounts(NamedTuple):
    trainable: int
    frozen: int


def apply_lora(
    model: nn.Module, targets: Iterable[str], *, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False
) -> list[str]:
    """Freeze `model` and wrap each linear layer whose path ends in one of `targets`; returns the wrapped paths.

    Raises `ValueError` when a target fits no linear layer.
    """
    targets = tuple(targets)
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _ends_in(name, targets)]
    unmatched = [target for target in targets if not any(_ends_in(path, (target,)) for path in paths)]
    if unmatched:
        raise ValueError(f"no linear layer is named {', '.join(unmatched)}")
    model.requires_grad_(False)
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        wrapped = LoRALinear(model.get_submodule(path), r, alpha, dropout, rslora=rslora)  # type: ignore[arg-type]
        setattr(parent, name, wrapped)
    return paths


def _ends_in(path: str, targets: tuple[str, ...]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Trainable and frozen parameters; r·(in + out) of them per wrapped layer train."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCounts(trainable, sum(p.numel() for p in model.parameters()) - trainable)


def to_peft_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter under the names of PEFT's `adapter_model.safetensors`."""
    state = {}
    for path, layer in lora_layers(model).items():
        state[f"{PEFT_PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach()
        state[f"{PEFT_PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach()
    return state


@torch.no_grad()
def load_peft_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Fill the adapter from PEFT's names; raises `ValueError` unless both sides hold exactly the same tensors."""
    expected = to_peft_state_dict(model)
    if expected.keys() != state.keys():
        raise ValueError(f"tensors differ: {sorted(expected.keys() ^ state.keys())[:3]}")
    for name, tensor in expected.items():
        tensor.copy_(state[name])
