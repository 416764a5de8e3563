"""Autoregressive flows of noise: bijections of real vectors whose Jacobian is triangular.

Entry ``i`` of the output is a monotone function of entry ``i`` of the input whose parameters are a network of the
entries before it. From noise to value everything runs in one pass (Kingma et al. 2016), which is the only direction
that a guide needs. Every layer starts as the identity.

References
----------
Kingma, D. P. et al. (2016). Improved variational inference with inverse autoregressive flow.
https://arxiv.org/abs/1606.04934
Germain, M., Gregor, K., Murray, I. and Larochelle, H. (2015). MADE: masked autoencoder for distribution estimation.
https://arxiv.org/abs/1502.03509
Durkan, C., Bekasov, A., Murray, I. and Papamakarios, G. (2019). Neural spline flows.
https://arxiv.org/abs/1906.04032
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, softmax, softplus

__all__ = ["AffineFlow", "Flow", "SplineFlow"]

_LOG_SCALE = 3.0  # an affine layer stretches by at most exp(3), so that no early step of a fit can overflow
_BOUND = 5.0  # the spline is the identity beyond five standard deviations of the noise
_MIN_BIN, _MIN_SLOPE = 1e-3, 1e-3
# Adam moves every parameter by about lr, and a network adds up many of them: without this factor the noise of one-draw
# gradients keeps a flow further from its optimum than the normal that it starts from.
_GAIN = 0.1


class Flow(nn.Module):
    """One layer: parameters of entry ``i`` from entries ``< i`` by a masked network with one hidden layer.

    Parameters
    ----------
    size
        Length of the vector.
    hidden
        Width of the hidden layer.
    num_params
        Parameters of the monotone function of one entry.
    """

    mask_in: Tensor
    mask_out: Tensor

    def __init__(self, size: int, hidden: int, num_params: int) -> None:
        super().__init__()
        self.size, self.num_params = size, num_params
        degrees = torch.arange(hidden) % max(size - 1, 1)  # a hidden unit of degree d reads entries 0..d
        entries = torch.arange(size)
        self.register_buffer("mask_in", (degrees[:, None] >= entries).to(torch.get_default_dtype()))
        mask = (entries[:, None] > degrees).to(torch.get_default_dtype())
        self.register_buffer("mask_out", mask.repeat_interleave(num_params, 0))
        self.weight_in = nn.Parameter(torch.randn(hidden, size) / math.sqrt(size))
        self.bias_in = nn.Parameter(torch.randn(hidden))  # at zero every hidden unit would be an odd function
        self.weight_out = nn.Parameter(torch.zeros(size * num_params, hidden))
        self.bias_out = nn.Parameter(torch.zeros(size * num_params))

    def parameters_of(self, x: Tensor) -> Tensor:
        """Parameters (..., size, num_params) of the monotone functions at ``x`` (..., size)."""
        inner = torch.tanh(linear(x, self.weight_in * self.mask_in, self.bias_in))
        outer = linear(inner, self.weight_out * self.mask_out, self.bias_out)
        return _GAIN * outer.reshape(*x.shape, self.num_params)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (..., size) of ``x`` (..., size) and the log volume change (...)."""
        raise NotImplementedError


class AffineFlow(Flow):
    """Shift and scale of each entry; see `Flow`."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__(size, hidden, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (..., size) of ``x`` (..., size) and the log volume change (...)."""
        shift, stretch = self.parameters_of(x).unbind(-1)
        log_scale = _LOG_SCALE * torch.tanh(stretch / _LOG_SCALE)
        return x * log_scale.exp() + shift, log_scale.sum(-1)


class SplineFlow(Flow):
    """Monotone rational-quadratic spline of each entry on [-5, 5] and a shift; see `Flow`.

    Parameters
    ----------
    size, hidden
        As in `Flow`.
    bins
        Pieces of the spline.
    """

    def __init__(self, size: int, hidden: int, bins: int = 8) -> None:
        super().__init__(size, hidden, 3 * bins)
        self.bins = bins

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (..., size) of ``x`` (..., size) and the log volume change (...)."""
        widths, heights, slopes, shift = self.parameters_of(x).split((self.bins, self.bins, self.bins - 1, 1), -1)
        y, log_slope = _spline(x, _partition(widths), _partition(heights), _slopes(slopes))
        return y + shift.squeeze(-1), log_slope.sum(-1)


def _partition(raw: Tensor) -> Tensor:
    """Knots (..., bins + 1) from -5 to 5; equal bins where ``raw`` is zero."""
    bins = raw.shape[-1]
    shares = _MIN_BIN + (1 - _MIN_BIN * bins) * softmax(raw, -1)
    return 2 * _BOUND * pad(shares.cumsum(-1), (1, 0)) - _BOUND


def _slopes(raw: Tensor) -> Tensor:
    """Slopes (..., bins + 1) at the knots, 1 at both ends and where ``raw`` is zero."""
    inner = _MIN_SLOPE + softplus(raw + math.log(math.expm1(1 - _MIN_SLOPE)))
    return pad(inner, (1, 1), value=1.0)


def _spline(x: Tensor, knots: Tensor, images: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Spline and its log slope at ``x`` (...), of knots, images and slopes (..., bins + 1); identity outside."""
    inside = x.abs() < _BOUND
    u = torch.where(inside, x, torch.zeros_like(x)).unsqueeze(-1)
    index = (u >= knots[..., 1:-1]).sum(-1, keepdim=True)
    left, right = knots.gather(-1, index), knots.gather(-1, index + 1)
    low, high = images.gather(-1, index), images.gather(-1, index + 1)
    slope_left, slope_right = slopes.gather(-1, index), slopes.gather(-1, index + 1)
    chord = (high - low) / (right - left)
    t = (u - left) / (right - left)
    between = t * (1 - t)
    denominator = chord + (slope_left + slope_right - 2 * chord) * between
    y = low + (high - low) * (chord * t.square() + slope_left * between) / denominator
    top = chord.square() * (slope_right * t.square() + 2 * chord * between + slope_left * (1 - t).square())
    log_slope = (top.log() - 2 * denominator.log()).squeeze(-1)
    return torch.where(inside, y.squeeze(-1), x), torch.where(inside, log_slope, torch.zeros_like(x))
