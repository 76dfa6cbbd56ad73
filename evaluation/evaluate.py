"""The work of `nextscale evaluate`: make or read images, judge them, measure their distribution, report.

Images are uint8 RGB, (h, w, 3).
"""

import argparse
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from evaluation import dpg
from evaluation.distributions import Measure
from evaluation.evaluate_options import SUITES, defaults
from evaluation.geneval import read_results, read_suite, result_cautions, suite, summarize
from evaluation.reconstruction import report_reconstructions
from evaluation.report import command_line, portable, result, short_digest, table, write_result
from evaluation.reward_scores import load_rewards, published, reward_figures
from evaluation.scenes import SHAPES, TAGS, prompt_suite
from evaluation.sheet import verdict_sheet
from evaluation.sources import Images, geneval_tree, open_images, progress, tree_prompts
from evaluation.tokenizer_quality import report_options
from evaluation.verdicts import Judged
from sample.commands.job import Job, metadata_digest, requests_digest
from sample.commands.plan_options import call_settings, how_options, plugins_of
from sample.commands.sampling_options import plan_of_call
from sample.files import write_png, write_text
from sample.images import image_stream, make_requests, process_share
from sample.load import load_pipeline, made_by, model_folder, resolve_device
from sample.own_code import plugin_settings
from sample.plan import untrained
from sample.plugins import plugged
from sample.processes import process_group
from sample.sinks import GenEvalTree, grid

SCENES = ("scenes", "scenes-unseen")  # suites of `evaluation.scenes`
PICTURES = 48  # in the picture beside a result


def evaluate(args: argparse.Namespace) -> int:
    """Do what a checked command line says (see `evaluation.evaluate_options`); 0.

    Raises ValueError and FileNotFoundError as its parts do, before images are made where that is possible.
    """
    if args.tokenizer is not None:
        report_options(args) if args.reference is None else report_reconstructions(args)
        return 0
    if args.geneval_results is not None:
        report_geneval(args)
        return 0
    if args.dpg_results is not None:
        report_dpg(args)
        return 0
    if not process_group(args.device).is_main_process and args.model is None:
        return 0  # one process measures, all of them draw
    if args.images is not None and not args.images.exists():
        raise FileNotFoundError(f"--images {args.images} does not exist: give a folder, an .npz or a .parquet file")
    measure_images(args)
    return 0


def measure_images(args: argparse.Namespace) -> None:
    """Make or read images, judge them if the judge here can, take the metrics and rewards asked for, report."""
    measure, settings, source, noted = Measure.of(args), {}, args.images, []
    rewards = load_rewards(args.rewards, device=resolve_device(args.device)) if args.rewards is not None else {}
    judge = not is_folder(args.suite) and (args.model is None or judgeable(suite_prompts(args)))
    if not judge:
        check_unjudged(args, measure)
    if args.model is not None:
        source, settings, noted = make_images(args)
        if source is None:
            return
    if not judge:
        tell_who_judges(args.suite, source)
        if not measure.metrics and not rewards:
            return
    images, metadatas, judged = read_images(args, source, judge=judge)
    row = {"model": model_name(args.model)} if args.model is not None else {"images": portable(args.images)}
    row |= {"suite": suite_name(args.suite)} if args.suite is not None else {}
    row |= judged.scores(args.seed) if judged is not None else {"n": len(images)}
    prompts = tags = None
    if metadatas is not None:
        prompts, tags = ([metadata[name] for metadata in metadatas] for name in ("prompt", "tag"))
        settings["prompts"] = len({path.parent.parent for path in images.paths})
    elif rewards or "clip-score" in measure.metrics:
        prompts = tree_prompts(images)
    figures, noticed = measure.figures(images, prompts)
    row |= figures
    if rewards:
        seen = progress(images, "rewards", len(images))
        row |= reward_figures(seen, prompts, rewards, batch_size=args.batch_size)
        settings["rewards"] = published(args.rewards)
    settings |= measure.settings()
    cautions = [*noted, *noticed, *measure.cautions(len(images), tags)]
    print(table([row], [name for name in row if not name.endswith("_ci95")]))
    for caution in cautions:
        print(f"caution: {caution}", file=sys.stderr)
    write(args, row, settings | {"cautions": cautions}, images, judged)


def check_unjudged(args: argparse.Namespace, measure: Measure) -> None:
    """Raise ValueError if something is asked for that only a judge, or a metric, could give."""
    if args.verdicts is not None:
        raise ValueError(f"--verdicts {args.verdicts}: no judge here knows the classes of --suite {args.suite}")
    if args.out is not None and not measure.metrics and args.rewards is None:
        raise ValueError(
            f"--out {args.out}: nothing is measured of --suite {args.suite} without --metrics or --rewards"
        )
    if is_folder(args.suite) and args.n is not None and args.n < dpg.PICTURES:
        raise ValueError(f"--n must be {dpg.PICTURES} or more for DPG-Bench's grids, got {args.n}")


def tell_who_judges(suite: str, source: Path) -> None:
    """Say who can judge a tree of images; for DPG-Bench's scorer, write beside the tree what that one reads.

    Raises ValueError as `dpg.write_grids` does.
    """
    if not is_folder(suite):
        print(f"{source}: images of {suite}; no judge here knows their classes, GenEval's detector does")
        return
    images, folder = open_images(source), source.with_name(f"{source.name}-grids")
    side = dpg.write_grids(images, tree_prompts(images), suite, folder)
    print(f"{folder}: a grid of {dpg.PICTURES} a prompt, for DPG-Bench's scorer with --resolution {side}")


def read_images(
    args: argparse.Namespace, source: Path, *, judge: bool
) -> tuple[Images, list[dict] | None, Judged | None]:
    """The images to measure; with a suite, the metadata of each image's prompt, and verdicts if they are to be judged.

    Raises ValueError if a tree that is to be of unseen pairs holds others.
    """
    if args.suite is None or is_folder(args.suite):
        return open_images(source), None, None
    images, metadatas = geneval_tree(source)
    others = sum(not metadata.get("unseen") for metadata in metadatas)
    if args.suite == "scenes-unseen" and others:
        raise ValueError(f"--suite scenes-unseen: {others} of {len(images)} images in {source} are of other prompts")
    return images, metadatas, Judged.of(source) if judge else None


def write(args: argparse.Namespace, row: dict, settings: dict, images: Images, judged: Judged | None) -> None:
    """Write what `--verdicts` and `--out` ask for: verdicts; the result, its table and a picture."""
    if args.verdicts is not None and judged is not None:
        write_text(args.verdicts, "".join(f"{line}\n" for line in judged.lines()))
        print(f"written: {args.verdicts}")
    if args.out is None:
        return
    if judged is not None:
        picture = verdict_sheet(*judged.first_of_each_tag(PICTURES // len(TAGS)))
    else:
        picture = grid([Image.fromarray(image) for image, _ in zip(images, range(PICTURES))])
    write_png(args.out.with_suffix(".png"), picture)
    given = vars(args) | ({} if args.rewards is None else {"rewards": published(args.rewards)})
    command = command_line("nextscale evaluate", given, defaults())
    write_result(args.out, result([row], command=command, n=len(images), seeds=args.seed, settings=settings))
    print(f"written: {args.out}")


def model_name(model: str) -> str:
    """A model as it may be published: its name, or its folder without this machine's part of the path."""
    return portable(model) if Path(model).exists() else model


def report_geneval(args: argparse.Namespace) -> None:
    """Print, and with `--out` write, GenEval's scores of its detector's results file."""
    rows = read_results(args.geneval_results)
    row = {"results": portable(args.geneval_results), **summarize(rows, seed=args.seed)}
    print(table([row], [name for name in row if not name.endswith("_ci95")]))
    cautions = result_cautions(rows)
    for caution in cautions:
        print(f"caution: {caution}", file=sys.stderr)
    if args.out is not None:
        command, settings = command_line("nextscale evaluate", vars(args), defaults()), {"cautions": cautions}
        write_result(args.out, result([row], command=command, n=len(rows), seeds=args.seed, settings=settings))
        print(f"written: {args.out}")


def report_dpg(args: argparse.Namespace) -> None:
    """Print, and with `--out` write, what DPG-Bench's scorer found."""
    found = dpg.read_results(args.dpg_results)
    row = {"results": portable(args.dpg_results), **found}
    print(table([row], [name for name in row if not name.endswith("_ci95")]))
    cautions = []
    if found["n"] != dpg.PROMPTS:
        cautions = [f"{found['n']} prompts are scored, and DPG-Bench has {dpg.PROMPTS}"]
        print(f"caution: {cautions[0]}", file=sys.stderr)
    if args.out is not None:
        command, settings = command_line("nextscale evaluate", vars(args), defaults()), {"cautions": cautions}
        write_result(args.out, result([row], command=command, n=found["n"], seeds=args.seed, settings=settings))
        print(f"written: {args.out}")


# --- prompts ---------------------------------------------------------------------------------------------------------


def suite_prompts(args: argparse.Namespace) -> list[dict]:
    """The prompts of `--suite` as metadata: GenEval's, or of a folder the prompt alone. Raises as reading them does."""
    if args.suite == "geneval":
        return suite()
    if is_folder(args.suite):
        return [{"prompt": prompt} for prompt in dpg.read_prompts(args.suite).values()]
    if args.suite not in SCENES:
        return read_suite(args.suite)
    return prompt_suite(args.per_tag, args.seed, unseen=True if args.suite == "scenes-unseen" else None)


def is_folder(suite: str | None) -> bool:
    """Whether a suite is a folder of prompts, DPG-Bench's."""
    return suite is not None and suite not in SUITES and Path(suite).is_dir()


def judgeable(metadatas: list[dict]) -> bool:
    """Whether the scenes judge knows all classes of these prompts."""
    return all(item["class"] in SHAPES for metadata in metadatas for item in metadata["include"])


def suite_name(text: str) -> str:
    """A suite's name, or its file's or folder's without the way there and ending."""
    return Path(text).stem if text not in SUITES and Path(text).exists() else text


# --- making images ---------------------------------------------------------------------------------------------------


def make_images(args: argparse.Namespace) -> tuple[Path | None, dict, list[str]]:
    """Make what is missing of a suite's images as a GenEval tree; its folder, the settings that made it, cautions.

    The folder is None in all but the main process. Interrupted, it says how much is done and raises KeyboardInterrupt.
    """
    state = process_group(args.device)
    model = model_folder(args.model)  # once: a training run may export a newer one while we work
    refiner = how_options(args).get("refiner")
    pipeline = load_pipeline(model, dtype=args.dtype, device=args.device, refiner=refiner, fast=args.fast)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.by_class:
        raise ValueError(
            f"--suite {args.suite} needs a text model, and {args.model} knows classes: those are measured by "
            "python -m evaluation.run --suite classes"
        )
    given, plugins = call_settings(args), plugins_of(args)
    call = plugged(pipeline, given, plugins)
    settings = made_by(pipeline, model, refiner, **given) | ({"fast": args.fast} if args.fast == "off" else {})
    settings |= plugin_settings(plugins, call, args.batch_size)
    metadatas = suite_prompts(args)
    per_prompt = args.n or (4 if args.suite == "geneval" or is_folder(args.suite) else 1)
    prompts = [metadata["prompt"] for metadata in metadatas]
    requests = make_requests(prompts, per_prompt=per_prompt, seed=args.seed, metadata=metadatas)
    asked = {"suite": suite_name(args.suite), "images_per_prompt": per_prompt, "seed": args.seed}
    asked |= {"per_tag": args.per_tag} if args.suite in SCENES else {"requests": requests_digest(requests)}
    of_job = {**settings, **asked}
    folder = args.work or default_folder(of_job)
    if args.suite not in SCENES:
        of_job["metadata"] = metadata_digest(requests)  # not in the folder's name: those of before have none
    job = Job(folder / "settings.json", of_job, later=("metadata",), option="--work")
    said = untrained(plan_of_call(args, pipeline, call))  # what cannot be is raised before anything is written
    job.check()
    tree = GenEvalTree(folder, settings)
    todo = tree.missing(process_share(requests))
    job.save()
    try:
        stream = image_stream(pipeline, todo, batch_size=args.batch_size, each_once=True, **call)
        for request, image in tqdm(stream, desc="drawing", total=len(todo), unit="image", disable=None):
            tree.write(request, image)
    except KeyboardInterrupt:
        done = len(requests) - len(tree.missing(requests))
        print(f"\n{done} of {len(requests)} images are made; the same command continues", file=sys.stderr)
        raise
    state.wait_for_everyone()
    return folder if state.is_main_process else None, of_job, [said] if said is not None else []


def default_folder(settings: dict) -> Path:
    """The folder of a job's images when none is named: one per model and settings, so that nothing is mixed."""
    return Path("cache/evaluate") / f"{settings['suite']}-{settings['model_digest']}-{short_digest(settings)}"
