"""What our bitwise tokenizer and transformer give for a golden folder of Infinity's, by the recorded names.

Shapes: B images, l tokens of one scale, n bits of a token, T text tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from einops import rearrange
from golden_outputs import Golden, Record, Tensors
from torch.nn import functional as F

from sample import adapters
from sample.generate import generate
from sample.guidance import Guidance
from sample.plan import plain
from tokenizer.aspects import TEMPLATES, nearest_template
from tokenizer.bitwise import BinarySphericalQuantizer
from tokenizer.schedule import ScaleSchedule
from var.conditioning import TextPrompt
from var.convert_infinity import normalized
from var.layers import rope_table
from var.transformer import NextScaleTransformer


def bsq_outputs(golden: Golden) -> Tensors:
    config = golden.config
    schedule = _sides(config.get("scale_schedule") or config["constructor"]["scale_schedule"])
    quantizer = BinarySphericalQuantizer(channels=config["constructor"]["dim"])
    latent = golden.io["latent"].clone().requires_grad_()
    quantized = quantizer(latent, schedule)
    direction = torch.cos(torch.arange(latent.numel(), dtype=torch.float32)).view_as(latent)
    (quantized.f_hat_BCHW * direction).sum().backward()
    single = quantizer(golden.io["latent"], ScaleSchedule((schedule.latent_hw,)))
    sums = quantizer.partial_sums(quantized.ids, schedule)
    return {
        "quantized_out": quantized.f_hat_BCHW.detach(),
        "grad_latent": latent.grad,
        "summed_codes_from_bits": sums[-1][:, :, None],
        "lfq_single_quantized": single.f_hat_BCHW[:, :, None],
        "lfq_single_bits": _as_map(single.ids[0], schedule.latent_hw),
        **{f"bits_scale{k}": _as_map(bits, schedule.sides[k]) for k, bits in enumerate(quantized.ids)},
        **{f"codes_scale{k}": quantizer.lookup(b, k, schedule)[:, :, None] for k, b in enumerate(quantized.ids)},
        **{
            f"var_input_scale{k + 1}": F.interpolate(sums[k], size=side, mode="area")[:, :, None]
            for k, side in enumerate(schedule.sides[1:])
        },
    }


@torch.no_grad()
def infinity_outputs(golden: Golden) -> Tensors:
    model, io = load_infinity(golden), golden.io
    quantizer = load_quantizer(golden, model)
    prompt = text_prompt(io["text_compact"], io["text_lens"])
    labels, inputs = quantizer.corrected(io["latent"], model.schedule)
    table = rope_table(model.schedule, range(len(model.schedule)), model.config.width // model.config.heads, "cpu")
    normed = model.conditioner.norm(prompt.states_BTE)
    outputs = {
        "x_BLC_wo_prefix": inputs,
        **{f"gt_bits_scale{k}": bits for k, bits in enumerate(labels)},
        "text_after_norm": normed[prompt.mask_BT],
        "text_for_cross_attn": model.conditioner.memory(normed)[prompt.mask_BT],
        "cond_BD": model.condition(prompt).start_BD,
        "rope_cache": torch.stack([table.real, table.imag]),
    }
    for name, given in (("logits_tf", prompt), ("logits_tf_uncond", model.null_prompt(prompt))):
        cond = model.condition(given)
        outputs[name] = model.logits(model(inputs, cond), cond).flatten(-2)
    inserted = golden.config["constructor"].get("cfg_insertion_layer", 0)
    for name, items in (("greedy", [0]), ("greedy_insert", inserted)):
        outputs |= greedy_outputs(golden, model, quantizer, prompt, items, prefix=f"{name}_")
    return outputs


def load_infinity(golden: Golden) -> NextScaleTransformer:
    config = golden.config
    constructor = config.get("fixed_constructor_args", {}) | config["constructor"]
    template = TEMPLATES[nearest_template(constructor.get("h_div_w", 1.0))]
    once = constructor.get("add_lvl_embeding_only_first_block", 1)
    chunks = constructor.get("block_chunks", 1)
    every = 1 if chunks == 1 else constructor["depth"] // chunks  # without chunks, the official loop asks at each block
    flags = {
        "schedule": _sides(constructor["scale_schedule"]),
        "rope_grid": config.get("rope_reference_hw") or template.latent_hw,
        "heads": constructor["num_heads"],
        "norm_eps": constructor.get("norm_eps", 1e-6),
        "level_every": 0 if once else every,
    }
    return adapters.build(adapters.INFINITY, normalized(golden.weights), **flags).float()


def load_quantizer(golden: Golden, model: NextScaleTransformer) -> BinarySphericalQuantizer:
    channels = golden.io["latent"].shape[1]
    return BinarySphericalQuantizer(channels=channels, patch=isqrt(model.config.latent_channels // channels))


def text_prompt(compact: torch.Tensor, lengths: torch.Tensor) -> TextPrompt:
    """Sequences one after the other as a padded batch."""
    states = torch.nn.utils.rnn.pad_sequence(compact.split(lengths.tolist()), batch_first=True)
    return TextPrompt(states, torch.arange(states.shape[1]) < lengths[:, None])


def greedy_outputs(
    golden: Golden,
    model: NextScaleTransformer,
    quantizer: BinarySphericalQuantizer,
    prompt: TextPrompt,
    insertion: int | list[int],
    *,
    prefix: str,
) -> Tensors:
    """The likeliest bits, guided where `insertion` says (0: on the logits, -n: after block depth - n)."""
    constructor, schedule = golden.config["constructor"], model.schedule
    items = [insertion] if isinstance(insertion, int) else insertion
    guidance = Guidance(
        [cfg - 1 for cfg in _per_scale(constructor["cfg_list"], schedule)],
        blocks=tuple(item for item in items if item < 0),
        on_logits=0 in items,
    )
    plan = plain(model, guidance=guidance, temperature=_per_scale(constructor["tau_list"], schedule))
    record = Record(choose=lambda logits: logits.argmax(dim=-1))
    state = generate(plan, quantizer, prompt, range(len(prompt)), hooks=[record])
    outputs = {"summed_codes": state.f_hat_BCHW}
    for k, bits in enumerate(state.tokens):
        codes = quantizer.lookup(bits, k, schedule)
        outputs[f"logits_scale{k}"] = record.logits[k]
        outputs[f"bits_scale{k}"] = bits
        outputs[f"codes_scale{k}"] = codes[:, :, None]
        outputs[f"vae_bits_scale{k}"] = rearrange((codes > 0).long(), "b c h w -> b 1 h w c")
    return {f"{prefix}{name}": tensor for name, tensor in outputs.items()}


def _per_scale(values: float | list[float], schedule: ScaleSchedule) -> list[float]:
    return list(values)[: len(schedule)] if isinstance(values, list) else [values] * len(schedule)


def _sides(spec: list) -> ScaleSchedule:
    """Infinity's (t, h, w) of every scale, t = 1 for images."""
    return ScaleSchedule.of([side[-2:] for side in spec])


def _as_map(bits_Bln: torch.Tensor, side: tuple[int, int]) -> torch.Tensor:
    return rearrange(bits_Bln, "b (h w) c -> b 1 h w c", h=side[0])


FAMILIES: dict[str, Callable[[Golden], Tensors]] = {"bsq": bsq_outputs, "infinity": infinity_outputs}
