"""The options of `nextscale evaluate`: declared, given defaults, checked. Nothing heavy is imported here."""

import argparse
from pathlib import Path

from evaluation.command import check_least
from evaluation.report import is_result
from sample.commands.plan_options import add_place_options, add_plan_options
from sample.commands.sampling_options import take_negative_lists
from sample.files import check_place

EXAMPLES = """examples:
  nextscale evaluate --model scenes --suite scenes --per-tag 100 --out results/scenes_model.json
  nextscale evaluate --suite scenes --images geneval/            judge a GenEval tree somebody else made
  nextscale evaluate --model FOLDER --suite geneval --work geneval/      images for GenEval's detector (553 prompts x 4)
  nextscale evaluate --geneval-results results.jsonl --out results/geneval.json      what that detector found
  nextscale evaluate --model FOLDER --suite dpg_bench/prompts --work dpg/      grids for DPG-Bench's scorer (dpg-grids/)
  nextscale evaluate --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz --metrics fid,is
  nextscale evaluate --images pictures/ --metrics fd-scenes,is-scenes
  nextscale evaluate --images drawn/ --rewards pickscore,imagereward      of a tree that sample --prompts FILE drew
  nextscale evaluate --tokenizer runs/scenes-tokenizer/latest/vqvae --n 1200
  nextscale evaluate --tokenizer T --reference photos/ --metrics fid,lpips        rFID, LPIPS, PSNR, SSIM of photos
  accelerate launch -m nextscale evaluate --model scenes --suite scenes      the same images, by several processes

FID, IS and KID use Inception features; distances on the scenes network are called fd-scenes and is-scenes.
The same command again continues where it stopped; finished images are kept."""

METRICS = ("fid", "sfid", "is", "kid", "prdc", "fd-dinov2", "cmmd", "clip-score", "fd-scenes", "is-scenes")
TOKENIZER_METRICS = ("fid", "fd-scenes", "fd-dinov2", "lpips")  # of reconstructions against their originals
SUITES = ("scenes", "scenes-unseen", "geneval")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Measure a model, a folder of images, or a tokenizer.", EXAMPLES
    take_negative_lists(parser)
    what = parser.add_argument_group("what to measure (one of)")
    what.add_argument("--model", help="make images: scenes (bundled), a model folder, a training run, or a Hub id")
    what.add_argument(
        "--images", type=Path, metavar="PATH", help="a folder, a GenEval tree (with --suite), an npz or parquet"
    )
    what.add_argument("--geneval-results", type=Path, metavar="FILE", help="the JSON lines GenEval's detector writes")
    what.add_argument("--dpg-results", type=Path, metavar="FILE", help="the results file DPG-Bench's scorer writes")
    what.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="reconstruct scenes or --reference: scenes, a folder",
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--suite",
        metavar="NAME|PATH",
        help="prompts: scenes, scenes-unseen (held-out pairs only), geneval, a file of GenEval's JSON or grammar, or "
        "DPG-Bench's folder of prompts",
    )
    how.add_argument("--per-tag", type=int, default=100, help="prompts of each tag (100)")
    how.add_argument(
        "--n", type=int, help="images of each prompt (1; geneval, DPG-Bench 4); with --tokenizer, scenes (1200)"
    )
    how.add_argument("--usage-n", type=int, default=2000, help="with --tokenizer, scenes to count codes on (2000)")
    how.add_argument("--seed", type=int, default=0, help="of prompts, images and resampling (0)")
    how.add_argument(
        "--metrics",
        metavar="LIST",
        help=f"some of {','.join(METRICS)} (fd-scenes,is-scenes for scenes); with --tokenizer of "
        + ",".join(TOKENIZER_METRICS),
    )
    how.add_argument(
        "--rewards",
        metavar="LIST",
        help="mean rewards of images and their prompts: pickscore,imagereward,hps,clip,... as --reward of sample",
    )
    how.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="real images, or an npz with mu and sigma; with --tokenizer, images to reconstruct",
    )
    how.add_argument("--inception-weights", type=Path, metavar="FILE", help="local Inception weights of torch-fidelity")
    how.add_argument("--dino", default="facebook/dinov2-large", metavar="MODEL", help="of fd-dinov2: Hub id or folder")
    how.add_argument("--clip", default="openai/clip-vit-large-patch14-336", metavar="MODEL", help="of cmmd, clip-score")
    how.add_argument("--bootstrap", type=int, help="resamples behind intervals (200; 20 on Inception's; 0: none)")

    sampling = parser.add_argument_group("sampling (the model's own settings unless given)")
    add_plan_options(sampling)

    where = parser.add_argument_group("with what, to where")
    where.add_argument("--batch-size", type=int, default=32, help="images at once (32)")
    add_place_options(where)
    where.add_argument(
        "--fast", choices=["auto", "off"], default="auto", help="auto: fast, as off up to rounding; off: plain (auto)"
    )
    where.add_argument("--work", type=Path, metavar="DIR", help="folder of made images (one per job in cache/evaluate)")
    where.add_argument("--verdicts", type=Path, metavar="FILE", help="also write each image's verdict, a JSON a line")
    where.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json; its table and picture beside it")


def defaults() -> dict:
    """Every option's value when it is not given."""
    parser = argparse.ArgumentParser()
    configure(parser)
    return vars(parser.parse_args([]))


def check(args: argparse.Namespace) -> None:
    """Raise ValueError on options that make no sense together, naming them."""
    sources = ("model", "images", "geneval_results", "dpg_results", "tokenizer")
    given = [name for name in sources if getattr(args, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
        raise ValueError(f"give one of --model, --images, --geneval-results, --dpg-results and --tokenizer, got {got}")
    if args.suite is not None and args.suite not in SUITES and not Path(args.suite).exists():
        raise ValueError(
            f"--suite: invalid choice {args.suite!r}, give {', '.join(SUITES)}, a file of prompts or a folder of them"
        )
    if args.images is not None and args.suite == "geneval":
        raise ValueError("--suite geneval is judged by GenEval's detector: run it on --images, then --geneval-results")
    check_least(args, per_tag=1, n=1, usage_n=1, seed=0, batch_size=1, bootstrap=0)
    if args.bootstrap == 1:
        raise ValueError("--bootstrap must be 0 (no intervals) or 2 and more, got 1")
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"--out must be a .json file, got {args.out}")
    if args.out is not None and args.out.is_file() and not is_result(args.out):
        raise ValueError(f"--out {args.out} is there, and no result: name another file")
    for name in ("out", "verdicts"):
        if getattr(args, name) is not None:
            check_place(f"--{name}", getattr(args, name), folder=False)
    if args.tokenizer is not None and (args.suite or (args.metrics and args.reference is None)):
        raise ValueError("--tokenizer takes no --suite, and --metrics only with the images to reconstruct: --reference")
    if args.model is not None and args.suite is None:
        raise ValueError(
            "--model needs --suite: the prompts to make images of (class models: python -m evaluation.run)"
        )
    if args.verdicts is not None and args.suite is None:
        raise ValueError(f"--verdicts {args.verdicts} needs --suite: the prompts that images are judged by")
    if args.rewards is not None and args.model is None and args.images is None:
        raise ValueError(f"--rewards {args.rewards} is for images with prompts: --model and --suite, or --images")
    if args.images is not None and not args.suite and not args.metrics and not args.rewards:
        raise ValueError(f"--images needs --suite scenes (a GenEval tree), --metrics {','.join(METRICS)}, or --rewards")
