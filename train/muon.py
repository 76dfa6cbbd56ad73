"""Muon (Jordan et al. 2024) as torch has it, with the matrices of one shape orthogonalised together.

torch takes one matrix after the other: some thirty small kernels for each of the hundred or so matrices of a model,
which on a GPU cost more time than the training step of a small one. And it does so in bfloat16, which a CPU without
instructions for it emulates, some fifteen times slower than float32.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from tokenizer.precision import native_bfloat16


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon`: same arguments, same state, same arithmetic up to rounding."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; sharded parameters, and those on a CPU that multiplies bfloat16, go torch's way."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        sharded = any(hasattr(p, "full_tensor") for p in parameters)
        if closure is not None or sharded or not all(p.is_cuda or emulates(p) for p in parameters):
            return super().step(closure)
        for group in self.param_groups:
            self.step_stacked(group)
        return None

    @torch.no_grad()
    def step_stacked(self, group: dict[str, Any]) -> None:
        """One step of a group's parameters, all matrices of a shape at once."""
        by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        for shape, params in by_shape.items():
            grads, averages = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            moves = torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages
            settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
            dtype = torch.float32 if emulates(params[0]) else torch.bfloat16
            turned_Nmn = orthogonalise(torch.stack(list(moves)).to(dtype), *settings)
            rate = group["lr"] * 0.2 * max(shape) ** 0.5  # "match_rms_adamw": the size of AdamW's updates
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(turned_Nmn.to(params[0].dtype).unbind()), alpha=-rate)


def emulates(parameter: torch.Tensor) -> bool:
    """Whether a parameter lies where bfloat16 products are only emulated, as far as is known."""
    return not native_bfloat16(parameter.device)


def orthogonalise(
    x_Nmn: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz iterations in the dtype given: matrices (N, m, n) to nearly orthogonal ones of the same shape."""
    a, b, c = coefficients
    tall = x_Nmn.shape[1] > x_Nmn.shape[2]
    x = x_Nmn.mT if tall else x_Nmn
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
