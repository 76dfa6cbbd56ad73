"""The search benchmark: `python -m evaluation.search_benchmark --model scenes --out results/search.json`.

Score against compute of every method at equal FLOPs, how well the reward foretells the judge's verdict at each scale,
and what searching does as the reward gets worse. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.command import Parser, add_out, check_least, in_one_line
from evaluation.report import command_of, file_digest, result, short_digest, table, write_result
from evaluation.scenes import TAGS, prompt_suite
from sample.commands.plan_options import add_place_options

BUDGETS = (1, 2, 4, 8)
COMPARED = ("best", "importance", "tts", "halving", "resample", "cluster", "random")
NOISES = (2, 4, 8, 16)
ENOUGH = 0.5  # of the scenes reward: with four rounds, nine tenths of the gain of best-of-4 at half its price
# TTS-VAR's own, Infinity-2B on GenEval: what our curve is read against.
PAPER = {"plain": 0.695, "importance:8": 0.718, "best:8": 0.736, "tts:2": 0.740, "tts:8": 0.753}


def default_rows() -> list[str]:
    """Every method at every budget, the paper's N = 2, rounds until enough, both without guidance, the judge as reward,
    weaker rewards.
    """
    rows = ["plain", *(f"{method}@{budget}" for method in COMPARED for budget in BUDGETS[1:]), "tts:2"]
    rows += [f"best:1+rounds={rounds}+enough={ENOUGH}" for rounds in (2, 4, 8, 16)]
    rows += [f"best:1+rounds={rounds}+enough={ENOUGH}+guidance=0" for rounds in (4, 8, 16)]
    rows += ["best:1+rounds=16+enough=0.8+guidance=0"]
    rows += [f"best@{budget}+guidance=0" for budget in BUDGETS[1:]]
    rows += ["best@8+oracle"]
    rows += [f"best@4+noise={noise}" for noise in NOISES]
    return rows + [f"tts@4+noise={noise}" for noise in NOISES[1::2]]


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m evaluation.search_benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="scenes", help="scenes (bundled), a model folder, a training run")
    parser.add_argument("--reward", default="scenes", help="as of nextscale sample; must give probabilities for noise")
    parser.add_argument(
        "--rows", help="rows after commas, see evaluation.search_runs (the default: those of results/search.md)"
    )
    parser.add_argument("--per-tag", type=int, default=92, help="prompts of each tag (92: 552 prompts)")
    parser.add_argument("--n", type=int, default=4, help="images of each prompt (4)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, images and resampling (0)")
    parser.add_argument("--batch-size", type=int, default=256, help="candidates at once (256)")
    add_place_options(parser)
    parser.add_argument("--fast", default="auto", help="as of nextscale sample: on, auto (the default), off")
    parser.add_argument("--work", type=Path, help="where finished batches are kept (cache/search/...)")
    add_out(parser, "results/search.json", "result, table and picture")
    return parser


def measure(options: argparse.Namespace) -> dict:
    """Run all rows; the result as `report.result` makes it, with the reward's accuracy under `reward_by_scale`."""
    from evaluation.reward_accuracy import by_scale
    from evaluation.search_runs import NoisyReward, Row, cost_of, row_of, run_row, same_as_before, search_of
    from evaluation.search_whole import candidates_of, choose_whole, is_whole, make_whole, rewards_of
    from sample.files import write_text
    from sample.images import make_requests
    from sample.load import load_pipeline, model_digest
    from sample.reward_names import load_reward
    from sample.scene_reward import SHIPPED

    rows = [Row.of(text) for text in (options.rows.split(",") if options.rows else default_rows())]
    pipeline = load_pipeline(options.model, dtype=options.dtype, device=options.device, fast=options.fast)
    pipeline.set_progress_bar_config(disable=True)
    reward = load_reward(options.reward, device=pipeline.transformer.device)
    metadatas = prompt_suite(options.per_tag, options.seed)
    prompts = [metadata["prompt"] for metadata in metadatas]
    requests = make_requests(prompts, per_prompt=options.n, seed=options.seed, metadata=metadatas)
    plain = cost_of(pipeline, None, None, metadatas).plain
    searches = [search_of(row, pipeline, reward, metadatas) for row in rows]
    settings = {"model_digest": model_digest(options.model), "reward": options.reward, "per_tag": options.per_tag}
    settings |= {"images_per_prompt": options.n, "seed": options.seed, "dtype": str(pipeline.transformer.dtype)}
    if options.reward == "scenes":
        settings["reward_digest"] = file_digest(SHIPPED)
    if options.fast != "auto":
        settings["fast"] = options.fast
    folder = options.work or Path("cache/search") / short_digest(settings)
    same_as_before(folder / "settings.json", settings | {"noises": list(NOISES)})
    found, sizes = [], {"folder": folder, "batch_size": options.batch_size}
    for row, search in zip(rows, searches):
        if is_whole(search):
            alike = [other for r, other in zip(rows, searches) if is_whole(other) and r.settings == row.settings]
            shared = {"rewards": rewards_of(alike, reward), "candidates": max(map(candidates_of, alike))}
            whole = make_whole(pipeline, requests, **shared, settings=row.settings, **sizes)
            batches = choose_whole(search, whole, requests)
        else:
            batches = run_row(row, pipeline, requests, search, **sizes)
        found.append(row_of(row, search, batches, requests, plain, seed=options.seed))
        print(f"{row.text}: score {found[-1]['score']:.4f} at {found[-1]['compute']:.2f} x plain", flush=True)
    noisy = [NoisyReward(reward, noise) for noise in NOISES]
    scales = folder / "reward_by_scale.json"
    if not scales.exists():
        made = by_scale(pipeline, requests, reward, weaker=noisy, batch_size=options.batch_size)
        write_text(scales, json.dumps(made))
    command = command_of(parser_of(), options)
    content = result(found, command=command, n=len(requests), seeds=options.seed, settings=settings)
    by_scales = json.loads(scales.read_text("utf-8"))
    return {**content, "prompts": len(prompts), "reward_by_scale": by_scales, "paper": PAPER}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result, its table and its picture."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with in_one_line(parser, kept="the same command continues"):
        check_least(options, per_tag=1, n=1, batch_size=1, seed=0)
        if options.out.suffix != ".json":
            raise ValueError(f"--out must be a .json file, got {options.out}")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the picture beside --out needs matplotlib: pip install 'nextscale[plots]'")
        content = measure(options)
        from evaluation.search_picture import draw_search

        print(table(content["rows"], ["row", "compute", "score", *TAGS]))
        write_result(options.out, content)
        draw_search(content, options.out.with_suffix(".png"))
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
