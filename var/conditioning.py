"""From a class or a text to what the transformer is conditioned on, computed once an image.

Shapes: B images, T text tokens, E text encoder width, D model width, H heads, d = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ClassPrompt:
    """Class labels (B,) int64 in [0, num_classes); num_classes is the null class."""

    classes_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.classes_B)

    def select(self, rows: torch.Tensor | slice) -> ClassPrompt:
        """The prompt of some rows."""
        return ClassPrompt(self.classes_B[rows])

    def to(self, device: torch.device | str) -> ClassPrompt:
        """The prompt on another device."""
        return ClassPrompt(self.classes_B.to(device))

    def join(self, other: ClassPrompt) -> ClassPrompt:
        """Both prompts in one batch."""
        return ClassPrompt(torch.cat([self.classes_B, other.classes_B]))


@dataclass(frozen=True)
class TextPrompt:
    """States of a text encoder (B, T, E) and a bool mask (B, T), True = a real token."""

    states_BTE: torch.Tensor
    mask_BT: torch.Tensor

    def __len__(self) -> int:
        return len(self.states_BTE)

    def select(self, rows: torch.Tensor | slice) -> TextPrompt:
        """The prompt of some rows."""
        return TextPrompt(self.states_BTE[rows], self.mask_BT[rows])

    def to(self, device: torch.device | str) -> TextPrompt:
        """The prompt on another device."""
        return TextPrompt(self.states_BTE.to(device), self.mask_BT.to(device))

    def join(self, other: TextPrompt) -> TextPrompt:
        """Both prompts in one batch, the shorter one padded."""
        T = max(self.mask_BT.shape[1], other.mask_BT.shape[1])
        padded = [
            (F.pad(p.states_BTE, (0, 0, 0, T - p.mask_BT.shape[1])), F.pad(p.mask_BT, (0, T - p.mask_BT.shape[1])))
            for p in (self, other)
        ]
        return TextPrompt(*(torch.cat(parts) for parts in zip(*padded)))


Prompt = ClassPrompt | TextPrompt


@dataclass(frozen=True)
class Conditioning:
    """All that one model needs of a prompt, computed once an image.

    Attributes:
        start_BD: what the tokens of the first scale start from.
        blocks: modulation (B, 6, D) of each block; those of masked prediction follow the others.
        head_B2D: modulation of the head.
        masked_head_B2D: that of the head of masked prediction; None where there is none.
        memory: cross-attention keys and values (B, H, T, d) of each block, in the same order; empty without text.
        memory_mask_B11T: bool, True = a real text token; None without text.
        kept: stochastic depth of training: for each block what `Block.kept` says; empty for none.
    """

    start_BD: torch.Tensor
    blocks: tuple[torch.Tensor, ...]
    head_B2D: torch.Tensor
    memory: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    memory_mask_B11T: torch.Tensor | None = None
    masked_head_B2D: torch.Tensor | None = None
    kept: tuple[torch.Tensor | None, ...] = ()

    def __len__(self) -> int:
        return len(self.start_BD)

    def select(self, rows: torch.Tensor | slice) -> Conditioning:
        """The conditioning of some rows (int64, duplicates allowed)."""
        return replace(
            self,
            start_BD=self.start_BD[rows],
            blocks=tuple(ada[rows] for ada in self.blocks),
            head_B2D=self.head_B2D[rows],
            memory=tuple((k[rows], v[rows]) for k, v in self.memory),
            memory_mask_B11T=None if self.memory_mask_B11T is None else self.memory_mask_B11T[rows],
            masked_head_B2D=None if self.masked_head_B2D is None else self.masked_head_B2D[rows],
            kept=tuple(None if kept is None else kept[:, rows] for kept in self.kept),
        )


class ClassConditioner(nn.Module):
    """A learned vector per class, and one for the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def null(self, prompt: ClassPrompt) -> ClassPrompt:
        """The unconditional prompt of the same size."""
        return ClassPrompt(torch.full_like(prompt.classes_B, self.num_classes))

    def forward(self, prompt: ClassPrompt) -> tuple[torch.Tensor, None, None]:
        """The condition (B, D) of classes in [0, num_classes]; classes have no memory."""
        return self.embedding(prompt.classes_B), None, None


class TextPool(nn.Module):
    """Attentive pooling: one learned query a head reads the text (Infinity's start token)."""

    def __init__(self, text_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_Hd = nn.Parameter(torch.empty(heads, width // heads))
        self.to_k = nn.Linear(text_width, width, bias=False)
        self.to_v = nn.Linear(text_width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, text_BTE: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """(B, T, E) to (B, D)."""
        k, v = (rearrange(p(text_BTE), "b t (h d) -> b h t d", h=self.heads) for p in (self.to_k, self.to_v))
        q = self.query_Hd[None, :, None].expand(len(k), -1, -1, -1).to(k.dtype)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BT[:, None, None])
        return self.to_out(rearrange(pooled, "b h 1 d -> b (h d)"))


class TextConditioner(nn.Module):
    """Text states to a pooled condition and a cross-attention memory, with a learned null text.

    Args:
        text_width: width of the text encoder's states, E.
        max_length: text tokens the null text is learned for.
        pool_heads: heads of the attentive pooling.
        norm_eps: of the text's norm; the null text is so short that it matters.
    """

    def __init__(self, text_width: int, width: int, *, max_length: int, pool_heads: int, norm_eps: float = 1e-6):
        super().__init__()
        self.null_text_TE = nn.Parameter(torch.empty(max_length, text_width))
        self.norm = nn.RMSNorm(text_width, eps=norm_eps)
        self.pool = TextPool(text_width, width, pool_heads)
        self.memory = nn.Sequential(nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))

    def null(self, prompt: TextPrompt) -> TextPrompt:
        """The learned null text, as long as each prompt."""
        B, T = prompt.mask_BT.shape
        if len(self.null_text_TE) < T:
            raise ValueError(
                f"prompt has {T} text tokens; this model's null text was learned for {len(self.null_text_TE)}"
            )
        states = self.null_text_TE[None, :T].expand(B, -1, -1).to(prompt.states_BTE.dtype)
        return TextPrompt(states, prompt.mask_BT)

    def forward(self, prompt: TextPrompt) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The condition (B, D), the memory (B, T, D) and its mask (B, 1, 1, T)."""
        text = self.norm(prompt.states_BTE.to(self.norm.weight.dtype))
        return self.pool(text, prompt.mask_BT), self.memory(text), prompt.mask_BT[:, None, None]
