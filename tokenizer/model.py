"""The tokenizer: diffusers' convolutional encoder and decoder around a multi-scale quantiser.

Shapes: B images, C latent channels, H W the latent grid. Images are float RGB in [-1, 1], (B, 3, stride*H, stride*W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from tokenizer.bitwise import BinarySphericalQuantizer
from tokenizer.quantizer import MultiScaleQuantizer, QuantizerOutput
from tokenizer.schedule import ScaleSchedule


@dataclass
class TokenizerOutput:
    """A training pass of the tokenizer.

    Attributes:
        reconstruction: (B, 3, h, w), not clamped.
        quantized: the quantiser's output, with its VQ loss and the token ids.
    """

    reconstruction: torch.Tensor
    quantized: QuantizerOutput


class ContiguousAttention(AttnProcessor2_0):
    """diffusers' attention, giving back the plain memory layout.

    It would hand on a transposed view, which puts every later layer in channels-last; there the group norm of a
    256-pixel image is wrong by 1e-4 in float32.
    """

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args: object, temb: object = None, **kwargs: object
    ) -> torch.Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        return super().__call__(attn, hidden_states, *args, temb=temb, **kwargs).contiguous()


class MultiScaleVQ(ModelMixin, ConfigMixin):
    """Multi-scale residual VQ autoencoder (VAR, section 3.2; the "vq-f16" convolutional shape of VQGAN).

    Args:
        channels: width of each resolution level, fine to coarse; n levels make latent cells of patch * 2**(n-1) pixels.
        layers_per_block: residual blocks a level in the encoder (the decoder has one more).
        attention: single-head self-attention at the coarsest level and in the middle.
        latent_channels: C, also the width of a code.
        vocab_size: codes in the codebook.
        schedule: sides of the scales, anything `ScaleSchedule.of` reads; stored as a list of [h, w].
        quant_conv_kernel: width of the convolutions before and after the quantiser (VAR's `quant_conv_ks`).
        phi_ratio: how much of the convolution after up-sampling a code map is added (VAR's `quant_resi`), in [0, 1].
        num_phis: such convolutions, shared by the scales in turn (VAR's `share_quant_resi`); 0 for one a scale.
        cosine: choose codes by their angle (VAR's `using_znorm`).
        beta: weight of the commitment loss.
        normalize_scales: divide the residuals of each scale by their size before codes are searched.
        norm_groups: groups of every GroupNorm.
        patch: pixels folded into channels before the encoder and unfolded after the decoder (1: none); saves the
            costly finest level.
        stem_channels: width of the encoder's first convolution where it is not that of the finest level.
        bitwise: tokens of latent_channels bits instead of codes (Infinity): no codebook, and no convolution next to the
            quantiser. vocab_size is 2 then; of the quantiser's options only beta is used.
        token_patch: latent cells along a bitwise token's side (Infinity 8B: 2).
        entropy: weight of the entropy penalty, see `BinarySphericalQuantizer`.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["quantizer"]  # noqa: RUF012  diffusers wants a list: a tuple it ignores

    @register_to_config
    def __init__(
        self,
        *,
        channels: list[int] = (160, 160, 320, 320, 640),
        layers_per_block: int = 2,
        attention: bool = True,
        latent_channels: int = 32,
        vocab_size: int = 4096,
        schedule: list[list[int]] | str = "var256",
        quant_conv_kernel: int = 3,
        phi_ratio: float = 0.5,
        num_phis: int = 4,
        cosine: bool = False,
        beta: float = 0.25,
        normalize_scales: bool = False,
        norm_groups: int = 32,
        patch: int = 1,
        stem_channels: int | None = None,
        bitwise: bool = False,
        token_patch: int = 1,
        entropy: float = 0.0,
    ):
        super().__init__()
        _check(self.config)
        self.schedule = ScaleSchedule.of(schedule)
        self.slice: int | None = None  # images decoded at once
        self.register_to_config(
            schedule=self.schedule.spec, channels=list(channels), vocab_size=2 if bitwise else vocab_size
        )
        self.encoder, self.decoder = self._new_encoder(), self._new_decoder()
        for attention_layer in (m for m in self.modules() if isinstance(m, Attention)):
            attention_layer.set_processor(ContiguousAttention())
        if bitwise:
            self.quant_conv = self.post_quant_conv = nn.Identity()
            self.quantizer = BinarySphericalQuantizer(
                channels=latent_channels, patch=token_patch, entropy=entropy, beta=beta
            )
            return
        same = {"kernel_size": quant_conv_kernel, "padding": quant_conv_kernel // 2}
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, **same)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, **same)
        self.quantizer = MultiScaleQuantizer(
            vocab_size=vocab_size,
            channels=latent_channels,
            phi_ratio=phi_ratio,
            num_phis=num_phis,
            num_scales=len(self.schedule),
            cosine=cosine,
            beta=beta,
            normalize_scales=normalize_scales,
        )

    def _new_encoder(self) -> Encoder:
        """diffusers' encoder; attention at the coarsest level, and a first convolution of its own width if wanted."""
        own, (finest, *coarser) = self.config, self.config.channels
        encoder = Encoder(
            in_channels=3 * own.patch**2,
            out_channels=own.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(coarser) + (_attends(own) + "DownEncoderBlock2D",),
            double_z=False,
            **_shared(own),
        )
        if own.stem_channels not in (None, finest):
            encoder.conv_in = nn.Conv2d(3 * own.patch**2, own.stem_channels, kernel_size=3, padding=1)
            encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
                in_channels=own.stem_channels, out_channels=finest, temb_channels=None, groups=own.norm_groups, eps=1e-6
            )
        return encoder

    def _new_decoder(self) -> Decoder:
        """diffusers' decoder; attention at the coarsest level."""
        own = self.config
        return Decoder(
            in_channels=own.latent_channels,
            out_channels=3 * own.patch**2,
            up_block_types=(_attends(own) + "UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (len(own.channels) - 1),
            **_shared(own),
        )

    def enable_slicing(self, images: int = 1) -> None:
        """From now on decode at most so many images at once: the same images, and less memory.

        Raises:
            ValueError: if `images` is below 1.
        """
        if images < 1:
            raise ValueError(f"images must be 1 or more, got {images}")
        self.slice = images

    def disable_slicing(self) -> None:
        """From now on decode whole batches at once."""
        self.slice = None

    @property
    def stride(self) -> int:
        """Pixels per token of the finest scale along a side."""
        return self.config.patch * 2 ** (len(self.config.channels) - 1) * self.config.token_patch

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels of the images of this tokenizer's own schedule."""
        h, w = self.schedule.latent_hw
        return h * self.stride, w * self.stride

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, h, w) in [-1, 1] to continuous latents (B, C, H, W)."""
        return self.quant_conv(self.encoder(F.pixel_unshuffle(image, self.config.patch)))

    def decode(self, f_hat_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, h, w), not clamped; see `enable_slicing`."""
        if self.slice is not None and len(f_hat_BCHW) > self.slice:
            return torch.cat([self.decode(part) for part in f_hat_BCHW.split(self.slice)])
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(f_hat_BCHW.to(self.dtype))), self.config.patch)

    def forward(self, image: torch.Tensor) -> TokenizerOutput:
        """The training pass: encode, quantise with a straight-through gradient, decode."""
        quantized = self.quantizer(self.encode(image), self.schedule)
        return TokenizerOutput(self.decode(quantized.f_hat_BCHW), quantized)

    @torch.no_grad()
    def image_to_tokens(self, image: torch.Tensor, schedule: ScaleSchedule | None = None) -> list[torch.Tensor]:
        """Images (B, 3, h, w) in [-1, 1] to the tokens of each scale: int64 (B, l) or, bitwise, (B, l, n).

        Raises:
            ValueError: if the images' size is not that of the schedule's latent grid, or latents are not finite.
        """
        schedule = schedule or self.schedule
        expected = tuple(side * self.stride for side in schedule.latent_hw)
        if tuple(image.shape[-2:]) != expected:
            raise ValueError(
                f"image is {tuple(image.shape[-2:])} pixels (h, w); schedule {schedule.text} needs {expected}"
            )
        return self.quantizer.encode(check_latents(self.encode(image.to(self.dtype))), schedule)

    @torch.no_grad()
    def tokens_to_image(self, ids: list[torch.Tensor], schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Tokens of all scales to images (B, 3, h, w), clamped to [-1, 1].

        Raises:
            ValueError: unless there are tokens of every scale.
        """
        schedule = schedule or self.schedule
        if len(ids) != len(schedule):
            raise ValueError(f"ids must be of the {len(schedule)} scales of {schedule.text}, got {len(ids)} tensors")
        return self.decode(self.quantizer.partial_sums(ids, schedule)[-1]).clamp(-1, 1)


def check_latents(f_BCHW: torch.Tensor) -> torch.Tensor:
    """The latents; their nearest codes would be code 0, whatever the image, where they are not finite: ValueError."""
    if not torch.isfinite(f_BCHW).all():
        raise ValueError("latents are not finite: the weights or the image are damaged, or float32 is needed as dtype")
    return f_BCHW


def _check(own: FrozenDict) -> None:
    """Raise ValueError unless a configuration is possible."""
    counts = {name: own[name] for name in ("latent_channels", "norm_groups", "layers_per_block")}
    for name, count in (counts | {"channels": min(own.channels, default=0)}).items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count if name in counts else list(own.channels)}")
    if own.quant_conv_kernel < 1 or own.quant_conv_kernel % 2 == 0:
        raise ValueError(f"quant_conv_kernel must be odd, got {own.quant_conv_kernel}")
    if own.token_patch != 1 and not own.bitwise:
        raise ValueError(f"token_patch is for bitwise tokens, got token_patch {own.token_patch} without bitwise")


def _attends(own: FrozenDict) -> str:
    """What the name of a block with attention begins with."""
    return "Attn" if own.attention else ""


def _shared(own: FrozenDict) -> dict[str, Any]:
    """What encoder and decoder have in common."""
    return {
        "block_out_channels": tuple(own.channels),
        "norm_num_groups": own.norm_groups,
        "layers_per_block": own.layers_per_block,
        "mid_block_add_attention": own.attention,
    }
