"""Train a next-scale transformer: `accelerate launch -m train.train_var --config configs/var/scenes.yaml`.

Flags go over the file (`--run.seed=1 --transformer.depth=12`); the same command again resumes. Tokens come from a
cache (`train.cache_tokens`) or are made on the fly by the frozen tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from sample.load import load_tokenizer, part_folder
from tokenizer.aspects import STRIDE, aspect_schedule
from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule
from train.buckets import AspectConfig, AspectImages
from train.collaborate import CollaborationConfig, DrafterObjective, RefinerObjective
from train.config import RunConfig, base_parser, exit_code, save_config
from train.data import DataConfig, build_dataset
from train.images import CorruptLog
from train.loop import run
from train.masked import MaskedConfig, MaskedObjective
from train.optimizers import OptimizerConfig
from train.order import spread_index
from train.prepare import preparer
from train.progressive import ProgressiveConfig, ProgressiveObjective
from train.sequential import SequentialConfig, SequentialObjective
from train.session import Batch, Task
from train.start_from import build_transformer, check_origin
from train.state import settings_of
from train.supernet import SupernetConfig, SupernetObjective
from train.text import TextConfig
from train.text_source import TextSource, open_text_source
from train.token_cache import TokenCache, tokenizer_hash
from train.var_objective import VarLossConfig, VarObjective
from var.transformer import NextScaleTransformer


@dataclass(kw_only=True)
class TokensConfig:
    """Where tokens come from.

    Args:
        tokenizer: the frozen tokenizer: its folder, or that of a run or a pipeline it is in, or "scenes".
        cache: folder that `train.cache_tokens` wrote; images are encoded on the fly when null.
        schedule: scales to train on instead of the tokenizer's own (another resolution).
        flips: bitwise self-correction: at every scale of every image a share of bits up to this, drawn evenly, enters
            the inputs flipped (Infinity: 0.3); 0 flips none. Needs images, or a cache with latents.
        noise: the same for codes: at every scale of every image, the vectors are disturbed by noise of up to this times
            their root mean square, drawn evenly, before the codes of the inputs are searched; 0 is none.

    Raises:
        ValueError: if `flips` is not in [0, 1], or `noise` is below 0.
    """

    tokenizer: str
    cache: str | None = None
    schedule: str | None = None
    flips: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"tokens.noise must be 0 or more, got {self.noise}")
        if not 0 <= self.flips <= 1:
            raise ValueError(f"tokens.flips must be in [0, 1], got {self.flips}")

    @property
    def corrects(self) -> bool:
        """Whether the batches need the images' latents (self-correction)."""
        return self.flips > 0 or self.noise > 0


def parser():
    """The command line: run, data, tokens, transformer, text, loss, optimizer."""
    made = base_parser("Train a next-scale transformer.")
    made.add_class_arguments(RunConfig, "run")
    made.add_class_arguments(DataConfig, "data")
    made.add_class_arguments(AspectConfig, "aspects")
    made.add_class_arguments(TokensConfig, "tokens")
    given = {"vocab_size", "latent_channels", "schedule", "num_classes", "text_width", "bitwise", "selectivity"}
    given |= {"subnets", "trained_scales", "sequential_layers", "sequential_scales", "masked_layers"}
    made.add_class_arguments(NextScaleTransformer, "transformer", skip=given, instantiate=False)
    made.add_argument(
        "--start_from", type=str | None, default=None, help="transformer to fine-tune: its folder, or a run or pipeline"
    )
    classes = "give a class model to fine-tune the data's classes: those of the same name are kept, others begin anew"
    made.add_argument("--new_classes", type=bool, default=False, help=classes)
    made.add_argument("--gate_gain", type=float, default=1e-3, help="initial gain of the residual gates (VAR's alng)")
    made.add_argument("--ada_gain", type=float, default=0.5, help="initial gain of the other modulations (VAR's aln)")
    backends = "attention in training: grouped (a call for each large scale), sdpa (one mask), or flex (on CUDA only)"
    made.add_argument("--attention", type=Literal["grouped", "sdpa", "flex"], default="grouped", help=backends)
    made.add_class_arguments(TextConfig, "text")
    made.add_class_arguments(VarLossConfig, "loss")
    made.add_class_arguments(ProgressiveConfig, "progressive")
    made.add_class_arguments(SupernetConfig, "supernet")
    made.add_class_arguments(CollaborationConfig, "code")
    made.add_class_arguments(SequentialConfig, "sequential")
    made.add_class_arguments(MaskedConfig, "masked")
    made.add_class_arguments(OptimizerConfig, "optimizer")
    return made


def open_tokenizer(config) -> MultiScaleVQ:
    """The frozen tokenizer, with the scales this training is for: those given, or the square of `aspects.size`."""
    vqvae = load_tokenizer(config.tokens.tokenizer)
    given = config.tokens.schedule
    if given is None and config.aspects.folder is not None:
        given = aspect_schedule("1:1", config.aspects.size)
    if given is not None:
        vqvae.schedule = ScaleSchedule.of(given)
        vqvae.register_to_config(schedule=vqvae.schedule.spec)
    return vqvae


def check_training(config) -> None:
    """Raise ValueError if two trainings are asked for, or one that is not for images of several shapes."""
    asked = {"progressive": config.progressive.is_on, "supernet.depths": config.supernet.depths}
    asked |= {"code.role": config.code.role, "sequential.layers": config.sequential.layers}
    asked |= {"masked.layers": config.masked.layers}
    several = [name for name, value in asked.items() if value]
    if len(several) > 1:
        raise ValueError(f"{' and '.join(several)} are different trainings: leave one out")
    if several and several[0] != "supernet.depths" and config.aspects.folder is not None:
        raise ValueError(f"{several[0]} trains the scales of one shape: leave out aspects.folder")


def build_objective(config, transformer: NextScaleTransformer, text_encoder: nn.Module | None) -> VarObjective:
    """The plain loss, or what `progressive`, `supernet.depths`, `code.role`, `sequential` or `masked.layers` ask for.

    Raises:
        ValueError: if they do not fit the model.
    """
    common = (transformer, config.loss, config.optimizer, text_encoder)
    if config.progressive.is_on:
        return ProgressiveObjective(*common, progressive=config.progressive)
    if config.supernet.depths:
        return SupernetObjective(*common, supernet=config.supernet)
    if config.sequential.layers:
        return SequentialObjective(*common)
    if config.masked.layers:
        return MaskedObjective(*common)
    if config.code.role == "drafter":
        return DrafterObjective(*common, code=config.code)
    if config.code.role == "refiner":
        teacher = NextScaleTransformer.from_pretrained(part_folder("code.teacher", config.code.teacher, "transformer"))
        return RefinerObjective(*common, code=config.code, teacher=teacher)
    return VarObjective(*common)


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict under a prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def exporter(
    vqvae: MultiScaleVQ, texts: TextSource, classes: Sequence[str] | None = None
) -> Callable[[Path, VarObjective, dict | None], None]:
    """Writes the whole pipeline: `transformer/`, `vqvae/` and, for text, `text_encoder/` and `tokenizer/`.

    `classes` are the names of a class model's, as its data set has them.
    """

    from sample.classes import worth_keeping
    from sample.pipeline import NextScalePipeline

    def export(folder: Path, objective: VarObjective, weights: dict | None) -> None:
        transformer, encoder = objective.transformer, objective.text_encoder
        if weights is not None:
            transformer = NextScaleTransformer.from_config(transformer.config)
            transformer.load_state_dict(part(weights, "transformer."))
            if encoder is not None:
                encoder = type(encoder)(encoder.config)
                encoder.load_state_dict(part(weights, "text_encoder."), strict=False)  # tied tables are saved once
        text = {"tokenizer": texts.tokenizer, "text_encoder": encoder or texts.frozen}
        pipeline = NextScalePipeline(transformer, vqvae, **text, class_names=worth_keeping(classes))
        pipeline.save_pretrained(folder)
        if texts.cache is not None:
            texts.cache.complete(pipeline, folder)

    return export


def previewer(vqvae: MultiScaleVQ, prepare: Callable[[Batch], Batch], val_data: Dataset, count: int):
    """Samples for the first validation prompts, seeds 0, 1, ...: guidance 2 over the real prompts."""
    from sample.draw import Filter
    from sample.generate import generate
    from sample.plan_text import PlanConfig

    items = [val_data[spread_index(i, len(val_data))] for i in range(min(count, len(val_data)))]

    def preview(objective: VarObjective) -> dict[str, torch.Tensor]:
        device = objective.transformer.device
        batch = torch.utils.data.default_collate(items)
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        prompt = objective.prompt(prepare({**batch, "counter": range(len(items))}))
        plan = PlanConfig().build(objective.transformer, guidance=2.0, filters=Filter(top_p=0.95))
        state = generate(plan, vqvae.quantizer, prompt, list(range(len(items))))
        return {"samples": vqvae.to(device).decode(state.f_hat_BCHW)}

    return preview


def datasets(config, vqvae: MultiScaleVQ) -> tuple[Dataset, Dataset]:
    """Training and validation data: cached tokens, or images of the tokenizer's size.

    Raises:
        ValueError: if the images' size is not the tokenizer's, or a class model's images have no labels.
    """
    labelled = config.transformer.conditioning == "class"
    if config.tokens.cache is not None:
        options = {"labelled": labelled, "latents": config.tokens.corrects}
        return tuple(TokenCache(config.tokens.cache, split, vqvae, **options) for split in ("train", "val"))
    if config.aspects.folder is not None:
        if labelled or vqvae.stride != STRIDE:
            raise ValueError(f"aspects.folder is for text models on a tokenizer of stride {STRIDE}")
        corrupt = CorruptLog(Path(config.run.run_dir) / "unreadable_images.txt")
        common = {"batch_size": config.run.batch_size, "seed": config.run.seed, "corrupt": corrupt}
        return tuple(AspectImages(config.aspects, split, **common) for split in ("train", "val"))
    if tuple(config.data.hw) != vqvae.image_hw:
        raise ValueError(f"data.size {config.data.hw} must be the tokenizer's: {vqvae.image_hw}")
    unreadable = Path(config.run.run_dir) / "unreadable_images.txt"
    options = {"seed": config.run.seed, "corrupt_log": unreadable, "labelled": labelled}
    train, val = (build_dataset(config.data, split, **options) for split in ("train", "val"))
    if labelled and (val.num_classes or 0) > (train.num_classes or 0):
        raise ValueError(
            f"data: the validation images are of {val.num_classes} classes, those of training of {train.num_classes}"
        )
    return train, val


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and train.

    Raises:
        ValueError: on settings that do not fit together.
    """
    made = parser()
    config = made.parse_args(argv)
    built = made.instantiate(config)
    run_config: RunConfig = built.run
    run_config.check_named()
    check_training(built)
    torch.manual_seed(run_config.seed)
    vqvae = open_tokenizer(built)
    if built.tokens.flips and not vqvae.config.bitwise:
        raise ValueError(f"tokens.flips is for bitwise tokens, and those of {built.tokens.tokenizer!r} are codes")
    if built.tokens.noise and vqvae.config.bitwise:
        raise ValueError(f"tokens.noise is for codes, and the tokens of {built.tokens.tokenizer!r} are bitwise")
    train_data, val_data = datasets(built, vqvae)
    classes = train_data.classes if built.transformer.conditioning == "class" else None
    if built.new_classes and built.transformer.conditioning != "class":
        raise ValueError("new_classes=true is for class models, and transformer.conditioning is text")
    if built.new_classes and built.start_from is None:
        raise ValueError("new_classes=true is for a class model to fine-tune: give start_from")
    if built.start_from is not None:
        built.start_from = str(part_folder("start_from", built.start_from, "transformer"))
        check_origin(built.start_from, vqvae, None if built.new_classes else classes)
    texts = (
        open_text_source(built.text)
        if built.transformer.conditioning == "text"
        else TextSource(width=built.text.d_model)
    )
    transformer = build_transformer(built, vqvae, train_data.num_classes, texts.width, classes)
    if not (built.sequential.layers or built.masked.layers):  # which leave the transformer as it is
        known = built.code.trained_scales(len(transformer.schedule))
        transformer.register_to_config(subnets=built.supernet.subnets, trained_scales=known)
    objective = build_objective(built, transformer, texts.trained)
    objective.attention = built.attention
    read = texts.reader(transformer.config.text_length, (train_data, val_data))
    disturbed = {"flips": built.tokens.flips, "noise": built.tokens.noise, "codes": built.masked.layers > 0}
    prepare = preparer(vqvae, read, **disturbed, seed=run_config.seed)
    for name in vars(config.transformer):  # what the file says is what is trained, with start_from, too
        config.transformer[name] = getattr(transformer.config, name)
    for name in vars(config.data):  # and what a cache was made of
        config.data[name] = getattr(train_data, "manifest", {}).get(f"data.{name}", config.data[name])
    task = Task(
        objective=objective,
        train_data=train_data,
        val_data=val_data,
        prepare=prepare,
        export=exporter(vqvae, texts, classes),
        preview=previewer(vqvae, prepare, val_data, run_config.previews) if run_config.previews else None,
        record=partial(save_config, made, config, run_config.run_dir),
        depends={
            "tokenizer": tokenizer_hash(vqvae),
            **({"list of classes": list(classes)} if classes else {}),
            **texts.depends(),
            **settings_of(
                "transformer", transformer, without=("drop_path", "selectivity", "subnets", "trained_scales")
            ),
            "optimizer.name": built.optimizer.name,
        },
    )
    run(task, run_config)


if __name__ == "__main__":
    sys.exit(exit_code(main))
