"""Whether a fitted conditional autoencoder makes images like those that were held out, and reads latents rightly.

Importance weights of a guide of images are uneven even where it is a good one: an image has many pixels. What can be
tested are its intervals, in images that the model makes, whose latents are known.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import binom, norm

from probmodels.conditional_vae.sampling import (
    class_agreement,
    decoder_of,
    fitted_problem,
    image_evidence,
    image_fidelity,
    latent_information,
    moments,
    some_rows,
)
from probmodels.edges.checks import judge_copies
from probmodels.errors import ResultError
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated

__all__ = ["check_draws", "check_model", "judge_fidelity"]

_FALSE_ALARM = 1e-3
_COVERED = 0.1  # share of the coverage of fresh images below which a class is missing
_BELOW, _UNTOLD = -0.2, 0.4  # upper ends of memorised and accuracy, of images that were seen
_COPIED = 0.5  # share of copies from which on images are those of the training set
_TOLD = 0.01  # probability of as many copies where there are none, below which they are said
_INFORMATION = 0.01  # nats of a latent that tells nothing
_LEVELS, _TOLERATED = (0.5, 0.9), 0.05
_MADE = 2000  # images of known latents
_AGREED = 0.8  # of the share of held-out images whose nearest training image is of their class
_GAP, _FEWEST = 0.05, 10  # nats a pixel by which the likelihood of held-out images may be lower, and images for it


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on latents read in images, in place of those on the weights of the guide.

    The model makes images of known latents, in the classes of the training images, and the guide reads them. Fewer
    latents in its intervals of 50 and 90 % than there should be are harmful. Images of the data may be read worse than
    those of the model, where the model does not fit them.
    """
    yield from still_falling(result.tree)
    problem = fitted_problem(result)
    model, place = decoder_of(problem), problem.args[1]
    information = latent_information(result).values
    told = information >= _INFORMATION
    if told.any():
        with isolated(seed=0), torch.no_grad():
            z = torch.randn(_MADE, model.num_latents).to(next(model.decoder.parameters()))
            label = place[torch.randint(len(place), (_MADE,))].to(z.device)
            image = model.likelihood(z, label).sample()
        mean, sd = moments(result, image, label)
        away = ((z - mean) / sd).abs().double().cpu().numpy()[:, told]
        names = np.flatnonzero(told)
        for level in _LEVELS:
            yield _coverage(away, level, names)
    idle = int((~told).sum())
    verdict = f"{idle} of {len(told)} latents tell nothing of the image (below {_INFORMATION} nats)"
    advice = "the posterior of these collapsed to the prior: take more steps, or fewer num_latents"
    yield Finding(not told.any(), verdict, advice if idle else "")


def _coverage(away: NDArray[np.float64], level: float, names: NDArray[np.int64]) -> Finding:
    """Whether as many latents (image, latent), in sds from their means, lie in intervals as there should be."""
    inside = (away < norm.ppf((1 + level) / 2)).sum(0)
    needed = binom.ppf(_FALSE_ALARM / (len(names) * len(_LEVELS)), len(away), level - _TOLERATED) / len(away)
    found = inside / len(away)
    worst = int(found.argmin())
    verdict = f"{level:.0%} intervals of latents hold {found[worst]:.1%} of those of latent {names[worst]}, the fewest "
    verdict += f"of {len(names)}, in {len(away):,} images that the model made (at least {needed:.1%})"
    bad = bool(found[worst] < needed)
    advice = "what is read of latents is too certain: take more steps, a larger guide_hidden, or fewer num_latents"
    return Finding(bad, verdict, advice if bad else "")


def check_model(result: Result) -> Iterator[Finding]:
    """Findings on new images: classes missing or not followed, copies, a classifier that tells them apart; on evidence.

    All but the classifier may be harmful, and so is a likelihood much lower for images held out. A classifier finds
    small differences when it sees enough images, and whether they matter depends on what images are for: it is said.
    """
    try:
        report = image_fidelity(result)
    except ResultError as error:
        yield Finding(False, f"fidelity of new images is not known: {error}", judged=False)  # and so nothing passes
    else:
        yield from judge_fidelity(report)
    data = fitted_problem(result).data
    assert data is not None
    held_out = data["held_out_image"].values
    yield judge_copies(data["image"].values, held_out[some_rows(len(held_out))], part="model")
    yield _agreement(*class_agreement(result))
    yield _evidence(result)


def _agreement(new: NDArray[np.bool_], held_out: NDArray[np.bool_]) -> Finding:
    """Whether new images are of the class that was asked for, by nearest neighbours, as held-out ones are of theirs."""
    least = _AGREED * held_out.mean()
    bad = bool(binom.cdf(new.sum(), len(new), least) < _FALSE_ALARM)
    verdict = f"{new.mean():.0%} of new images are of the class asked for, by the nearest training image, and "
    verdict += f"{held_out.mean():.0%} of held-out images of theirs (at least {least:.0%})"
    advice = "the decoder does not follow the class: take more steps, or more images of each class"
    return Finding(bad, verdict, advice if bad else "", part="model")


def _evidence(result: Result) -> Finding:
    """The log likelihood of images held out against that of fitted ones."""
    fitted, others = (image_evidence(result, held_out=held_out)["log_evidence"].values for held_out in (False, True))
    if len(others) < _FEWEST:
        verdict = f"{len(others)} images were held out, too few to compare their log likelihood with fitted ones"
        return Finding(False, verdict, f"hold out {_FEWEST} images or more", judged=False)  # and so nothing passes
    data = fitted_problem(result).data
    assert data is not None
    size = data.sizes["row"] * data.sizes["column"]
    error = float(np.sqrt(fitted.var(ddof=1) / len(fitted) + others.var(ddof=1) / len(others)))
    gap, limit = float(fitted.mean() - others.mean()), _GAP * size + 2 * error
    verdict = f"the log likelihood of images held out is at least {others.mean():.4g} nats, and {fitted.mean():.4g} of "
    verdict += f"fitted ones (more by at most {limit:.3g})"
    bad = not gap <= limit
    advice = "the model learned images by heart: take fewer steps, a smaller hidden, or more images"
    return Finding(bad, verdict, advice if bad else "", part="model")


def judge_fidelity(report: xr.Dataset) -> Iterator[Finding]:
    """Findings on a report of fidelity by class; also where new images are nearer to those held out."""
    classes = report.isel({"class": slice(1, None)})
    names, whole = classes["class"].values.tolist(), report.isel({"class": 0})
    covered = classes["coverage_high"].values / np.where(classes["num_synthetic"] > 0, classes["coverage_expected"], 1)
    covered = np.where(np.isnan(covered), np.inf, covered)  # of classes of which too few were held out
    lost = [str(name) for name, share in zip(names, covered, strict=True) if share < _COVERED]
    verdict = f"new images cover {float(whole['coverage']):.0%} of the held-out ones, where fresh images would cover "
    verdict += f"{float(whole['coverage_expected']):.0%}"
    if classes["coverage"].notnull().all():
        worst = int(np.argmin(classes["coverage"].values))
        verdict += f"; fewest of class {names[worst]!r}, {float(classes['coverage'][worst]):.0%}"
    if lost:
        verdict += f"; surely below {_COVERED:.0%} of that of fresh images: {', '.join(lost)}"
    advice = "images of these classes are missing: take more steps, or more images of them" if lost else ""
    yield Finding(bool(lost), verdict, advice, part="model")
    copied, low = float(whole["memorised"]), float(whole["memorised_low"])
    verdict = f"{max(copied, 0.0):.0%} of the new images are explained as copies of training images, by nearest "
    verdict += f"neighbours (fails where surely above {_COPIED:.0%}; p = {float(whole['memorised_pvalue']):.2g})"
    bad = low > _COPIED
    said = "the decoder learned images by heart: take fewer steps, a smaller hidden, or more images"
    yield Finding(bad, verdict, said if float(whole["memorised_pvalue"]) < _TOLD or bad else "", part="model")
    yield from _saw_held_out(whole)
    accuracy = float(whole["accuracy"])
    if np.isnan(accuracy):
        verdict = "too few images were held out for a classifier to tell new images from them"
        yield Finding(False, verdict, "hold out 20 images or more", part="model", judged=False)
        return
    apart = float(whole["accuracy_pvalue"]) < _FALSE_ALARM
    verdict = f"a classifier that sees images with their classes tells new images from held-out ones in {accuracy:.0%} "
    verdict += f"({float(whole['accuracy_low']):.0%} to {float(whole['accuracy_high']):.0%}; 50% is by chance)"
    said = "new images differ from real ones: do not take them for real data without looking at the samples"
    yield Finding(False, verdict, said if apart else "", part="model")


def _saw_held_out(whole: xr.Dataset) -> Iterator[Finding]:
    """Finding where new images are surely too near to those held out, which fresh images are not."""
    high, told = float(whole["memorised_high"]), float(whole["accuracy_high"])
    below = high < _BELOW and float(whole["memorised_pvalue"]) > 1 - 2 * _FALSE_ALARM
    if below or told < _UNTOLD:
        verdict = "new images are nearer to those held out than to those fitted: the generator saw them (share of "
        verdict += f"copies of fitted images at most {high:.2f}, where fresh images have 0; accuracy of a classifier "
        verdict += f"at most {told:.0%}, where fresh images have 50%)"
        yield Finding(True, verdict, "hold out images that the generator was not fitted to", part="model")
