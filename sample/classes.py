"""Names of classes, a model's own or ImageNet's: what a class model's numbers mean, and the number of a name."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass

CLASSES = 1000
LISTED = 8  # candidates that an error shows
NULL = ("null", "null class")

Names = tuple[tuple[str, ...], ...]  # of each class its names, the usual one first


@functools.cache
def class_names() -> Names:
    """The names of each of ImageNet-1k's 1000 classes, the usual one first (ILSVRC-2012's order, WordNet's names)."""
    return tuple(tuple(names.split(", ")) for _, names in _lines())


@functools.cache
def synsets() -> tuple[str, ...]:
    """WordNet's identifiers of the same classes ("n01440764"), which ImageNet's folders are called."""
    return tuple(synset for synset, _ in _lines())


def names_of(own: Sequence[str] | None, num_classes: int) -> Names | None:
    """What a model's classes are called: its own names, "cat" or "cat, felis" each; ImageNet's of 1000; else None."""
    if own is not None:
        return tuple(tuple(name.split(", ")) for name in own)
    return class_names() if num_classes == CLASSES else None


def worth_keeping(names: Sequence[str] | None) -> list[str] | None:
    """The names that a data set has for its classes, but for ImageNet's synsets: those classes have better ones."""
    return None if names is None or tuple(names) == synsets() else list(names)


def find_class(name: str, names: Names | None = None) -> int:
    """The class that a name means: "golden retriever" is 207, "null" is 1000; case, hyphens and articles do not matter.

    A usual name goes before another class's further name ("harp" is not the harmonica). What is no whole name is
    looked for among the words of all names.

    Args:
        name: what is looked for.
        names: of a model with classes of its own; ImageNet's when None.

    Raises:
        ValueError: if no class has that name, with those of similar spelling; or several have, with the candidates.
    """
    known, wanted = class_names() if names is None else names, normal(name)
    if names is None and wanted in NULL:
        return CLASSES
    index = _index(known)
    usual = [label for label, given in enumerate(index) if wanted in given[0].spellings]
    further = [label for label, given in enumerate(index) if any(wanted in one.spellings for one in given)]
    words = set(wanted.split())
    within = [label for label, given in enumerate(index) if words and any(words <= one.words for one in given)]
    for found in (usual, further, within):
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"class {name!r} could be one of {_listed(found, known)}: say which, by number or in full")
    if close := _close(wanted, known):
        hint = f"did you mean {_listed(close, known)}?"
    else:
        every = range(len(known))
        hint = "names are listed in sample/imagenet_classes.txt" if names is None else f"it has {_listed(every, known)}"
    raise ValueError(f"class {name!r} is no {'ImageNet class' if names is None else 'class of this model'}; {hint}")


def parse_classes(text: str, num_classes: int, own: Sequence[str] | None = None) -> list[int]:
    """The classes of "3", "0,3,7", "0-9", "all", "null" or, of a model whose classes have names, "cat, dog".

    Numbers are not checked against `num_classes`, the number of the null class. `own` are the model's own names, which
    go before ranges and words when they are given as they are; a model of 1000 classes without such has ImageNet's.

    Raises:
        ValueError: if `text` is none of these.
    """
    exact = {name: label for label, name in enumerate(own or ()) if not name.isdigit()}  # "all", "3-5" and "cat, dog"
    if text in exact:
        return [exact[text]]
    if text == "all":
        return list(range(num_classes))
    names = names_of(own, num_classes)
    classes: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if part in exact:
            classes.append(exact[part])
        elif numbers:
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if last < first:
                raise ValueError(f"--class must have ranges as FIRST-LAST, got {part!r}")
            classes += range(first, last + 1) if last <= num_classes else [last]  # which is refused, without the rest
        elif normal(part) in NULL:
            classes.append(num_classes)
        elif names is not None and re.search("[^\\W\\d]", part):
            classes.append(find_class(part, None if own is None else names))
        else:
            named = " or a name" if names is not None else ""
            raise ValueError(f"--class must be like 3 or 0,3,7 or 0-9 or all or null{named}; got {text!r}")
    return classes


def _lines() -> list[tuple[str, str]]:
    """Synset and names of each class, in order."""
    text = (importlib.resources.files("sample") / "imagenet_classes.txt").read_text(encoding="utf-8")
    return [tuple(line.split(" ", 2)[1:]) for line in text.splitlines() if not line.startswith("#")]


def normal(name: str) -> str:
    """A class's name without what spellings differ in: case, underscores and marks, a leading article."""
    words = re.sub(r"[^\w']+|_", " ", name.casefold()).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@dataclass(frozen=True)
class _Name:
    """A name as it may be asked for: with the word in brackets that tells it apart, and without."""

    spellings: tuple[str, str]
    words: frozenset[str]

    @classmethod
    def of(cls, name: str) -> _Name:
        whole = normal(name)
        return cls((whole, normal(name.partition(" (")[0])), frozenset(whole.split()))


@functools.cache
def _index(names: Names) -> list[list[_Name]]:
    return [[_Name.of(name) for name in given] for given in names]


def _close(wanted: str, names: Names) -> list[int]:
    spelled = {one.spellings[0]: label for label, given in reversed(list(enumerate(_index(names)))) for one in given}
    found = difflib.get_close_matches(wanted, spelled, n=4, cutoff=0.75)
    return list(dict.fromkeys(spelled[name] for name in found))


def _listed(labels: Sequence[int], names: Names) -> str:
    shown = [f"{label} {names[label][0]}" for label in labels[:LISTED]]
    more = len(labels) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
