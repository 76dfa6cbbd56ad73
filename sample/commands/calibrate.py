"""`nextscale calibrate`: measure once, on a few prompts, how narrowly each layer attends; ScaleKV's budgets need it.

The figures go into the transformer's configuration, so they travel with the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

from sample.commands.plan_options import add_place_options
from sample.commands.prompts import read_prompts, texts_or_classes

EXAMPLES = """examples:
  nextscale calibrate --out calibrated "a red star" "two rings" "a blue cross above a heart" ...   ten are enough
  nextscale calibrate --model runs/my-var --prompts prompts.txt
  nextscale calibrate --model var-d16 --class 0-9 --out var-d16-calibrated

It writes into the model's folder, or with --out a calibrated copy. After that: nextscale sample ... --cache 10%"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale calibrate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Measure how narrowly each layer attends, for --cache.", EXAMPLES
    parser.add_argument("prompt", nargs="*", help="texts to measure on; about ten")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="texts, one a line")
    parser.add_argument("--class", dest="classes", metavar="LIST", help="classes: 0,3,7 or 0-9")
    parser.add_argument("--n", type=int, default=1, help="images of each (1)")
    parser.add_argument("--seed", type=int, default=0, help="the name of the first image (0)")
    parser.add_argument("--model", default="scenes", help="scenes (bundled), a model folder, or a training run")
    parser.add_argument("--out", type=Path, help="folder of a calibrated copy; the model's own if left out")
    parser.add_argument("--overwrite", action="store_true", help="replace that folder if it exists")
    add_place_options(parser)
    parser.add_argument("--text-device", help="where the text encoder goes instead, e.g. cpu to save GPU memory")
    parser.add_argument(
        "--offload", choices=["none", "model", "layers"], default="none", help="as in nextscale sample (none)"
    )


def run(args: argparse.Namespace) -> int:
    """Do what the options say; 0.

    Raises:
        ValueError, FileNotFoundError: on options that make no sense, naming them.
    """
    prompts, _ = read_prompts(args)

    from sample.convert import finished_folder
    from sample.load import BUNDLED, load_pipeline, model_folder
    from sample.selectivity import measure_selectivity

    folder = model_folder(args.model)
    if args.out is None and args.model == BUNDLED:
        raise ValueError("the bundled model is calibrated already: name --out for another calibration of it")
    if args.out is None and not Path(args.model).exists():
        raise ValueError(f"--model {args.model} lies in the Hub's cache, which is not ours to change: name --out")
    if args.out is not None and args.out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {args.out} lies in the model that is copied: name another folder")
    places = {"device": args.device, "text_device": args.text_device, "offload": args.offload}
    pipeline = load_pipeline(folder, dtype=args.dtype, **places)
    pipeline.set_progress_bar_config(disable=True)
    prompts = texts_or_classes(prompts, args.classes, pipeline)
    copy = finished_folder(args.out, overwrite=args.overwrite, reads=[folder]) if args.out else nullcontext(folder)
    with copy as made:
        if args.out is not None:
            copy_model(folder, made)
        for name in ["transformer"] + ["refiner"] * (pipeline.refiner is not None):
            model = getattr(pipeline, name)
            index = measure_selectivity(pipeline, prompts, model=model, per_prompt=args.n, seed=args.seed)
            write_selectivity(made / name, index)
            print(f"{name}: {describe(index)}")
    print(f"written: {args.out or folder}")
    return 0


def copy_model(folder: Path, made: Path) -> None:
    """Copy a model as it is, or, where a training run keeps its parts only, as a pipeline."""
    from sample.load import load_pipeline, silent_loading

    if (folder / "model_index.json").is_file():
        shutil.copytree(folder, made, dirs_exist_ok=True)
        return
    with silent_loading():
        load_pipeline(folder, dtype="float32", device="cpu").save_pretrained(made)


def write_selectivity(folder: Path, index: list[list[float]]) -> None:
    """Put the index into the configuration of a transformer's folder, atomically."""
    from sample.files import write_text

    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"selectivity": index}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def describe(index: list[list[float]]) -> str:
    """The layers from wide to narrow attention at the last scale, in a line."""
    order = sorted(range(len(index)), key=lambda layer: index[layer][-1])
    return "widest attention first, at the last scale: layers " + ", ".join(map(str, order))
