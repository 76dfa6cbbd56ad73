"""Requests to a stream of images. Where they end up: `sample.sinks`.

An image depends on its request and the settings alone, unless a hook compares images: any batch size and any number of
processes give the same pictures, up to rounding (docs/architecture.md).

Shapes: K scales, h w pixels. Images are uint8 RGB, (h, w, 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sample.draw import seeds_from
from sample.state import GenerationState, Hook

if TYPE_CHECKING:
    from sample.pipeline import NextScaleOutput, NextScalePipeline


@dataclass(frozen=True)
class Request:
    """One image to make.

    Attributes:
        prompt: a text, or an int: a class for a class model.
        seed: the image's name.
        group: which prompt of the job this is.
        place: which image of that prompt this is.
        metadata: the GenEval line of the prompt, if it came from such a file.
    """

    prompt: str | int
    seed: int
    group: int = 0
    place: int = 0
    metadata: dict[str, Any] | None = None


def make_requests(
    prompts: Sequence[str | int] | str | int,
    *,
    per_prompt: int = 1,
    seed: int = 0,
    metadata: Sequence[dict[str, Any]] | None = None,
) -> list[Request]:
    """`per_prompt` images of each prompt; image i of them all gets seed + i, as in one call of the pipeline.

    Args:
        prompts: texts or classes; one of them alone will do, too.

    Raises:
        ValueError: if a seed is not in [0, 2**63).
    """
    prompts = [prompts] if isinstance(prompts, str | int) else prompts
    seeds_from(seed, len(prompts) * per_prompt)
    return [
        Request(prompt, seed + group * per_prompt + place, group, place, metadata[group] if metadata else None)
        for group, prompt in enumerate(prompts)
        for place in range(per_prompt)
    ]


def image_stream(
    pipeline: NextScalePipeline,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    every_scale: bool = False,
    each_once: bool = False,
    on_output: Callable[[list[Request], NextScaleOutput], Any] | None = None,
    **settings: Any,
) -> Iterator[tuple[Request, np.ndarray]]:
    """Every request with its image, in order, made batch by batch as they are asked for.

    A request whose image a hook drops is left out; one that it copies comes several times.

    Args:
        requests: what to make; give `sink.missing(requests)` to leave out what is finished.
        batch_size: images made at once; with a search, about so many candidates.
        on_output: given every batch with the pipeline's output.
        every_scale: yield (K, h, w, 3), the picture after each scale, instead of the last one (h, w, 3).
        each_once: refuse hooks that drop, copy or move images, before the first image of a batch is given.
        settings: of the pipeline's call: guidance_scale, top_k, plan, hooks, ...

    Raises:
        ValueError: on a setting that is not allowed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    hooks = tuple(settings.pop("hooks", ()))
    searches = settings.get("search") is not None
    if searches:
        if every_scale:
            raise ValueError("every_scale shows images that go on to the end; a search drops some: leave out one")
        batch_size = max(1, batch_size // settings["search"].candidates)
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        left = History() if every_scale else Left() if hooks and not searches else None
        name = "class_labels" if isinstance(batch[0].prompt, int) else "prompt"
        output = pipeline(
            **{name: [request.prompt for request in batch]},
            seed=[request.seed for request in batch],
            output_type="latent" if every_scale else "np",
            hooks=hooks if left is None else (*hooks, left),
            **settings,
        )
        if each_once and left is not None:
            check_origins(left.origins, len(batch))
        if on_output is not None:
            on_output(list(batch), output)
        scales = [pipeline.decode(f_hat, "np") for f_hat in left.f_hats] if every_scale else [output.images]
        batch = batch if left is None else [batch[origin] for origin in left.origins]
        for images in scales:
            check_finite(batch, images)
        pictures = np.stack([to_uint8(images) for images in scales], axis=1)
        yield from zip(batch, pictures if every_scale else pictures[:, 0], strict=True)


def check_origins(origins: Sequence[int], count: int) -> None:
    """Raise ValueError unless hooks left every image of a batch of `count` in its place."""
    if list(origins) != list(range(count)):
        raise ValueError("a plugin drops, copies or moves images: a job has each of them once, in order")


def check_finite(requests: Sequence[Request], images: np.ndarray) -> None:
    """Raise ValueError, naming the first image, if one holds NaN or infinity: its PNG would look like any other."""
    for request, image in zip(requests, images):
        if not np.isfinite(image).all():
            raise ValueError(
                f"the image of {request.prompt!r}, seed {request.seed}, is not finite: try another dtype (float32)"
            )


class Left(Hook):
    """Which image of the request each row is in the end; give it last.

    Attributes:
        origins: their numbers.
    """

    origins: list[int]

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        self.origins = state.origins


class History(Left):
    """Keeps the running reconstruction after each scale, too.

    Attributes:
        f_hats: after each scale, (B, C, H, W), of the rows there are in the end.
    """

    f_hats: list[torch.Tensor]

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        super().on_scale_end(state, k)
        state.extras[f"f_hat{k}"] = state.f_hat_BCHW
        self.f_hats = [state.extras[f"f_hat{earlier}"] for earlier in range(k + 1)]


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[0, 1] floats to 0..255 by rounding: what a PNG of the image holds."""
    return (image * 255).round().astype(np.uint8)


def process_share(requests: Sequence[Request], block: int = 1) -> list[Request]:
    """This process's requests: blocks of `block` are dealt round to the processes that accelerate started."""
    from accelerate import PartialState

    state = PartialState()
    return [r for i, r in enumerate(requests) if i // block % state.num_processes == state.process_index]
