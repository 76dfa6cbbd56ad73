"""Train a next-scale transformer: `accelerate launch -m train.train_var --config configs/var/scenes.yaml`.

Flags go over the file (`--run.seed=1 --transformer.depth=12`); the same command again resumes. Tokens come from a
cache (`train.cache_tokens`) or are made on the fly by the frozen tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from torch import nn
from torch.utils.data import Dataset

from tokenizer.aspects import STRIDE, aspect_schedule, schedule_of
from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule
from train.buckets import AspectConfig, AspectImages
from train.collaborate import CollaborationConfig, DrafterObjective, RefinerObjective
from train.config import RunConfig, base_parser, exit_code, save_config
from train.data import DataConfig, build_dataset
from train.images import CorruptLog
from train.loop import run
from train.objectives import VarLossConfig, VarObjective
from train.optimizers import OptimizerConfig
from train.order import image_draws
from train.progressive import ProgressiveConfig, ProgressiveObjective
from train.session import Batch, Task, brought
from train.state import settings_of
from train.supernet import SupernetConfig, SupernetObjective
from train.text import TextConfig, build_text_encoder, load_text_encoder, text_reader
from train.text_cache import TextCache, check_manifest, encoder_hash
from train.token_cache import DECODING, TokenCache, tokenizer_hash
from train.train_tokenizer import load_tokenizer, to_images
from var.transformer import NextScaleTransformer


@dataclass(kw_only=True)
class TokensConfig:
    """Where tokens come from.

    Args:
        tokenizer: folder of the frozen MultiScaleVQ (`RUN/latest/vqvae`).
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
    made.add_class_arguments(NextScaleTransformer, "transformer", skip=given, instantiate=False)
    made.add_argument("--start_from", type=str | None, default=None, help="folder of a transformer to fine-tune")
    made.add_argument("--gate_gain", type=float, default=1e-3, help="initial gain of the residual gates (VAR's alng)")
    made.add_argument("--ada_gain", type=float, default=0.5, help="initial gain of the other modulations (VAR's aln)")
    backends = "attention in training: grouped (a call for each large scale), sdpa (one mask), or flex (on CUDA only)"
    made.add_argument("--attention", type=Literal["grouped", "sdpa", "flex"], default="grouped", help=backends)
    made.add_class_arguments(TextConfig, "text")
    made.add_class_arguments(VarLossConfig, "loss")
    made.add_class_arguments(ProgressiveConfig, "progressive")
    made.add_class_arguments(SupernetConfig, "supernet")
    made.add_class_arguments(CollaborationConfig, "code")
    made.add_class_arguments(OptimizerConfig, "optimizer")
    return made


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a text model reads captions with; a class model has only a width, that nothing uses.

    Attributes:
        width: of the states.
        tokenizer: of the encoder that is here, which is either `trained` along or `frozen`.
        cache: states in the place of an encoder.
    """

    width: int
    tokenizer: object | None = None
    trained: nn.Module | None = None
    frozen: nn.Module | None = None
    cache: TextCache | None = None

    def depends(self) -> dict[str, str]:
        """What tells a frozen encoder from another; nothing of one that trains along."""
        if self.cache is not None:
            return {"text encoder": check_manifest(self.cache.folder, {})["encoder_hash"]}
        return {} if self.frozen is None else {"text encoder": encoder_hash(self.frozen, self.tokenizer)}

    def reader(self, max_length: int, data: Sequence[Dataset]) -> Callable[[list[str], torch.device], Batch] | None:
        """What makes the text entries of a batch; None for a class model.

        Raises:
            ValueError: if the encoder or the cache is not for texts of `max_length`, or the cache lacks captions.
        """
        if self.cache is None:
            frozen = self.frozen is not None
            encoder = self.frozen if frozen else self.trained
            return None if encoder is None else text_reader(encoder, self.tokenizer, max_length, frozen=frozen)
        check_manifest(self.cache.folder, {"text_length": max_length})
        for cached in (split for split in data if isinstance(split, TokenCache)):
            self.cache.require(sorted({caption for _, caption in cached.rows}))
        return self.cache


def open_texts(config: TextConfig) -> Texts:
    """The text encoder of a configuration, or the cache of its states.

    Raises:
        ValueError: if another encoder than `config.pretrained` made the cache.
    """
    if config.cache is None:
        encoder, tokenizer = build_text_encoder(config)
        role = "trained" if config.train else "frozen"
        return Texts(width=encoder.config.hidden_size, tokenizer=tokenizer, **{role: encoder})
    wanted = {}
    if config.pretrained is not None:
        wanted["encoder_hash"] = encoder_hash(*load_text_encoder(config.pretrained))
    cache = TextCache(config.cache, **wanted)
    return Texts(width=cache.width, cache=cache)


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


def build_transformer(config, vqvae: MultiScaleVQ, num_classes: int, text_width: int) -> NextScaleTransformer:
    """A new transformer for the tokenizer's tokens, or the one of `start_from`; a rotary one takes any schedule.

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
    rotary = NextScaleTransformer.load_config(config.start_from)["positions"] == "rope"
    changed = {"schedule": tokens["schedule"]} if rotary else {}  # rotary positions go on at any size
    given = given_sizes(config.transformer)
    if "drop_path" in given:
        changed["drop_path"] = given.pop("drop_path")
    model = NextScaleTransformer.from_pretrained(config.start_from, **changed)
    for name, wanted in given.items():
        if listed(getattr(model.config, name)) != listed(wanted):
            raise ValueError(
                f"transformer.{name} {wanted} is not that of start_from {config.start_from!r}, which has "
                f"{getattr(model.config, name)}: leave it out"
            )
    for name, wanted in tokens.items():
        if getattr(model.config, name) != wanted:
            raise ValueError(f"start_from {config.start_from!r} has {name} {getattr(model.config, name)}, not {wanted}")
    if conditioning == "class" and model.config.num_classes < num_classes:
        raise ValueError(f"start_from {config.start_from!r} knows {model.config.num_classes} of {num_classes} classes")
    return model


def check_origin(start_from: str, vqvae: MultiScaleVQ, classes: Sequence[str] | None) -> None:
    """Whether what lies beside a transformer to start from, its tokenizer and its classes' names, is what it gets now.

    Raises:
        ValueError: if not; only what is there is looked at, and tokens of another schedule are another matter.
    """
    folder = Path(start_from).parent
    own = folder / "vqvae"
    if (own / "config.json").is_file() and not same_tokenizer(load_tokenizer(str(own)), vqvae):
        raise ValueError(
            f"start_from {start_from!r} was trained on the tokens of {own}, and tokens.tokenizer makes others"
        )
    if classes is not None and (folder / "model_index.json").is_file():
        names = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("class_names")
        if names is not None and names != list(classes):
            raise ValueError(
                f"start_from {start_from!r} knows the classes {', '.join(names)[:200]}, and the data has "
                f"{', '.join(classes)[:200]}: labels would change their meaning"
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
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in alike)


def given_sizes(transformer: Namespace) -> dict[str, Any]:
    """The options of a transformer that are not their defaults."""
    defaults = signature(NextScaleTransformer.__init__).parameters
    return {name: value for name, value in vars(transformer).items() if listed(value) != listed(defaults[name].default)}


def listed(value: Any) -> Any:
    """Tuples as the lists that a file keeps of them."""
    return [listed(part) for part in value] if isinstance(value, (list, tuple)) else value


def build_objective(config, transformer: NextScaleTransformer, text_encoder: nn.Module | None) -> VarObjective:
    """The plain loss, or what `progressive`, `supernet.depths` or `code.role` ask for.

    Raises:
        ValueError: if two of them are asked for, or they do not fit the model.
    """
    common = (transformer, config.loss, config.optimizer, text_encoder)
    asked = {"progressive": config.progressive.is_on, "supernet.depths": config.supernet.depths}
    several = [name for name, value in {**asked, "code.role": config.code.role}.items() if value]
    if len(several) > 1:
        raise ValueError(f"{' and '.join(several)} are different trainings: leave one out")
    if several and several[0] != "supernet.depths" and config.aspects.folder is not None:
        raise ValueError(f"{several[0]} trains the scales of one shape: leave out aspects.folder")
    if config.progressive.is_on:
        return ProgressiveObjective(*common, progressive=config.progressive)
    if config.supernet.depths:
        return SupernetObjective(*common, supernet=config.supernet)
    if config.code.role == "drafter":
        return DrafterObjective(*common, code=config.code)
    if config.code.role == "refiner":
        teacher = NextScaleTransformer.from_pretrained(config.code.teacher)
        return RefinerObjective(*common, code=config.code, teacher=teacher)
    return VarObjective(*common)


def preparer(
    vqvae: MultiScaleVQ,
    read: Callable[[list[str], torch.device], Batch] | None,
    *,
    flips: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Callable[[Batch], Batch]:
    """What turns a batch of images or cached tokens into an objective's batch, with frozen models.

    `read` makes the text entries of captions (`train.text.text_reader` or a `TextCache`); None without text. With
    `flips` (bits) or `noise` (codes) a batch for training has the ids and inputs of self-correction.
    """

    def prepare(batch: Batch) -> Batch:
        device = batch["label"].device
        quantizer, schedule = brought(vqvae, device).quantizer, batch_schedule(batch, vqvae)
        made = {"counter": batch["counter"], "label": batch["label"]}
        if schedule is not vqvae.schedule:
            made["schedule"] = schedule
        if "ids" in batch:
            f_BCHW = batch.get("latents")
        else:
            with torch.autocast(device.type, enabled=False):  # tokens are those of the float32 encoder, as VAR's are
                f_BCHW = vqvae.encode(to_images(batch)["image"])
        if batch.get("training") and (flips or noise):
            draws = partial(draw_flips, largest=flips) if flips else partial(draw_noise, largest=noise)
            drawn = draws(batch["counter"], quantizer.channels, schedule, seed=seed, device=device)
            ids, made["inputs"] = quantizer.corrected(f_BCHW, schedule, drawn)
        else:
            cached = batch["ids"].split(schedule.lengths, dim=1) if "ids" in batch else None
            ids = quantizer.encode(f_BCHW, schedule) if cached is None else list(cached)
            made["inputs"] = quantizer.teacher_inputs(ids, schedule)
        made["ids"] = torch.cat(ids, dim=1)
        return made if read is None else made | read(list(batch["caption"]), device)

    return prepare


def batch_schedule(batch: Batch, vqvae: MultiScaleVQ) -> ScaleSchedule:
    """The tokenizer's own schedule, or that of a template (`tokenizer.aspects`) for images of another shape."""
    hw = tuple(batch["image"].shape[-2:]) if "image" in batch else vqvae.image_hw
    return vqvae.schedule if hw == vqvae.image_hw else schedule_of(hw[0] // vqvae.stride, hw[1] // vqvae.stride)


def draw_flips(
    counters: Sequence[int],
    bits: int,
    schedule: ScaleSchedule,
    *,
    largest: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Which bits of each image are flipped: K bool tensors (B, l, bits), keyed by (seed, image counter).

    Each scale of each image has a share of its own, a whole percentage drawn evenly from 0 to `largest`.
    """
    K = len(schedule)
    u_BN = image_draws(counters, K + schedule.total * bits, seed, 5, device=device)
    share_BK = (u_BN[:, :K] * (round(100 * largest) + 1)).floor() / 100
    places = u_BN[:, K:].unflatten(1, (schedule.total, bits)).split(schedule.lengths, dim=1)
    return [u_Bln < share_B[:, None, None] for u_Bln, share_B in zip(places, share_BK.unbind(dim=1))]


def draw_noise(
    counters: Sequence[int],
    channels: int,
    schedule: ScaleSchedule,
    *,
    largest: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Noise for `MultiScaleQuantizer.corrected`: K tensors (B, C, h, w), keyed by (seed, image counter).

    Each scale of each image has a standard deviation of its own, drawn evenly from 0 to `largest`.
    """
    K = len(schedule)
    u_BN = image_draws(counters, K + schedule.total * channels, seed, 5, device=device)
    sigma_BK = u_BN[:, :K] * largest
    parts = normal_of(u_BN[:, K:]).split([n * channels for n in schedule.lengths], dim=1)
    shaped = (n.unflatten(1, (channels, *hw)) for n, hw in zip(parts, schedule.sides))
    return [normal * sigma_B[:, None, None, None] for normal, sigma_B in zip(shaped, sigma_BK.unbind(dim=1))]


def normal_of(uniforms: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, all finite, of float32 in [0, 1) by inverse CDF."""
    largest = 1 - 2.0**-24  # below 1 in float32
    return torch.erfinv((uniforms * 2 - 1).clamp(-largest, largest)) * 2**0.5


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict under a prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def exporter(
    vqvae: MultiScaleVQ, texts: Texts, classes: Sequence[str] | None = None
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
    from sample.generate import generate
    from sample.plan import plain

    items = [val_data[i] for i in range(min(count, len(val_data)))]

    def preview(objective: VarObjective) -> dict[str, torch.Tensor]:
        device = objective.transformer.device
        batch = torch.utils.data.default_collate(items)
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        prompt = objective.prompt(prepare({**batch, "counter": range(len(items))}))
        plan = plain(objective.transformer, guidance=2.0, top_p=0.95)
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
    torch.manual_seed(run_config.seed)
    vqvae = open_tokenizer(built)
    if built.tokens.flips and not vqvae.config.bitwise:
        raise ValueError(f"tokens.flips is for bitwise tokens, and those of {built.tokens.tokenizer!r} are codes")
    if built.tokens.noise and vqvae.config.bitwise:
        raise ValueError(f"tokens.noise is for codes, and the tokens of {built.tokens.tokenizer!r} are bitwise")
    train_data, val_data = datasets(built, vqvae)
    classes = train_data.classes if built.transformer.conditioning == "class" else None
    if built.start_from is not None:
        check_origin(built.start_from, vqvae, classes)
    texts = open_texts(built.text) if built.transformer.conditioning == "text" else Texts(width=built.text.d_model)
    transformer = build_transformer(built, vqvae, train_data.num_classes, texts.width)
    objective = build_objective(built, transformer, texts.trained)
    objective.attention = built.attention
    read = texts.reader(transformer.config.text_length, (train_data, val_data))
    prepare = preparer(vqvae, read, flips=built.tokens.flips, noise=built.tokens.noise, seed=run_config.seed)
    for name in vars(config.transformer):  # what the file says is what is trained, with start_from, too
        config.transformer[name] = getattr(transformer.config, name)
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
            **settings_of("transformer", transformer, without=("drop_path", "selectivity")),
            "optimizer.name": built.optimizer.name,
        },
    )
    run(task, run_config)


if __name__ == "__main__":
    sys.exit(exit_code(main))
