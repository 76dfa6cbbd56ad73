"""What our models give for a golden folder of HMAR: next-scale prediction, masked prediction, and both in one run.

Shapes: B images, l tokens of one scale, L all tokens, V codes.
"""

from __future__ import annotations

from unittest import mock

import torch
from golden_outputs import Golden, Tensors, _spec, greedy_outputs, teacher_forced, vqvae_beside

from sample import adapters
from sample.generate import generate
from sample.guidance import Guidance
from sample.plan import Plan, Stage, plain
from tokenizer.model import MultiScaleVQ
from var import convert_hmar
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer


def hmar_outputs(golden: Golden) -> Tensors:
    constructor, labels = golden.config["constructor"], golden.io["labels"]
    vqvae, model = vqvae_beside(golden), load_hmar(golden)
    ids = [golden.io[f"gt_ids_scale{k}"] for k in range(len(model.schedule))]
    inputs = vqvae.quantizer.teacher_inputs(ids, model.schedule)
    codes = [vqvae.quantizer.scale_code(ids[k], k, model.schedule) for k in range(1, len(ids))]
    outputs = {"ns_input": inputs, "mask_input": torch.cat(codes, dim=1)}
    outputs |= {f"nsp_{name}": tensor for name, tensor in teacher_forced(model, labels, inputs).items()}
    masked_BL = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    masked_BL[:, golden.io["idx_to_mask"]] = True
    with torch.no_grad():
        cond = model.condition(ClassPrompt(labels))
        outputs["mp_logits"] = model.masked_logits(inputs, outputs["mask_input"], masked_BL, cond)
    cfg = constructor.get("cfg", golden.config.get("cfg", 1.5))
    alone = greedy_outputs(plain(model, guidance=cfg, top_k=1), plain(model, guidance=cfg), vqvae, labels)
    outputs |= {f"nsp_greedy_{name}": tensor for name, tensor in alone.items()}
    return outputs | whole_run(model, vqvae, labels, cfg, tuple(map(tuple, constructor["mask_schedule"])))


def load_hmar(golden: Golden) -> NextScaleTransformer:
    """Out of the two trainings' state dicts, as a user's two files."""
    first, second = (
        {key.removeprefix(f"{part}."): t for key, t in golden.weights.items() if key.startswith(f"{part}.")}
        for part in ("nsp", "mp")
    )
    schedule = _spec(golden.config["constructor"]["patch_nums"])
    heads = golden.config["constructor"].get("num_heads")
    return adapters.build(adapters.HMAR, convert_hmar.normalized(first, second), schedule=schedule, heads=heads).float()


def whole_run(
    model: NextScaleTransformer, vqvae: MultiScaleVQ, labels: torch.Tensor, cfg: float, passes: tuple
) -> Tensors:
    """The loop with argmax for a draw, as the reference ran here: logits of every pass, what was masked, the image."""
    seen: list[torch.Tensor] = []

    def argmax(logits_BlV: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(logits_BlV)
        return logits_BlV.argmax(dim=-1)

    stage = Stage(model, range(len(model.schedule)), guidance=Guidance(cfg), mask_schedule=passes)
    with mock.patch("sample.generate.draw", argmax), mock.patch("sample.masked.draw", argmax):
        state = generate(Plan((stage,)), vqvae.quantizer, ClassPrompt(labels), range(len(labels)))
    outputs = {f"hmar_final_ids_scale{k}": tokens for k, tokens in enumerate(state.tokens)}
    for k, settled in enumerate(passes):
        logits_BlV = None
        for step in range(len(settled)):
            again_BlV = seen.pop(0)
            outputs[f"hmar_logits_scale{k}_step{step}"] = again_BlV
            if step:
                probabilities = logits_BlV.softmax(dim=-1).amax(dim=-1)  # of the tokens, which are the likeliest
                places_Bn = probabilities.argsort(dim=-1)[:, : sum(settled[step:])]
                outputs[f"hmar_masked_idx_scale{k}_step{step}"] = places_Bn
                drawn = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, places_Bn, True)
                again_BlV = torch.where(drawn[..., None], again_BlV, logits_BlV)
            logits_BlV = again_BlV
    with torch.no_grad():
        outputs["hmar_greedy_img01"] = (vqvae.decode(state.f_hat_BCHW).clamp(-1, 1) + 1) / 2
    return outputs


FAMILIES = {"hmar": hmar_outputs}
