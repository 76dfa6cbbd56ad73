"""A class model to be fine-tuned on other classes: the vectors that it begins with.

Shapes: C classes and the null class, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sample.classes import normal
from var.transformer import NextScaleTransformer


def relabelled(
    model: NextScaleTransformer, count: int, classes: Sequence[str] | None, known: Sequence[str] | None
) -> NextScaleTransformer:
    """A class model for `count` other classes: those of a known name keep their vector, others begin as the null class.

    Args:
        classes: names of the new classes; known: of the model's own, in any spelling. Without either, all are new.
    """
    made, own_CD = model.resized(num_classes=count), model.conditioner.embedding.weight.detach()
    places = {normal(name): i for i, name in enumerate(known or ())}
    taken = [places.get(normal(name), len(own_CD) - 1) for name in classes or ()]
    taken += [len(own_CD) - 1] * (count + 1 - len(taken))  # labels without a name, and the null class itself
    made.conditioner.embedding.weight.data.copy_(own_CD[taken])  # those of the classes and, last, of the null class
    kept = [name for name in classes or () if normal(name) in places]
    print(
        f"new_classes: {count - len(kept)} of {count} begin as the null class, kept {names_of(kept)}", file=sys.stderr
    )
    return made


def names_of(classes: Sequence[str]) -> str:
    """A few of them."""
    return ", ".join(classes[:8]) + (" and others" if len(classes) > 8 else "") or "none by its name"
