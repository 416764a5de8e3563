# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Spoken digits and their images
#
# An image of a digit and a recording of someone who says it share the digit. Who speaks is private to the sound. With
# deep feature separation each tower has a second head for what is its own: the digit should be in the shared part, and
# the speaker in the private part. Run it on spectrograms and images of your own,
#
#     python examples/spoken_digits.py --sounds sounds.npz --images images.npz
#
# where `sounds.npz` holds arrays `logmel` (row, row, column), `digit` and `speaker`, as of the Free Spoken Digit
# Dataset, and `images.npz` arrays `image` (row, row, column) and `digit`, as of MNIST. Without files the images are
# those of scikit-learn, and the sounds are made up: each digit is a tune, which speakers sing at a pitch of their own.
# Takes about 12 seconds on one core without files.

# %%
import argparse

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from probmodels import diagnose, fit_svi
from probmodels.datasets.paired.views import make_views
from probmodels.modality_structure import embed, make_problem, measure

parser = argparse.ArgumentParser()
parser.add_argument("--sounds", help="file .npz of spectrograms")
parser.add_argument("--images", help="file .npz of images")
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()
rng = np.random.default_rng(0)

# %% [markdown]
# ## Pairs
#
# An image is paired with a sound of its digit. Spectrograms are pictures: time runs along their columns.


# %%
def sung(digit: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """Spectrograms (row, 16, 12): ten tunes of four notes, higher by a step for each speaker, with noise."""
    tunes = np.random.default_rng(1).permutation(10 * [0, 2, 4, 6, 8])[:40].reshape(10, 4)
    found = 0.5 * rng.random((len(digit), 16, 12))
    for row, (one, who) in enumerate(zip(digit, speaker, strict=True)):
        for note, height in enumerate(tunes[one]):
            found[row, height + who, 3 * note : 3 * note + 3] += rng.uniform(0.6, 1.0)
    return found


table = load_digits()
images, digit = table.images / 16, table.target
if args.images:
    with np.load(args.images) as file:
        images, digit = file["image"], file["digit"]
speaker = rng.integers(0, 4, len(digit))
sounds = sung(digit, speaker)
if args.sounds:
    with np.load(args.sounds) as file:
        places = [rng.choice(np.flatnonzero(file["digit"] == one)) for one in digit]
        sounds, speaker = file["logmel"][places], file["speaker"][places]
data = make_views({"image": images, "sound": sounds}, label=digit, held_out=0.3)
split = data["split"].values
print({str(dim): size for dim, size in data.sizes.items()})

# %% [markdown]
# ## Fit
#
# `orthogonality` holds both parts of a row at right angles; `contrast` asks the private part to tell rows apart, and to
# find each row again after a random change. Changes must leave alone what is to be kept: a sound that is moved along
# its frequencies would be that of another speaker, hence `shift=0`, which leaves erased squares.

# %%
weights = {"orthogonality": 1.0, "contrast": 0.5, "uniformity": 0.1}
problem = make_problem(data, size=16, hidden=64, temperature=0.2, shift=0.0, **weights)
fitting = {"num_steps": args.steps, "lr": 0.003, "lr_decay": 0.1, "batch_size": 128, "num_samples": 5}
result = fit_svi(problem, **fitting, seed=0, progress=False)
print(diagnose(result))
print(measure(result).T.to_string())

# %% [markdown]
# ## Digits of images that were never labelled
#
# The prototype of a digit is the mean of its embedded sounds. The bound on the information cannot exceed log N, and
# here what image and sound share is the digit: log 10 = 2.3 nats.

# %%
test, train = embed(result, "test"), embed(result, "train")
assert test.label is not None
assert train.label is not None
classes = np.unique(train.label)
prototypes = np.stack([train.z["sound"][train.label == one].mean(0) for one in classes])
prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
zero = (classes[(test.z["image"] @ prototypes.T).argmax(1)] == test.label).mean()
print(f"zero-shot: {zero:.1%} of {len(test.label)} images")

# %% [markdown]
# ## What is where
#
# Linear probes of the same size, fitted to the training rows, of the shared and the private part of the sound.

# %%
who = {part: speaker[split == part] for part in ("train", "test")}
what = {"train": train.label, "test": test.label}
found = {}
for name, (known, held_out) in {
    "shared": (train.z["sound"], test.z["sound"]),
    "private": (train.own["sound"], test.own["sound"]),
}.items():
    for target, labels in (("digit", what), ("speaker", who)):
        probe = LogisticRegression(C=100, max_iter=2000).fit(known, labels["train"])
        found[target, name] = probe.score(held_out, labels["test"])
        print(f"{target} from the {name} part of the sound: {found[target, name]:.1%}")

# %%
if args.sounds is None and args.images is None:
    assert zero > 0.9, f"zero-shot {zero:.1%}"
    assert found["speaker", "private"] > found["speaker", "shared"] + 0.1, "the speaker belongs to the private part"
    shuffled = rng.permutation(who["train"])
    chance = (
        LogisticRegression(C=100, max_iter=2000).fit(train.own["sound"], shuffled).score(test.own["sound"], who["test"])
    )
    assert chance < 0.4, f"a probe of shuffled speakers should be at chance, not {chance:.1%}"
