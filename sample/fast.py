"""The fast path of a loaded pipeline: the same networks with weights laid out once for the processor they run on.

`accelerate` exchanges modules of a pipeline for faster ones that compute the same (`sample.fast_cpu`,
`sample.fast_cuda`); nothing else in the system knows.
In float32 the tokens are those of the plain path (up to float ties) and images agree to about 1e-5.

Shapes: B images, C channels, h w pixels, I O widths of a layer.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from sample import fast_cpu, fast_cuda, few_rows, kernels
from sample.fast_cpu import can_pack
from sample.graphs import GraphedSampler
from tokenizer.precision import native_bfloat16
from var.layers import FeedForward, SelfAttention

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline
    from tokenizer.model import MultiScaleVQ

FAST = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class FastSettings:
    """What `accelerate` exchanges.

    Attributes:
        fold: nearest up-sampling and the 3x3 convolution after it become one transposed convolution (any device).
        convolutions: residual blocks in channels-last, weights packed, activations and sums fused (CPU).
        linears: weights of the transformer's linear layers packed, GELU fused (CPU).
        attention: attention as two bfloat16 matrix products with a float32 softmax between (CPU, bfloat16 models).
        graphs: calls that come again are replayed as CUDA graphs (see `sample.graphs`).
        channels_last: the layout of convolutions that a GPU's tensor cores read as it is (CUDA).
        kernels: what lies between matrix products, and between convolutions, becomes one kernel each; keys and values
            are written straight into the cache (CUDA, see `sample.fast_cuda`).
        few_rows: and blocks of few rows, as one image has them, become kernels that overlap; needs `kernels` (Hopper,
            half precision, see `sample.few_rows`).
    """

    fold: bool = False
    convolutions: bool = False
    linears: bool = False
    attention: bool = False
    graphs: bool = False
    channels_last: bool = False
    kernels: bool = False
    few_rows: bool = False


def supported(device: torch.device, dtype: torch.dtype) -> FastSettings:
    """All that is known to pay on a device for models of a dtype: not `few_rows`, and nothing on MPS and the like."""
    on_cpu = device.type == "cpu" and can_pack()
    halves = dtype == torch.bfloat16 and native_bfloat16() and hasattr(torch.backends.mkldnn, "matmul")
    packs = on_cpu and (dtype == torch.float32 or halves)
    on_gpu = device.type == "cuda"
    return FastSettings(
        fold=device.type in ("cpu", "cuda"),
        convolutions=packs,
        linears=packs,
        attention=on_cpu and halves,
        graphs=on_gpu,
        channels_last=on_gpu,
        kernels=on_gpu and kernels.usable(device, dtype),
    )


def accelerate(pipeline: NextScalePipeline, settings: FastSettings | None = None) -> NextScalePipeline:
    """Exchange modules of a pipeline in place, when it is on its device and in its dtype; it stays there.

    It can still be saved, as the plain model. Adapters (LoRA) must be loaded before, and weights may not change after.

    Args:
        settings: what to exchange; all that the device supports when None.

    Returns:
        The pipeline.

    Raises:
        ValueError: if it was accelerated or offloaded already, or the device or dtype cannot do what is asked for.
    """
    if pipeline.accelerated is not None:
        raise ValueError("pipeline was accelerated already: load the model again for other settings")
    if any(isinstance(module, FoldedUpsample | fast_cpu.PackedUpsample) for module in pipeline.vqvae.modules()):
        raise ValueError("parts of this pipeline belong to an accelerated one: load the model again")
    if pipeline.offloaded is not None:
        raise ValueError("pipeline is offloaded, and its weights move: load the model again with offload=none")
    device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
    possible = supported(device, dtype)
    settings = settings or possible
    for name in ("convolutions", "linears", "attention", "graphs", "channels_last", "kernels"):
        if getattr(settings, name) and not getattr(possible, name):
            raise ValueError(f"fast setting {name} cannot be used on {device} in {dtype}: this machine lacks it")
    if settings.few_rows and not (settings.kernels and few_rows.usable(device, dtype)):
        raise ValueError(f"fast setting few_rows needs kernels, a Hopper GPU and half precision, not {device}, {dtype}")
    accelerate_tokenizer(pipeline.vqvae, settings)
    for model in (pipeline.transformer, pipeline.refiner):
        if model is not None:
            accelerate_transformer(model, settings)
    if settings.graphs:
        pipeline.graphed = GraphedSampler(pipeline.vqvae)
    pipeline.accelerated = pipeline.transformer.accelerated_with = settings  # for a pipeline of the same parts, too
    return pipeline


def accelerate_tokenizer(vqvae: MultiScaleVQ, settings: FastSettings) -> None:
    """The part of `accelerate` that exchanges a tokenizer's, in place."""
    if settings.fold:
        exchange(vqvae.decoder, _folds, FoldedUpsample)
    if settings.convolutions:
        _exchange_residual_blocks(vqvae, fast_cpu.FastResnet, fast_cpu.NormSiLU)
        exchange(vqvae.decoder, lambda module: isinstance(module, FoldedUpsample), fast_cpu.PackedUpsample)
    if settings.kernels:
        _exchange_residual_blocks(vqvae, fast_cuda.FusedResnet, fast_cuda.FusedNormSiLU)
        if vqvae.decoder.conv_out.out_channels < fast_cuda.NARROW:
            vqvae.decoder.conv_out = fast_cuda.WidenedConv(vqvae.decoder.conv_out)
    if settings.channels_last:  # not the quantiser: its tokens are to stay those of the plain path
        for half in (vqvae.encoder, vqvae.decoder):
            half.to(memory_format=torch.channels_last)


def _exchange_residual_blocks(vqvae: nn.Module, resnet: Callable[[Any], nn.Module], norm: Callable) -> None:
    exchange(vqvae, lambda module: isinstance(module, ResnetBlock2D), resnet)
    for half in (vqvae.encoder, vqvae.decoder):
        half.conv_norm_out, half.conv_act = norm(half.conv_norm_out), nn.Identity()


def accelerate_transformer(model: nn.Module, settings: FastSettings) -> None:
    """The part of `accelerate` that exchanges a transformer's."""
    masked = [] if model.masked is None else [model.masked]
    if settings.attention:
        for attn in (module for module in model.modules() if isinstance(module, SelfAttention)):
            attn.attend = fast_cpu.half_attention
    if settings.kernels:
        fast_cuda.fuse_all(list(model.blocks), chained=settings.few_rows)
        for part in masked:
            fast_cuda.fuse_all(list(part.blocks))
        for part in (model, *masked) if model.dtype != torch.float32 else ():
            fast_cuda.fuse_head(part.head)
    if settings.linears:
        for part in (model.blocks, model.head, *masked):
            exchange(part, _has_no_adapter, fast_cpu.FastFeedForward)
            exchange(part, lambda module: type(module) is nn.Linear, fast_cpu.PackedLinear)


def _has_no_adapter(module: nn.Module) -> bool:
    """Whether a module is a feed-forward of two plain layers; those with an adapter are exchanged one by one."""
    return isinstance(module, FeedForward) and type(module.fc1) is type(module.fc2) is nn.Linear


def _folds(module: nn.Module) -> bool:
    """Whether a module is nearest up-sampling by 2 and a 3x3 convolution, and no more."""
    plain = isinstance(module, Upsample2D) and module.norm is None and module.interpolate and module.name == "conv"
    return plain and isinstance(module.conv, nn.Conv2d) and module.conv.kernel_size == (3, 3)


def exchange(root: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> None:
    """Put `make(module)` in the place of every wanted module below `root`."""
    for name, child in list(root.named_children()):
        if wanted(child):
            setattr(root, name, make(child).train(child.training))
        else:
            exchange(child, wanted, make)


class FoldedUpsample(nn.Module):
    """Nearest up-sampling by 2 and a 3x3 convolution as one 4x4 transposed convolution of stride 2.

    Output pixel (2i + a, 2j + b) sees four input pixels only; each of their weights is a sum of the 3x3's.
    """

    def __init__(self, upsample: Upsample2D):
        super().__init__()
        self.conv = upsample.conv  # the plain one, for saving
        self.register_buffer("folded", fold_weight(upsample.conv.weight.detach()), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, O, 2h, 2w)."""
        return F.conv_transpose2d(hidden_states, self.folded, self.conv.bias, stride=2, padding=1)


def fold_weight(weight_OI33: torch.Tensor) -> torch.Tensor:
    """The weight (I, O, 4, 4) of the transposed convolution; see `FoldedUpsample`."""
    pick_43 = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    folded = torch.einsum("uy,oiyx,vx->iouv", pick_43, weight_OI33.cpu().double(), pick_43)  # MPS has no float64
    return folded.to(weight_OI33).contiguous(memory_format=torch.channels_last)


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees instead of asking for it again, page by page (glibc only).

    Large maps of the decoder are otherwise mapped anew every time. It is for a process that draws images, and nothing
    else that needs memory: call it from a command, not from a library.

    Returns:
        Whether the C library could be told.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_trim_threshold, m_mmap_threshold = -1, -3
    return tell is not None and all((tell(m_mmap_threshold, 2**30), tell(m_trim_threshold, 2**31 - 1)))
