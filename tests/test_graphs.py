"""Recorded calls: what is replayed equals the plain path, and calls that differ are kept apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sample.draw import Filter, keep_top_k
from sample.fast import FastSettings, accelerate
from sample.graphs import GraphedSampler, Recorder, own_copies, replays
from sample.guidance import Guidance
from sample.pipeline import NextScalePipeline
from sample.plan import Plan
from tokenizer.model import MultiScaleVQ
from var.transformer import NextScaleTransformer


def pipeline() -> NextScalePipeline:
    """A small class model."""
    torch.manual_seed(0)
    schedule = "1,2,3,4"
    vqvae = MultiScaleVQ(channels=[32, 32], latent_channels=8, vocab_size=32, schedule=schedule).eval()
    sizes = {"depth": 2, "width": 32, "heads": 2, "vocab_size": 32, "latent_channels": 8, "num_classes": 5}
    made = NextScalePipeline(NextScaleTransformer(**sizes, schedule=schedule).eval(), vqvae)
    made.set_progress_bar_config(disable=True)
    return made


def replay_of(recorded: list):
    """A recorder's `record` that notes what it is given and computes on copies, as a graph does."""

    def record(function, tensors):
        inputs = own_copies(tensors)
        recorded.append([tensor.shape for tensor in tensors])

        def replay(given):
            for own, new in zip(inputs, given):
                own.copy_(new)
            return [output.clone() for output in function(*inputs)]

        return replay

    return record


def test_a_call_is_recorded_when_it_comes_again() -> None:
    recorded: list = []
    recorder = Recorder(replay_of(recorded), kept=2)
    double = lambda x: [2 * x]  # noqa: E731
    results = [recorder.run("a", double, [torch.full((3,), float(i))])[0] for i in range(4)]
    assert [r[0].item() for r in results] == [0, 2, 4, 6] and len(recorded) == 1
    recorder.run("b", double, [torch.zeros(3)])  # another key, then another shape: not recorded, and "a" is forgotten
    recorder.run("a", double, [torch.zeros(4)])
    recorder.run("a", double, [torch.zeros(3)])
    assert len(recorded) == 1 and len(recorder.calls) == 2


def test_replayed_images_are_those_of_the_plain_path() -> None:
    recorded: list = []
    plain, graphed = pipeline(), pipeline()
    graphed.graphed = GraphedSampler(graphed.vqvae, Recorder(replay_of(recorded)))
    for seed, labels, guidance in ((0, [1, 2], 2.0), (5, [3, 4], 2.0), (9, [0, 1], 2.0), (9, [0, 1], 0.0)):
        call = {"class_labels": labels, "seed": seed, "guidance_scale": guidance, "output_type": "pt"}
        expected, made = plain(**call), graphed(**call)
        assert torch.equal(expected.images, made.images) and made.seeds == expected.seeds
        assert all(torch.equal(a, b) for a, b in zip(expected.tokens, made.tokens))
    assert len(recorded) == 2  # the loop with guidance, and the decoder


def test_filters_and_guidance_that_may_be_equal_and_differ_are_not_replayed() -> None:
    class Fewer(Filter):
        def __init__(self, count: int) -> None:
            super().__init__()
            object.__setattr__(self, "count", count)

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return keep_top_k(logits, self.count)

    made = pipeline()
    (stage,) = made.make_plan().stages
    one, other = (Plan((replace(stage, filters=Fewer(count)),)) for count in (1, 32))
    assert one == other and replays(made.make_plan()) and not replays(one)

    class Own(Guidance):
        pass

    assert not replays(Plan((replace(stage, guidance=Own()),)))
    recorded: list = []
    made.graphed = GraphedSampler(made.vqvae, Recorder(replay_of(recorded)))
    call = {"class_labels": [1, 2], "seed": 0, "output_type": "latent"}
    images = [made(**call, plan=plan).images for plan in (one, one, other)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2]) and not recorded


def test_what_is_recorded_in_inference_mode_is_replayed_outside() -> None:
    recorder = Recorder(replay_of([]))
    double = lambda x: [2 * x]  # noqa: E731
    with torch.inference_mode():
        for i in range(2):
            recorder.run("a", double, [torch.full((3,), float(i))])
    assert recorder.run("a", double, [torch.ones(3)])[0].tolist() == [2, 2, 2]


def test_hooks_and_caches_that_choose_run_plainly() -> None:
    recorded, seen = [], []
    graphed = pipeline()
    graphed.graphed = GraphedSampler(graphed.vqvae, Recorder(replay_of(recorded)))
    chosen, pruned = (graphed.make_plan(**words) for words in ({"cache": "window:50%"}, {"prune": "50%"}))
    for _ in range(3):
        graphed(class_labels=1, seed=0, output_type="latent", callback_on_step_end=lambda p, k, side, t: seen.append(k))
        graphed(class_labels=1, seed=0, output_type="latent", plan=chosen)
        graphed(class_labels=1, seed=0, output_type="latent", plan=pruned)
    assert seen == [0, 1, 2, 3] * 3 and not recorded
    for _ in range(2):  # nothing is chosen where scales are left out whole
        graphed(class_labels=1, seed=0, output_type="latent", prune="100%", guidance_until=2)
    assert recorded


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_draw_the_tokens_of_the_plain_path(dtype: torch.dtype) -> None:
    plain, graphed = (pipeline().to("cuda", dtype) for _ in range(2))
    accelerate(graphed, FastSettings(graphs=True))
    for seed in range(4):
        call = {"class_labels": [1, 2], "seed": seed, "top_k": 20, "top_p": 0.9, "output_type": "pt"}
        expected, made = plain(**call), graphed(**call)
        assert all(torch.equal(a, b) for a, b in zip(expected.tokens, made.tokens))
        assert torch.equal(expected.images, made.images)
