"""Rewards and features by name, loaded only when asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from sample.rewards import (
    Aesthetic,
    Callback,
    ClipScore,
    Features,
    PixelFeatures,
    Reward,
    VisionFeatures,
    hps,
    image_reward,
)
from sample.scene_reward import SceneRewardFeatures, load_scene_reward

CLIP = "openai/clip-vit-large-patch14"
PICKSCORE = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
DINO = "facebook/dinov2-large"
REWARDS = "scenes, clip[:MODEL], pickscore, aesthetic:FILE, imagereward, hps, or MODULE:FUNCTION"
FEATURES = "pixels, latent, scenes, dinov2, clip[:MODEL], or vision:MODEL"


def load_reward(text: str, *, device: Any = "cpu") -> Reward:
    """The reward of a name: scenes, clip, clip:MODEL, pickscore, aesthetic:FILE, imagereward, hps, MODULE:FUNCTION.

    Raises:
        ValueError: if there is no such reward, or its package is missing.
        FileNotFoundError: if its model cannot be had.
    """
    kind, _, place = text.partition(":")
    if kind == "scenes":
        return load_scene_reward(place or None, device=device)
    if kind == "clip":
        return ClipScore(place or CLIP, name=text, device=device)
    if kind == "pickscore" and not place:
        return ClipScore(*PICKSCORE, name=text, device=device)
    if kind == "aesthetic" and place:
        return Aesthetic(place, device=device)
    if text in ("imagereward", "hps"):
        return (image_reward if text == "imagereward" else hps)(device=device)
    if place and kind not in ("pickscore", "imagereward", "hps"):
        return Callback(find_function(kind, place), text)
    raise ValueError(f"reward must be {REWARDS}; got {text!r}")


def load_features(text: str, *, device: Any = "cpu") -> Features | None:
    """The features of a name: pixels, scenes, dinov2, clip, clip:MODEL, vision:MODEL; None for latent.

    "latent" is the running reconstruction itself: nothing needs to be decoded for it.

    Raises:
        ValueError: if there are none of that name.
        FileNotFoundError: if the model cannot be had.
    """
    kind, _, place = text.partition(":")
    if text == "latent":
        return None
    if text == "pixels":
        return PixelFeatures()
    if kind == "scenes":
        return SceneRewardFeatures(load_scene_reward(place or None, device=device))
    if kind == "vision" and place:
        return VisionFeatures(place, name=text, device=device)
    if kind == "clip":
        return VisionFeatures(place or CLIP, name=text, device=device)
    if text == "dinov2":
        return VisionFeatures(DINO, name=text, device=device)
    raise ValueError(f"features must be {FEATURES}; got {text!r}")


def find_function(module: str, function: str) -> Callable:
    """A function of an importable module.

    Raises:
        ValueError: if there is none.
    """
    if os.getcwd() not in sys.path:  # where a user's module is, for a command that is installed
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {module}:{function} cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"reward {module}:{function} is no function")
    return found
