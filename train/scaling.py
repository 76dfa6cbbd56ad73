"""`nextscale scaling`: train a ladder of sizes, evaluate each, fit power laws; or fit points measured elsewhere.

Every size is a training run of its own (`train.train_var`) and an evaluation of its own (`nextscale evaluate`), so the
same command again goes on where it stopped. Torch is imported when the work starts, not to parse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

from evaluation.report import flat
from train.ladder import Ladder, Rung

if TYPE_CHECKING:
    from tokenizer.schedule import ScaleSchedule

EXAMPLES = """examples:
  nextscale scaling --config configs/scaling/scenes.yaml --dry-run       the commands, and how large the models are
  nextscale scaling --config configs/scaling/scenes.yaml --out results/scaling_scenes.json
  nextscale scaling --csv points.csv --out results/scaling.json          points of runs made elsewhere

The same command again goes on with the runs that are not finished."""


AT_WORK: set[subprocess.Popen] = set()  # commands of rungs that run now
BEGINNING, ENDING = Lock(), Event()  # while one begins or ends; when none may begin any more


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale scaling`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Scaling laws with error bars.", EXAMPLES
    parser.add_argument("--config", type=Path, metavar="FILE", help="train, evaluate and fit the ladder in this YAML")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="fit these points; columns as in evaluation/scaling.py"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands and sizes of the ladder")
    parser.add_argument("--fit-only", action="store_true", help="fit the runs that are there; train nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once: small models do not fill a GPU (1)")
    parser.add_argument("--bootstrap", type=int, default=400, help="resamples behind intervals (400; 0: none)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json; table, points and picture beside it")


def run(args: argparse.Namespace) -> int:
    """Do what the options say; 0; the exit code of a training or evaluation that failed.

    Raises ValueError and FileNotFoundError on options or points that make no sense.
    """
    if (args.config is None) == (args.csv is None):
        raise ValueError("give one of --config (a ladder to train) and --csv (points to fit)")
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"--out must be a .json file, got {args.out}")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, got {args.jobs}")
    if args.bootstrap < 0:
        raise ValueError(f"--bootstrap must be 0 or more, got {args.bootstrap}")
    if args.csv is not None:
        from evaluation.scaling import read_points

        return report(args, read_points(args.csv))
    ladder = Ladder.read(args.config)
    if not args.dry_run:
        ladder.check_finished()
    if not args.fit_only:
        ladder.check_trainable()
    if args.dry_run:
        return show(ladder)
    if not args.fit_only and (code := climb_all(ladder, args.jobs)):
        return code
    return report(args, ladder_points(ladder))


def climb_all(ladder: Ladder, jobs: int) -> int:
    """Train and evaluate every rung, `jobs` at once; the exit code of the first that failed, else 0.

    Stopped by Ctrl-C or SIGTERM it waits for the runs at work, which write their checkpoints, and begins no other.
    """
    with terminating(), ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(climb, ladder, rung) for rung in reversed(ladder.rungs)}  # the longest begin first
        try:
            for done in as_completed(waiting):
                if code := done.result():
                    return code
        finally:  # those that run go on to their end
            pool.shutdown(cancel_futures=True)
    return 0


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """Pass SIGTERM on to the commands at work, and exit; Ctrl-C reaches them from the terminal itself."""

    def pass_on(number: int, frame: object) -> None:
        ENDING.set()
        with BEGINNING:
            for process in AT_WORK:
                process.send_signal(number)
        raise SystemExit(128 + number)

    ENDING.clear()
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launch(words: Sequence[str]) -> int:
    """Run a command to its end; its exit code, that of SIGTERM where all is to end."""
    with BEGINNING:
        if ENDING.is_set():
            return 128 + signal.SIGTERM
        process = subprocess.Popen(words)
        AT_WORK.add(process)
    try:
        return process.wait()
    finally:
        with BEGINNING:
            AT_WORK.discard(process)


def show(ladder: Ladder) -> int:
    """Print every command with the size of its model; 0."""
    for rung in ladder.rungs:
        try:
            print(f"# {rung.name}: {rung_size(ladder, rung) / 1e6:.3g} M parameters")
        except FileNotFoundError as error:
            print(f"# {rung.name}: size unknown, {error}")
        for words in (ladder.training(rung), ladder.evaluation(rung) if ladder.per_tag else None):
            if words is not None:
                print(shlex.join("python" if word == sys.executable else str(word) for word in words))
    return 0


def rung_size(ladder: Ladder, rung: Rung) -> int:
    """Parameters of a rung's transformer, counted without allocating it.

    Raises FileNotFoundError if the tokenizer, or the cache that says how many classes there are, is not there yet.
    """
    import torch
    import yaml

    from sample.load import part_folder
    from tokenizer.model import MultiScaleVQ
    from train.text import TextConfig
    from var.transformer import NextScaleTransformer

    given = flat(yaml.safe_load(ladder.base.read_text(encoding="utf-8"))) | ladder.flags | rung.flags
    config = MultiScaleVQ.load_config(part_folder("tokens.tokenizer", given["tokens.tokenizer"], "vqvae"))
    sizes = {name.removeprefix("transformer."): v for name, v in given.items() if name.startswith("transformer.")}
    sizes |= {name: config[name] for name in ("vocab_size", "latent_channels", "schedule", "bitwise")}
    if sizes["bitwise"]:
        sizes["latent_channels"] *= config["token_patch"] ** 2  # bits of a token
    if sizes.get("conditioning") == "text":
        sizes["text_width"] = given.get("text.d_model", TextConfig.d_model)
    elif given.get("tokens.cache") is not None:
        manifest = Path(given["tokens.cache"]) / "train" / "manifest.json"
        sizes["num_classes"] = json.loads(manifest.read_text(encoding="utf-8"))["num_classes"]
    elif given.get("data.num_classes") is not None:
        sizes["num_classes"] = given["data.num_classes"]
    with torch.device("meta"):
        return sum(p.numel() for p in NextScaleTransformer(**sizes).parameters())


def climb(ladder: Ladder, rung: Rung) -> int:
    """Train a rung and evaluate it, unless that is done; the exit code of what failed, else 0.

    The files `done` and `evaluated` in its folder hold the commands.
    """
    from sample.files import write_text

    folder = ladder.run_folder(rung)
    if not (folder / "done").exists():
        print(f"{rung.name}: {folder}", flush=True)
        code = launch(ladder.training(rung))
        if code:
            return code
        write_text(folder / "done", shlex.join(ladder.training_words(rung)) + "\n")
    if ladder.per_tag and not (folder / "evaluation.json").exists():
        code = launch(ladder.evaluation(rung))
        if code:
            return code
        write_text(folder / "evaluated", shlex.join(ladder.evaluation_words(rung)) + "\n")
    return 0


def ladder_points(ladder: Ladder) -> list[dict]:
    """The points of all rungs that have trained.

    Raises FileNotFoundError if none has.
    """
    from evaluation.scaling import points_of_run, weights_of
    from tokenizer.schedule import ScaleSchedule

    points = []
    for rung in ladder.rungs:
        folder = ladder.run_folder(rung)
        transformer = folder / "latest" / "transformer"
        if not (folder / "done").exists():
            continue
        config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
        tokens = tokens_of_a_step(folder, ScaleSchedule.of(config["schedule"]))
        found = points_of_run(folder, tokens_per_image=tokens, parameters=weights_of(transformer), seed=rung.seed)
        if (folder / "evaluation.json").exists():
            row = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"][0]
            found[-1] |= {name: row[name] for name in ("fd_scenes", "is_scenes") if name in row}
            found[-1] |= {"score": row["overall"], "score_error": 1 - row["overall"]}
        points += found
    if not points:
        raise FileNotFoundError(f"{ladder.folder} holds no finished run: give the command without --fit-only first")
    return points


def tokens_of_a_step(folder: Path, schedule: ScaleSchedule) -> float:
    """Tokens of an image that a step of a run trains on, on average: all, but for coarse steps (train.progressive).

    Raises:
        ValueError: if scales join one after the other: compute then is not proportional to images.
    """
    import yaml

    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("progressive") or {}
    if settings.get("until"):
        raise ValueError(f"run {folder} has progressive.until: points on the way are no points of a law in compute")
    coarse = settings.get("coarse") or 0
    share = settings.get("coarse_share", 0.0) if coarse else 0.0
    return share * schedule.ends[coarse - 1] + (1 - share) * schedule.total if coarse else schedule.total


def report(args: argparse.Namespace, points: list[dict]) -> int:
    """Fit, print and write the laws; 0."""
    from evaluation.report import command_line, result, table, write_result
    from evaluation.scaling import check, laws_in_compute, laws_in_size, picture, write_points

    cautions = check(points)
    rows = laws_in_size(points, resamples=args.bootstrap) + laws_in_compute(points, resamples=args.bootstrap)
    for row in rows:
        print(table([row], [name for name in row if not name.endswith("_ci95")]), end="\n\n")
    for caution in cautions:
        print(f"caution: {caution}", file=sys.stderr)
    if args.out is None:
        return 0
    beside = args.out.with_suffix(".csv")
    if args.csv is None or not (beside.exists() and beside.samefile(args.csv)):
        write_points(beside, points)
    parser = argparse.ArgumentParser()
    configure(parser)
    command = command_line("nextscale scaling", vars(args), vars(parser.parse_args([])))
    runs = len({point["run"] for point in points})
    seeds = sorted({int(point.get("seed", 0)) for point in points})
    settings = {"bootstrap_resamples": args.bootstrap, "points": len(points), "cautions": cautions}
    write_result(args.out, result(rows, command=command, n=runs, seeds=seeds, settings=settings))
    picture(points, args.out.with_suffix(".png"))  # last: where it cannot be drawn, the figures are kept
    print(f"written: {args.out}")
    return 0
