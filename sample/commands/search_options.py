"""The options of a command that say what is searched, and the search they describe."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sample.own_code import module_digest
from sample.processes import speaks
from sample.search_steps import METHODS, Step

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline
    from sample.plan import Plan
    from sample.search import Search

OPTIONS = ("pooling", "also_score", "potential", "sharpness", "draw", "rounds", "enough")  # as `Search` names them
NEEDS_SEARCH = ("reward", "features", *OPTIONS, "budget", "images")
SETTINGS = ("search", *NEEDS_SEARCH[:-1])
DEFAULT_N = 2  # TTS-VAR's setting that matches best-of-8 in its paper
TEXTS = 24  # words or bytes of a prompt, about, where costs are planned


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Declare --search and what goes with it; `--n` is then the N of the search."""
    group = parser.add_argument_group("search (several candidates of an image; --n is its N, 2 unless given)")
    group.add_argument(
        "--search",
        metavar="METHOD",
        help='tts, halving, best, importance, resample, cluster, random; or steps: "16 cluster@1:12 resample@3:4 best"',
    )
    group.add_argument(
        "--reward",
        help="scenes, clip[:MODEL], pickscore, aesthetic:FILE, imagereward, hps, MODULE:FUNCTION (scenes: scenes)",
    )
    group.add_argument(
        "--features", help="latent, pixels, scenes, dinov2, clip[:MODEL], vision:MODEL, MODULE:FUNCTION (latent)"
    )
    group.add_argument("--pooling", help="of features before clustering: pca, pool, pca_all (pca)")
    group.add_argument("--also-score", type=scale_list, metavar="LIST", help="scales whose scores count as well: 3,4")
    group.add_argument("--potential", help="value, max, sum or difference of the scores so far (value)")
    group.add_argument("--sharpness", type=float, help="lambda in the weights exp(lambda * potential) (10)")
    group.add_argument("--draw", help="multinomial, or systematic: less variance (multinomial)")
    group.add_argument(
        "--budget",
        type=float,
        help="instead of --n: what an image may cost in all --rounds, within 5 %%, in plain images",
    )
    group.add_argument("--rounds", type=int, help="attempts, until an image scores --enough (1)")
    group.add_argument("--enough", type=float, help="a score, in the reward's units")
    group.add_argument("--images", type=int, help="with a search: images of each prompt (1)")
    group.add_argument(
        "--show-search",
        action="store_true",
        help="also draw the family tree of each image's candidates (more decoder calls, which are counted)",
    )


def scale_list(text: str) -> tuple[int, ...]:
    """An argument type: scales after commas. Raises ArgumentTypeError if they are none."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be scales like 3,4, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def search_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides about the images, JSON-able; empty without a search.

    Raises:
        ValueError: if options of a search are given without one, or --n and --budget together.
    """
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if args.search is not None and args.budget is not None and args.n is not None:
        raise ValueError(f"--n {args.n} and --budget {args.budget:g} both say how many candidates: give one")
    if args.search is None:
        idle = [
            *(name for name in NEEDS_SEARCH if getattr(args, name) is not None),
            *["show_search"] * args.show_search,
        ]
        if idle:
            raise ValueError(f"--{idle[0].replace('_', '-')} needs --search, e.g. --search tts")
        return {}
    if args.search not in METHODS and args.n is not None:
        raise ValueError(
            f"--n {args.n} goes with a method's name, and --search {args.search!r} says how many: leave it out"
        )
    if args.reward is not None and (digest := reward_digest(args.reward)) is not None:
        given["reward_digest"] = digest
    module, _, function = (args.features or "").partition(":")
    if function and module not in ("vision", "clip", "scenes") and (digest := module_digest(module)) is not None:
        given["features_digest"] = digest
    return given | ({} if args.budget is not None else {"search_n": args.n or DEFAULT_N})


def reward_digest(text: str) -> str | None:
    """Twelve hexadecimal digits of what a reward's name leads to: a file, a folder's files, a Python module in the
    current folder. None if that is elsewhere: in a package, on the Hub.
    """
    kind, _, place = text.partition(":")
    if not place:
        return None
    if kind not in ("scenes", "clip", "aesthetic"):  # MODULE:FUNCTION
        return module_digest(kind)
    files = sorted(Path(place).glob("*")) if Path(place).is_dir() else [Path(place)]
    files = [path for path in files if path.is_file()]
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def images_of_each(args: argparse.Namespace) -> int:
    """Images of each prompt: --n, or --images with a search.

    Raises:
        ValueError: if that is not 1 or more.
    """
    for name in ("n", "images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    return (args.n if args.search is None else args.images) or 1


def make_search(
    args: argparse.Namespace, pipeline: NextScalePipeline, prompts: Sequence[str | int], plan: Plan
) -> Search | None:
    """The search of the options; None without one.

    Args:
        prompts: the job's: what a reward costs is measured on the first when there is a budget, and a reward that
            cannot read all of them says so before the first picture.
        plan: of the pipeline's call, which decides what a plain image costs.

    Raises:
        ValueError, FileNotFoundError: as rewards, methods and `Search` raise them.
    """
    if args.search is None:
        return None
    from sample.reward_names import load_features, load_reward
    from sample.search import Search
    from sample.search_cost import SearchCost
    from sample.search_steps import fit_budget, make_steps

    device = pipeline.transformer.device
    name = args.reward or ("scenes" if str(args.model) == "scenes" else None)
    options = {n: getattr(args, n) for n in OPTIONS}
    options = {n: value for n, value in options.items() if value is not None}
    options["reward"] = load_reward(name, device=device) if name is not None else None
    if hasattr(options["reward"], "check"):
        options["reward"].check(prompts)
    options["features"] = load_features(args.features, device=device) if args.features is not None else None
    num_scales = len(plan.schedule)
    if args.budget is None:
        candidates, steps = make_steps(args.search, args.n or DEFAULT_N, num_scales)
    else:
        tokens = pipeline.transformer.config.text_length if pipeline.pads_texts else TEXTS
        costs = SearchCost.measure(
            pipeline, plan, options["reward"], options["features"], prompts[0], text_tokens=tokens
        )

        def cost(candidates: int, steps: tuple) -> float:
            return costs.relative(Search(candidates=candidates, steps=steps, **options))

        candidates, steps = fit_budget(args.search, args.budget, num_scales, cost)
    search = Search(candidates=candidates, steps=steps, pictures=args.show_search, **options)
    check_idle(args, candidates, steps)
    return search


def check_idle(args: argparse.Namespace, candidates: int, steps: Sequence[Step]) -> None:
    """Raise ValueError if an option of the search could do nothing in it."""
    if args.enough is not None and (args.rounds or 1) == 1:
        raise ValueError(f"--enough {args.enough:g} ends the --rounds, and there is one: give --rounds 4, say")
    if candidates == 1 and (args.rounds or 1) == 1 and args.search in METHODS and speaks():
        print(
            f"nextscale: caution: --search {args.search} with one candidate is drawn as without a search; the paper's "
            "N = 1 begins with eight: --budget 2, say",
            file=sys.stderr,
        )
    if candidates == 1:
        return
    hows = {step.how for step in steps}
    acts = {"features": "cluster", "pooling": "cluster", "potential": "resample", "sharpness": "resample"}
    acts |= {"also_score": "resample"}
    for name, how in (acts | {"draw": "resample"}).items():
        value = getattr(args, name)
        if value is not None and how not in hows:
            option = f"--{name.replace('_', '-')} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
            raise ValueError(f"{option} is for steps that {how}, and --search {args.search} has none")
    if args.also_score is not None and (args.potential or "value") == "value":
        raise ValueError("--also-score is for potentials of several scores: give --potential max, sum or difference")
