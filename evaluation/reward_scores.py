"""What rewards, as `--search` takes them, say of finished images and their prompts: ImageReward, HPS, PickScore, CLIP.

Shapes: N images of h w pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.intervals import Z95
from evaluation.report import portable
from sample.reward_names import load_reward
from sample.rewards import Reward, check_scores


def load_rewards(text: str, *, device: Any = "cpu") -> dict[str, Reward]:
    """The rewards of a list with commas ("pickscore,clip:MODEL"), each under its figure's name.

    Raises:
        ValueError: as `load_reward`, or if the list is empty, or two figures would have one name.
        FileNotFoundError: as `load_reward`.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"--rewards must name rewards with commas between them, got {text!r}")
    columns = [column_of(name) for name in names]
    twice = next((name for name, column in zip(names, columns) if columns.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"--rewards gives two figures named {column_of(twice)}, the second by {names[-1]!r}")
    return {column: load_reward(name, device=device) for column, name in zip(columns, names)}


def column_of(name: str) -> str:
    """What the figure of a reward is called: `reward_pickscore`, `reward_clip_my_model` of clip:/models/my-model."""
    kind, _, place = name.partition(":")
    return re.sub(r"\W+", "_", f"reward_{kind}_{Path(place).name}" if place else f"reward_{kind}")


def published(text: str) -> str:
    """A list of rewards without this machine's part of the paths in it."""
    parts = [part.strip().partition(":") for part in text.split(",") if part.strip()]
    return ",".join(
        f"{kind}{colon}{portable(place) if Path(place).is_absolute() else place}" for kind, colon, place in parts
    )


def reward_figures(
    images: Iterable[np.ndarray], prompts: Sequence[str], rewards: dict[str, Reward], *, batch_size: int
) -> dict:
    """The mean of each reward over images uint8 (h, w, 3), their sizes may differ, and its interval under `NAME_ci95`.

    Images of one prompt are alike, so the 95 % interval is one over prompts: +-1.96 standard errors of the mean with
    prompts as clusters; absent for a single prompt.

    Raises:
        ValueError: if there is not one prompt an image, or a reward gives no finite number for each.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in rewards}
    begin = 0
    for batch in batches(images, batch_size):
        about = prompts[begin : begin + len(batch)]
        if len(about) < len(batch):
            raise ValueError(f"rewards need one prompt an image, got {len(prompts)} prompts")
        pictures = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        for name, reward in rewards.items():
            found[name].append(check_scores(reward(pictures, about), reward, len(batch)))
        begin += len(batch)
    if begin != len(prompts):
        raise ValueError(f"rewards need one prompt an image, got {len(prompts)} prompts for {begin} images")
    figures: dict = {}
    for name, scores in found.items():
        scores_N = torch.cat(scores).double().numpy()
        figures[name] = float(scores_N.mean())
        half = clustered_half(scores_N, prompts)
        if half is not None:
            figures[f"{name}_ci95"] = [figures[name] - half, figures[name] + half]
    return figures


def clustered_half(scores_N: np.ndarray, prompts: Sequence[str]) -> float | None:
    """Half the 95 % interval of a mean of scores (N,) that come in prompts; None of one prompt."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    if len(places) < 2:
        return None
    off = np.bincount([places[prompt] for prompt in prompts], scores_N - scores_N.mean())
    return Z95 * float(np.sqrt((off**2).sum() * len(off) / (len(off) - 1))) / len(scores_N)


def batches(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Up to `size` consecutive images of one shape each."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (len(batch) == size or image.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
