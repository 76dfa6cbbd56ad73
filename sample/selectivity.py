"""How narrowly each layer of a model attends, measured on a few images: what ScaleKV's budgets follow (section 3)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sample.plan import Plan
from var.scalekv import SelectivityCache

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline
    from var.transformer import NextScaleTransformer


def measure_selectivity(
    pipeline: NextScalePipeline,
    prompts: list[str] | list[int],
    *,
    model: NextScaleTransformer | None = None,
    per_prompt: int = 1,
    seed: int = 0,
    top: float = 0.1,
) -> list[list[float]]:
    """The attention selectivity index of each layer at each scale, [layer][scale], averaged over images.

    Args:
        prompts: texts, or classes of a class model; `per_prompt` images of each, with the model's own settings.
        model: measured instead of the pipeline's transformer (its refiner).
        top: share of the history whose weight counts as narrow, in (0, 1].

    Raises:
        ValueError: of a model that keeps nothing of earlier scales (block_diagonal).
    """
    model = model or pipeline.transformer
    if not model.reads_earlier:
        raise ValueError("this model's attention stays within each scale: there is no cache to calibrate")
    caches: list[SelectivityCache] = []

    first = replace(pipeline.make_plan("var").stages[0], model=model, mask_schedule=None)

    def recorder() -> SelectivityCache:
        caches.append(SelectivityCache(len(model.blocks), first.pyramid, top=top))
        return caches[-1]

    stage = replace(first, new_cache=recorder)
    name = "class_labels" if pipeline.by_class else "prompt"
    for place, prompt in enumerate(prompts):
        pipeline(
            **{name: [prompt]},
            num_images_per_prompt=per_prompt,
            seed=seed + place * per_prompt,
            plan=Plan((stage,)),
            output_type="latent",
        )
    mean_LK = sum(cache.index_LK for cache in caches) / len(caches)
    return [[round(value, 6) for value in row] for row in mean_LK.tolist()]
