"""What labels leave open of the mechanisms of a fitted causal autoencoder, for intervals of effects.

The Laplace approximation in its linearised form. Around the fitted parameters of a mechanism, in rows whose labels of a
concept and of its causes are known,

    g(z; theta) ~ g(z; fitted) + J(z) (theta - fitted),
    theta - fitted ~ Normal(0, (J' J / s^2 + P)^-1),

J the derivatives by parameters in these rows, s the sd of what the mechanism leaves of the labels, with as many degrees
of freedom less as the labels determine parameters, and P the precision of a normal prior, as wide as the starting
values (1 for the last layer, 10 for coefficients that have no layers behind them). Of linear mechanisms that is the
error of least squares. What a Newton step still moves the parameters by is counted as an error of its own, so that a
fit that ended early has wide intervals and not false ones.

References
----------
Immer, A., Korzepa, M. and Bauer, M. (2021). Improving predictions of Bayesian neural nets via local linearization.
AISTATS. https://arxiv.org/abs/2008.08400
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from probmodels.causal_vae.model import CausalVAE
from probmodels.causal_vae.worlds import Change, changed
from probmodels.errors import ResultError
from probmodels.guides.causal_vae import Mechanisms
from probmodels.inference.result import Result

__all__ = ["MechanismDraws"]

_WIDE = 10.0  # prior sd of coefficients without layers behind them, in units of the concepts
_EXACT_LABELS = 0.1  # largest sd of labels that may stand for concepts
_MOST_PARAMETERS = 5000  # of a mechanism, whose square matrix is 200 MB
_BLOCK = 500  # rows whose derivatives are held at once


class _Spread(NamedTuple):
    """How far parameters of a mechanism are open, all in one vector.

    Attributes
    ----------
    factor
        Lower Cholesky factor of their precision (parameter, parameter).
    step
        What a Newton step would move them by (parameter,).
    """

    factor: Tensor
    step: Tensor


class MechanismDraws:
    """Draws of the mechanisms of all concepts that a treatment reaches.

    Parameters
    ----------
    mechanisms
        The fitted ones, additive or linear.
    names
        Names of the concepts.
    label
        Labels (data, concept) that they were fitted to, in units of the model; nan where a row has none.
    reached
        Places of the concepts whose mechanisms are drawn.
    missing
        Why there are no draws; empty where there are.
    """

    HOLDS: ClassVar[str] = (
        "of rows drawn anew, noise given observations, and parameters of mechanisms given labels (Laplace)"
    )

    def __init__(
        self, mechanisms: Mechanisms, names: Sequence[str], label: Tensor, reached: list[int], missing: str = ""
    ) -> None:
        self.mechanisms, self.names, self.reached, self.missing = mechanisms, tuple(names), reached, missing
        self.spread = {} if missing else {i: _spread(mechanisms, i, label) for i in reached}

    @classmethod
    def of(cls, result: Result, model: CausalVAE, treatment: int) -> MechanismDraws:
        """Those of a result and its fitted model."""
        mechanisms, names = model.mechanisms, model.names
        reached = _reached(mechanisms, treatment)
        label = mechanisms.base.new_full((0, mechanisms.size), math.nan)
        missing = _why_none(model, result, reached) if reached else ""
        if reached and not missing:
            try:
                data = result.rebuild().data
                if data is not None and "label" in data:
                    label = torch.as_tensor(data["label"].values).to(label)
                missing = _too_few(mechanisms, names, label, reached)
            except ResultError as error:
                missing = f"the labels that mechanisms were fitted to are not known: {error}"
        return cls(mechanisms, names, label, reached, f"none: {missing}" if missing else "")

    def draw(self, generator: torch.Generator) -> Callable[[Tensor, Mapping[str, Change]], Tensor]:
        """One draw: from concepts (data, concept) and changes by name to the concepts under the changes.

        Concepts are what they are in the data, whatever the mechanisms; the noise follows from both.
        """
        parts = {i: _coefficients(self.mechanisms, i) for i in self.reached}
        shifts = {i: _unravelled(_sample(self.spread[i], generator), parts[i]) for i in self.reached}

        def location(i: int, concepts: list[Tensor]) -> Tensor:
            values = self.mechanisms.parent_values(i, concepts)
            return _straight(self.mechanisms, parts[i], shifts[i], values)

        def carry(factual: Tensor, changes: Mapping[str, Change]) -> Tensor:
            given = list(factual.unbind(-1))
            found = list(given)
            for i in self.mechanisms.order:
                if i in shifts:
                    found[i] = given[i] + location(i, found) - location(i, given)
                if self.names[i] in changes:
                    found[i] = changed(found[i], changes[self.names[i]])
            return torch.stack(found, -1)

        return carry


def _reached(mechanisms: Mechanisms, treatment: int) -> list[int]:
    """Places of the concepts that descend from a treatment."""
    found = {treatment}
    for i in mechanisms.order:
        if found & set(mechanisms.parents[i]):
            found.add(i)
    return sorted(found - {treatment})


def _why_none(model: CausalVAE, result: Result, reached: list[int]) -> str:
    """Why parameters of mechanisms have no draws, whatever the labels; empty where they have."""
    mechanisms = model.mechanisms
    if mechanisms.kind not in ("additive", "linear"):
        return f"parameters of {mechanisms.kind!r} mechanisms have no draws; take mechanism='additive' or 'linear'"
    if "table" in result.params():
        return "proposals were refined, and the result does not keep the labels that mechanisms were fitted to"
    used = sorted({j for i in reached for j in (i, *mechanisms.parents[i])})
    widest = float(model.label_sd.expand(mechanisms.size)[used].max())
    if widest > _EXACT_LABELS * (1 + 1e-6):  # of 32-bit floats
        return f"labels of sd {widest:.3g} (label_sd) leave concepts open; they may have at most {_EXACT_LABELS}"
    size = max(sum(part.numel() for part in mechanisms.coefficients(i).values()) for i in reached)
    if size > _MOST_PARAMETERS:
        return f"a mechanism has {size:,} parameters, of at most {_MOST_PARAMETERS:,}; take a smaller mechanism_hidden"
    return ""


def _labelled(mechanisms: Mechanisms, i: int, label: Tensor) -> Tensor:
    """Rows of labels (data, concept) that have those of a concept and of all its causes."""
    return label[~label[:, [i, *mechanisms.parents[i]]].isnan().any(-1)]


def _too_few(mechanisms: Mechanisms, names: Sequence[str], label: Tensor, reached: list[int]) -> str:
    for i in reached:
        rows, least = len(_labelled(mechanisms, i, label)), len(mechanisms.parents[i]) + 2
        if rows < least:
            return f"{rows} rows have labels of {names[i]!r} and of all its causes; it takes {least}"
    return ""


def _coefficients(mechanisms: Mechanisms, i: int) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in mechanisms.coefficients(i).items()}


def _spread(mechanisms: Mechanisms, i: int, label: Tensor) -> _Spread:
    """How far the parameters of the mechanism of a concept are open."""
    parts = _coefficients(mechanisms, i)
    rows = _labelled(mechanisms, i, label)
    values = rows[:, mechanisms.parents[i]]
    slopes = vmap(jacrev(mechanisms.curve), (None, 0))
    size = sum(part.numel() for part in parts.values())
    square, pull = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    left = (rows[:, i] - mechanisms.curve(parts, values)).double()
    for some, error in zip(values.split(_BLOCK), left.split(_BLOCK), strict=True):
        found = slopes(parts, some)
        jacobian = torch.cat([found[name].reshape(len(some), -1) for name in parts], -1).double()
        square += jacobian.mT @ jacobian
        pull += jacobian.mT @ error
    prior = torch.cat(
        [torch.full((part.numel(),), _prior_sd(name, part) ** -2) for name, part in parts.items()]
    ).double()
    variance = float(left.square().mean())
    least = float(mechanisms.scale(i).detach()) ** 2
    factor = torch.linalg.cholesky(square / max(variance, least) + torch.diag(prior))
    free = size - float((torch.cholesky_inverse(factor).diagonal() * prior).sum())  # parameters that labels determine
    variance = max(variance * len(rows) / (len(rows) - free), least)
    factor = torch.linalg.cholesky(square / variance + torch.diag(prior))
    return _Spread(factor, torch.cholesky_solve(pull.unsqueeze(-1) / variance, factor).squeeze(-1))


def _prior_sd(name: str, part: Tensor) -> float:
    """Prior sd of coefficients; see above."""
    if name in ("base", "weight"):
        return _WIDE
    return 1.0 if name in ("offset", "last") else 1 / math.sqrt(len(part))


def _sample(spread: _Spread, generator: torch.Generator) -> Tensor:
    """A draw of what parameters are beyond the fitted ones (parameter,)."""
    noise = torch.randn(len(spread.step) + 1, generator=generator, dtype=torch.float64)
    apart = torch.linalg.solve_triangular(spread.factor.mT, noise[1:, None], upper=True).squeeze(-1)
    return apart + noise[0] * spread.step


def _straight(mechanisms: Mechanisms, at: dict[str, Tensor], shift: dict[str, Tensor], values: Tensor) -> Tensor:
    """Curve (...) at values of the causes (..., cause), by its tangent where parameters are beyond ``at``."""
    with torch.enable_grad():
        leaves = {name: part.clone().requires_grad_() for name, part in at.items()}
        curve = mechanisms.curve(leaves, values)
        # The product of a Jacobian from the right, as the derivative of that from the left.
        weight = torch.zeros_like(curve, requires_grad=True)
        left = torch.autograd.grad(curve, list(leaves.values()), weight, create_graph=True)
        (change,) = torch.autograd.grad(left, weight, list(shift.values()))
    return curve.detach() + change


def _unravelled(vector: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector of all coefficients in the shapes of each."""
    pieces = vector.split([part.numel() for part in parts.values()])
    return {name: piece.reshape(part.shape).to(part) for (name, part), piece in zip(parts.items(), pieces, strict=True)}
