"""Policies for discrete sites: a guide that draws one value after the other, each given all that were drawn before.

A generative flow network builds an object step by step so that it ends at z with probability proportional to a reward.
Here the object is the set of latent values of a model, a step is one element of a site, and the reward is p(x, z). No
two orders of steps lead to one state, so that the backward policy is 1 and the balance conditions say::

    q(z | x) = prod_t q(z_t | z_1, ..., z_{t-1}, x)  =  p(x, z) / Z(x)

for all z. The guide is the policy; objectives that enforce the balance stand in `probmodels.inference.flows.balance`,
and those that only need densities of given values, as sleep and wake-phi phases, work as well.

Which elements need each other is read off the model. A plate is *local* where nothing outside of it depends on what is
drawn inside: given all that lies outside, its rows are independent in the posterior, too. Rows of local plates share
the parameters of one network, whose inputs are the observed values of the row, arguments with a row for it, and what
was drawn outside: the policy is amortised, and a minibatch touches its own rows only. Elements of other plates and of
event axes are drawn one after the other, in one sample site, so that any dependence between them can be expressed.

Three networks give the logits:

===============  ====================================================================================================
``mlp``          per element one hidden layer and a linear map of all that came before, masked so that all elements of
                 a site get their logits at once; parameters grow with the square of the number of elements
``gru``          a recurrent state shared by all elements, each with a place of its own; parameters grow linearly
``independent``  ``mlp`` of the data alone: elements that no data couple are drawn independently of each other, to
                 compare with
===============  ====================================================================================================

Continuous sites are drawn first, as normals in unconstrained space whose means are linear in the continuous values
before them (``structured``) or constant (``mean_field``). They are conditional on no discrete value; the discrete ones
are conditional on them. Their density can be evaluated at given values, which the maps of `probmodels.guides.auto` do
not offer.

References
----------
Bengio, E., Jain, M., Korablyov, M., Precup, D. and Bengio, Y. (2021). Flow network based generative models for
non-iterative diverse candidate generation. NeurIPS 34. https://arxiv.org/abs/2106.04399
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
Germain, M., Gregor, K., Murray, I. and Larochelle, H. (2015). MADE: masked autoencoder for distribution estimation.
ICML. https://arxiv.org/abs/1502.03509
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any, Literal

import pyro
import pyro.distributions as dist
import torch
from annotated_types import Interval
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from probmodels.errors import ProblemError
from probmodels.guides.branches import Branches, Follow, read_branches
from probmodels.guides.layout import move
from probmodels.guides.outline import Outline, Variable, read_outline, run_model
from probmodels.guides.policy_networks import NETWORKS, Inputs, Network, broadcast, indicators, join, site_distribution
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.varying import FixedSites
from probmodels.inference.runtime.ops import isolated
from probmodels.options import OneOf, Positive, checked

__all__ = ["AutoGFlowNet", "DiscretePolicy", "make_policy"]

_MLP_LIMIT = 2_000_000  # numbers of a network above which the recurrent one is taken unless asked for


@checked(ProblemError)
def make_policy(
    problem: Problem,
    *,
    hidden: Annotated[int, Interval(ge=1, le=10_000)] = 64,
    network: Annotated[str, OneOf(NETWORKS)] | None = None,
    encoder: Annotated[int, Interval(ge=0, le=64)] = 0,
    order: Sequence[str] | None = None,
    data: Sequence[int | str] | None = None,
    continuous: Literal["structured", "mean_field"] = "structured",
    init: Mapping[str, Any] | None = None,
    init_scale: Positive = 0.1,
    log_z: bool = False,
    flows: bool = False,
) -> DiscretePolicy:
    """An autoregressive guide of a problem with discrete latent sites.

    Parameters
    ----------
    problem
        Its model is run a few times, in isolation and from a fixed seed: equal problems give equal guides.
    hidden
        Width of the networks.
    network
        ``"mlp"``, ``"gru"`` or ``"independent"``; None for ``"mlp"`` where it has no more than two million numbers.
    encoder
        Hidden layers, each ``hidden`` wide, that the data of a row pass before the networks.
    order
        Discrete sites in the order in which they shall be drawn; None for that of the program. Sites outside of local
        plates come first in any case.
    data
        Arguments of the model, by position or name, that rows of local plates may look at besides observed values:
        tensors with one entry for each row. None for all of them.
    continuous
        ``"structured"`` or ``"mean_field"``.
    init
        Starting values of continuous sites; the others start at the median of their prior.
    init_scale
        Standard deviation of continuous sites at the start, in unconstrained space.
    log_z
        Whether there is a deterministic site ``log_Z``, the log normaliser of the reward: one number for each row of
        the plate that holds all latent sites, a function of its data; or one for all.
    flows
        Whether there is a deterministic site ``log_flow_<site>`` before the first site, and before each discrete one
        that lies in no more local plates than all latent sites do: the log flow through what was drawn so far.

    Returns
    -------
    DiscretePolicy
        A Pyro program of the same arguments as the model.

    Raises
    ------
    ProblemError
        If the model has no discrete latent site, a support is not finite or changes between runs, or an option is
        unknown or out of range.
    """
    with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False), whole(problem)():
        outline = read_outline(problem, order, init or {})
        return DiscretePolicy(problem, outline, hidden, network, encoder, data, continuous, init_scale, log_z, flows)


AutoGFlowNet = make_policy


class _Group(nn.Module):
    """Discrete sites that lie in the same local plates: inputs, network, and what else they look at."""

    def __init__(self, members: Sequence[Variable], inputs: Inputs, network: Network, outer: Sequence[int]) -> None:
        super().__init__()
        self.inputs, self.network, self.outer = inputs, network, tuple(outer)
        for index, member in enumerate(members):
            assert member.table is not None
            self.register_buffer(f"table_{index}", member.table.clone())
        self.members = tuple(replace(member, table=None) for member in members)


class DiscretePolicy(PyroModule):
    """An autoregressive guide of discrete and continuous sites; made by `make_policy`.

    It copies, pickles and moves like any module, and holds the model only where its sites come and go: then it runs the
    program at its own draws, to see which sites there are. Parameters are called ``guide.policy.*`` and, for continuous
    sites, ``guide.site_<name>.*``.

    Attributes
    ----------
    local_plates
        Plates whose rows share one network and are drawn independently of each other.
    """

    def __init__(
        self,
        problem: Problem,
        outline: Outline,
        hidden: int,
        network: str | None,
        encoder: int,
        data: Sequence[int | str] | None,
        continuous: str,
        init_scale: float,
        log_z: bool,
        flows: bool,
    ) -> None:
        super().__init__("guide")
        self._flows = flows
        # In a list, so that the model's parameters do not become those of the guide.
        self._program = [problem.model] if isinstance(problem.model, FixedSites) else []
        self._branches: Branches | None = None  # what stands for the program
        if self._program and flows:
            raise ProblemError(f"{problem.name}: flows=True needs sites that are always there")
        latent = (*outline.discrete, *outline.continuous)
        self._plates = {plate.name: plate for variable in latent for plate in variable.plates}
        self.local_plates = tuple(sorted({name for variable in latent for name in variable.local}))
        self._refuse_subsampled(problem)
        like = _like(problem, outline)
        self._continuous = outline.continuous
        self._normals(continuous, init_scale)

        def inputs_of(plates: Iterable[str]) -> Inputs:
            within = [self._plates[name] for name in plates]
            return Inputs(problem, within, outline.observed, data, like, encoder, hidden)

        built = self._groups(outline.discrete, inputs_of, network, hidden)
        self.policy = nn.ModuleList(built)
        self._common = _common(latent)
        self._log_z = log_z
        if log_z or (flows and self._continuous):
            self.log_z_inputs = inputs_of(self._common)
            self.log_z = _Head(self.log_z_inputs.width, hidden)
        if flows:
            self.flow = self._flow_heads(built, hidden)
        self.to(like.dtype).to(like.device)
        for variable in self._continuous:  # whose types are their own
            self.get_submodule(f"site_{variable.name}").to(variable.dtype)

    def _groups(
        self,
        discrete: Sequence[Variable],
        inputs_of: Callable[[Iterable[str]], Inputs],
        network: str | None,
        hidden: int,
    ) -> list[_Group]:
        """Networks of the discrete sites, one for all sites that lie in the same local plates."""
        groups = list(dict.fromkeys(variable.local for variable in discrete))
        built: list[_Group] = []
        for local in groups:
            members = [variable for variable in discrete if variable.local == local]
            outer = [index for index, other in enumerate(groups[: len(built)]) if set(other) < set(local)]
            inputs = inputs_of(local)
            width = inputs.width + sum(built[index].network.state_width for index in outer)
            width += sum(v.layout.size for v in self._continuous if set(v.local) <= set(local))
            sizes = [(m.layout.size, m.num_values) for m in members]
            built.append(_Group(members, inputs, _choose_network(network, sizes, width, hidden), outer))
        return built

    def _flow_heads(self, groups: Sequence[_Group], hidden: int) -> nn.ModuleList:
        """One head for each discrete site that lies in no more local plates than all latent sites do."""
        free = [group for group in groups if set(group.members[0].local) == set(self._common)]
        widths: list[int] = [group.network.state_width for group in free for _ in group.members]
        return nn.ModuleList(_Head(width, hidden) for width in widths)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; returns the values by name."""
        plates = {p.name: pyro.plate(p.name, p.size, dim=p.dim) for p in self._plates.values()}
        values: dict[str, Tensor] = {}
        unconstrained: dict[str, Tensor] = {}
        policy: Any = self.policy
        like = policy[0].network.bias
        if self._log_z:
            self._state_log_z("log_Z", plates, like, args, kwargs)
        if self._flows and self._continuous:
            self._state_log_z(f"log_flow_{self._continuous[0].name}", plates, like, args, kwargs)
        for variable in self._continuous:
            values[variable.name] = self._draw_continuous(variable, plates, unconstrained)
        states: list[Tensor] = []
        heads = iter(self.flow) if self._flows else None
        for group in policy:
            local = set(group.members[0].local)
            parts = [group.inputs(plates, like, args, kwargs)]
            parts += [unconstrained[v.name].to(like) for v in self._continuous if set(v.local) <= local]
            parts += [states[index] for index in group.outer]
            parts = [part for part in parts if part.shape[-1]] or parts[:1]
            state = group.network.begin(join(parts))
            if self._program and self._branches is None:
                self._follow(self._program[0], group, state, values, args, kwargs)
            else:
                states.append(self._draw_group(group, state, values, plates, heads))
        return values

    def _draw_group(
        self, group: _Group, state: Tensor, values: dict[str, Tensor], plates: Mapping[str, Any], heads: Any
    ) -> Tensor:
        """Sample the sites of a group, which are added to the values; the state after them."""
        for place, variable in enumerate(group.members):
            if heads is not None and set(variable.local) == set(self._common):
                self._state(f"log_flow_{variable.name}", next(heads)(state).squeeze(-1), plates)
            table = group.get_buffer(f"table_{place}")
            there = None if self._branches is None else self._branches.has(variable.name, values)
            value = self._draw(group.network, state, place, variable, table, plates, there)
            values[variable.name] = value
            hot = variable.layout.flat(indicators(value, table).to(state.dtype))
            hot = hot if there is None else hot * there[..., None, None]
            state = group.network.push(state, place, hot)
        return state

    def for_many(
        self, deciding: Sequence[str], runs: Mapping[tuple[int, ...], Mapping[str, Any]]
    ) -> Callable[..., dict[str, Tensor]]:
        """The same guide as a program that a plate around it runs for many draws at once.

        Parameters
        ----------
        deciding
            Sites whose values decide which sites a program has that come and go.
        runs
            Nodes of a run of this program by the places of their values.

        Raises
        ------
        ProblemError
            If there is no such program.
        """
        if not self._program:
            return self
        policy: Any = self.policy
        (group,) = policy
        varying = [v for v in group.members if v.name in self._program[0].missing]
        if any(v.plates or v.kind == "table" or v.layout.size > 1 for v in varying):
            raise ProblemError("a site that comes and goes has several elements")
        tables = {v.name: group.get_buffer(f"table_{place}") for place, v in enumerate(group.members)}
        branches = read_branches([v.name for v in group.members], tables, deciding, runs)

        def run(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            self._branches = branches
            try:
                found: dict[str, Tensor] = self(*args, **kwargs)
                return found
            finally:
                self._branches = None

        return run

    def _follow(
        self, program: FixedSites, group: _Group, state: Tensor, values: dict[str, Tensor], args: Any, kwargs: Any
    ) -> None:
        """Run a program whose sites come and go, at values of the policy; draw the others as the program does."""
        met = Follow(program, group, state, values)
        with poutine.block(hide_fn=lambda site: site["name"] not in met.places), met:
            program.model(*args, **kwargs)
        program.fill(met.drawn)

    def _draw(
        self,
        network: Network,
        state: Tensor,
        place: int,
        variable: Variable,
        table: Tensor,
        plates: Mapping[str, Any],
        there: Tensor | None,
    ) -> Tensor:
        batch = list(variable.layout.batch)
        for plate in variable.plates:
            batch[plate.dim] = plates[plate.name].subsample_size
        fn = site_distribution(network, state, place, variable, table, batch, there)
        with ExitStack() as stack:
            for plate in variable.plates:
                stack.enter_context(plates[plate.name])
            return pyro.sample(variable.name, fn)

    def _normals(self, family: str, init_scale: float) -> None:
        """Parameters of the continuous sites."""
        seen: list[Variable] = []
        for variable in self._continuous:
            assert variable.start is not None
            inner = PyroModule()
            inner.loc = nn.Parameter(variable.start.clone())
            inner.scale = PyroParam(torch.full_like(variable.start, init_scale), constraints.positive)
            before = [v for v in seen if set(v.local) <= set(variable.local)] if family == "structured" else []
            inner.before = tuple(v.name for v in before)
            if before:
                width = sum(v.layout.size for v in before)
                inner.slope = nn.Parameter(variable.start.new_zeros(width, variable.layout.size))
            setattr(self, f"site_{variable.name}", inner)
            seen.append(variable)

    def _draw_continuous(
        self, variable: Variable, plates: Mapping[str, Any], unconstrained: dict[str, Tensor]
    ) -> Tensor:
        """Sample a continuous site; adds its distance (*rows, element) from the middle, in unconstrained space."""
        inner = getattr(self, f"site_{variable.name}")
        layout, count = variable.layout, len(variable.layout.batch)
        loc, scale = inner.loc, inner.scale
        for plate in variable.plates:
            if plates[plate.name].subsample_size < plate.size:
                rows = plates[plate.name].indices.to(loc.device)
                loc, scale = (p.index_select(count + plate.dim, rows) for p in (loc, scale))
        middle = loc
        if inner.before:
            shift = join([unconstrained[name].to(loc.dtype) for name in inner.before]) @ inner.slope
            rows = broadcast(shift.shape[:-1], layout.rows(loc.shape[:count]))
            batch = (*rows[: len(rows) - count], *loc.shape[:count])
            middle = loc + layout.full(shift.expand(*rows, -1).unsqueeze(-1), batch).squeeze(-1)
        num_inner = len(layout.inner)
        base = dist.Normal(middle, scale).to_event(num_inner)
        bijection = biject_to(variable.support)
        fn = dist.TransformedDistribution(base, [bijection])
        with ExitStack() as stack:
            for plate in variable.plates:
                stack.enter_context(plates[plate.name])
            value: Tensor = pyro.sample(variable.name, fn)
        away = bijection.inv(value) - loc.detach()
        unconstrained[variable.name] = layout.flat(away.unsqueeze(-1)).squeeze(-1)
        return value

    def _refuse_subsampled(self, problem: Problem) -> None:
        own = _subsample_sizes(problem)
        for name in self._plates:
            if name in own:
                raise ProblemError(
                    f"{problem.name}: plate {name!r} around a latent site takes {own[name]} of its "
                    f"{self._plates[name].size} rows by itself; make it pyro.plate({name!r}, "
                    f"{self._plates[name].size}) and let the engine subsample it: batch_plates=({name!r},)"
                )

    def _state_log_z(self, name: str, plates: Mapping[str, Any], like: Tensor, args: Any, kwargs: Any) -> None:
        value = self.log_z(self.log_z_inputs(plates, like, args, kwargs)).squeeze(-1)
        self._state(name, value, plates)

    def _state(self, name: str, value: Tensor, plates: Mapping[str, Any]) -> None:
        """A deterministic site with a number for each row of the plates that all latent sites share."""
        own = [self._plates[plate] for plate in self._common]
        shape = [1] * max((-plate.dim for plate in own), default=0)
        for plate in own:
            shape[plate.dim] = plates[plate.name].subsample_size
        value = value.expand(shape) if value.dim() <= len(shape) else value
        with ExitStack() as stack:
            for plate in own:
                stack.enter_context(plates[plate.name])
            pyro.deterministic(name, value, event_dim=0)

    def _apply(self, fn: Any, recurse: bool = True) -> DiscretePolicy:
        for variable in self._continuous:
            move(variable.support, fn)
        return super()._apply(fn, recurse)


class _Head(nn.Module):
    """A number for each row: one hidden layer, whose last bias moves a constant."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(max(width, 1), hidden), nn.Linear(hidden, 1)

    def forward(self, state: Tensor) -> Tensor:
        """From (*rows, at most width) to (*rows, 1); what a state does not hold yet counts as zero."""
        missing = max(self.width, 1) - state.shape[-1]
        return self.second(self.first(nn.functional.pad(state, (0, missing))).tanh())


def _choose_network(name: str | None, sizes: Sequence[tuple[int, int]], width: int, hidden: int) -> Network:
    if name is None:
        total, top = sum(size for size, _ in sizes), max(count for _, count in sizes)
        name = "mlp" if total * (width + total * top) * (hidden + top) <= _MLP_LIMIT else "gru"
    found: Network = NETWORKS[name](sizes, width, hidden)
    return found


def _common(latent: Iterable[Variable]) -> tuple[str, ...]:
    """Local plates that all latent sites lie in."""
    return tuple(sorted(set.intersection(*(set(variable.local) for variable in latent))))


def _like(problem: Problem, outline: Outline) -> Tensor:
    """A tensor of the type and on the device of the networks."""
    tensors = [value for value in (*problem.args, *problem.kwargs.values()) if isinstance(value, Tensor)]
    tensors += [value for value, _, _ in outline.observed.values()]
    tensors += [variable.start for variable in outline.continuous if variable.start is not None]
    found = next((value for value in tensors if value.is_floating_point()), None)
    device = tensors[0].device if tensors else None
    return torch.empty(0, dtype=found.dtype if found is not None else torch.get_default_dtype(), device=device)


def _subsample_sizes(problem: Problem) -> dict[str, int]:
    """Plates that the model itself subsamples, and that no engine does."""
    nodes = run_model(problem)
    return {
        name: len(node["value"])
        for name, node in nodes.items()
        if isinstance(node.get("fn"), _Subsample) and len(node["value"]) < node["fn"].size
    }
