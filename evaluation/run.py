"""Images of a model, described and reduced in one pass: `accelerate launch -m evaluation.run --model M ...`.

Every process makes whole shards (of 256 images) and describes them; the main process reads the shards in order and
takes the figures, so they are the same for any number of processes. A shard that exists is never made again. Images
go nowhere unless `--npz` keeps them.
"""

import argparse
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from evaluation.command import Parser, check_least, in_one_line
from sample.commands.plan_options import add_place_options, add_plan_options, call_settings, how_options, plugins_of
from sample.commands.sampling_options import plan_of_call
from sample.files import check_place
from sample.own_code import plugin_settings
from var.presets import VAR_SAMPLING

if TYPE_CHECKING:
    from evaluation.distributions import Measure
    from sample.images import Request
    from sample.pipeline import NextScalePipeline
    from sample.sinks import NpzFile

EXAMPLES = """examples:
  accelerate launch -m evaluation.run --model models/var-d16 --suite imagenet256 \\
      --reference VIRTUAL_imagenet256_labeled.npz --npz samples.npz --out results/var_d16.json
  python -m evaluation.run --model runs/cifar10 --suite cifar10 --per-class 500 --metrics is --work cache/cifar
  torchrun --nproc_per_node 4 -m evaluation.run --device cpu --model runs/shapes --suite classes      without GPUs

The same command again goes on where it stopped, with any number of processes."""


@dataclass(frozen=True)
class Suite:
    """What a published figure is taken over.

    classes: of the data set; None: all the model knows; "scenes": captions of drawn scenes, judged, where a tag is a
    class.  side: of the images in pixels; None: the model's.
    """

    classes: int | str | None
    per_class: int
    side: int | None = None
    metrics: str = "fid,sfid,is,prdc"
    sampling: dict[str, float] = field(default_factory=dict)


SUITES = {
    "imagenet256": Suite(1000, 50, 256, sampling=VAR_SAMPLING),
    "imagenet512": Suite(1000, 50, 512, sampling=VAR_SAMPLING),
    "cifar10": Suite(10, 5000, 32, metrics="fid,is"),
    "classes": Suite(None, 50, metrics="is-scenes"),
    "scenes": Suite("scenes", 1000, metrics="fd-scenes,is-scenes"),
}
NEUTRAL = {"temperature": 1, "temperature_last": False, "guidance_ramp": "linear", "plan": "var", "cache": "100%"}
NEUTRAL |= {"prune": "off"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Measure a model by the images it makes.", EXAMPLES
    parser.add_argument("--model", required=True, help="a model folder, a training run, or a Hub id")
    parser.add_argument("--suite", required=True, choices=SUITES, help="classes, images a class, and sampling")
    parser.add_argument("--per-class", type=int, help="images a class, or prompts a tag (the suite's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i of them all is seed + i (0)")
    how = parser.add_argument_group("how the images are made (the suite's, or else the model's own, unless given)")
    add_plan_options(how)
    parser.add_argument("--metrics", metavar="LIST", help="instead of the suite's, as in nextscale evaluate")
    parser.add_argument("--reference", type=Path, metavar="PATH", help="ADM's reference npz, or real images")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="local Inception weights")
    parser.add_argument("--dino", default="facebook/dinov2-large", metavar="MODEL", help="of fd-dinov2")
    parser.add_argument("--clip", default="openai/clip-vit-large-patch14-336", metavar="MODEL", help="of cmmd")
    parser.add_argument("--bootstrap", type=int, help="resamples behind intervals; 0: none")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once and process (32)")
    parser.add_argument("--shard", type=int, default=256, help="images in a shard: what a kill may cost (256)")
    add_place_options(parser)
    parser.add_argument(
        "--fast", choices=["auto", "off"], default="auto", help="auto: fast, as off up to rounding; off: plain (auto)"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder of the shards (one per job in cache/run)")
    parser.add_argument("--npz", type=Path, metavar="FILE", help="also keep the images, in ADM's format, shuffled")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json and its table")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError on options that make no sense, naming them."""
    check_least(args, per_class=1, seed=0, batch_size=1, shard=1, bootstrap=0)
    if args.bootstrap == 1:
        raise ValueError("--bootstrap must be 0 (no intervals) or 2 and more, got 1")
    for name, suffix in (("out", ".json"), ("npz", ".npz")):
        path = getattr(args, name)
        if path is not None and path.suffix != suffix:
            raise ValueError(f"--{name} must be a {suffix} file, got {path}")
        if path is not None:
            check_place(f"--{name}", path, folder=False)


def run(args: argparse.Namespace) -> int:
    """Do what checked options say; 0.

    Raises ValueError and FileNotFoundError as its parts do; KeyboardInterrupt when interrupted, with all whole shards
    kept.
    """
    from sample.processes import process_group

    state = process_group(args.device)
    job = Generation.of(args)
    job.make(state.process_index, state.num_processes)
    if state.is_main_process:
        job.wait()
        job.reduce(state.num_processes)
    return 0


@dataclass
class Generation:
    """A job: its requests, what draws and describes them, and where the shards lie.

    args: the command line.  requests: of all processes, in the order of the shards.  settings: what the shards depend
    on.  call: of the pipeline's call.  made: images made by this process.
    """

    args: argparse.Namespace
    pipeline: "NextScalePipeline"
    measure: "Measure"
    requests: list["Request"]
    settings: dict
    call: dict
    work: Path
    made: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def count(self) -> int:
        """The number of shards."""
        return ceil(len(self.requests) / self.args.shard)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Generation":
        """Load everything a command line names, check it, and check the work folder for other settings."""
        from evaluation.distributions import Measure, chosen_metrics
        from evaluation.scenes import prompt_suite
        from sample.commands.job import Job, npz_job, requests_digest
        from sample.images import make_requests
        from sample.load import load_pipeline, model_digest, model_folder
        from sample.plugins import plugged
        from sample.sinks import NpzFile

        suite = SUITES[args.suite]
        model = model_folder(args.model)
        refiner = how_options(args).get("refiner")
        pipeline = load_pipeline(model, dtype=args.dtype, device=args.device, refiner=refiner, fast=args.fast)
        pipeline.set_progress_bar_config(disable=True)
        classes = check_model(args, suite, pipeline)
        args = argparse.Namespace(**{**vars(args), "metrics": args.metrics or suite.metrics})
        if "clip-score" in chosen_metrics(args.metrics, None) and suite.classes != "scenes":
            raise ValueError(f"--metrics clip-score needs prompts, and --suite {args.suite} draws classes")
        measure = Measure.of(args)
        per_class, metadata = args.per_class or suite.per_class, None
        if suite.classes == "scenes":
            metadata = prompt_suite(per_class, args.seed)
            in_order = make_requests([m["prompt"] for m in metadata], seed=args.seed, metadata=metadata)
        else:
            in_order = make_requests(range(classes), per_prompt=per_class, seed=args.seed)
        requests = [in_order[i] for i in shuffled_order(len(in_order))]  # IS over parts must not see sorted classes
        given, plugins = {**suite.sampling, **call_settings(args)}, plugins_of(args)
        call = plugged(pipeline, given, plugins)
        settings = {
            "suite": args.suite,
            "model_digest": model_digest(model),
            "images": requests_digest(requests),
            "per_class": per_class,
            "seed": args.seed,
            "shard": args.shard,
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            **({"fast": args.fast} if args.fast == "off" else {}),
            **({"refiner_digest": model_digest(refiner)} if refiner is not None else {}),
            "sampling": {**(pipeline.config.sampling or {}), **given},
            **plugin_settings(plugins, call, args.batch_size),
            "extractors": {name: network.digest for name, network in measure.networks.items()},
            "spatial": "sfid" in measure.metrics,
        }
        work = args.work or default_work(settings)
        of_work = {**settings, "count": len(requests)}  # not in the folder's name: those of before have none
        jobs = [Job(work / "settings.json", of_work, later=("count",), outputs=(work / "features",), option="--work")]
        if args.npz is not None:
            of_images = {name: value for name, value in settings.items() if name not in ("extractors", "spatial")}
            outputs = (args.npz, NpzFile.parts_of(args.npz))
            jobs.append(Job(npz_job(args.npz), of_images, outputs=outputs, option="--npz"))
        plan_of_call(args, pipeline, call)  # what cannot be is said before anything is written
        for job in jobs:
            job.check()
        for job in jobs:
            job.save()
        return cls(args, pipeline, measure, requests, settings, call, work)

    def shard(self, number: int) -> list["Request"]:
        """The requests of a shard."""
        return self.requests[number * self.args.shard : (number + 1) * self.args.shard]

    @property
    def judged(self) -> bool:
        """Whether each image is judged by its caption."""
        return SUITES[self.args.suite].classes == "scenes"

    def missing(self) -> list[int]:
        """The shards that are not finished, images included where they are kept."""
        from evaluation.shards import shard_path

        return [
            number
            for number in range(self.count)
            if not shard_path(self.work, number).exists() or (self.sink and self.sink.missing(self.shard(number)))
        ]

    @cached_property
    def sink(self) -> "NpzFile | None":
        """Where images are kept, or None."""
        from sample.sinks import NpzFile

        return NpzFile(self.args.npz, self.requests, block=self.args.shard) if self.args.npz is not None else None

    def make(self, rank: int, world: int) -> None:
        """Make and describe this process's missing shards; process 0 shows how far all of them are."""
        todo = [number for number in self.missing() if number % world == rank]
        slow = 0.1 if sys.stderr.isatty() else 30.0  # seconds between lines of progress
        with tqdm(total=len(self.requests), unit="image", desc="images", disable=rank != 0, mininterval=slow) as bar:
            bar.update(self.finished())
            for number in todo:
                self.make_shard(number)
                bar.update(self.finished() - bar.n)

    def make_shard(self, number: int) -> None:
        """Draw the images of a shard, describe them with every network, write the shard."""
        from evaluation.features import describe_all
        from evaluation.judge import judge
        from evaluation.shards import shard_path, write_shard
        from sample.images import image_stream

        requests, images = self.shard(number), []
        how = {"batch_size": self.args.batch_size, "each_once": True, **self.call}
        for request, image in image_stream(self.pipeline, requests, **how):
            images.append(image)
            if self.sink is not None:
                self.sink.write(request, image)
        described = {
            name: describe_all(network, images, batch_size=self.args.batch_size)
            for name, network in self.measure.networks.items()
        }
        digests = [hashlib.blake2b(np.ascontiguousarray(image), digest_size=12).hexdigest() for image in images]
        correct = None
        if self.judged:
            correct = [judge(image, r.metadata).correct for image, r in zip(images, requests, strict=True)]
        write_shard(shard_path(self.work, number), requests, digests, described, correct)
        self.made += len(images)

    def finished(self) -> int:
        """Images in finished shards, of all processes."""
        return len(self.requests) - sum(len(self.shard(number)) for number in self.missing())

    def wait(self) -> None:
        """Until the other processes' shards are there."""
        with tqdm(total=len(self.requests), unit="image", desc="waiting", disable=None) as bar:
            while self.finished() < len(self.requests):
                bar.update(self.finished() - bar.n)
                time.sleep(0.2)

    def cautions(self, labels: Sequence[int], seeds: Sequence[int], digests: Sequence[str]) -> list[str]:
        """Where this differs from the suite, and what may be wrong with the images."""
        from evaluation import guards
        from sample.plan import untrained

        suite = SUITES[self.args.suite]
        said = untrained(plan_of_call(self.args, self.pipeline, self.call))
        lines = ([said] if said is not None else []) + departures(suite.sampling, self.settings["sampling"])
        lines += [f"plugin {text} is none of the suite's" for text in self.settings.get("plugin", ())]
        own = {name: value for name, value in (self.pipeline.config.sampling or {}).items() if value is not None}
        for name in suite.sampling.keys() & own.keys() - call_settings(self.args).keys():
            if own[name] != suite.sampling[name]:
                lines.append(f"{name} is the suite's {suite.sampling[name]}, and the model's own is {own[name]}")
        copies = sum(count - 1 for count in Counter(digests).values())
        if copies:
            lines.append(f"{copies} of {len(digests)} samples are exact copies of others: correlated seeds?")
        tags = [request.metadata["tag"] for request in self.requests] if self.judged else None
        if not self.judged:
            classes = suite.classes or self.pipeline.transformer.config.num_classes
            lines += guards.count_cautions(
                labels, classes, suite.per_class if suite.classes else self.settings["per_class"]
            )
        return [*lines, *guards.seed_cautions(seeds), *self.measure.cautions(len(labels), tags)]

    def reduce(self, processes: int) -> None:
        """Take the figures from all shards, print them, write the result of a run of `processes`."""
        from evaluation.judge import score
        from evaluation.report import command_of, portable, result, table, write_result
        from evaluation.shards import read_column, read_described, shard_path

        seconds = time.perf_counter() - self.started
        paths = [shard_path(self.work, number) for number in range(self.count)]
        columns = [read_column(paths, name).tolist() for name in ("labels", "seeds", "digests")]
        row: dict = {"model": portable(self.args.model), "suite": self.args.suite, "n": len(columns[0])}
        cautions = self.cautions(*columns)
        prompts = None
        if self.judged:
            prompts = [request.prompt for request in self.requests]
            row |= score(read_column(paths, "correct").tolist(), [request.metadata for request in self.requests])
        for name in self.measure.networks:
            figures, said = self.measure.figures_of(name, read_described(paths, name), prompts)
            row |= figures
            cautions += said
        if self.measure.networks:
            size = tuple(self.pipeline.vqvae.image_hw)
            cautions += self.measure.reference_cautions(Counter({size: len(self.requests)}))
        if self.sink is not None:
            self.sink.finish()
        print(table([row], [name for name in row if not name.endswith("_ci95")]))
        for caution in cautions:
            print(f"caution: {caution}", file=sys.stderr)
        if self.args.out is None:
            return
        speed = {"images_per_s_of_this_process": round(self.made / seconds, 2)} if self.made else {}
        settings = {**self.settings, **self.measure.settings(), **speed, "processes": processes, "cautions": cautions}
        command = command_of(parser_of(), self.args).replace("python", "accelerate launch", 1)
        write_result(
            self.args.out, result([row], command=command, n=len(columns[0]), seeds=self.args.seed, settings=settings)
        )
        print(f"written: {self.args.out}")


def shuffled_order(count: int, seed: int = 0) -> list[int]:
    """A fixed order of `count` images, for files whose parts must not be sorted by class."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def check_model(args: argparse.Namespace, suite: Suite, pipeline: "NextScalePipeline") -> int:
    """The number of classes to draw, 0 for texts. Raises ValueError unless the model makes what the suite measures."""
    if pipeline.by_class == (suite.classes == "scenes"):
        wanted, known = ("text", "classes") if pipeline.by_class else ("class", "texts")
        raise ValueError(f"--suite {args.suite} needs a {wanted} model, and {args.model} knows {known}")
    if suite.classes == "scenes":
        return 0
    classes = pipeline.transformer.config.num_classes
    if suite.classes not in (None, classes):
        raise ValueError(f"--suite {args.suite} has {suite.classes} classes, and {args.model} knows {classes}")
    if suite.side is not None and tuple(pipeline.vqvae.image_hw) != (suite.side, suite.side):
        size = "x".join(map(str, pipeline.vqvae.image_hw))
        raise ValueError(f"--suite {args.suite} is of {suite.side}x{suite.side} images, and {args.model} makes {size}")
    return classes


def default_work(settings: dict) -> Path:
    """The folder of a job's shards when none is named."""
    from evaluation.report import short_digest

    return Path("cache/run") / f"{settings['suite']}-{settings['model_digest']}-{short_digest(settings)}"


def departures(published: Mapping[str, Any], sampling: Mapping[str, Any]) -> list[str]:
    """Settings, the model's own among them, that are not those a figure was published with; none if none were."""
    if not published:
        return []
    lines = []
    for name, value in sampling.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if name in published and value != published[name]:
            lines.append(f"{name} is {value}, and the suite's {published[name]}")
        elif name not in published and any(one not in (None, NEUTRAL.get(name)) for one in values):
            lines.append(f"{name} is {value}, which the suite leaves alone")
    return lines


def parser_of() -> Parser:
    """The options of the command."""
    parser = Parser(prog="python -m evaluation.run")
    configure(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0; it exits with 2 after a mistake, told in one line, and with 130 when interrupted."""
    parser = parser_of()
    args = parser.parse_args(argv)
    with in_one_line(parser, kept="the same command goes on with the finished shards"):
        check(args)
        return run(args)


if __name__ == "__main__":
    sys.exit(main())
