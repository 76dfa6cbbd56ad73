"""What our models give for a golden folder: one function per family, returning every output by its recorded name.

Shapes: B images, l tokens of one scale, L all tokens, V codes, C latent channels.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from sample import adapters
from sample.draw import Filter, smooth_weights
from sample.generate import generate, scale_logits, start
from sample.plan import Plan, collaborative, plain
from sample.state import GenerationState, Hook
from tokenizer.model import MultiScaleVQ
from tokenizer.quantizer import phi_index
from tokenizer.schedule import ScaleSchedule
from var.conditioning import ClassPrompt
from var.eviction import best_and_window, take, window_scores
from var.scalekv import observation_window
from var.transformer import NextScaleTransformer

Tensors = dict[str, torch.Tensor]
LAST_SCALE = 12  # of Infinity's 13, which the released ScaleKV treats as the one before


@dataclass(frozen=True)
class Golden:
    """A folder with config.json, io.safetensors and, mostly, weights.safetensors."""

    path: Path

    @cached_property
    def config(self) -> dict:
        return json.loads((self.path / "config.json").read_text())

    @cached_property
    def io(self) -> Tensors:
        return load_file(self.path / "io.safetensors")

    @cached_property
    def weights(self) -> Tensors:
        return load_file(self.path / "weights.safetensors")

    @property
    def inputs(self) -> list[str]:
        roles = {name: entry.get("role") for name, entry in self.config.get("tensors", {}).items()}
        return self.config.get("inputs") or [name for name, role in roles.items() if role == "input"]

    @property
    def outputs(self) -> list[str]:
        return sorted(set(self.io) - set(self.inputs))

    def meaning(self, name: str) -> str:
        return str(self.config.get("tensors", {}).get(name, {}).get("meaning", ""))

    @cached_property
    def family(self) -> str:
        """By what the constructor takes first, by the reference's name second."""
        config, reference = self.config, str(self.config.get("reference", ""))
        constructor = config.get("constructor") or {}
        if any(name.startswith("masked_logits_") for name in self.io):
            return "sampler"
        for word, family in (("HMAR", "hmar"), ("ScaleKV", "scalekv"), ("BSQ", "bsq"), ("Infinity", "infinity")):
            if word in reference:
                return family
        if "vqvae_constructor" in config and "var_constructor" in config:
            return "formula"
        if "drafter" in constructor:
            return "code"
        if "v_patch_nums" in constructor or "z_channels" in constructor:
            return "vqvae"
        return "var" if "patch_nums" in constructor else "unknown"


# --- models through the converter ---------------------------------------------------------------------------------


def load_vqvae(weights: Tensors, constructor: dict) -> MultiScaleVQ:
    flags = {
        "phi_ratio": constructor.get("quant_resi", 0.5),
        "cosine": constructor.get("using_znorm", False),
        "beta": constructor.get("beta", 0.25),
    }
    return adapters.build(adapters.VQVAE, weights, schedule=_spec(constructor["v_patch_nums"]), **flags).float()


def load_var(weights: Tensors, constructor: dict) -> NextScaleTransformer:
    schedule = _spec(constructor["patch_nums"])
    flags = {"heads": constructor.get("num_heads"), "norm_eps": constructor.get("norm_eps", 1e-6)}
    return adapters.build(adapters.VAR, weights, schedule=schedule, **flags).float()


def vqvae_beside(golden: Golden) -> MultiScaleVQ:
    path = golden.path / golden.config.get("vae_weights", "weights.safetensors")
    return load_vqvae(
        load_file(path), golden.config.get("vae_constructor") or Golden(path.parent).config["constructor"]
    )


def _spec(sides: Sequence) -> list[list[int]]:
    return ScaleSchedule.of(sides).spec


# --- families -----------------------------------------------------------------------------------------------------


def vqvae_outputs(golden: Golden) -> Tensors:
    model = load_vqvae(golden.weights, golden.config["constructor"])
    image = golden.io["img"]
    return tokenizer_outputs(model, image) | tokenizer_training(model, image, golden.weights)


@torch.no_grad()
def tokenizer_outputs(model: MultiScaleVQ, image: torch.Tensor) -> Tensors:
    schedule, quantizer, f = model.schedule, model.quantizer, model.encode(image)
    ids = model.image_to_tokens(image)
    sums = quantizer.partial_sums(ids, schedule)
    return {
        "encoder_out": model.encoder(image),
        "f": f,
        **{f"ids_scale{k}": tokens for k, tokens in enumerate(ids)},
        **{f"fhat_scale{k}": f_hat for k, f_hat in enumerate(sums)},
        "img_rec_from_ids": model.tokens_to_image(ids),
        "img_rec_from_ids_first_scale_only": model.decode(sums[0]).clamp(-1, 1),
        "img_rec_not_same_shape": model.decode(growing_sum(model, ids)).clamp(-1, 1),
        "dec_unclamped": model.decode(sums[-1]),
        "var_input": quantizer.teacher_inputs(ids, schedule),
        "img_from_f_unquantised": model.decode(f).clamp(-1, 1),
        "f_after_fhat_mse": F.mse_loss(sums[-1], f)[None],
    }


def growing_sum(model: MultiScaleVQ, ids: list[torch.Tensor]) -> torch.Tensor:
    """The reference's `same_shape=False`: the canvas grows from scale to scale, phi works at each scale's own size."""
    quantizer, schedule = model.quantizer, model.schedule
    f_hat = torch.zeros(len(ids[0]), quantizer.channels, *schedule.sides[0])
    for k, tokens in enumerate(ids):
        code = quantizer.lookup(tokens, k, schedule)
        if quantizer.phis:
            code = quantizer.phis[phi_index(len(quantizer.phis), k, len(schedule))](code)
        f_hat = F.interpolate(f_hat, size=schedule.sides[k], mode="bicubic") + code
    return f_hat


def tokenizer_training(model: MultiScaleVQ, image: torch.Tensor, weights: Tensors) -> Tensors:
    model.train().zero_grad()
    output = model(image)
    total = output.quantized.loss + F.mse_loss(output.reconstruction, image)
    total.backward()
    model.eval()
    cells = len(image) * model.schedule.lengths[-1]
    hits = weights.get("quantize.ema_vocab_hit_SV", torch.zeros(len(model.schedule), model.quantizer.vocab_size))
    return {
        "train_rec_img": output.reconstruction.detach(),
        "train_vq_loss": output.quantized.loss.detach()[None],
        "train_total_loss": total.detach()[None],
        "train_usages": (hits >= cells / model.quantizer.vocab_size * 0.08).float().mean(dim=1) * 100,
        **gradients(adapters.VQVAE, model),
    }


def gradients(adapter: adapters.Adapter, model: torch.nn.Module) -> Tensors:
    """Gradients under official names."""
    ours = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }
    return {f"grad.{name}": grad for name, grad in adapters.to_official(adapter, ours, model.config).items()}


def var_outputs(golden: Golden) -> Tensors:
    vqvae = vqvae_beside(golden)
    model = load_var(golden.weights, golden.config["constructor"])
    io, labels = golden.io, golden.io["labels"]
    outputs = teacher_forced(model, labels, io["x_BLCv_wo_first_l"])
    if "gt_ids_BL" in io:
        outputs |= transformer_training(model, labels, io["x_BLCv_wo_first_l"], io["gt_ids_BL"])
    for name in run_names(golden):
        settings = run_settings(golden, name)
        outputs |= run_outputs(settings, vqvae, model, labels, prefix=f"{name}_")
    return outputs


@torch.no_grad()
def teacher_forced(model: NextScaleTransformer, labels: torch.Tensor, inputs: torch.Tensor) -> Tensors:
    outputs: Tensors = {}
    handles = [
        block.register_forward_hook(lambda _, __, out, i=i: outputs.__setitem__(f"hidden_after_block{i}", out))
        for i, block in enumerate(model.blocks)
    ]
    null = torch.full_like(labels, model.config.num_classes)
    for name, classes in (("logits_tf_uncond", null), ("logits_tf", labels)):
        cond = model.condition(ClassPrompt(classes))
        hidden = model(inputs, cond)
        outputs[name] = model.logits(hidden, cond)
    for handle in handles:
        handle.remove()
    return outputs | {"hidden_after_last_block": hidden}


def transformer_training(
    model: NextScaleTransformer, labels: torch.Tensor, inputs: torch.Tensor, targets_BL: torch.Tensor
) -> Tensors:
    model.train().zero_grad()
    cond = model.condition(ClassPrompt(labels))
    loss = F.cross_entropy(model.logits(model(inputs, cond), cond).flatten(0, 1), targets_BL.flatten())
    loss.backward()
    model.eval()
    return {"train_ce_loss": loss.detach()[None], **gradients(adapters.VAR, model)}


def code_outputs(golden: Golden) -> Tensors:
    constructor, labels = golden.config["constructor"], golden.io["labels"]
    vqvae = vqvae_beside(golden)
    drafter, refiner = (
        load_var(
            {key.removeprefix(f"{part}."): t for key, t in golden.weights.items() if key.startswith(f"{part}.")},
            golden.config.get("fixed_constructor_args", {})
            | constructor[part]
            | {"patch_nums": constructor["patch_nums"]},
        )
        for part in ("drafter", "refiner")
    )
    cfg, handover = constructor["cfg"], constructor["draft_steps"]
    greedy, prompt = Filter(top_k=1), ClassPrompt(labels)
    plan = collaborative(
        drafter, refiner, handover=handover, guidance=cfg, drafter_filters=greedy, refiner_filters=greedy
    )
    unfiltered = collaborative(drafter, refiner, handover=handover, guidance=cfg)
    outputs = greedy_outputs(plan, unfiltered, vqvae, labels)
    hub = torch.cat([outputs[f"input_scale{k}"] for k in range(1, handover + 1)], dim=1)
    with torch.no_grad():
        cond = refiner.condition(prompt.join(refiner.null_prompt(prompt)))
        entry = refiner.logits(refiner(torch.cat([hub, hub]), cond, scales=range(handover + 1)), cond)
    for name, model in (("drafter", drafter), ("refiner", refiner)):
        outputs |= run_outputs({"cfg": cfg}, vqvae, model, labels, prefix=f"{name}_alone_")
    return outputs | {
        "draft_fhat": outputs[f"fhat_scale{handover - 1}"],
        "draft_token_hub": hub,
        "refiner_entry_raw_logits": entry,
    }


def formula_outputs(golden: Golden) -> Tensors:
    """Weights by a formula in the folder instead of a file."""
    config, formula = golden.config, _module(golden.path / "formula.py")
    vqvae_args, var_args = config["vqvae_constructor"], config["var_constructor"]
    shapes = formula_shapes(vqvae_args, var_args)
    weights = {
        kind: {name: torch.from_numpy(formula.weight(name, shape, salt)) for name, shape in shapes[kind].items()}
        for kind, salt in (("vqvae", config["vqvae_salt"]), ("var", config["var_salt"]))
    }
    weights["vqvae"] = {
        name: tensor * config.get("extra_scale", {}).get(name, 1) for name, tensor in weights["vqvae"].items()
    }
    vqvae, model = load_vqvae(weights["vqvae"], vqvae_args), load_var(weights["var"], var_args)
    outputs = tokenizer_outputs(vqvae, formula_image(formula, config))
    run = config["var_greedy"]
    labels = torch.as_tensor(run["label"]).reshape(-1)
    forced = teacher_forced(model, labels, outputs["var_input"])
    outputs |= {f"var_{name}": tensor for name, tensor in forced.items()}
    return outputs | run_outputs(run, vqvae, model, labels, prefix="var_greedy_")


def formula_shapes(vqvae_args: dict, var_args: dict) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of every official parameter, by the two constructors' arguments."""
    spec = _spec(vqvae_args["v_patch_nums"])
    sharing = vqvae_args.get("share_quant_resi", 4)
    width = vqvae_args["ch"]
    vqvae = {
        "channels": [width * factor for factor in vqvae_args["ch_mult"]],
        "stem_channels": width,
        "latent_channels": vqvae_args["z_channels"],
        "vocab_size": vqvae_args["vocab_size"],
        "schedule": spec,
        "num_phis": sharing,
        "phi_ratio": vqvae_args.get("quant_resi", 0.5),
    }
    var = {
        "depth": var_args["depth"],
        "width": var_args["embed_dim"],
        "heads": var_args["num_heads"],
        "vocab_size": vqvae_args["vocab_size"],
        "latent_channels": vqvae_args["z_channels"],
        "schedule": _spec(var_args["patch_nums"]),
        "num_classes": var_args["num_classes"],
        "mlp_ratio": var_args.get("mlp_ratio", 4.0),
        "qk_norm": var_args.get("attn_l2_norm", True),
        "shared_ada": var_args.get("shared_aln", False),
    }
    shapes = {}
    for kind, adapter, config in (("vqvae", adapters.VQVAE, vqvae), ("var", adapters.VAR, var)):
        with torch.device("meta"):
            ours = adapter.model(**config)
        state = adapters.to_official(adapter, ours.state_dict(), ours.config)
        shapes[kind] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return shapes


def formula_image(formula: object, config: dict) -> torch.Tensor:
    """Coarse noise repeated, mixed with fine noise, as the config's text says."""
    text = config["input_image"]
    low, full = (
        tuple(int(n) for n in re.search(rf'"image\.{name}",\s*\(([\d, ]+)\)', text)[1].split(","))
        for name in ("lowres", "noise")
    )
    coarse = formula.hash_uniform("image.lowres", low)
    for axis in (2, 3):
        coarse = coarse.repeat(full[axis] // low[axis], axis=axis)
    return torch.from_numpy(coarse * 0.75 + 0.25 * formula.hash_uniform("image.noise", full)).float()


def sampler_outputs(golden: Golden) -> Tensors:
    outputs: Tensors = {}
    for name in golden.outputs:
        found = re.fullmatch(r"(masked_logits|probs)_k(\d+)_p([\d.]+)", name)
        if found:  # the reference's top_p 0 means no limit
            masked = Filter(top_k=int(found[2]), top_p=float(found[3]) or 1.0)(golden.io["logits"])
            outputs[name] = masked if found[1] == "masked_logits" else masked.softmax(dim=-1)
    return outputs


def scalekv_outputs(golden: Golden) -> Tensors:
    """The released `update_kv` scale by scale: our window, scores and choice under its rule of when to begin."""
    outputs: Tensors = {}
    for case in golden.config["cases"]:
        outputs |= scalekv_case(golden, case)
    return outputs


def scalekv_case(golden: Golden, case: dict) -> Tensors:
    io, name, outputs, begun = golden.io, case["name"], {}, False
    keys, values = io[f"{name}.k_init"], io[f"{name}.v_init"]
    heads, given = keys.shape[:2], keys.shape[2]
    places = torch.arange(given).expand(*heads, -1)
    for k in case["scale_inds_in_order"]:
        step, tokens = f"{name}.s{k}", golden.config["SCALE"][k]
        keys, values = (torch.cat([old, io[f"{step}.{n}_new"]], dim=2) for old, n in ((keys, "k"), (values, "v")))
        places = torch.cat([places, torch.arange(given, given + tokens).expand(*heads, -1)], dim=2)
        given, S = given + tokens, keys.shape[2]
        capacity = scalekv_capacity(golden.config["cache_sizes"], k, case)
        begun = begun or case["base_capacity"] < S
        chosen = torch.arange(S).expand(*heads, -1)
        if begun and capacity < S:
            chosen, scored = scalekv_choice(golden, case, step, keys, tokens, capacity)
            outputs |= scored
        begun = begun and k != LAST_SCALE
        keys, values, places = take(keys, chosen), take(values, chosen), places.gather(2, chosen)
        outputs |= {f"{step}.kept_k": keys, f"{step}.kept_v": values}
        outputs |= {f"{step}.kept_idx_in_cat": chosen, f"{step}.kept_global_pos": places}
    return outputs


def scalekv_capacity(sizes: list[list[int]], k: int, case: dict) -> int:
    """Tokens a layer keeps after scale k: the last scale takes the row of the one before, absent layers the base."""
    row = sizes[min(k + 2 - (k == LAST_SCALE), len(sizes) - 1)]
    return row[case["layer_idx"]] if case["layer_idx"] < len(row) else case["base_capacity"]


def scalekv_window(tokens: int, size: int, S: int) -> torch.Tensor:
    """Positions of the window among S keys: a square grid over the scale's tokens or, if none fits, the last."""
    side, grid = isqrt(tokens), isqrt(size)
    if side**2 != tokens or grid**2 != size or grid > side:
        return torch.arange(S - min(size, S), S)
    return torch.tensor(observation_window(side, side, grid)) + S - tokens


def scalekv_choice(
    golden: Golden, case: dict, step: str, keys_BHSd: torch.Tensor, tokens: int, capacity: int
) -> tuple[torch.Tensor, Tensors]:
    """Which tokens stay, and the scores; where the last kept ties with the first dropped, the recorded choice holds if
    its scores are as good."""
    S = keys_BHSd.shape[2]
    window = scalekv_window(tokens, case["window_size"], S)
    query, capacity = golden.io[f"{step}.q"][:, :, (window - S + tokens).clamp(min=0)], max(capacity, len(window))
    options = {"kernel": case["kernel_size"], "pooling": case["pooling"].removesuffix("pool"), "softmax": False}
    scores = window_scores(query, keys_BHSd, window, scale=query.shape[-1] ** -0.5, **options)
    chosen, free = best_and_window(scores, window, capacity), capacity - len(window)
    chosen = chosen.clamp(max=S - 1)  # pooling by an even kernel makes one score more
    if free == 0:
        return chosen, {}
    ranked = scores.sort(dim=-1, descending=True).values
    tied = ranked[..., free - 1] == ranked[..., free]
    recorded = golden.io[f"{step}.kept_idx_in_cat"]
    ours, theirs = (scores.gather(2, kept).nan_to_num(neginf=0).sort(-1).values for kept in (chosen, recorded))
    equal = (tied & torch.isclose(ours, theirs, atol=1e-5).all(-1))[..., None]
    scored = {f"{step}.pooled_scores": scores, f"{step}.topk_boundary_tied": tied.long()}
    return torch.where(equal, recorded, chosen), scored


FAMILIES: dict[str, Callable[[Golden], Tensors]] = {
    "scalekv": scalekv_outputs,
    "vqvae": vqvae_outputs,
    "var": var_outputs,
    "code": code_outputs,
    "formula": formula_outputs,
    "sampler": sampler_outputs,
}


# --- generation -----------------------------------------------------------------------------------------------------


class Record(Hook):
    """Keeps what the loop does; may choose the tokens instead of it.

    Args:
        choose: logits (B, l, V) to tokens (B, l).
    """

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.choose, self.logits, self.f_hats = choose, [], []

    def on_tokens(
        self, state: GenerationState, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor
    ) -> torch.Tensor:
        self.logits.append(logits_BlV)
        return self.choose(logits_BlV) if self.choose else tokens_Bl

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        self.f_hats.append(state.f_hat_BCHW)


def run_names(golden: Golden) -> list[str]:
    """The generation runs a VAR folder records: greedy, greedy_nocfg, sampled, ..."""
    pattern = re.compile(r"(\w+?)_(?:(?:ids|cfg_logits|fhat)_scale\d+|fhat|img01)(?:_stride\d+|_corner)?")
    return sorted({found[1] for name in golden.outputs if (found := pattern.fullmatch(name))})


def run_settings(golden: Golden, name: str) -> dict:
    """A run's arguments: from the config where it has an entry of that name, else from what it says of the tensors."""
    text = " ".join(golden.meaning(n) for n in golden.outputs if re.match(rf"{name}_(ids|cfg_logits|fhat|img01)", n))
    settings: dict = {"cfg": golden.config.get("cfg", 0.0), "smooth": "more_smooth=True" in text}
    for key, kind in (("cfg", float), ("top_k", int), ("top_p", float), ("g_seed", int)):
        found = re.search(rf"\b{key}=(\d+(?:\.\d+)?)", text)
        if found:
            settings[key] = kind(found[1])
    own = golden.config.get(name)
    return settings | (own if isinstance(own, dict) else {})


def run_outputs(
    settings: dict, vqvae: MultiScaleVQ, model: NextScaleTransformer, labels: torch.Tensor, *, prefix: str
) -> Tensors:
    filters = {"top_k": settings.get("top_k", 1), "top_p": settings.get("top_p") or 1.0}
    plan = plain(model, guidance=settings["cfg"], **filters)
    if "g_seed" in settings:
        rng = torch.Generator().manual_seed(settings["g_seed"])
        run = smooth_outputs if settings.get("smooth") else sampled_outputs
        outputs = run(plan, vqvae, labels, rng)
    else:
        outputs = greedy_outputs(plan, plain(model, guidance=settings["cfg"]), vqvae, labels)
    return {f"{prefix}{name}": tensor for name, tensor in outputs.items()}


def greedy_outputs(plan: Plan, unfiltered: Plan, vqvae: MultiScaleVQ, labels: torch.Tensor) -> Tensors:
    """Twice through the loop: as a user would run it, and unfiltered with our argmax to see the guided logits."""
    record, raw = Record(), Record(choose=lambda logits: logits.argmax(dim=-1))
    seeds, prompt = range(len(labels)), ClassPrompt(labels)
    state = generate(plan, vqvae.quantizer, prompt, seeds, hooks=[record])
    generate(unfiltered, vqvae.quantizer, prompt, seeds, hooks=[raw])
    return {
        **{f"cfg_logits_scale{k}": logits for k, logits in enumerate(raw.logits)},
        **{f"fhat_scale{k}": f_hat for k, f_hat in enumerate(record.f_hats)},
        **{f"input_scale{k + 1}": x for k, x in enumerate(state.inputs)},
        **final_outputs(state, vqvae),
    }


def sampled_outputs(plan: Plan, vqvae: MultiScaleVQ, labels: torch.Tensor, rng: torch.Generator) -> Tensors:
    """The reference's own draws: torch.multinomial, one generator for the run."""
    record = Record(choose=lambda logits: multinomial(logits, rng))
    state = generate(plan, vqvae.quantizer, ClassPrompt(labels), range(len(labels)), hooks=[record])
    return final_outputs(state, vqvae)


@torch.no_grad()
def smooth_outputs(plan: Plan, vqvae: MultiScaleVQ, labels: torch.Tensor, rng: torch.Generator) -> Tensors:
    """The loop's own steps with the reference's order of random numbers: the hard draw first, then Gumbel noise."""
    schedule = plan.schedule
    state = start(plan, vqvae.quantizer, ClassPrompt(labels), range(len(labels)))
    state.enter(plan.stages[0])
    for k in range(len(schedule)):
        logits = scale_logits(state, k)
        tokens = multinomial(logits, rng)
        weights = smooth_weights(logits, k / max(len(schedule) - 1, 1), rng)
        state.advance(k, tokens, vqvae.quantizer.blend(weights, k, schedule))
    return final_outputs(state, vqvae)


def multinomial(logits_BlV: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    probabilities = logits_BlV.softmax(dim=-1).flatten(0, 1)
    return torch.multinomial(probabilities, 1, replacement=True, generator=rng).view(logits_BlV.shape[:2])


@torch.no_grad()
def final_outputs(state: GenerationState, vqvae: MultiScaleVQ) -> Tensors:
    return {
        **{f"ids_scale{k}": tokens for k, tokens in enumerate(state.tokens)},
        "fhat": state.f_hat_BCHW,
        "final_fhat": state.f_hat_BCHW,
        "img01": (vqvae.decode(state.f_hat_BCHW).clamp(-1, 1) + 1) / 2,
    }


def _module(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"golden_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
