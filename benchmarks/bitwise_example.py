"""Bits against codes, trained small: `python -m benchmarks.bitwise_example`.

Two tokenizers from the same convolutions, one of bits and one of codes, and on each two equal transformers, with and
without self-correction: all see the same images. They are judged by what they draw. The same command again goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.elastic_rows import once
from evaluation.command import Parser, add_out, check_least, in_one_line
from evaluation.report import command_of, result, write_result

if TYPE_CHECKING:
    from evaluation.judge import Detection

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TAGS = ("single_object", "colors")  # what is trained on, and judged
TOP_P = 0.95
PICTURES = 12  # of each model in the picture
REFERENCE = 4000  # renders behind FD-scenes


@dataclass(frozen=True)
class Model:
    """A row of the table. tokens: bits or index.  corrected: whether it is trained with self-correction."""

    tokens: str
    corrected: bool

    @property
    def name(self) -> str:
        """In a word or two."""
        return f"{self.tokens}{' + correction' if self.corrected else ''}"

    @property
    def flags(self) -> list[str]:
        """What self-correction adds to a training command."""
        if not self.corrected:
            return ["--tokens.flips=0"]
        return ["--tokens.flips=0.3"] if self.tokens == "bits" else ["--tokens.flips=0", "--tokens.noise=1.0"]


MODELS = [Model(tokens, corrected) for tokens in ("index", "bits") for corrected in (False, True)]


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.bitwise_example", description=__doc__.split("\n")[0])
    parser.add_argument("--start", default="sample/bundled/vqvae", help="tokenizer that both begin with (the bundled)")
    parser.add_argument("--tokenizer-images", type=int, default=1600, help="images of each tokenizer (1600)")
    parser.add_argument("--scenes", type=int, default=5000, help="scenes that the transformers train on (5000)")
    parser.add_argument("--images", type=int, default=24000, help="images of each transformer (24000)")
    parser.add_argument("--per-tag", type=int, default=150, help=f"judged images of {' and '.join(TAGS)} (150 each)")
    parser.add_argument("--tune", type=int, default=24, help="images of each tag to choose the temperature on (24)")
    parser.add_argument("--temperatures", default="1.0,0.7,0.5", help="to choose from, on other prompts (1.0,0.7,0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and images (0)")
    parser.add_argument("--batch-size", type=int, default=50, help="images drawn at once (50)")
    parser.add_argument("--train-flags", default="", help="more flags of the transformers' trainings, for trials")
    parser.add_argument("--work", type=Path, default=Path("runs/bitwise-example"), help="folder of all that is trained")
    add_out(parser, "results/bitwise_example.json", "result, table, picture")
    return parser


# --- training --------------------------------------------------------------------------------------------------------


def train_all(options: argparse.Namespace) -> None:
    """Both tokenizers, both caches, the four transformers; finished ones are left alone."""
    for tokens in ("index", "bits"):
        run = options.work / f"tokenizer-{tokens}"
        config = CONFIGS / f"tokenizer/bitwise-example-{tokens}.yaml"
        flags = [f"--start_from={options.start}", f"--run.total_images={options.tokenizer_images}"]
        step(run, "train.train_tokenizer", f"--config={config}", f"--run.run_dir={run}", *flags)
        cache, vqvae = options.work / f"cache-{tokens}", run / "latest/vqvae"
        paths = [f"--cache.folder={cache}", f"--cache.tokenizer={vqvae}", f"--data.num_scenes={options.scenes}"]
        step(cache, "train.cache_tokens", f"--config={CONFIGS / 'tokenizer/bitwise-example-cache.yaml'}", *paths)
    for model in MODELS:
        train_model(options, model, folder_of(options, model), options.images)


def train_model(options: argparse.Namespace, model: Model, run: Path, images: int) -> None:
    """Train a transformer in the folder `run`."""
    tokens = [f"--tokens.tokenizer={options.work / f'tokenizer-{model.tokens}/latest/vqvae'}"]
    tokens += [f"--tokens.cache={options.work / f'cache-{model.tokens}'}", *model.flags]
    flags = [f"--run.run_dir={run}", f"--run.total_images={images}", *options.train_flags.split()]
    step(run, "train.train_var", f"--config={CONFIGS / 'var/bitwise-example.yaml'}", *tokens, *flags)


def step(folder: Path, module: str, *words: str) -> None:
    """Run a training command that fills `folder`, unless it was run to its end before.

    Raises:
        ValueError: if the command fails (it has said why), or another one filled the folder.
        KeyboardInterrupt: if it was interrupted.
    """
    done, command = folder / "finished.json", [module, *words]
    if done.exists():
        if json.loads(done.read_text(encoding="utf-8")) != command:
            raise ValueError(f"{folder} was made by another command: remove it or give another --work")
        return
    print(f"{folder.name}: python -m {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if code in (130, 143, -2, -15):
        raise KeyboardInterrupt
    if code:
        raise ValueError(f"{folder.name} failed with exit code {code}: see above")
    done.write_text(json.dumps(command), encoding="utf-8")


def folder_of(options: argparse.Namespace, model: Model) -> Path:
    """The run of a model."""
    return options.work / f"model-{model.tokens}{'-corrected' if model.corrected else ''}"


def trained(run: Path) -> dict:
    """Images and seconds that a run was trained for, by its metrics: {"images", "train_s"}."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    before = [0, *(row["images"] for row in rows)]
    seconds = sum((row["images"] - start) / row["images_per_s"] for row, start in zip(rows, before))
    return {"images": rows[-1]["images"], "train_s": round(seconds, 1)}


# --- measuring -------------------------------------------------------------------------------------------------------


def prompts(per_tag: int, seed: int) -> list[dict]:
    """`per_tag` captions of each tag, as GenEval metadata, seen and unseen pairs."""
    from evaluation.scenes import prompt_suite

    return [metadata for metadata in prompt_suite(per_tag, seed) if metadata["tag"] in TAGS]


def renders(n: int, seed: int) -> Iterator[tuple[np.ndarray, dict]]:
    """`n` fresh scenes of one object with their metadata, all pairs."""
    from evaluation.scenes import render, sample_scene

    rng = np.random.default_rng((seed, 11))
    for i in range(n):
        scene = sample_scene(rng, tag=TAGS[i % len(TAGS)], split="all")
        yield render(scene), scene.metadata


def tokenizer_figures(options: argparse.Namespace, tokens: str) -> dict:
    """PSNR of reconstructions of fresh scenes, the share that the judge accepts, and what it took to train."""
    from evaluation.intervals import mean_interval, wilson
    from evaluation.judge import judge
    from evaluation.tokenizer_quality import pixel_quality, to_floats, to_levels
    from sample.load import load_tokenizer

    run = options.work / f"tokenizer-{tokens}"
    vqvae = load_tokenizer(run)
    originals, metadatas = zip(*renders(2 * options.per_tag, options.seed + 1))
    size, rebuilt = options.batch_size, []
    for begin in range(0, len(originals), size):
        floats = to_floats(np.stack(originals[begin : begin + size]))
        rebuilt.append(to_levels(vqvae.tokens_to_image(vqvae.image_to_tokens(floats))))
    psnr, _ = pixel_quality(np.stack(originals), np.concatenate(rebuilt))
    good = [judge(image, metadata).correct for image, metadata in zip(np.concatenate(rebuilt), metadatas)]
    about = {"tokenizer_parameters": sum(p.numel() for p in vqvae.parameters())}
    about |= {f"tokenizer_{name}": value for name, value in trained(run).items()}
    about |= {"psnr_db": float(psnr.mean()), "psnr_db_ci95": mean_interval(psnr)}
    return about | {"accepted": float(np.mean(good)), "accepted_ci95": wilson(sum(good), len(good))}


def model_figures(options: argparse.Namespace, model: Model) -> dict:
    """Size, training and scores of a model, at the temperature that was best on other prompts."""
    from sample.load import load_pipeline

    run = folder_of(options, model)
    pipeline = load_pipeline(run, device="cpu", dtype="float32")
    pipeline.set_progress_bar_config(disable=True)
    config, tried = pipeline.transformer.config, {}
    for temperature in map(float, options.temperatures.split(",")):
        tuning = prompts(options.tune, options.seed + 2)
        found = drawn(pipeline, tuning, temperature, seed=options.seed + 100_000, batch_size=options.batch_size)
        tried[temperature] = float(np.mean(found["correct"]))
    best = max(tried, key=tried.get)
    bits = config.latent_channels if config.bitwise else int(np.log2(config.vocab_size))
    row = {"bits_per_token": bits, "tokens_per_image": pipeline.transformer.schedule.total}
    row |= {"parameters": sum(p.numel() for p in pipeline.transformer.parameters())}
    row |= {"text_parameters": sum(p.numel() for p in pipeline.text_encoder.parameters()), **trained(run)}
    row |= {f"tuning_score_at_{temperature}": score for temperature, score in tried.items()} | {"temperature": best}
    metadatas = prompts(options.per_tag, options.seed)
    found = drawn(pipeline, metadatas, best, seed=options.seed, batch_size=options.batch_size)
    write_pictures(run / "pictures.npz", found["images"], metadatas)
    row |= distribution(found["images"], options) | judged(found["correct"], metadatas)
    return row | parts(found["found"], metadatas)


def drawn(pipeline, metadatas: Sequence[dict], temperature: float, *, seed: int, batch_size: int) -> dict:
    """One image a prompt, image i named seed + i: {"images": uint8 (h, w, 3) each, "correct": bools, "found": ...}.

    What is found is the detections of each image, the largest first.
    """
    from evaluation.judge import apply_rules, detect
    from sample.images import image_stream, make_requests

    requests = make_requests([m["prompt"] for m in metadatas], seed=seed, metadata=list(metadatas))
    call = {"guidance_scale": 2.0, "top_p": TOP_P, "temperature": temperature}
    images = [image for _, image in image_stream(pipeline, requests, batch_size=batch_size, **call)]
    found = [sorted(detect(image), key=area, reverse=True) for image in images]
    correct = [apply_rules(detections, m).correct for detections, m in zip(found, metadatas)]
    return {"images": images, "correct": correct, "found": found}


def area(detection: Detection) -> float:
    """Of the box."""
    left, top, right, bottom = detection.box
    return (right - left) * (bottom - top)


def parts(found: Sequence[list[Detection]], metadatas: Sequence[dict]) -> dict:
    """How often the largest object has the shape, and the colour, of its caption, with Wilson intervals."""
    from evaluation.intervals import wilson

    figures: dict = {}
    for name, attribute, key in (("shape_right", "shape", "class"), ("colour_right", "colour", "color")):
        named = [(ds, m["include"][0][key]) for ds, m in zip(found, metadatas) if key in m["include"][0]]
        right = sum(bool(ds) and getattr(ds[0], attribute) == wanted for ds, wanted in named)
        figures |= {name: right / len(named), f"{name}_ci95": wilson(right, len(named))}
    return figures


def distribution(images: Sequence[np.ndarray], options: argparse.Namespace) -> dict:
    """FD-scenes to `REFERENCE` fresh scenes of one object, and what as many renders have."""
    from evaluation.features import describe_all
    from evaluation.frechet import frechet_distance, frechet_interval, moments
    from evaluation.scene_features import load_scene_features

    real, fresh = (moments(rendered(n, options.seed + k)) for k, n in ((3, REFERENCE), (4, len(images))))
    features = describe_all(load_scene_features(), list(images)).features
    distance = frechet_distance(moments(features), real)
    interval = frechet_interval(features, real, distance, resamples=200, seed=options.seed)
    figures = {"fd_scenes": distance, "fd_scenes_ci95": interval}
    return figures | {"fd_scenes_of_as_many_renders": frechet_distance(fresh, real)}


@cache
def rendered(n: int, seed: int) -> torch.Tensor:
    """Scene features (n, D) of fresh renders."""
    from evaluation.features import describe_all
    from evaluation.scene_features import load_scene_features

    return describe_all(load_scene_features(), [image for image, _ in renders(n, seed)]).features


def judged(correct: Sequence[bool], metadatas: Sequence[dict]) -> dict:
    """Scores with intervals, and which images are right."""
    from evaluation.judge import score

    scores = score(correct, metadatas)
    scores = {name.replace("overall", "score"): value for name, value in scores.items()}
    return scores | {"correct": "".join("01"[good] for good in correct)}


def write_pictures(path: Path, images: Sequence[np.ndarray], metadatas: Sequence[dict]) -> None:
    """Keep the first pictures of captions with a colour."""
    chosen = [i for i, metadata in enumerate(metadatas) if metadata["tag"] == "colors"][:PICTURES]
    np.savez(path, images=np.stack([images[i] for i in chosen]), rows=chosen)


def compared(rows: Sequence[dict]) -> list[dict]:
    """The rows with paired differences of right images, of the same prompts: to no correction, and to codes."""
    from evaluation.compare import compare_means

    bits = {(row["tokens"], row["corrected"]): [int(bit) for bit in row["correct"]] for row in rows}
    finished = []
    for row in rows:
        own, others = (row["tokens"], row["corrected"]), {}
        if row["corrected"]:
            others["minus_uncorrected"] = (row["tokens"], False)
        if row["tokens"] == "bits":
            others["minus_index"] = ("index", row["corrected"])
        new = {}
        for name, other in others.items():
            difference = compare_means(bits[own], bits[other])
            new |= {name: difference.difference, f"{name}_ci95": difference.difference_ci95}
        finished.append({name: value for name, value in row.items() if name != "correct"} | new)
    return finished


def measure(options: argparse.Namespace) -> dict:
    """Every row, once it is trained; the result as `report.result` makes it."""
    asked = [options.seed, options.per_tag, options.tune, options.temperatures]
    kept, rows = options.work / "figures", []
    for model in MODELS:
        tokenizer = once(kept, [model.tokens, *asked], lambda: tokenizer_figures(options, model.tokens))  # noqa: B023
        figures = once(kept, [asdict(model), *asked], lambda: model_figures(options, model))  # noqa: B023
        rows.append({"model": model.name, **asdict(model), **tokenizer, **figures})
        print(f"{model.name}: {rows[-1]['score']:.3f}", flush=True)
    settings = {"guidance_scale": 2.0, "top_p": TOP_P, "dtype": "float32", "tags": TAGS, "tuned_on": 2 * options.tune}
    command = command_of(parser_of(), options)
    return result(
        compared(rows), command=command, n=2 * options.per_tag, seeds=options.seed, settings={**settings, **sources()}
    )


def sources() -> dict:
    """The figures that FD-scenes rests on."""
    from evaluation.scene_features import load_scene_features

    return {
        "extractors": {"scenes": load_scene_features().digest},
        "fd_scenes_reference": f"{REFERENCE} renders of one object",
    }


def picture(options: argparse.Namespace) -> None:
    """The same prompts and seeds, a row a model, framed green where the judge finds them right."""
    from evaluation.judge import judge
    from evaluation.sheet import verdict_sheet
    from sample.files import write_png

    images, captions, correct = [], [], []
    metadatas = prompts(options.per_tag, options.seed)
    for model in MODELS:
        kept = np.load(folder_of(options, model) / "pictures.npz")
        for image, row in zip(kept["images"], kept["rows"]):
            images.append(image)
            captions.append(f"{model.name}: {metadatas[row]['prompt']}")
            correct.append(judge(image, metadatas[row]).correct)
    write_png(options.out.with_suffix(".png"), verdict_sheet(images, captions, correct, columns=len(kept["rows"])))


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, write the result, its table and its picture."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with in_one_line(parser, kept="the same command continues"):
        check_least(options, tokenizer_images=1, scenes=1, images=1, per_tag=PICTURES, tune=1, seed=0, batch_size=1)
        train_all(options)
        write_result(options.out, measure(options))
        picture(options)
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
