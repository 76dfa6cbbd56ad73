"""Rewards and features by name, loaded only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sample.own_code import find_named
from sample.rewards import (
    Aesthetic,
    Callback,
    ClipScore,
    Features,
    FunctionFeatures,
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
FEATURES = "pixels, latent, scenes, dinov2, clip[:MODEL], vision:MODEL, or MODULE:FUNCTION"


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
        return Callback(find_function("reward", text), text)
    raise ValueError(f"reward must be {REWARDS}; got {text!r}")


def load_features(text: str, *, device: Any = "cpu") -> Features | None:
    """The features of a name: pixels, scenes, dinov2, clip, clip:MODEL, vision:MODEL, MODULE:FUNCTION; None for latent.

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
    if place and kind not in ("vision", "pixels", "latent", "dinov2"):
        return FunctionFeatures(find_function("features", text), text)
    raise ValueError(f"features must be {FEATURES}; got {text!r}")


def find_function(option: str, text: str) -> Callable:
    """The function of MODULE:FUNCTION. Raises ValueError if it is none."""
    module, _, name = text.partition(":")
    found = find_named(option, module, name)
    if not callable(found):
        raise ValueError(f"{option} {text} is no function")
    return found
