"""Adam over named parameters, all of them in one operation, and projections on constraints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.optim.adam import adam

__all__ = ["Adam", "can_project", "project"]


class Adam:
    """Adam by name: parameters may come later, and those without a gradient stay as they are.

    Same numbers as `torch.optim.Adam`, whose functional form it calls with its own lists; for small models keeping
    those lists takes as long as the arithmetic.

    Parameters
    ----------
    betas
        Rates of the moments.
    eps
        Added to the root of the second moment.

    References
    ----------
    D. P. Kingma, J. Ba, Adam: a method for stochastic optimization, ICLR 2015, https://arxiv.org/abs/1412.6980
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._betas, self._eps = betas, eps
        self._moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._names: list[str] = []
        self._lists: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
        self._fused = True

    def step(self, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], lr: float) -> None:
        """Move parameters in place.

        Parameters
        ----------
        params
            Leaf tensors by name, the same ones at every step.
        gradients
            Gradients of some of them.
        lr
            Step size.
        """
        if list(gradients) != self._names:
            self._arrange(list(gradients), params)
        values, first, second, counts = self._lists
        with torch.no_grad():
            adam(
                values,
                # The fused operation reads memory in order, whatever the strides say.
                [gradient.contiguous() for gradient in gradients.values()],
                first,
                second,
                [],
                counts,
                foreach=False,
                fused=self._fused,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=lr,
                weight_decay=0.0,
                eps=self._eps,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counts of steps by ``<name>/<what>``."""
        return {
            f"{name}/{what}": value
            for name, values in self._moments.items()
            for what, value in zip(("first", "second", "count"), values, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` returned."""
        names = dict.fromkeys(key.rpartition("/")[0] for key in state)
        self._moments = {
            name: (state[f"{name}/first"], state[f"{name}/second"], state[f"{name}/count"]) for name in names
        }
        self._names = []

    def _arrange(self, names: list[str], params: Mapping[str, Tensor]) -> None:
        for name in names:
            if name not in self._moments:
                value = params[name].detach()
                zeros = torch.zeros_like(value, memory_format=torch.contiguous_format)
                count = torch.zeros((), dtype=torch.float32, device=value.device)
                self._moments[name] = (zeros, zeros.clone(), count)
        first, second, counts = ([self._moments[name][place] for name in names] for place in range(3))
        self._lists = ([params[name] for name in names], first, second, counts)
        self._fused = all(value.is_contiguous() and value.is_floating_point() for value in self._lists[0])
        self._names = names


def can_project(constraint: Any) -> bool:
    """Whether `project` knows a constraint: the simplex, and intervals that may be open to one side."""
    return constraint is constraints.simplex or any(hasattr(constraint, f"{side}_bound") for side in ("lower", "upper"))


def project(value: Tensor, constraint: Any) -> Tensor:
    """Nearest point that meets a constraint.

    References
    ----------
    Duchi, J., Shalev-Shwartz, S., Singer, Y. and Chandra, T. (2008). Efficient projections onto the l1-ball for
    learning in high dimensions. ICML. (Figure 1, the simplex.)
    """
    if constraint is constraints.simplex:
        ordered = value.sort(-1, descending=True).values
        excess = (ordered.cumsum(-1) - 1) / torch.arange(1, value.shape[-1] + 1, device=value.device)
        count = (ordered > excess).sum(-1, keepdim=True)
        return (value - excess.gather(-1, count - 1)).clamp(min=0)
    return value.clamp(getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None))
