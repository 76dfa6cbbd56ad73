"""`nextscale info`: what a model is, what it can be asked for, and what drawing with it takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sample.pipeline import NextScalePipeline
    from sample.plan import Stage

MIB = 2**20
SHOWN = 8  # class names in a line


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale info`."""
    parser.description = "What a model is, what it can be asked for, and what drawing with it takes."
    what = "scenes (bundled), a model folder, a training run, or a Hub id (OWNER/NAME@REVISION)"
    parser.add_argument("place", nargs="?", metavar="MODEL", help=what)
    parser.add_argument("--model", help="the same, as other commands take it")


def run(args: argparse.Namespace) -> int:
    """Print a line on each part of the model; 0.

    Raises:
        FileNotFoundError, ValueError: if there is no such model.
    """
    from sample.load import load_pipeline, model_folder

    if args.model and args.place:
        raise ValueError(f"give one model, and not both {args.place!r} and --model {args.model!r}")
    model = args.model or args.place or "scenes"
    folder = model_folder(model)
    facts = list(describe(load_pipeline(folder, dtype="float32", device="cpu")))
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(model if str(folder) == model else f"{model}: {shown}")
    for name, what in facts:
        print(f"  {name:12}  {what}")
    return 0


def describe(pipeline: NextScalePipeline) -> Iterator[tuple[str, str]]:
    """Names and facts, from the configurations and shapes alone."""
    model, vqvae = pipeline.transformer, pipeline.vqvae
    config, schedule = model.config, model.schedule
    h, w = (vqvae.stride * side for side in schedule.latent_hw)
    yield "draws", f"images of {w} x {h} pixels from {'classes' if pipeline.by_class else 'texts'}"
    yield "prompts", prompts(pipeline)
    yield "defaults", sampling(pipeline)
    tokens = f"of {vqvae.quantizer.channels} bits" if config.bitwise else f"of {config.vocab_size:,} codes"
    sides = schedule.text.replace(",", ", ")
    yield "scales", f"sides {sides}: {schedule.total:,} tokens {tokens}, a cell of {vqvae.stride} pixels"
    shape = f"{len(model.blocks)} layers of width {config.width}, {config.heads} heads, {config.positions} positions"
    yield "transformer", f"{millions(model)}; {shape}"
    if model.sequential is not None:
        yield "head", f"{millions(model.sequential)}; draws the first {config.sequential_scales} scales token by token"
    for stage in pipeline.make_plan().stages:
        if stage.model.masked is not None:
            own = f"{stage.model.config.masked_layers} layers and a head of their own; {passes(stage)}"
            yield "masked", f"{millions(stage.model.masked)}; {own}"
    if pipeline.refiner is not None:
        border = pipeline.config.handover
        takes = "takes over where a plan says" if border is None else f"takes over after {border} scales"
        yield "refiner", f"{millions(pipeline.refiner)}; {len(pipeline.refiner.blocks)} layers, {takes}"
    yield "tokenizer", f"{millions(vqvae)}; {vqvae.quantizer.channels} latent channels"
    if pipeline.text_encoder is not None:
        yield "text encoder", f"{millions(pipeline.text_encoder)}; {type(pipeline.text_encoder).__name__}"
    yield "shapes", "others by --aspect and --size" if config.positions == "rope" else "this one only"
    if config.trained_scales is not None:
        first, end = config.trained_scales
        yield (
            "trained",
            f"for the scales {first} to {end - 1} only: {'a refiner' if first else 'a drafter'}, for --plan code:N",
        )
    if config.subnets is not None:
        depths, bridge = ", ".join(map(str, config.subnets["depths"])), config.subnets["bridge"]
        yield "--depth", f"trained with {depths} layers from scale {bridge} on, too"
    if not model.reads_earlier:
        yield "--cache", "none: attention stays within each scale, so nothing is kept"
    elif config.selectivity is not None:
        yield "--cache", "ScaleKV (calibrated)"
    else:
        yield "--cache", "window, streaming, snapkv, pyramidkv; ScaleKV after calibrate"
    yield "memory", memory(pipeline)


def prompts(pipeline: NextScalePipeline) -> str:
    """What a model can be asked for."""
    from sample.classes import names_of

    config = pipeline.transformer.config
    if not pipeline.by_class:
        return f"texts of up to {config.text_length} tokens, by a {type(pipeline.tokenizer).__name__}"
    names = names_of(pipeline.config.class_names, config.num_classes)
    numbers = f"{config.num_classes:,} classes, 0 to {config.num_classes - 1}"
    if names is None:
        return f"{numbers}, without names"
    usual = ", ".join(given[0] for given in names[:SHOWN])
    return f"{numbers}: {usual}{', ...' if len(names) > SHOWN else ''}"


def sampling(pipeline: NextScalePipeline) -> str:
    """The model's own settings; others are those of a call."""
    own = {name: value for name, value in (pipeline.config.sampling or {}).items() if value is not None}
    return (
        ", ".join(f"{name} {value}" for name, value in own.items())
        or "none of its own (guidance 1.5, growing; all tokens)"
    )


def passes(stage: Stage) -> str:
    """Which scales masked prediction goes over again."""
    more = [
        f"{'x'.join(map(str, stage.pyramid.sides[k]))} in {len(stage.settled(k))}"
        for k in stage.scales
        if len(stage.settled(k)) > 1
    ]
    return f"scales of several passes: {', '.join(more)}" if more else "every scale in one pass"


def millions(module: torch.nn.Module) -> str:
    """The number of parameters."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:,.1f} M parameters"


def memory(pipeline: NextScalePipeline) -> str:
    """Predicted for one image in two precisions (`sample.memory`), with the text encoder's weights."""
    import torch

    from sample.memory import predict, weight_bytes

    plan, said = pipeline.make_plan(), []
    for dtype in (torch.float32, torch.bfloat16):
        text = 0 if pipeline.text_encoder is None else weight_bytes(pipeline.text_encoder, dtype)
        length = 0 if pipeline.by_class else pipeline.transformer.config.text_length
        peak = text + predict(plan, pipeline.vqvae, 1, dtype, text_tokens=length).peak
        said.append(f"{peak / MIB:,.0f} MiB in {str(dtype).removeprefix('torch.')}")
    return f"one image takes about {', '.join(said)}"
