"""One row of the search benchmark: a search named in a few words, run on a suite of prompts, resumed where it stopped.

A row is a text: plain; METHOD@B, with as many candidates as a budget of B plain images allows, within 5 %, with all
networks and rounds; METHOD:N, with the N of the method; or steps, as 12/cluster@1:8/resample@4:3/best. Marks may
follow: +oracle (the judge itself is the reward), +noise=S (the reward's log-odds get Gaussian noise of that size),
+rounds=R+enough=P, +potential=max, +draw=systematic, +features=NAME, +sharpness=L, +guidance=T (of all candidates).
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation.judge import judge, score
from evaluation.search_whole import ORACLE
from evaluation.verdicts import prompt_intervals, widened
from sample.files import atomically, write_text
from sample.images import Request, to_uint8
from sample.ledger import Ledger
from sample.pipeline import NextScalePipeline
from sample.reward_names import load_features
from sample.rewards import Callback, Prompts, Reward
from sample.search import Search
from sample.search_cost import SearchCost
from sample.search_steps import METHODS, fit_budget, make_steps

MARKS: dict[str, Callable] = {
    "noise": float, "rounds": int, "enough": float, "sharpness": float, "potential": str, "draw": str, "features": str,
    "guidance": float,
}  # fmt: skip
_TEXT = re.compile(r"(\d+(?:/[\w@:]+)+|\w+)(?:([@:])([\d.]+))?((?:\+\w+(?:=[\w.:/-]+)?)*)")


@dataclass(frozen=True)
class Row:
    """A row's text, read.

    Attributes:
        method: of `sample.search_steps.METHODS`, or plain, or the steps themselves.
        budget, n: what decides the number of candidates; one of them, none for plain and steps.
        oracle: the judge is the reward.
        marks: the others.
    """

    text: str
    method: str
    budget: float | None = None
    n: float | None = None
    oracle: bool = False
    marks: dict = field(default_factory=dict)

    @property
    def settings(self) -> dict:
        """What the pipeline is told besides the search."""
        return {"guidance_scale": self.marks["guidance"]} if "guidance" in self.marks else {}

    @classmethod
    def of(cls, text: str) -> Row:
        """Read a row. Raises ValueError if that cannot be done."""
        match = _TEXT.fullmatch(text)
        alone = match is not None and (match[1] == "plain" or "/" in match[1])
        if not alone and not (match and match[1] in METHODS and match[2]):
            methods = ", ".join(METHODS)
            raise ValueError(f"a row is plain, METHOD@BUDGET or METHOD:N ({methods}), or steps; got {text!r}")
        words = [word.partition("=") for word in match[4].split("+")[1:]]
        unknown = [name for name, _, _ in words if name not in (*MARKS, "oracle")]
        if unknown:
            raise ValueError(f"marks of a row are oracle, {', '.join(MARKS)}; got {unknown[0]!r} in {text!r}")
        marks = {name: MARKS[name](value) for name, _, value in words if name != "oracle"}
        size = {"@": "budget", ":": "n"}.get(match[2] or "")
        oracle = any(name == "oracle" for name, _, _ in words)
        return cls(text, match[1], oracle=oracle, marks=marks, **({size: float(match[3])} if size else {}))


class NoisyReward:
    """A reward whose log-odds carry Gaussian noise, drawn from the picture and its prompt: a weaker verifier.

    The reward must give probabilities. The same picture and prompt always get the same noise.
    """

    def __init__(self, reward: Reward, noise: float):
        self.reward, self.noise, self.name = reward, noise, f"{reward.name}+noise={noise:g}"

    def __call__(self, images_BCHW: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """uint8 (B, 3, h, w) and B prompts to (B,)."""
        odds = torch.logit(self.reward(images_BCHW, prompts).double(), eps=1e-6)
        keys = [zlib.crc32(image.tobytes(), zlib.crc32(str(p).encode())) for image, p in _bytes(images_BCHW, prompts)]
        noise = torch.tensor([np.random.default_rng(key).standard_normal() for key in keys])
        return (odds + self.noise * noise).sigmoid().float()


def _bytes(images_BCHW: torch.Tensor, prompts: Prompts) -> zip:
    return zip(images_BCHW.cpu().contiguous().numpy(), prompts)


def oracle_of(metadatas: Sequence[dict]) -> Callback:
    """The scene judge as a reward, for rows that are marked oracle and nothing else."""
    by_prompt = {metadata["prompt"]: metadata for metadata in metadatas}

    def correct(images: np.ndarray, prompts: list) -> list[float]:
        return [float(judge(image, by_prompt[prompt]).correct) for image, prompt in zip(images, prompts)]

    return Callback(correct, ORACLE)


def search_of(row: Row, pipeline: NextScalePipeline, reward: Reward, metadatas: Sequence[dict]) -> Search | None:
    """The search of a row; None for plain. Raises ValueError as its parts do."""
    if row.method == "plain":
        return None
    marks = {name: value for name, value in row.marks.items() if name != "guidance"}
    plan = pipeline.make_plan(**row.settings)
    noise, features = marks.pop("noise", 0.0), load_features(marks.pop("features", "latent"))
    chosen = oracle_of(metadatas) if row.oracle else NoisyReward(reward, noise) if noise else reward
    options = {"reward": chosen, "features": features, **marks}
    if row.budget is None:
        candidates, steps = make_steps(row.method.replace("/", " "), row.n or 1, len(plan.schedule))
    else:
        cost = cost_of(pipeline, chosen, features, metadatas, **row.settings)
        plain = cost_of(pipeline, None, None, metadatas).plain
        candidates, steps = fit_budget(
            row.method,
            row.budget,
            len(plan.schedule),
            lambda many, ways: cost.flops(Search(candidates=many, steps=ways, **options)) / plain,
        )
    return Search(candidates=candidates, steps=steps, **options)


def cost_of(
    pipeline: NextScalePipeline, reward: Reward | None, features: object, metadatas: Sequence[dict], **settings: float
) -> SearchCost:
    """What a search's parts cost on this pipeline with these settings, with the longest prompt of a suite."""
    prompts = [metadata["prompt"] for metadata in metadatas]
    longest = pipeline.encode_prompt(prompts).mask_BT.shape[1]
    plan = pipeline.make_plan(**settings)
    return SearchCost.measure(pipeline, plan, reward, features, prompts[0], text_tokens=longest)


def run_row(
    row: Row,
    pipeline: NextScalePipeline,
    requests: Sequence[Request],
    search: Search | None,
    *,
    folder: Path,
    batch_size: int,
) -> list[dict]:
    """Every batch of a row, in order: `correct`, `scores`, `rounds`, `seconds` and `ledger` (its fields).

    Batches lie in `folder`, a JSON file each; those that are there are not made again.
    """
    size = max(1, batch_size // (search.candidates if search is not None else 1))
    name, batches = re.sub(r"[^\w.=@:+-]", "_", row.text), []
    own = folder / f"{name}-{size}"
    same_as_before(own / "search.json", {"row": row.text, "search": str(search)})
    with tqdm(total=len(requests), desc=row.text, unit="image", disable=None, leave=False) as bar:
        for begin in range(0, len(requests), size):
            batch = requests[begin : begin + size]
            path = own / f"{begin:06d}.json"
            if not path.exists():
                made = json.dumps(_run_batch(pipeline, batch, search, row.settings))
                atomically(path, lambda partial, made=made: partial.write_text(made, "utf-8"))
            batches.append(json.loads(path.read_text("utf-8")))
            bar.update(len(batch))
    return batches


def same_as_before(path: Path, settings: dict) -> None:
    """Note what a folder's batches were made with. Raises ValueError if that was something else."""
    if path.exists() and (before := json.loads(path.read_text("utf-8"))) != settings:
        differ = ", ".join(name for name in {**before, **settings} if before.get(name) != settings.get(name))
        raise ValueError(f"{path.parent} holds results of another {differ}: give another --work, or remove it")
    write_text(path, json.dumps(settings))


def _run_batch(pipeline: NextScalePipeline, batch: Sequence[Request], search: Search | None, settings: dict) -> dict:
    ledger, begin = Ledger(), time.perf_counter()
    prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
    output = pipeline(prompts, seed=seeds, hooks=[ledger], search=search, output_type="latent", **settings)
    decoded = output.search.decoded_BCHW if output.search is not None else None
    if decoded is None:
        decoded = ledger.call("decoder", pipeline.vqvae.decode, output.images)
    images = to_uint8(pipeline.image_processor.postprocess(decoded.detach().float(), output_type="np"))
    seconds = time.perf_counter() - begin
    found, counted = output.search, {name: getattr(ledger, name) for name in ("images", "tokens", "calls")}
    return {
        "correct": [judge(image, request.metadata).correct for image, request in zip(images, batch)],
        "scores": found.scores if found is not None else [None] * len(batch),
        "rounds": found.rounds if found is not None else [1] * len(batch),
        "seconds": seconds,
        "ledger": {**counted, "flops": ledger.total_flops},
    }


def row_of(
    row: Row,
    search: Search | None,
    batches: Sequence[dict],
    requests: Sequence[Request],
    plain_flops: float,
    *,
    seed: int,
) -> dict:
    """A row of the results: what was run, what it cost for an image, its scores with intervals over prompts."""
    n = len(requests)
    ledgers = [batch["ledger"] for batch in batches]
    calls = {name: sum(ledger["calls"].get(name, 0) for ledger in ledgers) / n for name in ("decoder", "reward")}
    flops = sum(ledger["flops"] for ledger in ledgers) / n
    correct = [good for batch in batches for good in batch["correct"]]
    metadatas = [request.metadata for request in requests]
    prompts = [Path(f"{request.group:05d}") for request in requests]
    scores = score(correct, metadatas)
    if len(set(prompts)) < n:
        scores = widened(scores, prompt_intervals(correct, metadatas, prompts, seed=seed))
    return {
        "row": row.text,
        "method": row.method,
        "reward": search.reward.name if search is not None else "none",
        "candidates": search.candidates if search is not None else 1,
        "steps": " ".join(map(str, search.steps)) if search is not None else "none",
        "compute": flops / plain_flops,
        "gflops_per_image": flops / 1e9,
        "tokens_per_image": sum(ledger["tokens"] for ledger in ledgers) / n,
        "decoder_calls_per_image": calls["decoder"],
        "reward_calls_per_image": calls["reward"],
        "rounds": float(np.mean([r for batch in batches for r in batch["rounds"]])),
        **({} if batches[0]["seconds"] is None else {"s_per_image": sum(b["seconds"] for b in batches) / n}),
        "score": scores.pop("overall"),
        "score_ci95": scores.pop("overall_ci95"),
        **scores,
    }
