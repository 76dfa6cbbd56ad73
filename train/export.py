"""A training run as a pipeline to hand out: `python -m train.export --model runs/scenes-var --out sample/bundled`.

Half the size of the run's own export: all weights in bfloat16 (or float16), and the model's sampling defaults beside
them. Loading brings them back to the dtype asked for.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sample.files import check_place
from sample.load import DTYPES, PARTS, load_pipeline, load_tokenizer, silent_loading
from train.config import base_parser, exit_code


@dataclass(kw_only=True)
class ExportConfig:
    """What to export, where to, and how it is drawn from by default.

    Args:
        model: a training run, or a pipeline folder.
        out: folder of the pipeline; other files in it stay.
        overwrite: replace the pipeline that is in `out`.
        vqvae: folder of another tokenizer with the same tokens (a decoder that was trained on).
        dtype: float32, bfloat16 or float16.
        guidance_scale: the model's own guidance from now on; 0 is none. One number, or one a scale. This setting, as
            those below, stays what it is where `model` has one and none is given here.
        top_k: its own; 0 is all. One number, or one a scale.
        top_p: its own, in (0, 1]. One number, or one a scale.
        temperature: its own. One number, or one a scale.
        guidance_ramp: its own, linear or constant.
        mask_schedule: its own passes over its scales, like 1/1,3/1,1,2,5, or off; the published ones where it has none.
    """

    model: str
    out: str
    overwrite: bool = False
    vqvae: str | None = None
    dtype: str = "bfloat16"
    guidance_scale: float | list[float] | None = None
    top_k: int | list[int] | None = None
    top_p: float | list[float] | None = None
    temperature: float | list[float] | None = None
    guidance_ramp: str | None = None
    mask_schedule: str | None = None


def export(config: ExportConfig) -> float:
    """Write the pipeline; returns its size in MB (10**6 bytes).

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: on an unknown dtype, a tokenizer that makes other tokens, an `out` where nothing can be written, or
            a pipeline in it that is not to be overwritten.
    """
    out = Path(config.out)
    if not config.out:
        raise ValueError("out must name a folder, got ''")
    check_place("out", out, folder=True)
    if (out / "model_index.json").exists() and not config.overwrite:
        raise ValueError(f"out {config.out!r} holds a pipeline: name another folder, or set --overwrite=true")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}")
    pipeline = load_pipeline(config.model, dtype=torch.float32, device="cpu")
    if config.vqvae is not None:
        pipeline.register_modules(vqvae=same_tokens(pipeline.vqvae, config.vqvae))
    names = ("guidance_scale", "top_k", "top_p", "temperature", "guidance_ramp", "mask_schedule")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    pipeline.make_plan(**given)  # raises, as sampling would
    pipeline.register_to_config(sampling={**(pipeline.config.sampling or {}), **given})
    for part in (pipeline.transformer, pipeline.refiner, pipeline.vqvae, pipeline.text_encoder):
        if part is not None:
            torch.nn.Module.to(part, DTYPES[config.dtype])  # loading casts back what needs float32
    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with silent_loading():
        pipeline.save_pretrained(partial)
    forget_origin(partial)
    replace_parts(partial, out)
    return sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1e6


def forget_origin(folder: Path) -> None:
    """Take the paths of this machine out of the configurations."""
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def same_tokens(own: torch.nn.Module, folder: str) -> torch.nn.Module:
    """The tokenizer in `folder`, if it makes the same tokens and transformer inputs as `own`.

    Raises:
        ValueError: if it does not.
    """
    from train.token_cache import tokenizer_hash

    other = load_tokenizer(folder)
    if tokenizer_hash(other) != tokenizer_hash(own):
        raise ValueError(f"vqvae {folder!r} makes other tokens than the model's own: only its decoder may differ")
    return other


def replace_parts(source: Path, out: Path) -> None:
    """Move the pipeline's files from `source` into `out`, each by a rename, model_index.json last.

    If one cannot be moved, those that were there are put back.
    """
    out.mkdir(parents=True, exist_ok=True)
    aside = source / "before"
    aside.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for name in PARTS:
            for begin, end in ((out / name, aside / name), (source / name, out / name)):
                if begin.exists():
                    begin.rename(end)
                    moved.append((begin, end))
        (source / "model_index.json").replace(out / "model_index.json")
    except BaseException:
        for begin, end in reversed(moved):
            end.rename(begin)
        raise
    shutil.rmtree(source)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and export."""
    parser = base_parser("Export a run as a pipeline.")
    parser.add_class_arguments(ExportConfig)
    config = parser.parse_args(argv)
    made = ExportConfig(**{name: value for name, value in vars(config).items() if name != "config"})
    print(f"{made.out}: {export(made):.2f} MB of weights")


if __name__ == "__main__":
    sys.exit(exit_code(main))
