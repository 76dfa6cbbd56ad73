"""Sampling as CUDA graphs: a call that comes again is recorded once and replayed, without Python between its kernels.

One graph holds the whole loop, from the condition to the last scale's codes, and one the decoder. A recording replays
the kernels of the call that was recorded, so tokens and pixels are its, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch

from sample.draw import Filter, check_finite
from sample.generate import play, start
from sample.guidance import Guidance
from sample.plan import Plan
from sample.state import GenerationState
from tokenizer.model import MultiScaleVQ
from var.cache import KVCache
from var.conditioning import Prompt

KEPT = 8  # calls remembered by a `Recorder`: a recorded one holds its inputs and results

Function = Callable[..., Sequence[torch.Tensor]]
Replay = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


@dataclass
class Call:
    """A call that came before. key: what it depends on beside tensors.  replay: its recording, once there is one."""

    key: Any
    shapes: list[tuple[torch.Size, torch.dtype]]
    replay: Replay | None = None


class Recorder:
    """Runs functions of tensors: plainly at the first call of a kind, recorded at the second, replayed from then on.

    Args:
        record: makes a recording of a function and example tensors; `record_graph` but for tests.
        kept: calls remembered; the one that was used longest ago goes first.
    """

    def __init__(self, record: Callable[[Function, Sequence[torch.Tensor]], Replay] | None = None, kept: int = KEPT):
        self.record, self.kept = record or record_graph, kept
        self.calls: list[Call] = []

    def run(self, key: Any, function: Function, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """`function(*tensors)`; equal `key` and shapes must mean equal work. The result is the caller's own."""
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        place = next((i for i, call in enumerate(self.calls) if call.shapes == shapes and call.key == key), None)
        if place is None:
            self.calls = [*self.calls, Call(key, shapes)][-self.kept :]
            return function(*tensors)
        call = self.calls.pop(place)
        self.calls.append(call)
        if call.replay is None:
            call.replay = self.record(function, tensors)
        return call.replay(tensors)


@cache
def shared_pool(device: torch.device) -> torch.cuda.MemPool:
    """The memory in which all graphs of a GPU work: they run one after another, and results are copied out.

    It is held for good: a pool that only graphs hold is gone with the last of them, and its name cannot be used again.
    """
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a GPU are recorded; torch's own is of the GPU that recorded first."""
    return torch.cuda.Stream(device)


def own_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that may be written to later in any mode, made in any."""
    with torch.inference_mode(False):
        return [tensor.clone() for tensor in tensors]


def record_graph(function: Function, tensors: Sequence[torch.Tensor]) -> Replay:
    """A CUDA graph of `function` on copies of `tensors`, which must all be on one GPU."""
    place = tensors[0].device
    with torch.cuda.device(place):
        inputs, aside = own_copies(tensors), recording_stream(place)
        torch.cuda.empty_cache()  # what the plain call before left free, another stream cannot use
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up outside of the recording
            function(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=shared_pool(place).id, stream=aside):
            outputs = function(*inputs)

    def replay(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for own, new in zip(inputs, given):
            own.copy_(new)
        graph.replay()
        return [output.clone() for output in outputs]

    return replay


def replays(plan: Plan) -> bool:
    """Whether equal plans are alike in all that a recording holds: no cache chooses as it goes, and what is guided and
    filtered is of the kinds known here, which are equal only if they do the same.
    """
    ours = all(
        type(stage.guidance) is Guidance and all(type(stage.filter(k)) is Filter for k in stage.scales)
        for stage in plan.stages
    )
    return ours and all(type(stage.make_cache()) is KVCache for stage in plan.stages)


class GraphedSampler:
    """`generate` and the decoder through a `Recorder`, for calls without hooks."""

    def __init__(self, vqvae: MultiScaleVQ, recorder: Recorder | None = None):
        self.vqvae, self.recorder = vqvae, recorder or Recorder()

    @torch.no_grad()
    def generate(self, plan: Plan, prompt: Prompt, seeds: Sequence[int]) -> GenerationState:
        """As `sample.generate.generate`: the final state, checked when all is drawn."""
        quantizer = self.vqvae.quantizer
        state = start(plan, quantizer, prompt, seeds)
        names = [field.name for field in fields(prompt)]

        def loop(uniforms_BLn: torch.Tensor, *parts: torch.Tensor) -> list[torch.Tensor]:
            begun = quantizer.start(len(uniforms_BLn), plan.schedule, uniforms_BLn.device)
            again = type(prompt)(**dict(zip(names, parts)))
            made = play(GenerationState(plan, quantizer, again, None, state.seeds, uniforms_BLn, begun))
            finite = torch.ones((), dtype=torch.bool) if made.finite is None else made.finite
            return [made.f_hat_BCHW, finite, *made.tokens]

        given = [state.uniforms_BLn, *(getattr(prompt, name) for name in names)]
        state.f_hat_BCHW, state.finite, *state.tokens = self.recorder.run(plan, loop, given)
        check_finite(state.finite)
        return state

    @torch.no_grad()
    def decode(self, f_hat_BCHW: torch.Tensor) -> torch.Tensor:
        """As `MultiScaleVQ.decode`."""
        return self.recorder.run(("decode", self.vqvae.slice), lambda f_hat: [self.vqvae.decode(f_hat)], [f_hat_BCHW])[
            0
        ]
