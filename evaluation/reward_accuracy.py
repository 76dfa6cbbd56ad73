"""How well a reward, reading unfinished pictures, foretells the verdict on the finished ones: what decides when a
search should choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import pearsonr
from tqdm import tqdm

from evaluation.judge import judge
from sample.images import History, Request, to_uint8
from sample.pipeline import NextScalePipeline
from sample.rewards import Reward, to_images


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """How often a good one scores above a bad one, ties half; NaN without both."""
    high, low = scores[good], scores[~good]
    if not len(high) or not len(low):
        return float("nan")
    ordered = np.sort(low)
    wins = np.searchsorted(ordered, high, "left") + np.searchsorted(ordered, high, "right")
    return float(wins.mean() / (2 * len(low)))


def auc_within(scores: np.ndarray, good: np.ndarray, groups: np.ndarray) -> float:
    """`auc` over pairs of one prompt's images only, what a search has to choose among; NaN without any such pair."""
    wins = pairs = 0.0
    for group in np.unique(groups):
        own = groups == group
        count = int(good[own].sum()) * int((~good[own]).sum())
        if count:
            wins += auc(scores[own], good[own]) * count
            pairs += count
    return wins / pairs if pairs else float("nan")


def by_scale(
    pipeline: NextScalePipeline,
    requests: Sequence[Request],
    reward: Reward,
    *,
    weaker: Sequence[Reward] = (),
    batch_size: int,
) -> list[dict]:
    """A row for each scale: `auc`, `auc_within_prompts`, and `correlation` with the reward at the end.

    All are of the reward on pictures decoded after that scale against the judge's verdict on the finished ones. Of the
    `weaker` rewards there is one row each, of the finished pictures.
    """
    rewards = [reward, *weaker]
    scores: dict[tuple[int, int], list[float]] = {}
    good: list[bool] = []
    for begin in tqdm(range(0, len(requests), batch_size), desc="reward by scale", disable=None, leave=False):
        batch, history = requests[begin : begin + batch_size], History()
        prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
        output = pipeline(prompts, seed=seeds, hooks=[history], output_type="latent")
        finished = to_uint8(pipeline.decode(output.images, "np"))
        good += [judge(image, request.metadata).correct for image, request in zip(finished, batch)]
        for k, f_hat in enumerate(history.f_hats):
            images = to_images(pipeline.vqvae.decode(f_hat).detach())
            for i, each in enumerate(rewards if k == len(history.f_hats) - 1 else rewards[:1]):
                scores.setdefault((i, k), []).extend(each(images, prompts).tolist())
    verdicts, groups = np.array(good), np.array([request.group for request in requests])
    last = max(k for _, k in scores)
    rows = []
    for (i, k), found in sorted(scores.items()):
        now, final = np.array(found), np.array(scores[i, last])
        row = {"reward": rewards[i].name, "scale": k, "auc": auc(now, verdicts)}
        row["auc_within_prompts"] = auc_within(now, verdicts, groups)
        row["correlation"] = float(pearsonr(now, final).statistic) if now.std() * final.std() > 0 else float("nan")
        rows.append({name: None if value != value else value for name, value in row.items()})
    return rows
