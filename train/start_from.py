"""The transformer that a training begins with: a new one for the tokenizer's tokens, or `start_from`'s, checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from sample.load import load_tokenizer
from tokenizer.aspects import schedule_of
from tokenizer.model import MultiScaleVQ
from train.masked import with_masked, without_masked
from train.new_classes import relabelled
from train.sequential import with_head, without_head
from train.token_cache import DECODING, unusual
from var.transformer import NextScaleTransformer


def build_transformer(
    config, vqvae: MultiScaleVQ, num_classes: int, text_width: int, classes: Sequence[str] | None = None
) -> NextScaleTransformer:
    """A new transformer for the tokenizer's tokens, or the one of `start_from`; a rotary one takes any schedule.

    Args:
        config: of `train.train_var`.
        classes: names of the data's classes, if it has any.

    Raises:
        ValueError: if the transformer to start from is for other tokens or prompts.
    """
    conditioning = config.transformer.conditioning
    tokens = {
        "vocab_size": vqvae.config.vocab_size,
        "latent_channels": vqvae.quantizer.channels,
        "schedule": vqvae.schedule.spec,
        "bitwise": vqvae.config.bitwise,
        "conditioning": conditioning,
        **({"text_width": text_width} if conditioning == "text" else {}),
    }
    if config.start_from is None:
        sizes = {**vars(config.transformer), "num_classes": num_classes, "text_width": text_width, **tokens}
        if config.aspects.folder is not None and sizes["rope_grid"] is None:  # positions mean the same at all shapes
            sizes["rope_grid"] = list(schedule_of(*vqvae.schedule.latent_hw).grid_hw)
        model = NextScaleTransformer(**sizes)
        model.init_weights(gate_gain=config.gate_gain, ada_gain=config.ada_gain)
        return model
    own = NextScaleTransformer.load_config(config.start_from)
    rotary = own["positions"] == "rope"
    changed = {"schedule": tokens["schedule"]} if rotary else {}  # rotary positions go on at any size
    given = given_sizes(config.transformer)
    changed |= {name: given.pop(name) for name in ("drop_path", "mask") if name in given}  # of the same weights
    mask, own_mask = changed.get("mask"), own.get("mask", "block_causal")
    if mask not in (None, own_mask):
        if config.masked.layers or config.sequential.layers:
            raise ValueError(f"start_from {config.start_from!r} has mask {own_mask}: train it under {mask} first")
        print(f"start_from {config.start_from!r}: mask {own_mask} becomes {mask}", file=sys.stderr)
    model = with_part(NextScaleTransformer.from_pretrained(config.start_from, **changed), config, vqvae)
    for name, wanted in given.items():
        if listed(getattr(model.config, name)) != listed(wanted):
            raise ValueError(
                f"transformer.{name} {wanted} is not that of start_from {config.start_from!r}, which has "
                f"{getattr(model.config, name)}: leave it out"
            )
    for name, wanted in tokens.items():
        if getattr(model.config, name) != wanted:
            raise ValueError(f"start_from {config.start_from!r} has {name} {getattr(model.config, name)}, not {wanted}")
    if config.new_classes:
        if config.masked.layers or config.sequential.layers:
            raise ValueError("new_classes=true trains all of a model: leave out masked.layers and sequential.layers")
        return relabelled(model, num_classes, classes, class_names_beside(config.start_from))
    if conditioning == "class" and model.config.num_classes < num_classes:
        raise ValueError(
            f"start_from {config.start_from!r} knows {model.config.num_classes} of {num_classes} classes: "
            "new_classes=true gives it those of the data"
        )
    return model


def with_part(model: NextScaleTransformer, config, vqvae: MultiScaleVQ) -> NextScaleTransformer:
    """The transformer with the part that is to be trained, and without others: they know the weights below them."""
    if model.sequential is not None and not config.sequential.layers:
        print(f"start_from {config.start_from!r}: its sequential head is left out, train another", file=sys.stderr)
        model = without_head(model)
    if model.masked is not None and not config.masked.layers:
        print(f"start_from {config.start_from!r}: its masked prediction is left out, train another", file=sys.stderr)
        model = without_masked(model)
    if config.sequential.layers:
        model = with_head(model, config.sequential, vqvae.quantizer)
    return with_masked(model, config.masked.layers) if config.masked.layers else model


def class_names_beside(start_from: str) -> list[str] | None:
    """Names of the classes of a transformer's pipeline, if they are known."""
    index = Path(start_from).parent / "model_index.json"
    return json.loads(index.read_text(encoding="utf-8")).get("class_names") if index.is_file() else None


def check_origin(start_from: str, vqvae: MultiScaleVQ, classes: Sequence[str] | None) -> None:
    """Whether what lies beside a transformer to start from, its tokenizer and its classes' names, is what it gets now.

    Args:
        classes: names of the data's classes; None where they may differ.

    Raises:
        ValueError: if not; only what is there is looked at, and tokens of another schedule are another matter.
    """
    folder = Path(start_from).parent
    own = folder / "vqvae"
    if (own / "config.json").is_file() and not same_tokenizer(load_tokenizer(str(own)), vqvae):
        raise ValueError(
            f"start_from {start_from!r} was trained on the tokens of {own}, and tokens.tokenizer makes others"
        )
    names = class_names_beside(start_from)
    if classes is not None and names is not None and names != list(classes):
        raise ValueError(
            f"start_from {start_from!r} knows the classes {', '.join(names)[:200]}, and the data has "
            f"{', '.join(classes)[:200]}: labels would change their meaning (new_classes=true gives it the data's)"
        )


def same_tokenizer(a: MultiScaleVQ, b: MultiScaleVQ) -> bool:
    """Whether what makes tokens is the same in both, but for what an export rounds to bfloat16.

    What differs in shape belongs to a scale each, of another schedule.
    """
    one, two = (
        {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if not name.startswith(DECODING)}
        for model in (a, b)
    )
    alike = [name for name in one.keys() & two.keys() if one[name].shape == two[name].shape]
    same_settings = unusual(a) == unusual(b) and one.keys() == two.keys()
    return same_settings and all(torch.equal(one[name], two[name]) for name in alike)


def given_sizes(transformer: Namespace) -> dict[str, Any]:
    """The options of a transformer that are not their defaults."""
    defaults = signature(NextScaleTransformer.__init__).parameters
    return {name: value for name, value in vars(transformer).items() if listed(value) != listed(defaults[name].default)}


def listed(value: Any) -> Any:
    """Tuples as the lists that a file keeps of them."""
    return [listed(part) for part in value] if isinstance(value, (list, tuple)) else value
