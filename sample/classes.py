"""Names of ImageNet's classes: what a class model's numbers mean, and the number of a name."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass

CLASSES = 1000
LISTED = 8  # candidates that an error shows


@functools.cache
def class_names() -> tuple[tuple[str, ...], ...]:
    """The names of each of ImageNet-1k's 1000 classes, the usual one first (ILSVRC-2012's order, WordNet's names)."""
    text = (importlib.resources.files("sample") / "imagenet_classes.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(tuple(line.split(" ", 2)[2].split(", ")) for line in lines)


def class_name(label: int) -> str:
    """The usual name of a class in [0, 1000]; class 1000 is the null class, which stands for no class at all.

    Raises:
        ValueError: on another number.
    """
    if label == CLASSES:
        return "null class"
    if not 0 <= label < CLASSES:
        raise ValueError(f"ImageNet's classes are 0..{CLASSES - 1} and the null class {CLASSES}, got {label}")
    return class_names()[label][0]


def find_class(name: str) -> int:
    """The class that a name means: "golden retriever" is 207, "null" is 1000; case, hyphens and articles do not matter.

    A usual name goes before another class's further name ("harp" is not the harmonica). What is no whole name is
    looked for among the words of all names.

    Raises:
        ValueError: if no class has that name, with those of similar spelling; or several have, with the candidates.
    """
    wanted = _normal(name)
    if wanted in ("null", "null class"):
        return CLASSES
    usual = [label for label, names in enumerate(_index()) if wanted in names[0].spellings]
    further = [label for label, names in enumerate(_index()) if any(wanted in name.spellings for name in names)]
    words = set(wanted.split())
    within = [label for label, names in enumerate(_index()) if words and any(words <= name.words for name in names)]
    for found in (usual, further, within):
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"class {name!r} could be one of {_listed(found)}: say which, by number or in full")
    close = _close(wanted)
    hint = f"did you mean {_listed(close)}?" if close else "names are listed in sample/imagenet_classes.txt"
    raise ValueError(f"class {name!r} is no ImageNet class; {hint}")


def parse_classes(text: str, num_classes: int) -> list[int]:
    """The classes of "3", "0,3,7", "0-9", "all", "null" or, of a model of 1000 classes, "golden retriever, tabby".

    Numbers are not checked against `num_classes`, the number of the null class.

    Raises:
        ValueError: if `text` is none of these.
    """
    if text == "all":
        return list(range(num_classes))
    classes: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if last < first:
                raise ValueError(f"classes must be given as FIRST-LAST, got {part!r}")
            classes += range(first, last + 1)
        elif part == "null":
            classes.append(num_classes)
        elif num_classes == CLASSES and re.search("[^\\W\\d]", part):
            classes.append(find_class(part))
        else:
            names = " or a name" if num_classes == CLASSES else ""
            raise ValueError(f"--class must be like 3 or 0,3,7 or 0-9 or all or null{names}; got {text!r}")
    return classes


def _normal(name: str) -> str:
    words = re.sub(r"[^\w']+", " ", name.casefold()).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@dataclass(frozen=True)
class _Name:
    """A name as it may be asked for: with the word in brackets that tells it apart, and without."""

    spellings: tuple[str, str]
    words: frozenset[str]

    @classmethod
    def of(cls, name: str) -> _Name:
        whole = _normal(name)
        return cls((whole, _normal(name.partition(" (")[0])), frozenset(whole.split()))


@functools.cache
def _index() -> list[list[_Name]]:
    return [[_Name.of(name) for name in names] for names in class_names()]


def _close(wanted: str) -> list[int]:
    spelled = {n.spellings[0]: label for label, names in reversed(list(enumerate(_index()))) for n in names}
    found = difflib.get_close_matches(wanted, spelled, n=4, cutoff=0.75)
    return list(dict.fromkeys(spelled[name] for name in found))


def _listed(labels: Sequence[int]) -> str:
    shown = [f"{label} {class_names()[label][0]}" for label in labels[:LISTED]]
    more = len(labels) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
