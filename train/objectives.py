"""What the stages minimise. An objective is a module whose forward is the loss (see `train.loop.Objective`).

Shapes: B images, K scales, l tokens of one scale, L of all, V codes, C latent channels, N vectors in a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaluation.features import load_scene_features
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
from tokenizer.schedule import ScaleSchedule
from train.optimizers import Branch, OptimizerConfig
from train.order import image_draws, uniforms
from train.session import Batch, Clock, Metrics, Objective, Processes
from var.conditioning import ClassPrompt, Conditioning, Prompt, TextPrompt
from var.transformer import NextScaleTransformer

USED = 0.08  # a code counts as used by a scale above this share of its fair share of hits (VAR's statistic)


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
        adversary_start: share of training after which the adversary joins, in [0, 1].
        adversary_width, adversary_layers: shape of the discriminator.
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
            found["adversary"] = Branch(self.adversary_optimizer, named)
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
        used_KV = self.usage_KV >= USED
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


# --- next-scale prediction -----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class VarLossConfig:
    """The loss of next-scale prediction.

    Args:
        drop: share of prompts replaced by the null prompt, for classifier-free guidance.
        label_smoothing: of the cross-entropy, in training only.
        weights: token (every token alike, VAR), scale (every scale alike), side (a token weighs one over the side of
            its scale, Infinity) or lognorm (HMAR's).
    """

    drop: float = 0.1
    label_smoothing: float = 0.0
    weights: str = "token"

    def __post_init__(self) -> None:
        if self.weights not in ("token", "scale", "side", "lognorm"):
            raise ValueError(f"loss.weights must be token, scale, side or lognorm, got {self.weights!r}")
        for name in ("drop", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"loss.{name} must be in [0, 1), got {getattr(self, name)}")


def token_weights(schedule: ScaleSchedule, kind: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Weight of each of the L tokens in the loss, summing to 1: (L,) float32, not to be written to.

    "lognorm" is HMAR's: a normal density over the scales' relative sides, coarse and fine swapped (HMAR, section 4.1).
    """
    return _token_weights(schedule, kind, str(device))


@cache  # a copy to a GPU would wait, in every step, for all that it has been given to do
@torch.inference_mode(False)
def _token_weights(schedule: ScaleSchedule, kind: str, device: str) -> torch.Tensor:
    K = len(schedule)
    side_K = torch.tensor([(h * w) ** 0.5 for h, w in schedule.sides], dtype=torch.float64)
    r_K = side_K / side_K[-1]
    if kind == "lognorm" and K > 1 and r_K.std() > 0:
        scale_K = torch.exp(-0.5 * ((r_K.flip(0) - r_K.mean()) / r_K.std()) ** 2)
    elif kind == "token":
        scale_K = torch.tensor(schedule.lengths, dtype=torch.float64)
    elif kind == "side":
        scale_K = side_K  # h w tokens of weight 1 / sqrt(h w) each
    else:
        scale_K = torch.ones(K, dtype=torch.float64)
    scale_K = scale_K / scale_K.sum()
    return torch.cat([torch.full((n,), float(w) / n) for n, w in zip(schedule.lengths, scale_K)]).to(device)


@cache
@torch.inference_mode(False)
def _own_tokens(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    """Which tokens are each scale's: (K, L) bool."""
    level_L = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (level_L == torch.arange(len(lengths))[:, None]).to(device)


def token_scores(
    logits_BLV: torch.Tensor, ids_BL: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and accuracy of each place, (L,) float32 both, as means over the images.

    Args:
        logits_BLV: (B, L, V) or, bitwise, (B, L, n, 2).
        ids_BL: (B, L) or (B, L, n) int64; bits are averaged.
    """
    means = (0, *range(2, ids_BL.ndim))
    loss_N = F.cross_entropy(
        logits_BLV.flatten(0, -2), ids_BL.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    correct = logits_BLV.detach().argmax(dim=-1) == ids_BL
    return loss_N.view_as(ids_BL).mean(dim=means), correct.float().mean(dim=means)


class VarObjective(Objective):
    """Cross-entropy of all tokens given all coarser scales (VAR, equation 3).

    A batch is {"ids": (B, L) int64 or, bitwise, (B, L, n), "inputs": (B, L - l of scale 0, C), "counter": B image
    counters} and the prompt; with self-correction, ids and inputs are of tokens that went wrong now and then. A
    "schedule" is that of images of another shape than the model's own. The prompt is {"label": (B,)}, or {"states":
    (B, T, E), "mask": (B, T) bool} from a frozen text encoder, or {"input_ids": (B, T), "mask"} for the one that trains
    along.

    Attributes:
        attention: backend of self-attention in training, one of `var.masks.BACKENDS`; validation takes sdpa.
        score: `token_scores`, or what it was compiled to.
    """

    attention = "grouped"
    score = staticmethod(token_scores)

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: VarLossConfig,
        optimizer: OptimizerConfig,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.config, self.optimizer = config, optimizer
        # Then the null prompt learns nothing, or a part of the encoder that makes no states, as BERT's pooler.
        self.find_unused = config.drop == 0 or text_encoder is not None

    def branches(self) -> dict[str, Branch]:
        """One branch: the transformer, and the text encoder if it trains."""
        return {"main": Branch(self.optimizer, self.named_parameters())}

    def prompt(self, batch: Batch) -> Prompt:
        """What the batch is conditioned on."""
        if "label" in batch and self.transformer.config.conditioning == "class":
            return ClassPrompt(batch["label"])
        if self.text_encoder is None:
            return TextPrompt(batch["states"], batch["mask"])
        states = self.text_encoder(input_ids=batch["input_ids"], attention_mask=batch["mask"]).last_hidden_state
        return TextPrompt(states, batch["mask"])

    def hidden(self, inputs: torch.Tensor | None, cond: Conditioning, **passes: Any) -> torch.Tensor:
        """Hidden states (B, L, D) of all tokens.

        Raises:
            ValueError: if flex attention is to train on a CPU.
        """
        if self.attention != "sdpa" and torch.is_grad_enabled():
            if self.attention == "flex" and cond.start_BD.device.type == "cpu":
                raise ValueError("attention flex cannot train on a CPU (PyTorch has no backward pass of it): take sdpa")
            passes = {**passes, "attention_backend": self.attention}
        if self.transformer.gradient_checkpointing:  # the backward pass recomputes outside of any block of code here
            return self.transformer(inputs, cond, **passes)
        with fast_cpu_attention(cond.start_BD.device):
            return self.transformer(inputs, cond, **passes)

    def passes(self, clock: Clock) -> dict[str, Any]:
        """What the transformer is called with beside inputs and condition: an objective of subnets chooses layers."""
        return {}

    def weights(self, clock: Clock) -> torch.Tensor:
        """Weight of each token in the loss, (L,) on the device; progressive training changes it over time."""
        return token_weights(self.transformer.schedule, self.config.weights, self.transformer.device)

    def training_prompt(self, batch: Batch, clock: Clock, reader: NextScaleTransformer | None = None) -> Prompt:
        """The batch's prompt; in training, for a share of the images, the null prompt of who reads it (the model)."""
        prompt, reader = self.prompt(batch), reader or self.transformer
        if not self.training or self.config.drop == 0:
            return prompt
        u_B = image_draws(batch["counter"], 1, clock.seed, 2, device=reader.device)[:, 0]
        return drop_prompts(prompt, reader.null_prompt(prompt), u_B < self.config.drop)

    def forward(self, batch: Batch, clock: Clock) -> tuple[torch.Tensor, Metrics]:
        """Loss, and loss and accuracy by scale; in eval mode no prompt is dropped and no label smoothed."""
        return self.predict(batch, clock, **self.passes(clock))

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """`forward` with other arguments of the transformer."""
        ids_BL, schedule = batch["ids"], batch.get("schedule")
        if schedule is not None:
            passes = {**passes, "schedule": schedule}
        cond = self.transformer.condition(self.training_prompt(batch, clock))
        logits_BLV = self.transformer.logits(self.hidden(batch["inputs"], cond, **passes), cond)
        loss_L, correct_L = self.score(logits_BLV, ids_BL, self.config.label_smoothing if self.training else 0.0)
        if schedule is None:
            weights_L = self.weights(clock)
        else:
            weights_L = token_weights(schedule, self.config.weights, loss_L.device)
        loss = (loss_L * weights_L).sum()
        if schedule is not None:  # its scales are not the model's own
            return loss, {"accuracy": correct_L.mean()}
        by_scale = {**self.by_scale("loss", loss_L), **self.by_scale("accuracy", correct_L)}
        return loss, {"accuracy": correct_L.mean(), **by_scale}

    def by_scale(self, name: str, value_L: torch.Tensor) -> Metrics:
        """Means over the tokens of each scale that there is."""
        schedule = self.transformer.schedule
        own_KL = _own_tokens(tuple(schedule.lengths[: schedule.ends.index(len(value_L)) + 1]), str(value_L.device))
        mean_K = torch.where(own_KL, value_L.detach(), 0.0).sum(dim=1) / own_KL.sum(dim=1)
        return {f"{name}_{scale}": mean for scale, mean in zip(schedule.names, mean_K)}

    def compile_parts(self) -> None:
        """Compile every block, and what is made of the logits: it would read and write them several times."""
        settings = torch._dynamo.config  # each number of scales, with gradients and without, is compiled by itself
        limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # torch 2.6
        setattr(settings, limit, max(getattr(settings, limit), 4 * len(self.transformer.schedule)))
        self.transformer.compile_repeated_blocks(dynamic=False)
        self.score = torch.compile(self.score, dynamic=False)

    def halve_stream(self) -> None:
        """Keep the hidden states between blocks in half precision, too."""
        self.transformer.half_stream = True

    def checkpoint_activations(self) -> None:
        """Keep only the activations between blocks."""
        self.transformer.enable_gradient_checkpointing()


def first_scales(batch: Batch, schedule: ScaleSchedule, count: int) -> Batch:
    """The batch with the ids and inputs of its first `count` scales alone; no inputs (None) for the first scale."""
    end, first = schedule.ends[count - 1], schedule.lengths[0]
    inputs = batch["inputs"][:, : end - first] if end > first else None
    return {**batch, "ids": batch["ids"][:, :end], "inputs": inputs}


@contextlib.contextmanager
def fast_cpu_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as plain matrix products in the compute dtype: the fused backward is slower there."""
    if device.type != "cpu":
        yield
        return
    flags = torch.backends.cuda  # the flag is the CPU's as well
    before = flags.fp16_bf16_reduction_math_sdp_allowed()
    flags.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        flags.allow_fp16_bf16_reduction_math_sdp(before)


def drop_prompts(prompt: Prompt, null: Prompt, drop_B: torch.Tensor) -> Prompt:
    """The prompt with the rows where `drop_B` (bool) replaced by the null prompt's."""
    if isinstance(prompt, ClassPrompt):
        return ClassPrompt(torch.where(drop_B.to(prompt.classes_B.device), null.classes_B, prompt.classes_B))
    drop_B = drop_B.to(prompt.mask_BT.device)
    states = torch.where(drop_B[:, None, None], null.states_BTE, prompt.states_BTE)
    return TextPrompt(states, torch.where(drop_B[:, None], null.mask_BT, prompt.mask_BT))
