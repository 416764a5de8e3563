"""Sentences as labelled data: readers of treebanks and a simulator.

A data set of sentences holds

=============  ==========================  ============================================================================
variable       dims                        meaning
=============  ==========================  ============================================================================
``word``       (sentence, position)        codes of words, 0 after the end of a sentence
``length``     (sentence,)                 number of words
``gold``       (sentence, start, end)      whether the words from start to before end are a constituent of the tree that
                                           came with the sentence; of two words or more
=============  ==========================  ============================================================================

with coordinate ``vocabulary``, the words by code, and attribute ``gold_from``, the source of ``gold``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import NDArray

from probmodels.datasets.checks import AnyPath, check_size, existing_file
from probmodels.errors import DataError
from probmodels.options import Count, OneOf, Seed, checked, refuse_unused

__all__ = ["UNKNOWN", "check_sentences", "load_conllu", "make_sentences", "simulate_sentences"]

UNKNOWN = "<unknown>"
_COLUMNS = 10
_HEAD = 6
_Length = Annotated[int, Interval(ge=2, le=1000)]  # of sentences in words: memory grows with its square
_Vocabulary = Annotated[Sequence[str], Len(1)]
_DEPENDENCIES = "subtrees of the dependency tree: treebanks of dependencies have no constituents"

# Rules of a small English; "" is any parent.
_Rules = dict[str, dict[str, dict[tuple[str, str], float]]]  # label: parent: children: probability
_RULES: dict[str, _Rules] = {
    "english": {
        "S": {"": {("NP", "VP"): 1.0}},
        "NP": {"": {("Determiner", "Noun"): 0.7, ("NP", "PP"): 0.3}},
        "VP": {"": {("Verb", "NP"): 0.7, ("VP", "PP"): 0.3}},
        "PP": {"": {("Preposition", "NP"): 1.0}},
    },
    "parents": {
        "S": {"": {("NP", "VP"): 1.0}},
        "NP": {
            "S": {("Determiner", "Noun"): 1.0},
            "VP": {("Noun", "Determiner"): 0.6, ("NP", "PP"): 0.4},
            "NP": {("Noun", "Determiner"): 0.9, ("NP", "PP"): 0.1},
            "PP": {("Determiner", "Noun"): 0.8, ("NP", "PP"): 0.2},
        },
        "VP": {"S": {("Verb", "NP"): 0.6, ("VP", "PP"): 0.4}, "VP": {("Verb", "NP"): 1.0}},
        "PP": {"NP": {("Preposition", "NP"): 1.0}, "VP": {("NP", "Preposition"): 1.0}},
    },
}
_WORDS: dict[str, dict[str, float]] = {
    "Determiner": {"the": 0.5, "a": 0.3, "every": 0.2},
    "Noun": {"dog": 0.3, "child": 0.3, "park": 0.2, "telescope": 0.2},
    "Verb": {"saw": 0.5, "followed": 0.3, "drew": 0.2},
    "Preposition": {"with": 0.6, "near": 0.4},
}


@checked(DataError)
def make_sentences(
    sentences: Sequence[Sequence[str]],
    brackets: Sequence[Sequence[tuple[int, int]]] | None = None,
    *,
    vocabulary: _Vocabulary | None = None,
    min_count: Count = 1,
    max_length: _Length | None = None,
    **attrs: Any,
) -> xr.Dataset:
    """Labelled data of sentences of words.

    Parameters
    ----------
    sentences
        Words of each sentence, two or more.
    brackets
        Constituents of each by start and end, the end being the first position after it; None where none are known.
    vocabulary
        Words by code; others are coded as ``"<unknown>"``, which has to be among them then. None for all words.
    min_count
        Words that are rarer are coded as ``"<unknown>"``; not used with a vocabulary.
    max_length
        Number of positions; None for the words of the longest sentence.
    **attrs
        Attributes of the data set.

    Returns
    -------
    xr.Dataset
        As the module says.

    Raises
    ------
    DataError
        If there is no sentence, one has fewer than two words or more than positions, a bracket lies outside of its
        sentence, a word is unknown, or an option is out of range or not used.
    """
    if vocabulary is not None:
        refuse_unused(make_sentences, "vocabulary", min_count=min_count)
    if not len(sentences):
        raise DataError("there is no sentence; give one or more, or allow for longer ones")
    lengths = np.array([len(sentence) for sentence in sentences])
    size = int(lengths.max()) if max_length is None else max_length
    for number, length in enumerate(lengths):
        if not 2 <= length <= size:
            raise DataError(f"sentence {number} has {length} words; choose sentences of 2 to {size} words")
    counts = Counter(word for sentence in sentences for word in sentence)
    if vocabulary is None:
        vocabulary = _frequent(counts, min_count)
    code = _codes(vocabulary, counts)
    word = np.zeros((len(sentences), size), dtype=np.int64)
    for row, sentence in enumerate(sentences):
        word[row, : len(sentence)] = [code.get(item, code.get(UNKNOWN, 0)) for item in sentence]
    variables: dict[str, Any] = {"word": (("sentence", "position"), word), "length": ("sentence", lengths)}
    if brackets is not None:
        variables["gold"] = (("sentence", "start", "end"), _grid(brackets, lengths, size))
    labels = {
        "sentence": np.arange(len(sentences)),
        "position": np.arange(size),
        "vocabulary": np.asarray(vocabulary, dtype=str),
    }
    return xr.Dataset(variables, labels, attrs)


def _frequent(counts: Counter[str], min_count: int) -> list[str]:
    """Words that are counted often enough, and one for all others where there are any."""
    frequent = sorted(word for word, count in counts.items() if count >= min_count)
    return frequent if len(frequent) == len(counts) else [UNKNOWN, *frequent]


def _codes(vocabulary: Sequence[str], counts: Counter[str]) -> dict[str, int]:
    """Code of each word of a vocabulary, which has to cover the words that are counted."""
    code = {word: place for place, word in enumerate(vocabulary)}
    if len(code) != len(vocabulary):
        raise DataError(f"vocabulary names {len(vocabulary) - len(code)} words twice; name each once")
    lost = sorted(word for word in counts if word not in code)
    if lost and UNKNOWN not in code:
        raise DataError(f"vocabulary lacks {len(lost)} words, such as {lost[0]!r}; add them or {UNKNOWN!r}")
    return code


def _grid(brackets: Sequence[Sequence[tuple[int, int]]], lengths: NDArray[Any], size: int) -> NDArray[np.bool_]:
    check_size(sentences=len(lengths), max_length=size, ends=size + 1)
    grid = np.zeros((len(lengths), size, size + 1), dtype=bool)
    if len(brackets) != len(lengths):
        raise DataError(f"there are brackets of {len(brackets)} sentences, but {len(lengths)} sentences")
    for row, spans in enumerate(brackets):
        for start, end in spans:
            if not 0 <= start < end - 1 < lengths[row]:
                raise DataError(
                    f"bracket ({start}, {end}) of sentence {row} does not fit its {lengths[row]} words; give two words "
                    "or more, by the first position and that after the last"
                )
            grid[row, start, end] = True
    return grid


def check_sentences(data: xr.Dataset) -> None:
    """Check that data are sentences as the module describes them.

    Raises
    ------
    DataError
        If a variable is missing, of other dims, or out of range.
    """
    if not isinstance(data, xr.Dataset):
        raise DataError(f"data are a {type(data).__name__}; give a Dataset, as make_sentences does")
    wanted = {"word": ("sentence", "position"), "length": ("sentence",)}
    for name, dims in wanted.items():
        if name not in data or data[name].dims != dims:
            found = data[name].dims if name in data else "absent"
            raise DataError(f"variable {name!r} is {found}; give dims {dims}, as make_sentences does")
        if data[name].dtype.kind not in "iu":
            raise DataError(f"variable {name!r} holds {data[name].dtype}; give integers")
    if "vocabulary" not in data.coords:
        raise DataError("coordinate 'vocabulary' is absent; give the words by code, as make_sentences does")
    length, word = data["length"].values, data["word"].values
    if not len(length) or length.min() < 2 or length.max() > word.shape[1]:
        span = f"from {length.min()} to {length.max()}" if len(length) else "of no sentence"
        raise DataError(f"lengths are {span}; choose sentences of 2 to {word.shape[1]} words, the number of positions")
    if word.min() < 0 or word.max() >= data.sizes["vocabulary"]:
        raise DataError(
            f"codes of words run from {word.min()} to {word.max()}; choose 0 to {data.sizes['vocabulary'] - 1}, the "
            "places in the vocabulary"
        )
    shape = (len(word), word.shape[1], word.shape[1] + 1)
    if "gold" in data and data["gold"].shape != shape:
        raise DataError(f"variable 'gold' has shape {data['gold'].shape}; give {shape}, by sentence, start and end")


@checked(DataError)
def load_conllu(
    path: AnyPath,
    *,
    max_length: _Length = 10,
    min_count: Count = 2,
    vocabulary: _Vocabulary | None = None,
    punctuation: bool = False,
    unique: bool = False,
    limit: Count | None = None,
) -> xr.Dataset:
    """Sentences of a treebank in the format CoNLL-U, such as those of Universal Dependencies.

    Words are lowered. ``gold`` has the subtrees of the dependency tree that are contiguous: a word with all that
    depends on it. This leaves flat what lies within them, so that no binary tree has precision 1.

    Parameters
    ----------
    path
        The file.
    max_length
        Number of positions; sentences that are longer, and those of one word, are left out.
    min_count, vocabulary
        As in `make_sentences`.
    punctuation
        Whether words whose part of speech is ``PUNCT`` are kept.
    unique
        Whether only the first of equal sentences is kept.
    limit
        Largest number of sentences that are kept; None for all.

    Returns
    -------
    xr.Dataset
        As the module says.

    Raises
    ------
    DataError
        If the file cannot be read, a line is damaged, no sentence is left, or an option is out of range or not used.

    References
    ----------
    de Marneffe, M.-C., Manning, C. D., Nivre, J. and Zeman, D. (2021). Universal Dependencies. Computational
    Linguistics 47(2). https://doi.org/10.1162/coli_a_00402
    """
    if vocabulary is not None:
        refuse_unused(load_conllu, "vocabulary", min_count=min_count)
    file = existing_file(path)
    sentences: list[list[str]] = []
    brackets: list[list[tuple[int, int]]] = []
    seen: set[tuple[str, ...]] = set()
    for rows, where in _blocks(file):
        words, spans = _parse(rows, punctuation, where)
        if 2 <= len(words) <= max_length and not (unique and tuple(words) in seen):
            seen.add(tuple(words))
            sentences.append(words)
            brackets.append(spans)
        if limit is not None and len(sentences) >= limit:
            break
    if not sentences:
        raise DataError(f"{path} has no sentence of 2 to {max_length} words; give a larger max_length")
    return make_sentences(
        sentences,
        brackets,
        **({"min_count": min_count} if vocabulary is None else {"vocabulary": vocabulary}),
        max_length=max_length,
        name=file.stem,
        gold_from=_DEPENDENCIES,
    )


def _blocks(path: Path) -> Iterator[tuple[list[list[str]], str]]:
    """Columns of the lines of each sentence, and where they stand."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; give a file in the format CoNLL-U") from error
    rows: list[list[str]] = []
    begin = 1
    for number, line in enumerate([*lines, ""], 1):
        if not line.strip():
            yield rows, f"{path}, lines {begin} to {number}"
            rows, begin = [], number + 1
        elif not line.startswith("#"):
            cells = line.split("\t")
            if len(cells) != _COLUMNS:
                raise DataError(f"{path}, line {number} has {len(cells)} columns; CoNLL-U has {_COLUMNS}, tabbed")
            rows.append(cells)


def _parse(rows: Sequence[Sequence[str]], punctuation: bool, where: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Words of a sentence, and the contiguous subtrees of two words or more."""
    rows = [cells for cells in rows if cells[0].isdigit()]  # neither ranges nor empty nodes
    try:
        heads = {int(cells[0]): int(cells[_HEAD]) for cells in rows}
    except ValueError as error:
        raise DataError(f"{where}: {error}; columns 1 and 7, the word and its head, have to be numbers") from error
    kept = [int(cells[0]) for cells in rows if punctuation or cells[3] != "PUNCT"]
    place = {number: position for position, number in enumerate(kept)}
    subtrees = _subtrees(heads, place, where)
    spans = {(min(found), max(found) + 1) for found in subtrees if found and _contiguous(found)}
    words = [cells[1].lower() for cells in rows if int(cells[0]) in place]
    return words, sorted(span for span in spans if span[1] - span[0] > 1)


def _subtrees(heads: Mapping[int, int], place: Mapping[int, int], where: str) -> list[set[int]]:
    """Places of the words that depend on each word, directly or not, and its own."""
    below: dict[int, set[int]] = {number: set() for number in heads}
    for number, position in place.items():
        head, steps = number, 0
        while head:
            if head not in heads or steps > len(heads):
                raise DataError(f"{where}: the heads of word {number} lead to no root; repair column 7")
            below[head].add(position)
            head, steps = heads[head], steps + 1
    return list(below.values())


def _contiguous(places: set[int]) -> bool:
    return len(places) == max(places) - min(places) + 1


@checked(DataError)
def simulate_sentences(
    num_sentences: Annotated[int, Interval(ge=1, le=1_000_000)] = 1000,
    *,
    grammar: Annotated[str, OneOf(_RULES)] = "english",
    max_length: Annotated[int, Interval(ge=5, le=1000)] = 11,
    seed: Seed = 0,
) -> xr.Dataset:
    """Sentences of a small grammar of English, in which prepositional phrases may belong to nouns or to verbs.

    Parameters
    ----------
    num_sentences
        Number of sentences.
    grammar
        ``"english"``, which is context-free, or ``"parents"``: there the rule of a phrase depends on the phrase above
        it, so that objects are ordered otherwise than subjects.
    max_length
        Number of positions; longer sentences are drawn again.
    seed
        Seed of all draws.

    Returns
    -------
    xr.Dataset
        As the module says; and the grammar, ``true_root`` (nonterminal,), ``true_rule`` (context, nonterminal, left,
        right) and ``true_emission`` (preterminal, vocabulary), contexts being parents, the last one that of the root,
        or a single one.

    Raises
    ------
    DataError
        If the grammar is unknown or a number is out of range.
    """
    check_size(num_sentences=num_sentences, max_length=max_length, ends=max_length + 1)
    rng = np.random.default_rng(seed)
    rules = _RULES[grammar]
    sentences: list[list[str]] = []
    brackets: list[list[tuple[int, int]]] = []
    while len(sentences) < num_sentences:
        words, spans = _derive(rules, rng, max_length)
        if len(words) <= max_length:
            sentences.append(words)
            brackets.append(spans)
    vocabulary = [word for words in _WORDS.values() for word in words]
    data = make_sentences(
        sentences,
        brackets,
        vocabulary=vocabulary,
        max_length=max_length,
        name=grammar,
        gold_from="constituents of the trees that the sentences were drawn with",
        seed=seed,
    )
    return data.assign(_true_tables(rules, vocabulary))


def _derive(rules: _Rules, rng: np.random.Generator, limit: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Words of a sentence, and its constituents; cut off once it is too long."""
    words: list[str] = []
    spans: list[tuple[int, int]] = []

    def expand(symbol: str, parent: str) -> None:
        if symbol in _WORDS:
            words.append(str(rng.choice(list(_WORDS[symbol]), p=list(_WORDS[symbol].values()))))
            return
        start = len(words)
        choices = rules[symbol].get(parent) or next(iter(rules[symbol].values()))
        pairs = list(choices)
        for child in pairs[rng.choice(len(pairs), p=list(choices.values()))]:
            if len(words) <= limit:
                expand(child, symbol)
        spans.append((start, len(words)))

    expand("S", "")
    return words, spans


def _true_tables(rules: _Rules, vocabulary: Sequence[str]) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    """The grammar as arrays."""
    labels = list(rules)
    symbols = [*labels, *_WORDS]
    parents = [""] if all("" in given for given in rules.values()) else [*labels, ""]
    rule = np.zeros((len(parents), len(labels), len(symbols), len(symbols)))
    for p, parent in enumerate(parents):
        for a, label in enumerate(labels):
            choices = rules[label].get(parent) or next(iter(rules[label].values()))
            for (left, right), chance in choices.items():
                rule[p, a, symbols.index(left), symbols.index(right)] = chance
    root = np.eye(len(labels))[0]
    emission = np.array([[words.get(word, 0.0) for word in vocabulary] for words in _WORDS.values()])
    return {
        "true_root": (("nonterminal",), root),
        "true_rule": (("context", "nonterminal", "left", "right"), rule),
        "true_emission": (("preterminal", "vocabulary"), emission),
    }
