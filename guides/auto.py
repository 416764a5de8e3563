"""Automatic guides by name: one guide for every model of continuous sites, in several families.

The latent sites x = (x_1, ..., x_n) are images of one unconstrained vector z under the bijections of their supports,
and z is the image of standard normal noise under a map of the family::

    e ~ Normal(0, I),    z = T(e),    x_j = b_j(z_j),
    log q(x) = log Normal(e; 0, I) - log |det dT/de| - sum_j log |det db_j/dz_j|

==============  ====================================================================================================
``mean_field``  z = m + s e, entry by entry
``low_rank``    z = m + s (e + U V'e): diagonal changed by a matrix of low rank
``full_rank``   z = m + s L e with L unit lower triangular
``iaf``         z = m + s L f(e), f autoregressive affine layers
``nsf``         the same with rational-quadratic splines; also called ``flow``
``structured``  full rank for what lies outside of plates; each element of a plate full rank and linear in the noise
                of what encloses it: exact where the posterior is Gaussian and elements are independent given the rest
``map``         a point, the mode of the density of x; also called ``delta``
``laplace``     the mode of the density of z, and, once fitted, a normal with the curvature there
==============  ====================================================================================================

``gflownet`` is for models with discrete sites and stands in `probmodels.guides.gflownet`.

The noise carries no parameter, so that its density adds nothing to the gradient: entropies of the normal families are
differentiated exactly. Nothing branches on values, so that a step can be captured as one graph.

With ``path_gradient`` the entropy is differentiated along the path of the draw alone (Roeder et al. 2017), so that the
gradient loses its noise where the guide meets the posterior. After 2000 steps ``full_rank`` came 4 to 100 times closer
to the evidence of normal posteriors of 5 to 50 entries. It is an option since it is slower from a start much narrower
than the posterior, and diverged for ``full_rank`` with 50 entries at a step size of 0.05.

Sites inside ``problem.batch_plates``, which an engine may subsample, have one row of parameters for each element in
``mean_field``, ``structured`` and ``map``, and a minibatch touches its own rows only. The other families draw the
whole vector, of which a minibatch uses its elements: unbiased, but with the noise of two parts that cancel only on
average. ``problem.reparam`` is for gradient-based MCMC, which runs a reparametrised model; a guide samples the sites of
the model as it stands. To fit a reparametrised model, reparametrise the model itself with ``poutine.reparam``.

References
----------
Kucukelbir, A., Tran, D., Ranganath, R., Gelman, A. and Blei, D. M. (2017). Automatic differentiation variational
inference. JMLR 18(14). https://arxiv.org/abs/1603.00788
Roeder, G., Wu, Y. and Duvenaud, D. (2017). Sticking the landing: simple, lower-variance gradient estimators for
variational inference. https://arxiv.org/abs/1703.09194
Ong, V. M.-H., Nott, D. J. and Smith, M. S. (2018). Gaussian variational approximation with a factor covariance
structure. JCGS 27(3). https://arxiv.org/abs/1701.03208
Tan, L. S. L. and Nott, D. J. (2018). Gaussian variational approximation with sparse precision matrices. Statistics and
Computing 28. https://arxiv.org/abs/1605.05622
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import register_kl

from probmodels.errors import ProblemError
from probmodels.guides.families import GUIDES, LaplaceMap, Map, PointMap
from probmodels.guides.gflownet import DiscretePolicy, make_policy
from probmodels.guides.layout import Group, Place, Plate, choose, make_groups, move, read_places
from probmodels.inference.flows.seeding import AnnealedVarGrad
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.potential import Potential
from probmodels.inference.programs.varying import with_fixed_sites
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Positive, check_options, checked, hint, options_of

__all__ = ["GUIDES", "POLICIES", "FlatGuide", "check_guide", "guide_functions", "make_guide", "with_guide"]

POLICIES: dict[str, Callable[..., DiscretePolicy]] = {"gflownet": make_policy}
"""Guides of models with discrete sites, beside the families of `GUIDES`, which are for continuous ones."""


@checked(ProblemError)
def with_guide(problem: Problem, name: str = "mean_field", **options: Any) -> Problem:
    """The problem, and what its hyperparameters are judged by, with an automatic guide; see `make_guide`.

    With the guide ``gflownet`` the loss becomes `AnnealedVarGrad` where it is the name of an ELBO of Pyro, and discrete
    sites that come and go stay, as `with_fixed_sites` says.
    """
    if name in POLICIES:
        check_guide(name, options)
        problem = with_fixed_sites(problem)
    guide = make_guide(problem, name, **options)
    if name in POLICIES and isinstance(problem.loss, str) and hasattr(pyro.infer, problem.loss):
        problem = replace(problem, loss=AnnealedVarGrad())
    outer = None if problem.outer is None else problem.outer.mapped(lambda other: replace(other, guide=guide))
    return replace(problem, guide=guide, outer=outer)


@checked(ProblemError)
def make_guide(
    problem: Problem,
    name: str = "mean_field",
    *,
    init: Mapping[str, Any] | None = None,
    init_scale: Positive = 0.1,
    **options: Any,
) -> FlatGuide | DiscretePolicy:
    """An automatic guide of a problem.

    Parameters
    ----------
    problem
        Its model is run a few times, in isolation and from a fixed seed: equal problems give equal guides.
    name
        One of `GUIDES`; or ``gflownet``, for models with discrete sites, see `probmodels.guides.gflownet`.
    init
        Starting values of continuous sites; the others start at the median of their prior given the sites before them,
        or where that has no finite density, at the first point tried that has.
    init_scale
        Standard deviation of continuous sites at the start, in unconstrained space.
    **options
        Those of ``gflownet`` are the arguments of `make_policy`. Of the others: ``rank`` of ``low_rank``: the root of
        the number of entries. ``num_flows``, 2, and ``hidden`` width of the networks of ``iaf``, ``nsf`` and ``flow``.
        ``path_gradient`` of ``mean_field``, ``low_rank`` and ``full_rank``, False: see the module.

    Returns
    -------
    FlatGuide or DiscretePolicy
        A Pyro program of the same arguments as the model.

    Raises
    ------
    ProblemError
        If the name or an option is unknown or out of range, a latent site is discrete, its support has no map from
        unconstrained space or moves with other sites, or no start of finite density is found.
    """
    check_guide(name, {"init": init, "init_scale": init_scale, **options})
    if name in POLICIES:
        return POLICIES[name](problem, init=init, init_scale=init_scale, **options)
    family = GUIDES[name]
    places, start = read_places(problem, init or {})
    split = {"none": set[str](), "batch": set(problem.batch_plates), "all": None}[family.splits]
    with isolated(seed=0):
        return FlatGuide(places, start, family, split, init_scale, options)


def check_guide(name: str, options: Mapping[str, Any]) -> None:
    """Check a name and its options, before there is a problem.

    Raises
    ------
    ProblemError
        If one of them is unknown, the closest that is known is named; or a value is of a wrong type or out of range.
    """
    functions = guide_functions(name)
    known = [option for _, names in functions for option in names]
    for option in options:
        if option not in known:
            raise ProblemError(f"guide {name!r} has no option {option!r}{hint(option, known)}")
    for function, names in functions:
        own = {option: value for option, value in options.items() if option in names}
        check_options(function, own, where=f"guide {name!r}: ", error=ProblemError)


def guide_functions(name: str) -> list[tuple[Callable[..., Any], list[str]]]:
    """Functions that take the options of a guide, each with the names of those that it takes.

    Raises
    ------
    ProblemError
        If no guide has this name.
    """
    known = (*GUIDES, *POLICIES)
    if name not in known:
        raise ProblemError(f"no automatic guide is called {name!r}{hint(name, known)}")
    if name in POLICIES:
        return [(POLICIES[name], list(options_of(POLICIES[name], skip=1)))]
    family = GUIDES[name]
    return [(make_guide, ["init", "init_scale"]), (family, list(options_of(family, skip=3)))]


class _Placed(dist.Delta):
    """A value and its log density, without an analytic divergence: that of Delta leaves the density out."""


@register_kl(_Placed, dist.Distribution)
def _no_divergence(p: _Placed, q: dist.Distribution) -> Tensor:
    raise NotImplementedError


class FlatGuide(PyroModule):
    """A guide made of maps from noise to unconstrained vectors; made by `make_guide`.

    It holds no reference to the model, so that it copies, pickles and moves like any module. Parameters are called
    ``guide.joint.*``, and ``guide.in_<plates>.*`` for sites with a row of parameters for each element.
    """

    def __init__(
        self,
        places: Sequence[Place],
        start: Mapping[str, Tensor],
        family: type[Map],
        split: set[str] | None,
        init_scale: float,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__("guide")
        self._jacobian = family is not PointMap
        self._places, self._groups = tuple(places), make_groups(places, split)
        self._dtypes = {place.name: place.dtype for place in places}
        self._plates = {plate.name: plate for place in places for plate in place.plates}
        self._enclosing = [[i for i, other in enumerate(self._groups) if other.within(g)] for g in self._groups]
        sizes = [group.parts[-1].stop for group in self._groups]
        for group, enclosing in zip(self._groups, self._enclosing, strict=True):
            inner = family(group.gather(start), init_scale, [sizes[index] for index in enclosing], **options)
            setattr(self, group.label, inner)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; returns the values by name."""
        plates = {
            p.name: pyro.plate(p.name, p.size, subsample_size=p.subsample_size, dim=p.dim)
            for p in self._plates.values()
        }
        unconstrained: dict[str, Tensor] = {}
        noises: list[Tensor] = []
        for index, group in enumerate(self._groups):
            z = self._draw(index, group, plates, noises)
            for part in group.parts:
                value = choose(part.read(z), part.plates, plates, part.place)
                unconstrained[part.place.name] = value.to(self._dtypes[part.place.name])
        values: dict[str, Tensor] = {}
        with ExitStack() as stack:
            entered: tuple[Plate, ...] = ()
            for place in self._places:
                if place.plates != entered:
                    stack.close()
                    entered = place.plates
                    for plate in entered:
                        stack.enter_context(plates[plate.name])
                values[place.name] = pyro.sample(place.name, self._place(place, unconstrained[place.name]))
        return values

    def finish(self, problem: Problem) -> None:
        """What is left to do after a fit: the curvature at the mode for ``laplace``, nothing for the others.

        Parameters
        ----------
        problem
            Holds the fitted model; to be called inside the parameter store of the fit.

        Raises
        ------
        ProblemError
            If the Hessian is not positive definite.
        """
        inner = getattr(self, self._groups[0].label)
        if isinstance(inner, LaplaceMap):
            inner.root.copy_(_inverse_root(problem, inner.loc.detach()))
            inner.spread.fill_(1.0)

    def _draw(self, index: int, group: Group, plates: Mapping[str, Any], noises: list[Tensor]) -> Tensor:
        """Vectors (..., *batch, size) of a group, of the rows of the minibatch; its noise is added to ``noises``."""
        inner = getattr(self, group.label)

        def pick(parameter: Tensor) -> Tensor:
            for plate in group.plates:
                if plates[plate.name].subsample_size < plate.size:
                    axis = len(group.batch) + plate.dim
                    parameter = parameter.index_select(axis, plates[plate.name].indices.to(parameter.device))
            return parameter

        helper: Any = {"is_auxiliary": True}
        with ExitStack() as stack:
            for plate in group.plates:
                stack.enter_context(plates[plate.name])
            noise = inner.loc.new_zeros(inner.loc.shape[-1])
            if inner.noisy:
                standard = dist.Normal(noise, torch.ones_like(noise)).to_event(1)
                noise = pyro.sample(f"_noise_{group.label}", standard, infer=helper)
            noises.append(noise)
            z, log_volume = inner(noise, pick, [noises[i] for i in self._enclosing[index]])
            density = -log_volume.expand(z.shape[:-1])
            if inner.path_gradient:  # the value of one, the gradient of the other
                along = (inner.score(noise, pick).detach() * z).sum(-1)
                density = (density - along).detach() + along
            return pyro.sample(f"_vector_{group.label}", _Placed(z, density, event_dim=1), infer=helper)

    def _place(self, place: Place, unconstrained: Tensor) -> _Placed:
        bijection = place.bijection
        value = bijection(unconstrained)
        if not self._jacobian:
            return _Placed(value, event_dim=place.event_dim)
        log_volume = bijection.log_abs_det_jacobian(unconstrained, value)
        num_batch = value.dim() - place.event_dim
        return _Placed(value, -sum_rightmost(log_volume, log_volume.dim() - num_batch), event_dim=place.event_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> FlatGuide:
        for place in self._places:
            move(place.support, fn)
            self._dtypes[place.name] = fn(torch.empty(0, dtype=self._dtypes[place.name])).dtype
        return super()._apply(fn, recurse)


def _inverse_root(problem: Problem, loc: Tensor) -> Tensor:
    """Lower triangular root of the inverse Hessian of the potential at ``loc`` (size,)."""
    with torch.enable_grad(), pyro.validation_enabled(False), whole(problem)():
        potential = Potential(replace(problem, reparam={}))
        z = loc.to(potential.like).requires_grad_(True)
        (gradient,) = torch.autograd.grad(-potential.log_density(z), z, create_graph=True)
        rows = [torch.autograd.grad(entry, z, retain_graph=True)[0] for entry in gradient]
    hessian = torch.stack(rows).detach().double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    if not bool(torch.isfinite(values).all()) or float(values[0]) <= 1e-10 * float(values[-1]):
        raise ProblemError(
            f"{problem.name}: the curvature at the fitted point is not that of a mode: eigenvalues of the Hessian "
            f"reach from {float(values[0]):.3g} to {float(values[-1]):.3g}; take more steps, or the guide 'full_rank'"
        )
    covariance = (vectors / values) @ vectors.mT
    return torch.linalg.cholesky(covariance).to(loc)
