"""Searches that choose among whole images (none, best-of-N, importance sampling) choose among the same ones: these are
made, scored and judged once for all such rows of the search benchmark.

Shapes: R requests of a batch, M candidates made of each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation.judge import judge
from sample.files import atomically
from sample.images import Request, to_uint8
from sample.ledger import Ledger
from sample.pipeline import NextScalePipeline
from sample.rewards import Reward, to_images
from sample.search import Search, candidate_seeds, choices_of, pick

ORACLE = "oracle"  # the name of the judge as a reward, for rows that are marked so


def is_whole(search: Search | None) -> bool:
    """Whether a search, or none, only chooses among finished images."""
    if search is None:
        return True
    return len(search.steps) == 1 and search.rounds == 1 and search.scored <= {search.steps[-1].scale}


def candidates_of(search: Search | None) -> int:
    """How many images a search chooses among."""
    return search.candidates if search is not None else 1


def rewards_of(searches: Sequence[Search | None], reward: Reward) -> dict[str, Reward]:
    """The rewards of several searches and one more, by name; the judge is none."""
    used = [reward, *(search.reward for search in searches if search is not None and search.reward is not None)]
    return {reward.name: reward for reward in used if reward.name != ORACLE}


def make_whole(
    pipeline: NextScalePipeline,
    requests: Sequence[Request],
    rewards: Mapping[str, Reward],
    candidates: int,
    *,
    settings: Mapping,
    folder: Path,
    batch_size: int,
) -> list[dict]:
    """`candidates` finished images of every request, in batches.

    Args:
        rewards: by name; all score all images.
        settings: of the pipeline's call.
        folder: batches lie there, a JSON file each; those that are there are not made again.

    Returns:
        Of each batch: `correct` [R][M], `scores` by reward [R][M], `ledger` (fields of all its images).
    """
    key = hashlib.sha256(json.dumps([sorted(rewards), sorted(settings.items())]).encode()).hexdigest()[:8]
    size, batches = max(1, batch_size // candidates), []
    with tqdm(total=len(requests), desc="whole images", unit="image", disable=None, leave=False) as bar:
        for begin in range(0, len(requests), size):
            batch = requests[begin : begin + size]
            path = folder / f"whole-{candidates}-{key}-{size}" / f"{begin:06d}.json"
            if not path.exists():
                made = json.dumps(_make_batch(pipeline, batch, rewards, candidates, settings))
                atomically(path, lambda partial, made=made: partial.write_text(made, "utf-8"))
            batches.append(json.loads(path.read_text("utf-8")))
            bar.update(len(batch))
    return batches


def _make_batch(
    pipeline: NextScalePipeline,
    batch: Sequence[Request],
    rewards: Mapping[str, Reward],
    candidates: int,
    settings: Mapping,
) -> dict:
    ledger = Ledger()
    prompts = [request.prompt for request in batch for _ in range(candidates)]
    seeds = [seed for request in batch for seed in candidate_seeds(request.seed, candidates)]
    output = pipeline(prompts, seed=seeds, hooks=[ledger], output_type="latent", **settings)
    decoded = ledger.call("decoder", pipeline.vqvae.decode, output.images)
    images = to_images(decoded.detach())
    scores = {}
    for i, (name, reward) in enumerate(rewards.items()):
        scores[name] = ledger.call("reward" if i == 0 else f"unpaid {name}", reward, images, prompts)
    finished = to_uint8(pipeline.image_processor.postprocess(decoded.detach().float(), output_type="np"))
    metadatas = [request.metadata for request in batch for _ in range(candidates)]
    correct = torch.tensor([judge(image, metadata).correct for image, metadata in zip(finished, metadatas)])
    return {
        "correct": correct.view(-1, candidates).tolist(),
        "scores": {name: found.view(-1, candidates).tolist() for name, found in scores.items()},
        "ledger": {"tokens": ledger.tokens, "model_flops": ledger.model_flops, "flops": ledger.flops},
    }


def choose_whole(search: Search | None, batches: Sequence[dict], requests: Sequence[Request]) -> list[dict]:
    """What a search gives that chooses among the first of the images made: batches as `search_runs.run_row` has them.

    Costs are those of the candidates it looks at; how long these alone would have taken is not known.
    """
    found, waiting = [], iter(requests)
    name = search.reward.name if search is not None and search.reward is not None else None
    looks = candidates_of(search) > 1 and search.calls()["reward"] > 0
    paid = looks and name in batches[0]["scores"]
    for batch in batches:
        made = len(batch["correct"]) * len(batch["correct"][0])
        used = len(batch["correct"]) * candidates_of(search)
        scores = batch["correct"] if name == ORACLE else batch["scores"].get(name, batch["correct"])
        chosen = [_choose(search, request, row) for row, request in zip(scores, waiting)]
        ledger = batch["ledger"]
        flops = ledger["model_flops"] + ledger["flops"]["decoder"] + paid * ledger["flops"].get("reward", 0)
        found.append(
            {
                "correct": [batch["correct"][row][place] for row, place in enumerate(chosen)],
                "scores": [float(scores[row][place]) if looks else None for row, place in enumerate(chosen)],
                "rounds": [1] * len(chosen),
                "seconds": None,
                "ledger": {
                    "tokens": ledger["tokens"] * used // made,
                    "calls": {"decoder": used, "reward": used * looks},
                    "flops": flops * used / made,
                },
            }
        )  # fmt: skip
    return found


def _choose(search: Search | None, request: Request, scores: Sequence[float]) -> int:
    """The number of the candidate that a search gives for a request, by the scores of all that were made."""
    if candidates_of(search) == 1:
        return 0
    step, history = search.steps[-1], [torch.tensor(scores[: search.candidates], dtype=torch.float32)]
    kept, _ = pick(search, step, search.candidates, history, None, choices_of(request.seed, step.scale))
    return kept[0]
