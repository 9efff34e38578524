"""Muon: momentum whose matrices are orthogonalised before each step, for all weights but embeddings and vectors.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the update's size matched to
AdamW's as in Liu et al., "Muon is Scalable for LLM Training" (2025). On this model it needs about half as many steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients of Jordan et al.: singular values end between about 0.7 and 1.2."""


def orthogonalize(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Bring the singular values of ``[count, rows, columns]`` near one, iterating on the smaller Gram matrix."""
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = wide @ wide.mT
    product = torch.eye(gram.shape[1]).expand_as(gram)
    a, b, c = QUINTIC
    for _ in range(rounds):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=1, dim2=2).add_(a)  # every matrix here is a polynomial of the first, so they commute
        product = factor @ product
        gram = factor @ gram @ factor
    wide = product @ wide
    return wide.mT if tall else wide


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; parameters of more than two dimensions count as ``[first, rest]``."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                shapes[update.shape].append((parameter, update))
            for shape, pairs in shapes.items():
                size = 0.2 * max(shape) ** 0.5
                for (parameter, _), update in zip(
                    pairs, orthogonalize(torch.stack([u for _, u in pairs])), strict=True
                ):
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)
