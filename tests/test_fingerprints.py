"""Fingerprints: what an author can edit changes them, what changes no number does not."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from probmodels.inference.runtime.fingerprints import fingerprint

MODEL = '''
import pyro, torch
import pyro.distributions as dist
SCALE = 2.0
DATA = torch.arange(3.0)

def helper(x):
    return x + 1

def unrelated(x):
    return x - 1

def model(y, width=1.0):
    """Words."""
    names = [name for name in ("a", "b") if name in {"a", "b", "c", "d"}]
    x = pyro.sample("x", dist.Normal(0.0, SCALE))
    pyro.sample("y", dist.Normal(helper(x), width).expand([len(DATA)]).to_event(1), obs=y)
'''


def of(source: str, name: str = "model"):
    space = {"__name__": "theirs"}
    exec(compile(source, "theirs.py", "exec"), space)
    return fingerprint(space[name])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Normal(0.0, SCALE)", "Normal(1.0, SCALE)"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("arange(3.0)", "arange(4.0)"),
        ("width=1.0", "width=2.0"),
        ("return x + 1", "return x + 2"),
        ('sample("x"', 'sample("z"'),
        ('if name in {"a"', 'if name in {"e"'),
        ("dist.Normal(0.0", "dist.Cauchy(0.0"),
    ],
)
def test_an_edited_model_is_another_one(old, new):
    assert old in MODEL
    assert of(MODEL) != of(MODEL.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [("SCALE = 2.0", "\n\n# a comment\nSCALE = 2.0  # another"), ("return x - 1", "return x - 2")],
)
def test_what_changes_no_number_changes_no_fingerprint(old, new):
    assert old in MODEL
    assert of(MODEL) == of(MODEL.replace(old, new))


@pytest.mark.slow
def test_processes_agree():
    program = f"import sys; sys.path[:] = {sys.path!r}\nfrom tests_fingerprint import of, MODEL\nprint(of(MODEL))"
    program = program.replace("tests_fingerprint", "test_fingerprints").replace("sys.path[:]", "sys.path[:0]")
    path = __file__.rpartition("/")[0]
    program = f"import sys; sys.path.insert(0, {path!r})\n{program}"
    found = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)  # each with a hash seed of its own, which orders sets
    }
    assert found == {of(MODEL)}


def test_closures_partials_methods_and_classes_count():
    def make(shift):
        return lambda x: x + shift

    assert fingerprint(make(1.0)) == fingerprint(make(1.0)) != fingerprint(make(2.0))
    assert fingerprint(partial(make, 1)) != fingerprint(partial(make, 2))

    class Thing:
        def __init__(self, value):
            self.value = value

        def method(self):
            return self.value

    class Other(Thing):
        def method(self):
            return -self.value

    assert fingerprint(Thing(1).method) == fingerprint(Thing(1).method) != fingerprint(Thing(2).method)
    assert fingerprint(Thing(1)) != fingerprint(Other(1))
    before, old = fingerprint(Thing(1)), Thing.method
    Thing.method = lambda self: 3
    assert fingerprint(Thing(1)) != before
    Thing.method = old
    assert fingerprint(Thing(1)) == before


def test_values_of_every_kind():
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    assert fingerprint(one) == fingerprint(one) != fingerprint(two)
    assert fingerprint(torch.ones(2)) != fingerprint(torch.ones(2, 1)) != fingerprint(torch.ones(2).double())
    assert fingerprint({"b", "a"}) == fingerprint({"a", "b"})
    assert fingerprint(torch.float32) != fingerprint(torch.float64)
    assert fingerprint(np.array(["a", 1], dtype=object)) == ["a", 1]
    assert "0x" not in str(fingerprint([object(), torch.nn, len]))


def test_what_holds_itself_ends():
    loop: list[object] = []
    loop.append(loop)
    assert fingerprint(loop) == ["list within itself"]

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert fingerprint(even) == fingerprint(even)
