"""Networks of policies: what they look at, logits of one element after the other, and the distribution of a site."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from probmodels.errors import ProblemError
from probmodels.guides.layout import Plate
from probmodels.guides.outline import Layout, Variable
from probmodels.inference.problem import Problem

__all__ = ["NETWORKS", "Autoregressive", "Inputs", "Network", "broadcast", "indicators", "join", "site_distribution"]

_WHOLE_LIMIT = 512  # observed numbers up to which they are an input of what lies outside of local plates


class Inputs(nn.Module):
    """What the rows of some local plates may look at: their part of tensors among the arguments, standardised.

    Values are read from the arguments at every call, so that other data of the same shapes give other posteriors;
    observed values that are no argument are kept. ``layers`` of width ``hidden`` add what they make of them.
    """

    def __init__(
        self,
        problem: Problem,
        plates: Sequence[Plate],
        observed: Mapping[str, tuple[Tensor, int, tuple[Plate, ...]]],
        wanted: Sequence[int | str] | None,
        like: Tensor,
        layers: int = 0,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        self._plates = tuple(sorted(plates, key=lambda plate: plate.dim))
        self._sources: list[tuple[int | str | None, tuple[int, ...], tuple[int | None, ...]]] = []
        given: dict[Any, Any] = {**dict(enumerate(problem.args)), **problem.kwargs}
        for key in wanted or ():
            if not isinstance(given.get(key), Tensor):
                raise ProblemError(
                    f"{problem.name}: data names {key!r}, which is no tensor among the arguments {list(given)}"
                )
        used = self._add_observed(given, observed, like)
        self._add_arguments(given, used, wanted, like)
        self.width = sum(len(self.get_buffer(f"mean_{i}")) for i in range(len(self._sources)))
        widths = [self.width, *[hidden] * layers] if self.width else []
        linear = [[nn.Linear(a, b), nn.SiLU()] for a, b in itertools.pairwise(widths)]
        self.encoder = nn.Sequential(*itertools.chain.from_iterable(linear))
        self.width += hidden if linear else 0

    def _add_observed(
        self,
        given: Mapping[Any, Any],
        observed: Mapping[str, tuple[Tensor, int, tuple[Plate, ...]]],
        like: Tensor,
    ) -> set[int | str]:
        """Add the values of observed sites that rows have a part of; the arguments that hold observed values."""
        used: set[int | str] = set()
        names = {plate.name for plate in self._plates}
        for value, num_event, site_plates in observed.values():
            equal = [k for k, arg in given.items() if isinstance(arg, Tensor) and _same(arg, value)]
            used.update(equal)
            dims = {plate.name: value.dim() - num_event + plate.dim for plate in site_plates}
            sizes = {p.name: p.size for p in self._plates if p.name in dims}
            axes = {name: dims[name] for name, size in sizes.items() if value.shape[dims[name]] == size}
            if (names and not axes) or (not names and (not equal or value.numel() > _WHOLE_LIMIT)):
                continue
            self._add(equal[0] if equal else None, value, axes, like)
        return used

    def _add_arguments(
        self, given: Mapping[Any, Any], used: set[int | str], wanted: Sequence[int | str] | None, like: Tensor
    ) -> None:
        """Add the other tensors among the arguments that have an axis of the size of a plate."""
        for key, arg in given.items():
            if not isinstance(arg, Tensor) or key in used or (wanted is not None and key not in wanted):
                continue
            for plate in self._plates:
                places = [axis for axis, size in enumerate(arg.shape) if size == plate.size]
                if places and plate.size > 1:
                    self._add(key, arg, {plate.name: places[0]}, like)
                    break

    def _add(self, key: int | str | None, value: Tensor, axes: Mapping[str, int], like: Tensor) -> None:
        index = len(self._sources)
        row_axes = tuple(axes.get(plate.name) for plate in self._plates)
        self._sources.append((key, tuple(value.shape), row_axes))
        if key is None:
            self.register_buffer(f"kept_{index}", value.to(like))
        rows = self._lay(value.to(like), row_axes)
        flat = rows.reshape(-1, rows.shape[-1])
        flat = flat.where(flat.isfinite(), torch.zeros_like(flat))
        single = len(flat) < 2
        mean = flat.mean().expand(flat.shape[-1]) if single else flat.mean(0)
        sd = (flat.std(unbiased=False).expand(flat.shape[-1])) if single else flat.std(0, unbiased=False)
        self.register_buffer(f"mean_{index}", mean.clone())
        self.register_buffer(f"scale_{index}", torch.where(sd > 1e-8, sd, torch.ones_like(sd)))

    def _lay(self, value: Tensor, row_axes: Sequence[int | None]) -> Tensor:
        """From the shape of a source to (*rows, feature), rows at the dims of the plates."""
        depth = max((-plate.dim for plate in self._plates), default=0)
        found = {plate.dim: axis for plate, axis in zip(self._plates, row_axes, strict=True) if axis is not None}
        kept = [found[dim] for dim in range(-depth, 0) if dim in found]
        rest = [axis for axis in range(value.dim()) if axis not in kept]
        rows = [value.shape[found[dim]] if dim in found else 1 for dim in range(-depth, 0)]
        return value.permute([*kept, *rest]).reshape([*rows, -1])

    def forward(self, plates: Mapping[str, Any], like: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Inputs (*rows, feature) of the rows that the plates chose."""
        parts = []
        for index, (key, shape, row_axes) in enumerate(self._sources):
            value = self.get_buffer(f"kept_{index}") if key is None else _given(key, args, kwargs)
            part = self._lay(value.reshape(shape).to(like), row_axes)
            for plate, axis in zip(self._plates, row_axes, strict=True):
                if axis is not None and plates[plate.name].subsample_size < plate.size:
                    part = part.index_select(plate.dim - 1, plates[plate.name].indices.to(part.device))
            part = (part - self.get_buffer(f"mean_{index}")) / self.get_buffer(f"scale_{index}")
            parts.append(torch.where(part.isfinite(), part, torch.zeros_like(part)))
        if not parts:
            return like.new_zeros(0)
        seen = join(parts)
        return join([seen, self.encoder(seen)]) if len(self.encoder) else seen


def _given(key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]


def _same(arg: Tensor, value: Tensor) -> bool:
    return arg.numel() == value.numel() and bool(torch.equal(arg.reshape(value.shape).to(value.dtype), value))


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Joint shape; that of torch takes as long as a small matrix product."""
    if all(shape == shapes[0] for shape in shapes):
        return tuple(shapes[0])
    depth = max(len(shape) for shape in shapes)
    padded = [(1,) * (depth - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last axis, the others broadcast."""
    if len(parts) == 1:
        return parts[0]
    shape = broadcast(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


class Network(nn.Module):
    """Logits of the elements of a group's sites, one site after the other.

    A state (*rows, width) holds what was drawn so far; `logits` gives the logits (*rows, element, value) of a site's
    elements each given those before it, `draw` draws them, and `push` makes the state that follows.
    """

    state_width: int  # of the state after all sites

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        ends = [0]
        for size, _ in sizes:
            ends.append(ends[-1] + size)
        self.ends, self.counts = tuple(ends), tuple(count for _, count in sizes)
        self.top = max(self.counts)

    def begin(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def logits(self, state: Tensor, site: int, hot: Tensor | None) -> Tensor:
        raise NotImplementedError

    def draw(self, state: Tensor, site: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError

    def push(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        raise NotImplementedError

    def _padded(self, hot: Tensor) -> Tensor:
        return nn.functional.pad(hot, (0, self.top - hot.shape[-1])) if hot.shape[-1] < self.top else hot


class _Masked(Network):
    """One hidden layer for each element, of inputs and of indicators of all values before it, and a linear map."""

    def __init__(self, sizes: Sequence[tuple[int, int]], num_inputs: int, hidden: int) -> None:
        super().__init__(sizes)
        total = self.ends[-1]
        self.num_inputs, self.hidden = num_inputs, hidden
        self.state_width = num_inputs + total * self.top
        first = torch.randn(total, self.state_width, hidden + self.top)
        first[..., :num_inputs, :] /= math.sqrt(max(num_inputs, 1))
        first[..., num_inputs:, :] /= math.sqrt(total)
        first[..., hidden:] = 0.0
        bias = torch.cat([torch.randn(total, hidden) * 0.5, torch.zeros(total, self.top)], -1)
        self.first, self.bias = nn.Parameter(first), nn.Parameter(bias)
        self.second = nn.Parameter(torch.zeros(total, hidden, self.top))  # every value is equally likely at the start

    def begin(self, inputs: Tensor) -> Tensor:
        return inputs

    def push(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        return join([state, self._padded(hot).flatten(-2)])

    def logits(self, state: Tensor, site: int, hot: Tensor | None) -> Tensor:
        start, stop = self.ends[site : site + 2]
        layer = self._layer(state, start, stop)
        if stop - start > 1:
            assert hot is not None
            own = self._own(start, stop)
            mask = torch.ones(stop - start, stop - start, dtype=own.dtype, device=own.device).tril(-1)
            hot = self._padded(hot).to(own.dtype).flatten(-2)
            weight = (own * mask[..., None, None]).flatten(1, 2)  # (element, earlier * value, out)
            layer = layer + (hot @ weight.permute(1, 0, 2).flatten(1)).unflatten(-1, weight.shape[::2])
        return self._head(layer, start, stop)[..., : self.counts[site]]

    def draw(self, state: Tensor, site: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        start, stop = self.ends[site : site + 2]
        layer, own, drawn = self._layer(state, start, stop), self._own(start, stop), []
        for element in range(stop - start):
            here = slice(element, element + 1)
            logits = self._head(layer[..., here, :], start + element, start + element + 1)[..., : self.counts[site]]
            hot = choose(logits)  # (*rows, 1, value)
            drawn.append(hot)
            if element + 1 < stop - start:
                weight = own[:, element, : hot.shape[-1]].permute(1, 0, 2).flatten(1)
                layer = layer + (hot.squeeze(-2) @ weight).unflatten(-1, (stop - start, -1))
        return torch.cat(drawn, -2)

    def _own(self, start: int, stop: int) -> Tensor:
        """Weights (element, earlier element, value, out) between the elements of a site."""
        columns = slice(self.num_inputs + start * self.top, self.num_inputs + stop * self.top)
        return self.first[start:stop, columns].unflatten(1, (stop - start, self.top))

    def _layer(self, state: Tensor, start: int, stop: int) -> Tensor:
        bias = self.bias[start:stop]
        if state.shape[-1] == 0:
            return bias.expand(*state.shape[:-1], *bias.shape)
        weight = self.first[start:stop, : state.shape[-1]].permute(1, 0, 2).flatten(1)
        return (state @ weight).unflatten(-1, bias.shape) + bias

    def _head(self, layer: Tensor, start: int, stop: int) -> Tensor:
        # The root keeps what one step of Adam moves the logits by from growing with the width.
        inside, direct = layer[..., : self.hidden].tanh() / math.sqrt(self.hidden), layer[..., self.hidden :]
        return torch.einsum("...eh,ehk->...ek", inside, self.second[start:stop]) + direct


class _Independent(_Masked):
    """The same without the values before: a factorised policy, to compare with."""

    def __init__(self, sizes: Sequence[tuple[int, int]], num_inputs: int, hidden: int) -> None:
        super().__init__(sizes, num_inputs, hidden)
        self.state_width = num_inputs
        self.first = nn.Parameter(self.first.detach()[:, :num_inputs].clone())

    def push(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        return state

    def logits(self, state: Tensor, site: int, hot: Tensor | None) -> Tensor:
        start, stop = self.ends[site : site + 2]
        return self._head(self._layer(state, start, stop), start, stop)[..., : self.counts[site]]

    def draw(self, state: Tensor, site: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        return choose(self.logits(state, site, None))


class _Recurrent(Network):
    """A state that every value passes through, with a place for each element and a head for each site."""

    def __init__(self, sizes: Sequence[tuple[int, int]], num_inputs: int, hidden: int) -> None:
        super().__init__(sizes)
        total = self.ends[-1]
        self.hidden, self.state_width = hidden, 2 * hidden
        self.read = nn.Linear(num_inputs, hidden) if num_inputs else None
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.embed = nn.Parameter(torch.randn(len(sizes), self.top, hidden))
        self.place = nn.Parameter(torch.randn(total, hidden))
        self.mix = nn.Linear(2 * hidden, hidden)
        self.heads = nn.Parameter(torch.zeros(len(sizes), hidden, self.top))
        self.bias = nn.Parameter(torch.zeros(total, self.top))

    def begin(self, inputs: Tensor) -> Tensor:
        if self.read is None:
            return self.place.new_zeros(*inputs.shape[:-1], self.state_width)
        seen = self.read(inputs).tanh()
        return torch.cat([torch.zeros_like(seen), seen], -1)

    def logits(self, state: Tensor, site: int, hot: Tensor | None) -> Tensor:
        start, stop = self.ends[site : site + 2]
        passed, seen = state.chunk(2, -1)
        before = passed.unsqueeze(-2)
        if stop - start > 1:
            assert hot is not None
            after = self._passed(state, site, hot[..., :-1, :])
            before = torch.cat([before.expand(*after.shape[:-2], 1, -1), after], -2)
        return self._head(before, seen, site, slice(start, stop))

    def draw(self, state: Tensor, site: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        start, stop = self.ends[site : site + 2]
        passed, seen = state.chunk(2, -1)
        drawn: list[Tensor] = []
        for element in range(start, stop):
            hot = choose(self._head(passed.unsqueeze(-2), seen, site, slice(element, element + 1)))
            drawn.append(hot)
            if element + 1 < stop:
                step = hot @ self.embed[site, : hot.shape[-1]] + self.place[element]
                passed = self._run(step, passed)[..., -1, :]
        return torch.cat(drawn, -2)

    def push(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        seen = state.chunk(2, -1)[1]
        return join([self._passed(state, site, hot)[..., -1, :], seen])

    def _passed(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        """States (*rows, element, hidden) after each of the first elements of a site."""
        start = self.ends[site]
        steps = hot @ self.embed[site, : hot.shape[-1]] + self.place[start : start + hot.shape[-2]]
        return self._run(steps, state.chunk(2, -1)[0])

    def _run(self, steps: Tensor, passed: Tensor) -> Tensor:
        rows = broadcast(steps.shape[:-2], passed.shape[:-1])
        steps = steps.expand(*rows, *steps.shape[-2:]).reshape(-1, *steps.shape[-2:])
        first = passed.expand(*rows, self.hidden).reshape(1, -1, self.hidden).contiguous()
        return self.gru(steps, first)[0].reshape(*rows, -1, self.hidden)

    def _head(self, before: Tensor, seen: Tensor, site: int, elements: slice) -> Tensor:
        place = self.place[elements]
        rows = broadcast(before.shape[:-2], seen.shape[:-1])
        both = join([before.expand(*rows, *before.shape[-2:]), seen.unsqueeze(-2)])
        inside = (self.mix(both) + place).tanh() / math.sqrt(self.hidden)  # as in `_Masked`
        count = self.counts[site]
        return inside @ self.heads[site, :, :count] + self.bias[elements, :count]


NETWORKS: dict[str, type[Any]] = {"mlp": _Masked, "gru": _Recurrent, "independent": _Independent}


class Autoregressive(dist.TorchDistribution):
    """Elements of a discrete site, each given those before it; made by `DiscretePolicy`.

    The log density of an entry of the batch is that of its value given the earlier ones: over a plate whose rows depend
    on each other, the sum over rows is the joint log density, and single rows are conditional ones.

    Parameters
    ----------
    network
        Gives the logits.
    state
        What was drawn before, (*rows, width).
    site
        Place of the site in its group.
    layout
        Which axes of the batch are rows.
    table
        Values (value, *leaf) of an element.
    batch_shape, event_shape
        Shapes of the site.
    temperature, epsilon
        Draws come from ``(1 - epsilon) softmax(logits / temperature) + epsilon uniform``, element by element;
        densities never do.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    has_enumerate_support = False

    def __init__(
        self,
        network: Network,
        state: Tensor,
        site: int,
        layout: Layout,
        table: Tensor,
        batch_shape: Sequence[int],
        event_shape: Sequence[int] = (),
        *,
        temperature: float = 1.0,
        epsilon: float = 0.0,
    ) -> None:
        self._parts = (network, state, site, layout, table)
        self.temperature, self.epsilon = temperature, epsilon
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        """One of the values of the table, in every element."""
        kind: Any = constraints.integer_interval(self._parts[4].min(), self._parts[4].max())
        return constraints.independent(kind, self.event_dim) if self.event_dim else kind

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Autoregressive:
        """The same for a larger batch, whose further axes are independent."""
        return self._like(batch_shape, self.temperature, self.epsilon)

    def explored(self, temperature: float = 1.0, epsilon: float = 0.0) -> Autoregressive:
        """The same with other draws: of logits divided by a temperature, mixed with uniform ones."""
        return self._like(self.batch_shape, temperature, epsilon)

    def _like(self, batch_shape: Sequence[int], temperature: float, epsilon: float) -> Autoregressive:
        return Autoregressive(*self._parts, batch_shape, self.event_shape, temperature=temperature, epsilon=epsilon)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """Draw element by element."""
        network, state, site, layout, table = self._parts
        batch = (*sample_shape, *self.batch_shape)
        with torch.no_grad():
            state = state.expand(*layout.rows(batch), state.shape[-1])
            hot = layout.full(network.draw(state, site, self._choose), batch)
            return table[hot.argmax(-1)]

    @property
    def num_steps(self) -> int:
        """Elements of each row, which are drawn one after the other."""
        return self._parts[3].size

    def completed(self, value: Tensor, kept: Tensor) -> Tensor:
        """A draw whose first elements, ``kept`` of them by entry of the batch, are those of a value."""
        network, state, site, layout, table = self._parts
        made = 0

        def choose(logits: Tensor) -> Tensor:
            nonlocal made
            start, made = made, made + logits.shape[-2]
            keep = kept.unsqueeze(-1) > torch.arange(start, made, device=logits.device)
            return torch.where(keep.unsqueeze(-1), given[..., start:made, :], self._choose(logits))

        with torch.no_grad():
            given = layout.flat(indicators(value, table).to(state.dtype))
            state = state.expand(*layout.rows(self.batch_shape), state.shape[-1])
            hot = layout.full(network.draw(state, site, choose), self.batch_shape)
            return table[hot.argmax(-1)]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability (*batch) of each entry given the earlier ones."""
        network, state, site, layout, table = self._parts
        found = indicators(value, table)
        num_inner = len(layout.inner)
        shape = broadcast(found.shape[: found.dim() - num_inner - 1], self.batch_shape)
        found = found.expand(*shape, *found.shape[found.dim() - num_inner - 1 :]).to(state.dtype)
        hot = layout.flat(found)
        state = state.expand(*hot.shape[:-2], state.shape[-1])
        logits = network.logits(state, site, hot).log_softmax(-1)
        density = layout.full((logits * hot).sum(-1, keepdim=True), shape).squeeze(-1)
        return density.flatten(len(shape)).sum(-1) if num_inner else density

    def _choose(self, logits: Tensor) -> Tensor:
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.epsilon > 0.0:
            mixed = (1 - self.epsilon) * logits.softmax(-1) + self.epsilon / logits.shape[-1]
            logits = mixed.log()
        noise = torch.empty_like(logits).exponential_()
        best = (logits - noise.log()).argmax(-1, keepdim=True)
        # Not one_hot, which reads values, so that no graph could hold it.
        return (best == torch.arange(logits.shape[-1], device=best.device)).to(logits.dtype)


def indicators(value: Tensor, table: Tensor) -> Tensor:
    """Which value of a table (value, *leaf) each element (..., *leaf) has: (..., value)."""
    num_leaf = table.dim() - 1
    equal = value.unsqueeze(value.dim() - num_leaf) == table
    return equal.flatten(equal.dim() - num_leaf).all(-1) if num_leaf else equal


def site_distribution(
    network: Network,
    state: Tensor,
    place: int,
    variable: Variable,
    table: Tensor,
    batch: Sequence[int],
    there: Tensor | None = None,
) -> Any:
    """What a policy draws a site from, given what its network has passed; uniform where the site is not there."""
    layout = variable.layout
    if layout.size > 1 or variable.kind == "table":
        return Autoregressive(network, state, place, layout, table, batch, (*layout.inner, *table.shape[1:]))
    logits = network.logits(state, place, None).squeeze(-2)
    logits = logits if there is None else logits * there.unsqueeze(-1)
    lead = len(batch) + 1 - logits.dim()
    logits = logits.reshape((1,) * lead + logits.shape) if lead > 0 else logits
    if variable.kind == "categorical":
        fn: Any = dist.Categorical(logits=logits)
    else:
        fn = dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
    return fn.expand(batch) if len(fn.batch_shape) <= len(batch) else fn
