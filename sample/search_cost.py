"""What a search will cost, in plain images, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from sample.costs import plan_flops
from sample.ledger import call_flops
from sample.plan import Plan
from sample.rewards import Features, Reward, to_images
from sample.search import Search

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline


@dataclass(frozen=True)
class SearchCost:
    """FLOPs of the parts of a search, for one row each.

    Attributes:
        plan, text_tokens: what the transformers do, with prompts of that length.
        decoder, reward, features: of one image.
    """

    plan: Plan
    decoder: int
    reward: int = 0
    features: int = 0
    text_tokens: int = 0

    @classmethod
    def measure(
        cls,
        pipeline: NextScalePipeline,
        plan: Plan,
        reward: Reward | None,
        features: Features | None,
        prompt: str | int,
        *,
        text_tokens: int = 0,
    ) -> Self:
        """Each network run once on a grey image; `prompt` is one that the reward can read."""
        quantizer, device = pipeline.vqvae.quantizer, pipeline.transformer.device
        f_hat_BCHW = quantizer.start(1, plan.schedule, device)
        with torch.no_grad():
            images = to_images(pipeline.vqvae.decode(f_hat_BCHW))
        return cls(
            plan,
            decoder=call_flops(pipeline.vqvae.decode, f_hat_BCHW),
            reward=call_flops(reward, images, [prompt]) if reward is not None else 0,
            features=call_flops(features, images) if features is not None else 0,
            text_tokens=text_tokens,
        )

    @property
    def plain(self) -> int:
        """FLOPs of an image without a search, its decoding included."""
        return plan_flops(self.plan, text_tokens=self.text_tokens) + self.decoder

    def flops(self, search: Search) -> int:
        """The most FLOPs an image costs with a search, in all its rounds, the decoding of the result included."""
        calls = search.calls()
        widths = search.widths(len(self.plan.schedule))
        networks = sum(calls[name] * getattr(self, name) for name in calls)
        return search.rounds * (plan_flops(self.plan, widths, text_tokens=self.text_tokens) + networks)

    def relative(self, search: Search) -> float:
        """That in plain images."""
        return self.flops(search) / self.plain
