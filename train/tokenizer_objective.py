"""What training a tokenizer minimises: reconstruction, perceptual, quantiser and adversary losses; and codebook care.

Shapes: B images, K scales, l tokens of one scale, V codes, C latent channels, N vectors in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from evaluation.scene_features import load_scene_features
from tokenizer.losses import (
    LpipsLoss,
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    gradient_loss,
    hinge_d_loss,
    hinge_g_loss,
    pixel_loss,
)
from tokenizer.model import MultiScaleVQ
from tokenizer.quantizer import USED_SHARE
from train.optimizers import Branch, OptimizerConfig
from train.order import uniforms
from train.session import Batch, Clock, Metrics, Objective, Processes


@dataclass(kw_only=True)
class TokenizerLossConfig:
    """Weights of the tokenizer's loss terms, and the care of its codebook.

    Args:
        l1: of the mean absolute pixel error.
        l2: of the mean squared pixel error.
        gradient: of the error of finite differences (edges).
        perceptual: of the perceptual distance.
        early: of the same terms on an image decoded from the first scales alone, up to one drawn at each step: keeps
            the last scales from holding everything (Infinity's "reg" tokenizers; bitwise only).
        perceptual_kind: none, scenes (the shipped scenes network, which FD-scenes is measured with too) or lpips
            (needs the lpips extra).
        vq: of the quantiser's own loss.
        adversary: of the PatchGAN generator loss, before its adaptive weight; 0 builds no discriminator.
        adversary_start: share of training after which the adversary joins, in [0, 1]; its learning rate begins then.
        adversary_width: channels of the discriminator's first layer.
        adversary_layers: strided layers of the discriminator.
        draw_codes: begin with every code at a vector of the first step's last micro-batch; false keeps those of
            `start_from`.
        restart_every: steps between restarts of dead codes; 0 never restarts.
        dead_below: a code is dead when its average hits fall below this share of an equal split, over all scales.
        decoder_only: train the decoder and leave encoder, codebook and so all tokens as they are: a transformer trained
            on these tokens stays valid.
        restart_until: share of training after which dead codes and the scales' sizes are left alone, in [0, 1].
    """

    l1: float = 0.2
    l2: float = 1.0
    gradient: float = 0.0
    perceptual: float = 1.0
    perceptual_kind: str = "none"
    early: float = 0.0
    vq: float = 1.0
    adversary: float = 0.0
    adversary_start: float = 0.2
    adversary_width: int = 64
    adversary_layers: int = 3
    draw_codes: bool = True
    restart_every: int = 100
    dead_below: float = 0.03
    restart_until: float = 0.8
    decoder_only: bool = False

    def __post_init__(self) -> None:
        if self.perceptual_kind not in ("none", "scenes", "lpips"):
            raise ValueError(f"loss.perceptual_kind must be none, scenes or lpips, got {self.perceptual_kind!r}")
        for name in ("l1", "l2", "gradient", "perceptual", "early", "vq", "adversary"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("adversary_start", "restart_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name} is a share of training in [0, 1], got {getattr(self, name)}")
        widths = [self.adversary_width * min(2**i, 8) for i in range(1, self.adversary_layers + 1)]
        if self.adversary_width < 1 or any(width % min(32, width) for width in widths):
            raise ValueError(f"loss.adversary_width must be a multiple of 16, got {self.adversary_width}")
        if self.restart_every < 0 or self.dead_below < 0:
            given = f"{self.restart_every} and {self.dead_below}"
            raise ValueError(f"loss.restart_every and loss.dead_below must be 0 or more, got {given}")


class SceneMaps(nn.Module):
    """The scenes network's four feature maps, frozen: it stays in eval mode when what holds it trains."""

    def __init__(self):
        super().__init__()
        self.network = load_scene_features()

    def train(self, mode: bool = True) -> SceneMaps:
        """Eval mode, whatever is asked for."""
        return super().train(False)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, h, w) in [-1, 1] to four maps (B, c, h', w')."""
        return self.network.maps(image)


def build_perceptual(kind: str) -> nn.Module | None:
    """The frozen perceptual distance of two batches of images, or None for "none"."""
    if kind == "none":
        return None
    return LpipsLoss() if kind == "lpips" else PerceptualLoss(SceneMaps())


class TokenizerObjective(Objective):
    """Reconstruction + perceptual + VQ (+ adversary) loss of a MultiScaleVQ (VAR, equation 5; VQGAN, equation 7).

    A batch is {"image": (B, 3, h, w) float in [-1, 1]}.
    """

    shardable = False  # codes are restarted in place, and the adaptive weight needs the last layer whole

    def __init__(
        self, vqvae: MultiScaleVQ, config: TokenizerLossConfig, optimizer: OptimizerConfig, adversary: OptimizerConfig
    ):
        super().__init__()
        self.vqvae, self.config = vqvae, config
        self.optimizer, self.adversary_optimizer = optimizer, adversary
        if config.decoder_only:
            for part in (vqvae.encoder, vqvae.quant_conv, vqvae.quantizer):
                part.requires_grad_(False)
        self.perceptual = build_perceptual(config.perceptual_kind)
        if config.early > 0 and (not vqvae.config.bitwise or len(vqvae.schedule) < 2):
            raise ValueError("loss.early needs a tokenizer that is bitwise and has 2 scales or more")
        self.discriminator = None
        if config.adversary > 0:
            if min(vqvae.image_hw) < 3 * 2**config.adversary_layers:
                raise ValueError(
                    f"loss.adversary_layers {config.adversary_layers} needs images of {3 * 2**config.adversary_layers} "
                    f"pixels or more, these have {min(vqvae.image_hw)}"
                )
            self.discriminator = PatchDiscriminator(config.adversary_width, config.adversary_layers)
        self.find_unused = self.discriminator is not None
        # Hits of each code at each scale over its fair share (B * l / V), an exponential average over steps.
        self.register_buffer("usage_KV", torch.ones(len(vqvae.schedule), vqvae.config.vocab_size))

    def branches(self) -> dict[str, Branch]:
        """The tokenizer, and its adversary if there is one."""
        found = {"main": Branch(self.optimizer, self.vqvae.named_parameters(prefix="vqvae"))}
        if self.discriminator is not None:
            named = self.discriminator.named_parameters(prefix="discriminator")
            found["adversary"] = Branch(self.adversary_optimizer, named, begin=self.config.adversary_start)
        return found

    def forward(self, batch: Batch, clock: Clock) -> tuple[torch.Tensor, Metrics]:
        """Loss and metrics of a batch; in eval mode also PSNR (dB) and SSIM, and no adversary."""
        config, image = self.config, batch["image"]
        output = self.vqvae(image)
        reconstruction = output.reconstruction
        likelihood, metrics = self.likelihood(reconstruction, image)
        metrics["vq"] = output.quantized.loss
        loss = likelihood + config.vq * output.quantized.loss
        if config.early > 0 and self.training:
            sums = output.quantized.sums_BCHW[:-1]
            drawn = int(uniforms(1, clock.seed, clock.step, 4)[0] * len(sums))
            metrics["early"] = self.likelihood(self.vqvae.decode(sums[drawn]), image)[0]
            loss = loss + config.early * metrics["early"]
        if not self.training:
            return loss, {**metrics, **reconstruction_quality(reconstruction, image)}
        if self.discriminator is not None and clock.progress >= config.adversary_start:
            adversarial, d_metrics = self.adversarial_losses(reconstruction, image, likelihood)
            loss, metrics = loss + adversarial, {**metrics, **d_metrics}
        metrics = {name: value.detach() for name, value in metrics.items()}
        metrics["hits_KV"] = count_hits(output.quantized.ids, self.vqvae.config.vocab_size)
        metrics["rms_K"] = torch.stack([r_NC.square().mean().sqrt() for r_NC in output.quantized.residuals_NC])
        return loss, metrics

    def likelihood(self, reconstruction: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """How far a reconstruction is from its image, and the parts of that."""
        config = self.config
        metrics = {"pixel": pixel_loss(reconstruction, image, l1=config.l1, l2=config.l2)}
        total = metrics["pixel"]
        if config.gradient > 0:
            metrics["gradient"] = gradient_loss(reconstruction, image)
            total = total + config.gradient * metrics["gradient"]
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, image)
            total = total + config.perceptual * metrics["perceptual"]
        return total, metrics

    def adversarial_losses(
        self, reconstruction: torch.Tensor, image: torch.Tensor, likelihood: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """Both sides' losses as one scalar: neither sends gradients into the other's weights."""
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = hinge_g_loss(torch.func.functional_call(self.discriminator, fixed, (reconstruction,)))
        weight = adaptive_weight(likelihood, fooled, self.vqvae.decoder.conv_out.weight)
        judged = hinge_d_loss(self.discriminator(image), self.discriminator(reconstruction.detach()))
        metrics = {"adversarial": fooled, "adaptive_weight": weight, "discriminator": judged}
        return self.config.adversary * weight * fooled + judged, metrics

    @torch.no_grad()
    def after_step(self, batch: Batch, metrics: Metrics, clock: Clock, processes: Processes) -> None:
        """Update usage and residual sizes by scale; now and then restart dead codes at vectors of the present batch."""
        hits_KV = processes.reduce(metrics["hits_KV"])
        share_K1 = hits_KV.sum(dim=1, keepdim=True) / self.usage_KV.shape[1]
        decay = 0.9 if clock.step < 100 else 0.99
        self.usage_KV.lerp_(hits_KV / share_K1, 1 - decay)
        if self.config.decoder_only:
            return
        quantizer = self.vqvae.quantizer
        first = clock.step == 0 and self.config.draw_codes
        moving = clock.progress < self.config.restart_until
        if quantizer.normalize_scales and moving:
            drift_K = processes.reduce(metrics["rms_K"]) / processes.accelerator.num_processes
            quantizer.scale_rms_K.mul_(drift_K if first else 1 + (1 - decay) * (drift_K - 1))
        if not quantizer.has_codebook:
            return
        every = self.config.restart_every
        if first or (every and clock.step and clock.step % every == 0 and moving):
            self.restart_codes(batch["image"], share_K1, clock, processes)

    @torch.no_grad()
    def restart_codes(self, image: torch.Tensor, share_K1: torch.Tensor, clock: Clock, processes: Processes) -> None:
        """Move codes that no scale uses to residual vectors of `image`; at step 0 all of them, to start at the data.

        Drawn with a generator keyed by (seed, step), scales equally often; every process takes process 0's.
        """
        codebook = self.vqvae.quantizer.codebook.weight
        total_V = (self.usage_KV * share_K1).sum(dim=0) / share_K1.sum()
        dead_V = total_V < self.config.dead_below
        if clock.step == 0:
            dead_V = torch.ones_like(dead_V)
        if not dead_V.any():
            return
        was_training = self.training
        self.eval()
        residuals = self.vqvae.quantizer(self.vqvae.encode(image), self.vqvae.schedule).residuals_NC
        self.train(was_training)
        generator = torch.Generator().manual_seed(int(uniforms(1, clock.seed, clock.step, 1)[0] * 2**53))
        scale_N = torch.randint(len(residuals), (len(dead_V),), generator=generator).tolist()
        place_N = torch.rand(len(dead_V), generator=generator).tolist()
        drawn_VC = torch.stack([residuals[k][int(u * len(residuals[k]))] for k, u in zip(scale_N, place_N)])
        drawn_VC = processes.broadcast(drawn_VC.to(codebook.dtype))
        codebook.copy_(torch.where(dead_V[:, None], drawn_VC, codebook))
        self.usage_KV.masked_fill_(dead_V, 1.0)

    def statistics(self) -> dict[str, float]:
        """Share of codes in use, by scale and by any scale."""
        used_KV = self.usage_KV >= USED_SHARE
        names = [f"usage_{name}" for name in self.vqvae.schedule.names]
        return dict(zip([*names, "usage"], [*used_KV.float().mean(1).tolist(), used_KV.any(0).float().mean().item()]))

    def compile_parts(self) -> None:
        """Compile the convolutional halves."""
        self.vqvae.encoder.compile(dynamic=False)
        self.vqvae.decoder.compile(dynamic=False)


def count_hits(ids: list[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """How often each code was chosen at each scale: K tensors (B, l) to (K, V) float32."""
    return torch.stack([torch.bincount(ids_Bl.flatten(), minlength=vocab_size).float() for ids_Bl in ids])


def reconstruction_quality(reconstruction: torch.Tensor, image: torch.Tensor) -> Metrics:
    """PSNR in dB and SSIM of images in [-1, 1], each a mean over the batch."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    shown, wanted = (reconstruction.float().clamp(-1, 1) + 1) / 2, (image.float() + 1) / 2
    with torch.autocast(image.device.type, enabled=False):  # SSIM subtracts nearly equal numbers
        return {
            "psnr": peak_signal_noise_ratio(shown, wanted, data_range=1.0, dim=(1, 2, 3)),
            "ssim": structural_similarity_index_measure(shown, wanted, data_range=1.0),
        }
