"""Whether draws of causal graphs are enough, and whether the model of their mechanisms fits the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from probmodels.causal_graph.edges import DEPENDENT, NOT_NORMAL, SERIAL, Examined, examine
from probmodels.causal_graph.residuals import ResidualTests
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.result import Result

__all__ = ["check_draws", "check_model", "dependence_findings"]

_FEWEST, _ROUGH = 50, 0.03  # draws; Monte Carlo error that is worth a word


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on independent draws of the exact posterior, which need not converge; nothing on those of a guide."""
    if result.tree.attrs.get("kernel") != "ExactGraphs":
        return
    draws = result.posterior["graph"].transpose("chain", "draw", ...).values
    count = draws.shape[0] * draws.shape[1]
    share = draws.reshape(count, -1).mean(0)
    error = math.sqrt(float((share * (1 - share)).max()) / count)
    verdict = f"{count:,} independent draws of the exact posterior; Monte Carlo error of the probability of an edge "
    if count < _FEWEST:
        advice = f"draw {_FEWEST} or more (num_samples), or take edge_probabilities, which has no such error"
        yield Finding(False, f"{verdict}up to {0.5 / math.sqrt(count):.2f}", advice, judged=False)
        return
    advice = "edge_probabilities has no such error; or draw more (num_samples)" if error > _ROUGH else ""
    yield Finding(False, f"{verdict}at most {error:.3f}", advice)


def check_model(result: Result) -> Iterator[Finding]:
    """Findings on residuals under the most probable graph: of causes and of each other, of rows, and of normal noise.

    They cannot see hidden common causes whose effects leave residuals that are nearly independent, as linear effects
    with normal noise do.
    """
    found = examine(result)
    yield from dependence_findings(found.tests, found.names, found.rows)
    if found.normal:
        yield _shape(found)


def dependence_findings(tests: ResidualTests, names: Sequence[str], rows: int) -> Iterator[Finding]:
    """Findings on residuals that depend on causes, on each other, or on those of the row before."""
    serial = tests.serial < SERIAL
    place = int(np.abs(tests.lag).argmax())
    lag = float(tests.lag[place])
    verdict = f"residuals of neighbouring rows have a correlation of {lag:.2f} at {names[place]}, the largest in size "
    verdict += f"(tail probability {tests.serial:.2g}, at least {SERIAL:g})"
    advice = f"rows are no independent draws, so that all probabilities are too certain: {rows:,} such rows tell as "
    advice += f"much of a relation as about {max(1, round(rows * (1 - lag**2) / (1 + lag**2))):,} independent ones; "
    advice += "thin them, or take differences"
    yield Finding(serial, verdict, advice if serial else "", part="model")
    dependent = tests.dependence <= DEPENDENT
    pairs = np.argwhere(np.triu(tests.pairs <= DEPENDENT, 1))
    pairs = pairs[np.argsort(tests.pairs[tuple(pairs.T)], kind="stable")]
    told = [f"{names[i]} and {names[j]}" for i, j in pairs]
    where = f" of {', '.join(told[:4])}{f' and {len(told) - 4} more pairs' * (len(told) > 4)}" if dependent else ""
    verdict = f"residuals{where} {'depend' if dependent else 'show no dependence'} on causes or on each other "
    verdict += f"(tail probability {tests.dependence:.2g} over all pairs, at least {DEPENDENT:g})"
    if not dependent:
        verdict += (
            "; hidden common causes, above all linear ones, and noise that grows with its cause can escape this test"
        )
    advice = "what the graph says of these concepts cannot be trusted, however close to 0 or 1: look for a hidden "
    advice += "common cause, noise that grows with its cause, values on a scale that bends relations (try logarithms), "
    advice += "or rows that were selected"
    advice += "; dependent rows can be the reason as well" * serial
    yield Finding(dependent, verdict, advice if dependent else "", part="model")


def _shape(found: Examined) -> Finding:
    place = int(found.tests.gain.argmax())
    gain = float(found.tests.gain[place])
    verdict = f"noise='normal', and noise of any shape is more probable by a log Bayes factor of {gain:.1f} at "
    verdict += f"{found.names[place]} (at most {NOT_NORMAL:g})"
    bad = gain > NOT_NORMAL
    return Finding(bad, verdict, "take noise='any'" if bad else "", part="model")
