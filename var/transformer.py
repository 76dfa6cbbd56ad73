"""The next-scale-prediction transformer (VAR, section 3; text options as in Infinity, section 3).

Shapes: B images, l tokens of the scales at hand, L all tokens, C latent channels, D width, V codes, T text tokens,
n bits of a bitwise token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import sqrt
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache
from var.conditioning import ClassConditioner, Conditioning, Prompt, TextConditioner
from var.heads import BitwiseHead, CategoricalHead
from var.layers import AdaLinear, Block, rope_table
from var.masked import MaskedPrediction
from var.masks import PREDICATES, Mask, attention_mask
from var.sequential import SequentialHead


class NextScaleTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts all tokens of a scale at once from the scales before it.

    Args:
        depth: blocks.
        width: D.
        heads: attention heads.
        vocab_size: V of the tokenizer.
        latent_channels: C of the tokenizer.
        schedule: sides of the scales, anything `ScaleSchedule.of` reads; stored as a list of [h, w].
        conditioning: "class" or "text".
        num_classes: classes of a class model (index num_classes is the null class).
        text_width: width of the text encoder, for a text model.
        text_length: the longest prompt in tokens, for a text model.
        mlp_ratio: hidden width of the feed-forward over D.
        qk_norm: cosine attention with a learned temperature a head.
        shared_ada: one modulation layer for all blocks plus an offset a block (VAR-d36, Infinity).
        positions: "learned" (one vector a token, VAR), "rope" (2-D rotary, Infinity) or "both".
        mask: "block_causal" (VAR) or "block_diagonal" (HMAR).
        drop_path: largest stochastic depth, reached linearly at the last block; it acts where `Conditioning.kept` says
            which image keeps which branch (`train.var_objective`).
        level_table: rows of the level embedding; the number of scales when None.
        level_every: add the level embedding again before every so many blocks; 0 adds it once (Infinity's chunks).
        bitwise: predict tokens of latent_channels bits, two logits a bit (Infinity); vocab_size is 2 then.
        pool_heads: heads of the text's attentive pooling; `heads` when None.
        cross_gate: first value of a learned gate on cross-attention; None for no gate.
        rope_grid: (height, width) that rotary positions are measured on; the last scale when None.
        norm_eps: of the layer norms of blocks and head, and of the text's.
        selectivity: how narrowly each layer attends at each scale, as `nextscale calibrate` measured it (ScaleKV).
        subnets: what was trained along (VARiant): layers of each subnet, "depths", and scales that ran all layers,
            "bridge"; None for the whole model alone. It says which plans are of use, and changes nothing.
        trained_scales: [begin, end) of the scales that were trained, of a drafter or refiner; None for all. It changes
            nothing, either.
        sequential_layers: layers of a head that draws the tokens of the first `sequential_scales` scales one after the
            other (`var.sequential`); 0 for no such head.
        masked_layers: last layers of which there is a second set, with a head, that draws some tokens of a scale again
            given the others (`var.masked`, HMAR); 0 for none. Needs mask block_diagonal.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _repeated_blocks = ("Block",)
    _keep_in_fp32_modules = ["head"]  # noqa: RUF012  diffusers wants a list: a tuple it ignores

    @register_to_config
    def __init__(
        self,
        *,
        depth: int = 16,
        width: int = 1024,
        heads: int = 16,
        vocab_size: int = 4096,
        latent_channels: int = 32,
        schedule: list[list[int]] | str = "var256",
        conditioning: str = "class",
        num_classes: int = 1000,
        text_width: int = 256,
        text_length: int = 128,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        shared_ada: bool = False,
        positions: str = "learned",
        mask: str = "block_causal",
        drop_path: float = 0.0,
        level_table: int | None = None,
        level_every: int = 0,
        bitwise: bool = False,
        pool_heads: int | None = None,
        cross_gate: float | None = None,
        rope_grid: list[int] | None = None,
        norm_eps: float = 1e-6,
        selectivity: list[list[float]] | None = None,
        subnets: dict[str, Any] | None = None,
        trained_scales: list[int] | None = None,
        sequential_layers: int = 0,
        sequential_scales: int = 0,
        masked_layers: int = 0,
    ):
        super().__init__()
        _check_sizes(self.config)
        vocab_size = 2 if bitwise else vocab_size
        given = ScaleSchedule.of(schedule)
        self.schedule = replace(given, grid=tuple(rope_grid) if rope_grid is not None else given.grid)
        _check_options(self.config, len(self.schedule))
        grid = None if self.schedule.grid is None else list(self.schedule.grid)
        self.register_to_config(schedule=self.schedule.spec, vocab_size=vocab_size, rope_grid=grid)
        self.half_stream = False  # under autocast, whether what goes from block to block is in half precision, too
        self.gradient_checkpointing = False

        if conditioning == "class":
            self.conditioner = ClassConditioner(num_classes, width)
        else:
            self.conditioner = TextConditioner(
                text_width, width, max_length=text_length, pool_heads=pool_heads or heads, norm_eps=norm_eps
            )
        self.start_position_1lD = nn.Parameter(torch.empty(1, self.schedule.lengths[0], width))
        self.input_proj = nn.Linear(latent_channels, width)
        self.level_embedding = nn.Embedding(level_table or len(self.schedule), width)
        self.position_1LD = nn.Parameter(torch.empty(1, self.schedule.total, width)) if positions != "rope" else None

        self.ada_shared = AdaLinear(width, 6) if shared_ada else None
        self.blocks = nn.ModuleList(self._new_block(i) for i in range(depth))
        make_head, size = (BitwiseHead, latent_channels) if bitwise else (CategoricalHead, vocab_size)
        self.head = make_head(width, size, norm_eps=norm_eps)
        self.masked = None
        if masked_layers:
            last = [self._new_block(i) for i in range(depth - masked_layers, depth)]
            self.masked = MaskedPrediction(last, CategoricalHead(width, size, norm_eps=norm_eps), width)
        self.sequential = None
        if sequential_layers:
            self.sequential = SequentialHead(
                width, heads, round(width * mlp_ratio), vocab_size, layers=sequential_layers, norm_eps=norm_eps
            )
        self.init_weights()

    def _new_block(self, i: int) -> Block:
        """A block for place i; stochastic depth grows from 0 at the first to `drop_path` at the last."""
        own = self.config
        return Block(
            own.width,
            own.heads,
            round(own.width * own.mlp_ratio),
            qk_norm=own.qk_norm,
            shared_ada=own.shared_ada,
            cross=own.conditioning == "text",
            cross_gate=own.cross_gate,
            drop_path=own.drop_path * i / max(own.depth - 1, 1),
            norm_eps=own.norm_eps,
        )

    def resized(self, **sizes: object) -> NextScaleTransformer:
        """A model of other sizes with the weights that are in both, in float32 on the CPU; others begin anew."""
        own = {name: value for name, value in self.config.items() if not name.startswith("_")}
        made = NextScaleTransformer(**own | sizes)
        wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
        kept = {name: tensor for name, tensor in self.state_dict().items() if wanted.get(name) == tensor.shape}
        made.load_state_dict(kept, strict=False)
        return made

    def null_prompt(self, prompt: Prompt) -> Prompt:
        """The unconditional prompt of the same shape, for classifier-free guidance."""
        return self.conditioner.null(prompt)

    @property
    def reads_earlier(self) -> bool:
        """Whether attention reads earlier scales, so that their keys and values are kept (not HMAR's)."""
        return self.config.mask != "block_diagonal"

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks, then those of masked prediction: the order of what `condition` makes for them."""
        return [*self.blocks, *(self.masked.blocks if self.masked is not None else ())]

    def condition(self, prompt: Prompt) -> Conditioning:
        """Everything the blocks need of a prompt, once an image: start token, modulations, cross-attention keys."""
        cond_BD, memory_BTD, mask_B11T = self.conditioner(prompt)
        shared, blocks = None if self.ada_shared is None else self.ada_shared(cond_BD), self.all_blocks
        return Conditioning(
            start_BD=cond_BD,
            blocks=tuple(block.modulation(cond_BD, shared) for block in blocks),
            head_B2D=self.head.modulation(cond_BD),
            masked_head_B2D=None if self.masked is None else self.masked.head.modulation(cond_BD),
            memory=() if memory_BTD is None else tuple(block.cross.memory(memory_BTD) for block in blocks),
            memory_mask_B11T=mask_B11T,
        )

    def forward(
        self,
        x_BlC: torch.Tensor | None,
        cond: Conditioning,
        *,
        scales: range | None = None,
        cache: KVCache | None = None,
        layers: Collection[int] | None = None,
        bridge: int = 0,
        attention_backend: str = "sdpa",
        schedule: ScaleSchedule | None = None,
        after: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, l, D) of the tokens of `scales`.

        Args:
            x_BlC: the quantiser's inputs of `scales`, scale 0 having none (None when only scale 0 is asked for).
            cond: from `condition`.
            scales: consecutive scales to run; all of them when None (training).
            cache: holds the scales before `scales.start`, and takes the new ones; not used without `reads_earlier`.
            layers: the blocks to run, the others pass their input on; all when None.
            bridge: scales that run all blocks whatever `layers` says; `scales` must begin at 0 then.
            attention_backend: "sdpa", "flex" or "grouped", see `var.masks`.
            schedule: the scales to work on instead of the model's own (another aspect ratio); see `check_schedule`.
            after: for some blocks, what their hidden states (B, l, D) become before the next block.

        Raises:
            ValueError: on a bridge that is none, layers that there are not, or as `check_schedule`.
        """
        schedule = self.check_schedule(schedule)
        if layers is not None and not set(layers) <= set(range(len(self.blocks))):
            raise ValueError(f"layers must be some of 0..{len(self.blocks) - 1}, got {sorted(layers)}")
        scales, cache = scales if scales is not None else range(len(schedule)), cache if self.reads_earlier else None
        h = self._embed(x_BlC, cond, scales, schedule)
        mask = attention_mask(
            schedule, scales, h.device, kind=self.config.mask, backend=attention_backend, cached=cache is not None
        )
        rope = self._rope(schedule, scales, h.device)
        if not 0 <= bridge < len(schedule) or (bridge and scales.start > 0):
            raise ValueError(f"bridge must be in [0, {len(schedule)}), and 0 unless scales begin at 0; got {bridge}")
        bridge = min(bridge, scales.stop)
        begin, short = schedule.begins[scales.start], schedule.ends[bridge - 1] if bridge else 0
        if short:
            short_mask = attention_mask(
                schedule, range(bridge), h.device, kind=self.config.mask, backend=attention_backend
            )
            short_rope = None if rope is None else rope[:short]
        every = self.config.level_every
        for i, block in enumerate(self.blocks):
            if every and i and i % every == 0:
                h = h + self._levels(schedule, scales)
            if layers is None or i in layers:
                h = self._run(block, h, cond, i, mask, rope, cache, begin)
            elif short:
                first = self._run(block, h[:, :short], cond, i, short_mask, short_rope, cache, begin)
                h = torch.cat([first, h[:, short:]], dim=1)
            if after and i in after:  # of skipped blocks as well: guidance does not go with a subnet
                h = after[i](h)
        return h

    def masked_logits(
        self,
        x_BlC: torch.Tensor | None,
        code_BlC: torch.Tensor | None,
        masked_Bl: torch.Tensor | None,
        cond: Conditioning,
        *,
        scales: range | None = None,
        attention_backend: str = "sdpa",
        schedule: ScaleSchedule | None = None,
    ) -> torch.Tensor:
        """Logits (B, l, V), float32, of tokens given the others of their scale (HMAR, section 4.2).

        Args:
            x_BlC: the inputs of `scales`, as in `forward`.
            code_BlC: what the tokens of each scale add there, at its own size (`PyramidQuantizer.scale_code`); scale 0
                has none and is never masked.
            masked_Bl: bool, the tokens that are not seen; as long as `code_BlC`.
            scales: consecutive scales; all of them when None (training).
            schedule: as in `forward`.
        """
        schedule = self.check_schedule(schedule)
        scales = scales if scales is not None else range(len(schedule))
        beside_BlD = None
        if code_BlC is not None:
            beside_BlD = self.masked.beside(self._project(code_BlC) - self.input_proj.bias, masked_Bl)
        h = self._embed(x_BlC, cond, scales, schedule, beside_BlD)
        mask = attention_mask(schedule, scales, h.device, kind=self.config.mask, backend=attention_backend)
        rope, every, own = self._rope(schedule, scales, h.device), self.config.level_every, len(self.masked.blocks)
        chain = [*enumerate(self.blocks[:-own]), *enumerate(self.masked.blocks, len(self.blocks))]
        for place, (i, block) in enumerate(chain):
            if every and place and place % every == 0:
                h = h + self._levels(schedule, scales)
            h = self._run(block, h, cond, i, mask, rope, None, 0)
        return self.masked.head.project(self.masked.head.features(h, cond.masked_head_B2D))

    def _run(
        self,
        block: Block,
        h_BlD: torch.Tensor,
        cond: Conditioning,
        layer: int,
        mask: Mask | None,
        rope: torch.Tensor | None,
        cache: KVCache | None,
        begin: int,
    ) -> torch.Tensor:
        """One block: (B, l, D) to the same, its inner states thrown away and computed again if that is asked for."""
        memory = cond.memory[layer] if cond.memory else None
        arguments = (h_BlD, cond.blocks[layer], memory, cond.memory_mask_B11T, mask, rope, cache, layer, begin)
        kept_2B11 = cond.kept[layer] if cond.kept else None
        arguments += (None if kept_2B11 is None else kept_2B11.to(h_BlD.dtype),)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            out_BlD = self._gradient_checkpointing_func(block, *arguments)
        else:
            out_BlD = block(*arguments)
        return out_BlD.to(h_BlD.dtype)  # of a half stream: a gate in float32 would end it

    def logits(self, hidden_BlD: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Logits (B, l, V) or, bitwise, (B, l, n, 2); float32."""
        return self.head.project(self.head.features(hidden_BlD, cond.head_B2D))

    def new_cache(self, schedule: ScaleSchedule | None = None) -> KVCache:
        """An empty cache for the model's own or another schedule."""
        return KVCache(len(self.blocks), capacity=(schedule or self.schedule).begins[-1])

    def check_schedule(self, schedule: ScaleSchedule | None) -> ScaleSchedule:
        """`schedule` if this model can work on it, its own when None.

        One without a grid keeps the model's where it is the model's own scales, or fewer of them; else its last scale
        is the grid.

        Raises:
            ValueError: if positions are learned for one schedule or measured on another grid, the first scales differ
                in tokens, or there are more scales than levels.
        """
        if schedule is None or schedule == self.schedule:
            return self.schedule
        if schedule.grid is None and schedule.sides == self.schedule.sides[: len(schedule)]:
            schedule = replace(schedule, grid=self.schedule.grid)  # fewer of its own scales, which have their places
        if self.position_1LD is not None:
            raise ValueError(f"schedule {schedule.text} needs rotary positions; this model learned those of its own")
        if self.schedule.grid is None and schedule.grid not in (None, self.schedule.latent_hw):
            raise ValueError(
                f"schedule {schedule.text} has positions on a grid of {schedule.grid}, this model learned them on its "
                f"own last scale, {self.schedule.latent_hw}: a model of several shapes is trained with rope_grid"
            )
        if schedule.lengths[0] != self.schedule.lengths[0]:
            raise ValueError(
                f"schedule must begin with {self.schedule.lengths[0]} tokens as the model's own, got {schedule.text}"
            )
        if len(schedule) > self.level_embedding.num_embeddings:
            raise ValueError(
                f"schedule must have at most {self.level_embedding.num_embeddings} scales, got {len(schedule)}"
            )
        return schedule

    def _embed(
        self,
        x_BlC: torch.Tensor | None,
        cond: Conditioning,
        scales: range,
        schedule: ScaleSchedule,
        beside_BlD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        parts = []
        if scales.start == 0:
            parts.append(cond.start_BD[:, None] + self.start_position_1lD)
        if x_BlC is not None:
            projected_BlD = self._project(x_BlC)
            parts.append(projected_BlD if beside_BlD is None else projected_BlD + beside_BlD)
        h = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        h = h + self._levels(schedule, scales)
        if self.position_1LD is not None:
            h = h + self.position_1LD[:, schedule.begins[scales.start] : schedule.ends[scales.stop - 1]]
        if self.half_stream and torch.is_autocast_enabled(h.device.type):
            return h.to(torch.get_autocast_dtype(h.device.type))
        return h

    def _project(self, x_BlC: torch.Tensor) -> torch.Tensor:
        """Inputs (B, l, C) to the width, in the weights' own precision also under autocast, as the official code."""
        with torch.autocast(x_BlC.device.type, enabled=False):
            return self.input_proj(x_BlC.to(self.input_proj.weight.dtype))

    def _levels(self, schedule: ScaleSchedule, scales: range) -> torch.Tensor:
        begin, end = schedule.begins[scales.start], schedule.ends[scales.stop - 1]
        return self.level_embedding(_level_ids(schedule, self.level_embedding.weight.device)[begin:end])

    def _rope(self, schedule: ScaleSchedule, scales: range, device: torch.device) -> torch.Tensor | None:
        if self.config.positions == "learned":
            return None
        return rope_table(schedule, scales, self.config.width // self.config.heads, device)

    @torch.no_grad()
    def init_weights(self, *, gate_gain: float = 1e-3, ada_gain: float = 0.5, head_gain: float = 0.02) -> None:
        """The official initialisation (VAR's `init_weights`): width-scaled, with almost closed gates.

        Args:
            gate_gain: gain of the two gate rows of every modulation ("alng": 1e-3 for d16, 1e-5 for d30).
            ada_gain: gain of the other modulation rows and of the head's.
            head_gain: gain of the output projection.
        """
        D, depth = self.config.width, len(self.blocks)
        std = sqrt(1 / (3 * D))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        for free in (self.start_position_1lD, self.position_1LD):
            if free is not None:
                nn.init.trunc_normal_(free, std=std)
        if isinstance(self.conditioner, TextConditioner):
            nn.init.trunc_normal_(self.conditioner.pool.query_Hd, std=std)
            nn.init.trunc_normal_(self.conditioner.null_text_TE, std=1.2 / sqrt(self.config.text_width))
        for block in self.blocks:  # those of masked prediction become their copies
            block.attn.to_out.weight.div_(sqrt(2 * depth))
            block.ffn.fc2.weight.div_(sqrt(2 * depth))
            if hasattr(block, "cross"):
                block.cross.to_out.weight.div_(sqrt(2 * depth))
            if self.ada_shared is None:
                block.ada[1].weight[: 2 * D].mul_(gate_gain)
                block.ada[1].weight[2 * D :].mul_(ada_gain)
            else:
                nn.init.trunc_normal_(block.ada_offset_6D, std=1 / sqrt(D))
                block.ada_offset_6D[:2].mul_(gate_gain)
                block.ada_offset_6D[2:].mul_(ada_gain)
        self.head.proj.weight.mul_(head_gain)
        self.head.ada[1].weight.mul_(ada_gain)
        if self.sequential is not None:
            self.sequential.init_weights()
        if self.masked is not None:
            self.masked.init_weights(self.blocks[-len(self.masked.blocks) :], self.head)


@cache  # not bounded: a recorded CUDA graph reads these again
@torch.inference_mode(False)
def _level_ids(schedule: ScaleSchedule, device: torch.device) -> torch.Tensor:
    """The scale of every token, (L,) int64: made once, as a copy to a GPU stops the loop."""
    return torch.tensor(schedule.level_ids, device=device)


def _check_sizes(own: FrozenDict) -> None:
    """Raise ValueError unless the sizes of a configuration are possible."""
    least = {"depth": 1, "width": 1, "latent_channels": 1, "num_classes": 1, "text_width": 1, "text_length": 1}
    for name, low in (least | {"vocab_size": 2, "level_every": 0}).items():
        if own[name] < low:
            raise ValueError(f"{name} must be {low} or more, got {own[name]}")
    if not own.mlp_ratio > 0 or not 0 <= own.drop_path < 1:
        given = f"{own.mlp_ratio} and {own.drop_path}"
        raise ValueError(f"mlp_ratio must be above 0 and drop_path in [0, 1): got {given}")
    if own.rope_grid is not None and (len(own.rope_grid) != 2 or min(own.rope_grid) < 1):
        raise ValueError(f"rope_grid must be (height, width) of 1 or more, got {own.rope_grid}")
    for name, count in (("heads", own.heads), ("pool_heads", own.pool_heads or own.heads)):
        if count < 1 or own.width % count:
            raise ValueError(f"width must be a multiple of {name}, got width {own.width} and {name} {count}")
    if own.positions != "learned" and own.width // own.heads % 4:
        raise ValueError(f"rotary positions need heads of a multiple of 4, got width {own.width} and heads {own.heads}")


def _check_options(own: FrozenDict, scales: int) -> None:
    """Raise ValueError unless the options of a configuration exist, and go together on so many scales."""
    for name, allowed in (
        ("mask", tuple(PREDICATES)),
        ("conditioning", ("class", "text")),
        ("positions", ("learned", "rope", "both")),
    ):
        if own[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {own[name]!r}")
    if own.subnets is not None and not _are_subnets(own.subnets, own.depth):
        raise ValueError(
            f'subnets must be null or like {{"depths": [4, 2], "bridge": 6}}, of less than {own.depth} layers, got '
            f"{own.subnets}"
        )
    if own.trained_scales is not None and not _is_range(own.trained_scales, scales):
        raise ValueError(f"trained_scales must be null or [begin, end] in 0..{scales}, got {own.trained_scales}")
    if own.level_table is not None and own.level_table < scales:
        raise ValueError(f"level_table must be {scales} or more, one a scale, got {own.level_table}")
    if own.sequential_layers and (own.sequential_layers < 0 or not 1 <= own.sequential_scales <= scales):
        given = f"{own.sequential_layers} and {own.sequential_scales}"
        raise ValueError(f"sequential_layers must be 0 or more, and sequential_scales then in 1..{scales}: got {given}")
    if own.sequential_layers and own.bitwise:
        raise ValueError("sequential_layers must be 0 for bitwise tokens: the head draws codes")
    if own.masked_layers and not 0 < own.masked_layers < own.depth:
        raise ValueError(
            f"masked_layers must be in 0..{own.depth - 1}, as the first layer is shared, got {own.masked_layers}"
        )
    if own.masked_layers and (own.mask != "block_diagonal" or own.bitwise or own.sequential_layers or scales < 2):
        raise ValueError(
            "masked_layers must be 0 unless mask is block_diagonal, tokens are codes of two scales or more, and "
            "sequential_layers is 0"
        )


def _is_range(given: Sequence[int], count: int) -> bool:
    return len(given) == 2 and all(isinstance(n, int) for n in given) and 0 <= given[0] < given[1] <= count


def _are_subnets(subnets: Mapping[str, Any], depth: int) -> bool:
    if not isinstance(subnets, Mapping) or set(subnets) != {"depths", "bridge"}:
        return False
    depths, bridge = subnets["depths"], subnets["bridge"]
    whole = all(isinstance(n, int) for n in (*depths, bridge)) if isinstance(depths, Sequence) else False
    return whole and bridge >= 0 and all(0 < n < depth for n in depths)
