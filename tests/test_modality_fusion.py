"""The fusion encoder: against plain torch, on rows held out, and with partners that do not belong together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from probmodels import Result, diagnose, fit_svi
from probmodels.datasets.paired.views import make_views
from probmodels.errors import DataError, ResultError
from probmodels.inference.runtime.ops import isolated
from probmodels.modality_structure import fused_scores, make_problem
from probmodels.modality_structure.fusion import hard_negatives, hide_words

COLOURS, SHAPES = ("red", "green", "blue", "white"), ("disc", "square", "cross", "star")


def captions(num_rows: int, seed: int = 0, related: bool = True, **options: Any) -> Any:
    """Vectors that say colour and shape, and texts that name them; or those of other rows."""
    rng = np.random.default_rng(seed)
    colour, shape = rng.integers(0, 4, (2, num_rows))
    vector = np.concatenate([np.eye(4)[colour], np.eye(4)[shape]], 1) + 0.2 * rng.normal(size=(num_rows, 8))
    order = np.arange(num_rows) if related else rng.permutation(num_rows)
    text = [f"a {COLOURS[colour[i]]} {SHAPES[shape[i]]}" for i in order]
    return make_views({"image": vector, "text": text}, **options)


def attend(layer: Any, asked: Tensor, given: Tensor, absent: Tensor) -> Tensor:
    """Multi-head attention in plain torch."""
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip(
            (asked, given, given), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True
        )
    )
    score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(absent[:, None, None], -math.inf)
    return layer.out_proj((score.softmax(-1) @ v).transpose(1, 2).flatten(2))


def states(encoder: Any, asking: tuple[Tensor, Tensor], answering: tuple[Tensor, Tensor]) -> Tensor:
    """The encoder in plain torch."""
    x = asking[0]
    for layer in encoder.layers:
        state = layer.norms[0](x)
        x = x + attend(layer.inside, state, state, ~asking[1])
        x = x + attend(layer.across, layer.norms[1](x), answering[0], ~answering[1])
        x = x + layer.change(layer.norms[2](x))
    return encoder.norm(x)


def test_log_densities_are_the_losses_of_plain_torch() -> None:
    present = np.ones((24, 2), dtype=bool)
    present[3, 1] = False
    data = captions(24, present=present, split=["train"] * 18 + ["test"] * 6)
    problem = make_problem(data, size=4, hidden=8, temperature=0.2, fusion=0.7, masked=0.4, masked_share=0.3)
    problem = problem.mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    model: Any = problem.model
    seen, vectors, codes = problem.args
    with isolated(seed=0), torch.no_grad():
        trace = poutine.trace(model).get_trace(*problem.args)
        trace.compute_log_prob()
        (v, _), (t, _) = model.embed((vectors, codes)).values()
        logits = v @ t.T / 0.2
        both = seen.all(1)
        generator = torch.Generator().manual_seed(0)
        free = both & ~torch.eye(18, dtype=torch.bool)
        chances = [torch.where(free, table.exp(), 0.0) for table in (logits, logits.T)]
        other = [torch.multinomial(c / c.sum(1, keepdim=True), 1, generator=generator)[:, 0] for c in chances]
        assert all((one != torch.arange(18)).all() and both[one].all() for one in other)
        fusion = model.fusion
        image, text = (fusion.tokens[f"tokens_{name}"](x) for name, x in (("image", vectors), ("text", codes)))
        encoder = fusion.encoder(("image", "text"))
        rows = torch.arange(18)

        def score(images: Tensor, texts: Tensor) -> Tensor:
            state = states(encoder, (text[0][texts], text[1][texts]), (image[0][images], image[1][images]))
            return encoder.match(state[:, 0])[both, 0]

        right, wrong = score(rows, rows), torch.cat([score(rows, other[0]), score(other[1], rows)])
        loss = F.binary_cross_entropy_with_logits(right, torch.ones_like(right), reduction="sum")
        loss = loss + F.binary_cross_entropy_with_logits(wrong, torch.zeros_like(wrong), reduction="sum")
        hidden = hide_words(codes, 0.3, generator)
        masked = fusion.tokens["tokens_text"](torch.where(hidden, data.sizes["text_word"], codes))
        words = encoder.words(states(encoder, masked, image)[:, 1:])
        chosen = hidden & both[:, None]
        masked_loss = F.cross_entropy(words[chosen], codes[chosen].long(), reduction="sum")
    found = {name: float(trace.nodes[name]["log_prob_sum"]) for name in ("fused_image_to_text", "masked_image_to_text")}
    assert found["fused_image_to_text"] == pytest.approx(-0.7 * float(loss), rel=1e-6)
    assert found["masked_image_to_text"] == pytest.approx(-0.4 * float(masked_loss), rel=1e-6)


def test_negatives_are_hard_and_one_word_of_each_text_is_hidden() -> None:
    logits = torch.zeros(4, 4)
    logits[0, 2], logits[1, 1], logits[3, 0] = 50.0, 90.0, 70.0
    seen = torch.tensor([True, True, True, True])
    drawn = torch.stack([hard_negatives(logits, seen, torch.Generator().manual_seed(i)) for i in range(60)])
    assert (drawn[:, 0] == 2).all()
    assert (drawn[:, 3] == 0).all()
    assert set(drawn[:, 1].tolist()) == {0, 2, 3}  # never its own
    alone = hard_negatives(logits, torch.tensor([True, False, False, False]))
    assert alone.shape == (4,)
    codes = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [0, 0, 0, 0]]).repeat(2000, 1)
    hidden = hide_words(codes, 0.3, torch.Generator().manual_seed(0)).unflatten(0, (2000, 3))
    assert not hidden[:, 1, 1:].any()
    assert not hidden[:, 2].any()
    assert hidden[:, 1, 0].all()
    expected = 4 * 0.3 + 0.7**4  # where none is drawn, one is taken
    assert abs(float(hidden[:, 0].sum(1).float().mean()) - expected) < 0.09


def fit(data: Any, steps: int = 250) -> Result:
    problem = make_problem(data, size=8, hidden=32, fusion=1.0, masked=1.0, masked_share=0.3, fusion_layers=1)
    return fit_svi(problem, num_steps=steps, lr=0.005, batch_size=64, num_samples=10, progress=False)


def test_partners_held_out_are_told_and_words_are_read_from_the_other_modality() -> None:
    result = fit(captions(300, held_out=0.3))
    found = fused_scores(result).iloc[0]
    assert found["partner"] > 0.85, found
    assert found["words"] > found["words_other"] + 0.2, found
    assert found["words"] > found["words_common"] + 0.2, found
    report = diagnose(result)
    assert report.model == "passed", str(report)
    assert "partners held out above another row" in str(report)


def test_shuffled_partners_are_told_no_better_than_by_chance() -> None:
    result = fit(captions(300, held_out=0.3, related=False))
    found = fused_scores(result).iloc[0]
    assert abs(found["partner"] - 0.5) < 4 * 0.5 / math.sqrt(found["N"]), found
    assert abs(found["words"] - found["words_other"]) < 0.15, found
    report = diagnose(result)
    assert report.model == "failed"
    assert "tells partners no better than by chance" in str(report)


def test_wrong_requests_are_refused() -> None:
    rng = np.random.default_rng(0)
    vectors = make_views({"a": rng.normal(size=(30, 3)), "b": rng.normal(size=(30, 3))})
    with pytest.raises(DataError, match="no modality is a text"):
        make_problem(vectors, masked=1.0)
    with pytest.raises(DataError, match="fusion_layers"):
        make_problem(vectors, fusion_layers=3)
    with pytest.raises(DataError, match="masked_share"):
        make_problem(captions(30), fusion=1.0, masked_share=0.5)
    codes = np.ones((200, 4), dtype=int)
    codes[0, 0] = 900_000
    many = make_views({"image": rng.normal(size=(200, 3)), "text": codes}, kinds={"text": "texts"})
    with pytest.raises(DataError, match="larger min_count"):
        make_problem(many, size=1, hidden=1, masked=1.0)
    plain = fit_svi(make_problem(vectors, hidden=8), num_steps=2, num_samples=2, progress=False)
    with pytest.raises(ResultError, match="no fusion encoder"):
        fused_scores(plain)
    both = fit_svi(make_problem(vectors, hidden=8, fusion=1.0), num_steps=2, num_samples=2, progress=False)
    assert set(fused_scores(both)) == {"first", "second", "N", "partner"}
