"""Teach a text encoder what captions say: `python -m train.train_text --config configs/text/scenes.yaml`, minutes.

A text encoder that learns from the loss of image tokens alone soon knows the words of a caption but not who has which
colour or who is left of whom: that is a fraction of a nat in hundreds. Read off the captions themselves it takes
minutes. Linear heads, dropped afterwards, ask the state of every byte for the facts of the object its phrase names and
of the other one. Captions come without pictures.

Shapes: B captions, T bytes of the longest (one token each), E width of the states, F facts of a byte.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from evaluation.scenes import (
    COLOURS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    read_caption,
    scene_at,
    scene_metadata,
    tag_shares,
)
from train.config import RunConfig, base_parser, exit_code, save_config
from train.loop import run
from train.optimizers import Branch, OptimizerConfig
from train.session import Batch, Clock, Metrics, Objective, Task
from train.text import TextConfig, build_text_encoder, text_reader

IGNORED = -100
LONGEST = 64  # bytes of a caption and its end token; scenes captions have at most 53
PLACES = (None, *RELATIONS)
COUNTS = (1, 2, 3, 4)
FACTS = {  # of a byte: the object of its phrase, and the other object of the caption if there is one
    "shape": len(SHAPES),
    "colour": 1 + len(COLOURS),  # 0: not said
    "place": len(PLACES),  # where it is, seen from the other one; 0: not said
    "count": len(COUNTS),
    "other_shape": 1 + len(SHAPES),  # 0: there is none
    "other_colour": 1 + len(COLOURS),
}


@dataclass(kw_only=True)
class CaptionConfig:
    """Which captions to read.

    Args:
        num_captions: captions in an epoch.
        val_captions: captions of the validation.
        scene_tags: how often each tag is read (others: 1); alike when null.
        split: train, or all: captions that name held-out pairs as well. No picture shows one either way.
        keep: weight of the squared distance to the states the encoder began with (of unit mean square, both): a
            transformer trained on those goes on from there; 0 lets them go.
    """

    num_captions: int = 1_000_000
    val_captions: int = 2000
    scene_tags: dict[str, float] | None = None
    split: Literal["train", "all"] = "train"
    keep: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_captions", "val_captions"):
            if getattr(self, name) < 1:
                raise ValueError(f"captions.{name} must be 1 or more, got {getattr(self, name)}")
        if self.keep < 0:
            raise ValueError(f"captions.keep must be 0 or more, got {self.keep}")


def caption_facts(metadata: dict) -> torch.Tensor:
    """The facts every byte of a caption is asked for: (LONGEST, F) int64, `IGNORED` behind the caption's end token.

    Bytes between two phrases ("and", "left of") and the end token count with the second one.
    """
    shapes, colours, count, relation = read_caption(metadata)
    places = (relation, OPPOSITE[relation]) if relation else (None, None)
    objects = [
        (
            SHAPES.index(shape),
            1 + list(COLOURS).index(colours[i]) if colours else 0,
            PLACES.index(places[i]),
            COUNTS.index(count),
        )
        for i, shape in enumerate(shapes)
    ]
    rows = [(*own, *_other(objects, i)) for i, own in enumerate(objects)]
    first = scene_metadata(metadata["tag"], shapes[:1], colours[:1], count=count)["prompt"]
    facts_TF = torch.full((LONGEST, len(FACTS)), IGNORED)
    facts_TF[: len(metadata["prompt"].encode()) + 1] = torch.tensor(rows[-1])
    facts_TF[: len(first.encode())] = torch.tensor(rows[0])
    return facts_TF


def _other(objects: list[tuple[int, ...]], index: int) -> tuple[int, int]:
    if len(objects) == 1:
        return 0, 0
    shape, colour, *_ = objects[1 - index]
    return 1 + shape, colour


class Captions(Dataset):
    """Captions of drawn scenes with their facts: {"caption": str, "facts": (LONGEST, F) int64}."""

    def __init__(self, n: int, *, seed: int, tags: dict[str, float] | None = None, split: str = "train"):
        self.n, self.seed, self.shares, self.split = n, seed, tag_shares(tags), split

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        metadata = scene_at(index, self.seed, self.split, self.shares).metadata
        return {"caption": metadata["prompt"], "facts": caption_facts(metadata)}


def caption_mean(value_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The mean over each caption's bytes, then over captions: so that no split of a batch changes it."""
    return (torch.where(mask_BT, value_BT, 0.0).sum(dim=1) / mask_BT.sum(dim=1)).mean()


class TextObjective(Objective):
    """Mean cross-entropy of all facts at all bytes, and the distance to the states of the encoder at the start.

    The heads read the states as a transformer does, after a norm without weights (`var.conditioning.TextConditioner`).
    """

    shardable = False  # the export takes the encoder whole

    def __init__(self, encoder: nn.Module, config: CaptionConfig, optimizer: OptimizerConfig):
        super().__init__()
        self.encoder, self.config, self.optimizer = encoder, config, optimizer
        self.start = copy.deepcopy(encoder).requires_grad_(False) if config.keep > 0 else None
        self.heads = nn.Linear(encoder.config.hidden_size, sum(FACTS.values()))

    def branches(self) -> dict[str, Branch]:
        """One branch: the encoder and the heads."""
        return {"main": Branch(self.optimizer, self.named_parameters())}

    def states(self, encoder: nn.Module, batch: Batch) -> torch.Tensor:
        """States (B, T, E) of unit mean square."""
        states = encoder(input_ids=batch["input_ids"], attention_mask=batch["mask"]).last_hidden_state
        return F.rms_norm(states.float(), states.shape[-1:])

    def forward(self, batch: Batch, clock: Clock) -> tuple[torch.Tensor, Metrics]:
        """Loss, and of every fact the share of bytes that know it."""
        states_BTE = self.states(self.encoder, batch)
        logits = self.heads(states_BTE).float().split(list(FACTS.values()), dim=-1)
        wanted_BTF, mask_BT = batch["facts"], batch["mask"]
        losses, metrics = [], {}
        for name, logits_BTn, wanted_BT in zip(FACTS, logits, wanted_BTF.unbind(dim=-1), strict=True):
            loss_BT = F.cross_entropy(logits_BTn.mT, wanted_BT, reduction="none", ignore_index=IGNORED)
            losses.append(caption_mean(loss_BT, mask_BT))
            metrics[f"knows_{name}"] = caption_mean((logits_BTn.argmax(dim=-1) == wanted_BT).float(), mask_BT)
        loss = torch.stack(losses).sum()
        if self.start is not None:
            with torch.no_grad():
                before_BTE = self.states(self.start, batch)
            metrics["moved"] = caption_mean((states_BTE - before_BTE).square().mean(dim=-1), mask_BT)
            loss = loss + self.config.keep * metrics["moved"]
        return loss, {name: value.detach() for name, value in metrics.items()}


def parser():
    """The command line: run, text, captions, optimizer."""
    made = base_parser("Teach a byte-level text encoder what scene captions say.")
    made.add_class_arguments(RunConfig, "run")
    made.add_class_arguments(TextConfig, "text")
    made.add_class_arguments(CaptionConfig, "captions")
    made.add_class_arguments(OptimizerConfig, "optimizer")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and train; `RUN_DIR/latest` then goes into `text.pretrained`.

    Raises:
        ValueError: on settings that do not fit together, or a text encoder whose tokens are not bytes.
    """
    made = parser()
    config = made.parse_args(argv)
    built = made.instantiate(config)
    run_config: RunConfig = built.run
    run_config.check_named()
    torch.manual_seed(run_config.seed)
    if not built.text.train:
        raise ValueError("text.train must be true here: the text encoder is what is trained")
    if built.captions.keep > 0 and built.text.pretrained is None:
        raise ValueError(f"captions.keep {built.captions.keep} keeps to an encoder: give text.pretrained")
    encoder, tokenizer = build_text_encoder(built.text)
    if len(tokenizer("a ring").input_ids) != len("a ring") + 1:
        raise ValueError(f"text.pretrained {built.text.pretrained!r} must read a token a byte, as ByT5 does")
    objective = TextObjective(encoder, built.captions, built.optimizer)
    read = text_reader(encoder, tokenizer, LONGEST, frozen=False)

    def prepare(batch: Batch) -> Batch:
        text = read(list(batch["caption"]), batch["facts"].device)
        return {**text, "facts": batch["facts"][:, : text["mask"].shape[1]]}

    def export(folder: Path, trained: TextObjective, weights: dict | None) -> None:
        trained.encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")

    captions = built.captions
    which = {"tags": captions.scene_tags, "split": captions.split}
    task = Task(
        objective=objective,
        train_data=Captions(captions.num_captions, seed=run_config.seed, **which),
        val_data=Captions(captions.val_captions, seed=2**31 + run_config.seed, **which),
        prepare=prepare,
        export=export,
        record=partial(save_config, made, config, run_config.run_dir),
    )
    run(task, run_config)


if __name__ == "__main__":
    sys.exit(exit_code(main))
