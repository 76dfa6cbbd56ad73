"""The pipeline: prompts or classes to pictures, in diffusers' conventions, around the one loop.

Shapes: B images, C latent channels, H W the latent grid, l tokens of one scale.

diffusers reads the annotations of `NextScalePipeline.__init__`, so they are not postponed in this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sample.checkpoints import readable
from sample.draw import check_seeds, seeds_from
from sample.edit import RULES, Canvas, EditHook, Picture, edit_hook, read_canvases
from sample.generate import generate
from sample.graphs import GraphedSampler, replays
from sample.guidance import Guidance
from sample.official import Flags, load_official
from sample.offload import keep_on_cpu
from sample.plan import Plan, scale_filters
from sample.plan_text import PlanConfig
from sample.search import Found, Search, Show, search_images
from sample.state import GenerationState, Hook
from sample.text import encode_prompts
from tokenizer.aspects import SIZES, aspect_schedule
from tokenizer.model import MultiScaleVQ
from tokenizer.precision import cast
from tokenizer.schedule import ScaleSchedule
from var.conditioning import ClassPrompt, Prompt, TextPrompt
from var.transformer import NextScaleTransformer

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
CALLBACK_TENSORS = ("f_hat", "tokens")
SHORT_TEXT = 128  # tokens up to which all texts are padded alike in half precision
PLAN_WORDS = ("plan", "depth", "cache", "prune")
GUIDANCE_WORDS = {"guidance_scale": "scale", "guidance_ramp": "ramp", "guidance_blocks": "blocks"}
GUIDANCE_WORDS |= {"guidance_until": "until"}
SAMPLING = (*GUIDANCE_WORDS, "top_k", "top_p", "temperature", "temperature_last", "aspect", "size", "sequential")
SAMPLING += ("mask_schedule", *PLAN_WORDS)

Images = list[Image.Image] | np.ndarray | torch.Tensor
StepCallback = Callable[["NextScalePipeline", int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


@dataclass
class NextScaleOutput(BaseOutput):
    """What a call of the pipeline gives.

    Attributes:
        images: B PIL images; or float32 in [0, 1], (B, h, w, 3) numpy for "np", (B, 3, h, w) for "pt"; or the latents
            (B, C, H, W) for "latent".
        seeds: the name of each image: the same seed and prompt make it again, alone or in any batch.
        tokens: one int64 tensor per scale, (B, l) or, bitwise, (B, l, n); -1 in scales that were not drawn (prune).
        search: what a search found on the way and what it cost, where there was one.
    """

    images: Images
    seeds: list[int]
    tokens: list[torch.Tensor]
    search: Found | None = None


class NextScalePipeline(DiffusionPipeline):
    """Text- or class-to-image by next-scale prediction.

    Args:
        transformer: predicts the tokens of each scale.
        vqvae: tokens to images.
        tokenizer, text_encoder: of a text model; None for a class model.
        sampling: the model's own defaults of the settings in `SAMPLING`, saved with it.
        refiner: makes the last scales (CoDe); None where `transformer` makes them all.
        handover: scales that `transformer` makes before a refiner, where no plan says so.
        class_names: what a class model's classes are called, in order; None without names, or for ImageNet's.
    """

    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder", "refiner"]
    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)

    def __init__(
        self,
        transformer: NextScaleTransformer,
        vqvae: MultiScaleVQ,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        sampling: dict | None = None,
        refiner: NextScaleTransformer | None = None,
        handover: int | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        models = {"transformer": transformer, "vqvae": vqvae, "refiner": refiner}
        self.register_modules(**models, tokenizer=tokenizer, text_encoder=text_encoder)
        self.register_to_config(sampling=check_sampling(sampling or {}), handover=handover, class_names=class_names)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vqvae.stride)
        self.accelerated = getattr(transformer, "accelerated_with", None)  # what `sample.fast.accelerate` exchanged
        self.graphed: GraphedSampler | None = None  # replays calls without hooks; set by `accelerate` on CUDA
        self.offloaded: str | None = None  # how `sample.offload` keeps the weights in CPU memory

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, a dtype or both; the quantiser and the output head stay float32."""
        dtype = kwargs.pop("dtype", None)
        for argument in args:
            dtype = argument if isinstance(argument, torch.dtype) else dtype
        places = tuple(argument for argument in args if not isinstance(argument, torch.dtype))
        held = "accelerated" if self.accelerated is not None else "offloaded" if self.offloaded is not None else None
        if held is not None and (places or kwargs or dtype not in (None, self.transformer.dtype)):
            plain = {"accelerated": "fast=off", "offloaded": "offload=none"}[held]
            raise ValueError(f"an {held} pipeline stays on its device and in its dtype: load the model with {plain}")
        if dtype is not None:  # first, so that a device never holds the float32 weights
            for component in (self.transformer, self.vqvae, self.text_encoder, self.refiner):
                if component is not None:
                    cast(component, dtype)
        if places or kwargs:
            super().to(*places, **kwargs)
        return self

    def __reduce_ex__(self, protocol: int) -> Any:
        """How it is copied (`copy.deepcopy`) and pickled; not when its weights are laid out for this processor."""
        if self.accelerated is not None or self.offloaded is not None:
            raise TypeError("an accelerated or offloaded pipeline cannot be copied or pickled: load the model again")
        return super().__reduce_ex__(protocol)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """diffusers' name of `load_pipeline(offload="model")`, see `sample.offload`."""
        keep_on_cpu(self.to("cpu"), "model", _gpu(gpu_id, device))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """diffusers' name of `load_pipeline(offload="layers")`, see `sample.offload`."""
        keep_on_cpu(self.to("cpu"), "layers", _gpu(gpu_id, device))

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """The local folder of a Hub repository, for `from_pretrained`; see `huggingface_hub.snapshot_download`.

        diffusers' own looks for a file of code beside the weights of each class that is not its own.
        """
        from huggingface_hub import snapshot_download

        known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {name: options[name] for name in known if options.get(name) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=list(HUB_FILES), **given)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """diffusers' own, with files that others may read where the umask lets them.

        Raises:
            ValueError: if a part has an adapter or was compiled, which its weights' names show: nothing could load it.
        """
        for name, part in self.components.items():
            if getattr(part, "peft_config", None):
                raise ValueError(f"{name} has an adapter: fuse_lora and unload_lora it first, or save_lora_adapter")
            if isinstance(part, torch.nn.Module) and any("_orig_mod." in key for key in part.state_dict()):
                raise ValueError(f"{name} holds a module of torch.compile: save the model that is not compiled")
        super().save_pretrained(save_directory, **options)
        readable(Path(save_directory))

    @classmethod
    def from_official(
        cls,
        *,
        vae: str,
        transformer: str,
        refiner: str | None = None,
        masked: str | None = None,
        family: str | None = None,
        flags: Flags | None = None,
    ) -> Self:
        """The pipeline of official VAR, CoDe (with a refiner) or HMAR checkpoint files; see `load_official`.

        Args:
            vae, transformer, refiner, masked: `.pth` or `.safetensors` files, or hf://OWNER/NAME/FILE on the Hub.
            family: "hmar" for a whole HMAR model in one file; told by the files when None.
            flags: what the tensors cannot tell.
        """
        files = {"vae": vae, "transformer": transformer, "refiner": refiner, "masked": masked}
        return cls(**load_official(**files, family=family, flags=flags))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | TextPrompt | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | TextPrompt | None = None,
        image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        mask_rule: str = "corrected",
        num_images_per_prompt: int = 1,
        guidance_scale: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        temperature_last: bool | None = None,
        guidance_ramp: str | None = None,
        guidance_blocks: Sequence[int] | None = None,
        guidance_until: int | None = None,
        aspect: str | None = None,
        size: str | None = None,
        sequential: int | None = None,
        mask_schedule: str | Sequence[Sequence[int]] | None = None,
        smooth: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        plan: Plan | PlanConfig | str | None = None,
        depth: int | Sequence[int] | None = None,
        cache: str | float | None = None,
        prune: str | float | Sequence[float] | None = None,
        hooks: Sequence[Hook] = (),
        search: Search | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("f_hat",),
    ) -> NextScaleOutput | tuple:
        """Generate `num_images_per_prompt` images of each prompt or class, as one batch.

        Args:
            prompt: a text or several, for a text model; or what `encode_prompt` made of them.
            class_labels: a class in [0, num_classes) or several, for a class model; num_classes is the null class.
            negative_prompt: what guidance pushes away from, instead of the learned null text; one, or one a prompt.
            image: a picture to edit, PIL or uint8 (h, w, 3), of any size; or one a prompt. A class model may then do
                without class_labels, which is the null class.
            mask_image: white where `image` is repainted, black where it stays bit by bit, grey where both are blended;
                PIL or uint8 or bool (h, w), of any size; or one a prompt.
            mask_rule: which tokens stay: "corrected", "official" or "whole", see `sample.edit`.
            guidance_scale: t of VAR's guidance (1 + t) * conditional - t * unconditional; 0 is none. It grows linearly
                from 0 at the first scale; a sequence gives it scale by scale. Infinity's cfg is 1 + t.
            guidance_ramp: "linear", or "constant" for the same on every scale; the model's own when None.
            guidance_until: scales from this one on are not guided, at half the price; as a sequence that ends in zeros.
            guidance_blocks: guide the hidden states after these blocks instead of the logits; -1 is the last one.
            top_k, top_p, temperature, temperature_last: what may be drawn, see `sample.draw.Filter`; a sequence gives
                it scale by scale. The model's own defaults when None.
            aspect, size: "16:9", width to height, and 0.06M, 0.25M, 0.60M or 1M: scales of Infinity's templates for a
                model with rotary positions; its own scales when both are None (see `tokenizer.aspects`).
            sequential: draw the first so many scales token by token, with a model that has a head for that
                (`var.sequential`); 0 draws every scale at once, None as many as the head was trained for.
            mask_schedule: how many tokens each pass over a scale settles, by a model of masked prediction (HMAR):
                [[1], [1, 3], [1, 1, 2, 5]] or "1/1,3/1,1,2,5", later scales in one pass; "off" for one pass each, None
                for the model's own, else the published ones (`sample.masked`).
            smooth: mix codes by Gumbel-softmax (VAR's `more_smooth`): nicer pictures, never for measurements.
            generator: names the images by drawing a seed from it for each; or one generator an image.
            seed: names the images: image i gets seed + i; or one seed an image. Fresh seeds when both are None.
            plan, depth, cache, prune: which model and layers make how much of each scale with how much memory, in
                words: "code:6", 4, "10%", "50%" (see `sample.plan_text.PlanConfig`). Or a Plan, which leaves nothing
                else to say.
            hooks: plugged into the loop, see `sample.state.Hook`.
            search: make several candidates of each image and give the best, see `sample.search.Search`. A
                `sample.ledger.Ledger` among the hooks counts what it costs.
            output_type: "pil", "np", "pt" or "latent", see `NextScaleOutput`.
            return_dict: a NextScaleOutput instead of the tuple (images, seeds, tokens).
            callback_on_step_end: called as (pipeline, k, side, tensors) after scale k, `side` its height in tokens. A
                returned dict with "f_hat" replaces the running reconstruction. diffusers' own callbacks may be given,
                with their own `tensor_inputs`.
            callback_on_step_end_tensor_inputs: which of "f_hat" (B, C, H, W) and "tokens" (B, l) it is given.

        Raises:
            ValueError, TypeError: on a setting that is not allowed, naming it.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if search is not None and not isinstance(search, Search):
            raise TypeError(f"search must be a sample.search.Search, got {type(search).__name__}: {search!r}")
        if mask_rule not in RULES:
            raise ValueError(f"mask_rule must be one of {', '.join(RULES)}, got {mask_rule!r}")
        if not isinstance(hooks, Sequence) or not all(isinstance(hook, Hook) for hook in hooks):
            raise TypeError(f"hooks must be a list of sample.state.Hook, got {hooks!r}")
        settings = {"guidance_scale": guidance_scale, "top_k": top_k, "top_p": top_p, "temperature": temperature}
        settings |= {"temperature_last": temperature_last, "depth": depth, "cache": cache}
        settings |= {"guidance_ramp": guidance_ramp, "guidance_blocks": guidance_blocks, "aspect": aspect, "size": size}
        settings |= {"sequential": sequential, "mask_schedule": mask_schedule, "prune": prune}
        settings |= {"guidance_until": guidance_until}
        plan = self.make_plan(plan, **{name: _listed(value) for name, value in settings.items() if value is not None})
        num_images_per_prompt = _listed(num_images_per_prompt)
        if image is not None and self.by_class and class_labels is None:
            class_labels = self.transformer.config.num_classes
        condition = self._prompt(prompt, class_labels, num_images_per_prompt)
        negative = self._negative(negative_prompt, len(condition), num_images_per_prompt)
        callback = ()
        if callback_on_step_end is not None:
            names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
            callback = (CallbackHook(self, callback_on_step_end, names),)
        canvases = self._canvases(image, mask_image, len(condition), num_images_per_prompt, plan)
        edit = [self._edit(canvases, plan, mask_rule)] if canvases else []

        seeds = image_seeds(len(condition), seed=_listed(seed), generator=generator)
        with self.progress_bar(total=len(plan.schedule)) as bar:
            call = {"negative": negative, "hooks": (*hooks, *edit, *callback, ProgressHook(bar))}
            if search is None:
                made = self._generate(plan, condition, seeds, smooth=smooth, **call)
            elif smooth:
                raise ValueError("search compares images as they are drawn: leave out smooth")
            else:
                names = condition.classes_B.tolist() if self.by_class else _texts(prompt, num_images_per_prompt)
                call |= {"search": search, "prompts": names, "decode": self.vqvae.decode}
                call |= {"show": self._shown(canvases, plan) if canvases else None}
                made = search_images(plan, self.vqvae.quantizer, condition, seeds, **call)
        images = made.f_hat_BCHW if output_type == "latent" else self._images(made, canvases, output_type)
        self.maybe_free_model_hooks()
        output = NextScaleOutput(images, list(made.seeds), made.tokens, made if search is not None else None)
        return output if return_dict else output.to_tuple()

    def _generate(self, plan: Plan, condition: Prompt, seeds: list[int], **call: Any) -> GenerationState:
        """By the loop; replayed where nothing but the progress bar looks on, and all of the plan can be."""
        *others, progress = call["hooks"]
        aside = others or call["negative"] is not None or call["smooth"]
        if self.graphed is None or aside or not replays(plan):
            return generate(plan, self.vqvae.quantizer, condition, seeds, **call)
        made = self.graphed.generate(plan, condition, seeds)
        progress.bar.update(len(plan.schedule))
        return made

    @torch.no_grad()
    def decode(self, f_hat_BCHW: torch.Tensor, output_type: str = "pil") -> Images:
        """Latents (B, C, H, W) to images as `NextScaleOutput.images` has them."""
        decode = self.vqvae.decode if self.graphed is None else self.graphed.decode
        return self.image_processor.postprocess(decode(f_hat_BCHW).float(), output_type=output_type)

    def _canvases(self, image: Any, mask_image: Any, batch: int, copies: int, plan: Plan) -> list[Canvas]:
        """The picture of every image to be edited; none without `image`."""
        if (image is None) != (mask_image is None):
            raise ValueError("image and mask_image belong together: give both to edit, or neither")
        if image is None:
            return []
        canvases = read_canvases(image, mask_image, self._image_hw(plan), batch // copies)
        return [canvas for canvas in canvases for _ in range(copies)]

    def _edit(self, canvases: Sequence[Canvas], plan: Plan, rule: str) -> EditHook:
        device, schedule = self.transformer.device, plan.schedule
        seen = torch.stack([canvas.seen(self._image_hw(plan)) for canvas in canvases]).to(device)
        keep = torch.stack([canvas.keep(schedule.latent_hw) for canvas in canvases])
        return edit_hook(self.vqvae, seen, keep, schedule, rule)

    def _shown(self, canvases: Sequence[Canvas], plan: Plan) -> Show:
        """What a search sees of the decoded images: their windows as they will be pasted, of the model's own size."""
        hw = self._image_hw(plan)
        seen_B3hw = torch.stack([canvas.seen(hw) for canvas in canvases])
        repaint_B1hw = torch.stack([canvas.repaint(hw) for canvas in canvases])

        def show(decoded_B3hw: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
            below, share = (x[list(rows)].to(decoded_B3hw) for x in (seen_B3hw, repaint_B1hw))
            return below.lerp(decoded_B3hw, share)

        return show

    def _images(self, made: GenerationState | Found, canvases: Sequence[Canvas], output_type: str) -> Images:
        """The images of a result: pasted into their pictures, as a search saw them, or decoded."""
        if canvases:
            return self._pasted(made.f_hat_BCHW, [canvases[row] for row in made.origins], output_type)
        if not isinstance(made, Found):
            return self.decode(made.f_hat_BCHW, output_type)
        seen_BCHW = made.decoded_BCHW
        if seen_BCHW is None:  # part of what the search cost
            seen_BCHW = made.ledger.call("decoder", self.vqvae.decode, made.f_hat_BCHW)
        return self.image_processor.postprocess(seen_BCHW.float(), output_type=output_type)

    def _pasted(self, f_hat_BCHW: torch.Tensor, canvases: Sequence[Canvas], output_type: str) -> Images:
        """The decoded images pasted into their pictures, whose size they have."""
        made = [canvas.paste(image) for canvas, image in zip(canvases, self.decode(f_hat_BCHW, "pt"))]
        if output_type == "pil":
            return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in made]
        if len({image.shape for image in made}) > 1:
            raise ValueError(f'output_type {output_type!r} needs images of one size: take "pil", or edit one at a time')
        stacked = np.stack(made)
        return stacked if output_type == "np" else torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()

    def _image_hw(self, plan: Plan) -> tuple[int, int]:
        return tuple(side * self.vqvae.stride for side in plan.schedule.latent_hw)

    def encode_prompt(self, prompts: str | Sequence[str]) -> Prompt:
        """A text or several to what the transformer is conditioned on; a call takes it as `prompt` instead of texts.

        The text encoder may be on another device, or be freed afterwards.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("prompt needs a text encoder and a tokenizer, and this pipeline was made without them")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        length = self.transformer.config.text_length
        whole = self.pads_texts
        encoded = encode_prompts(self.tokenizer, self.text_encoder, prompts, max_length=length, whole=whole)
        return encoded.to(self.transformer.device)

    @property
    def pads_texts(self) -> bool:
        """Whether all texts are padded to the model's longest: in half precision, where that is short.

        Sums over padding are rounded otherwise: there a longer prompt beside it would change an image.
        """
        length = self.transformer.config.text_length
        places = getattr(getattr(self.text_encoder, "config", None), "max_position_embeddings", None) or length
        return not self.by_class and self.transformer.dtype != torch.float32 and length <= min(SHORT_TEXT, places)

    def make_plan(self, plan: Plan | PlanConfig | str | None = None, **given: Any) -> Plan:
        """The plan that a call with these settings (of `SAMPLING`) follows, the model's own under them."""
        if isinstance(plan, Plan):
            if given:
                raise ValueError(f"plan already says how to draw: leave out {', '.join(given)}")
            kind, own = plan.stages[0].model.config.conditioning, self.transformer.config.conditioning
            if kind != own:
                raise ValueError(f"plan is of a {kind} model, and the pipeline's is a {own} model")
            return plan
        own = dict(self.config.sampling or {})
        if self.config.handover is not None:
            own.setdefault("plan", f"code:{self.config.handover}")
        if plan is not None:  # another plan has nothing of the model's own
            own = {name: value for name, value in own.items() if name not in PLAN_WORDS}
        settings = {**own, **given}
        schedule = self._schedule(settings.pop("aspect", None), settings.pop("size", None))
        guided = {field: settings.pop(name) for name, field in GUIDANCE_WORDS.items() if name in settings}
        if "blocks" in guided:
            if not isinstance(guided["blocks"], Sequence) or not guided["blocks"]:
                raise ValueError(
                    f"guidance_blocks must be a list of one block or more, or be left out, got {guided['blocks']!r}"
                )
            guided |= {"blocks": tuple(guided["blocks"]), "on_logits": False}
        words = {name: settings.pop(name) for name in PLAN_WORDS if name in settings}
        if not isinstance(plan, PlanConfig):
            plan = PlanConfig(**words, **({} if plan is None else {"plan": plan}))
        elif words:
            raise ValueError(f"plan is a PlanConfig, which says {' and '.join(words)} too")
        steps = {name: settings.pop(name, None) for name in ("sequential", "mask_schedule")}
        filters = scale_filters(len(schedule or self.transformer.schedule), **settings)
        made = {"guidance": Guidance(**guided), "filters": filters, "schedule": schedule, **steps}
        return plan.build(self.transformer, refiner=self.refiner, **made)

    def _schedule(self, aspect: str | None, size: str | None) -> ScaleSchedule | None:
        """The scales of an aspect ratio and size; None for the model's own."""
        if aspect is None and size is None:
            return None
        if not isinstance(aspect, str | None):  # 2 might be read either way
            raise ValueError(f"aspect must be width:height, e.g. 16:9, got {aspect!r}")
        own = {count: name for name, count in SIZES.items()}.get(len(self.transformer.schedule), "1M")
        schedule = aspect_schedule("1:1" if aspect is None else aspect, own if size is None else size)
        return self.transformer.check_schedule(schedule)

    def _prompt(
        self, prompt: str | Sequence[str] | TextPrompt | None, class_labels: int | Sequence[int] | None, copies: int
    ) -> Prompt:
        """The prompt of every image: each text or class `copies` times in a row, encoded once."""
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
            raise ValueError(f"num_images_per_prompt must be 1 or more, got {copies}")
        wanted, unwanted = ("class_labels", prompt) if self.by_class else ("prompt", class_labels)
        if unwanted is not None or (prompt is None and class_labels is None):
            kind, example = ("class", "class_labels=3") if self.by_class else ("text", 'prompt="a red star"')
            raise ValueError(f"this is a {kind} model: give {wanted}, e.g. {example}, and nothing else to condition on")
        if isinstance(prompt, TextPrompt):
            encoded = prompt.to(self.transformer.device)
            return encoded.select(_repeat(len(encoded), copies).to(encoded.mask_BT.device))
        if not self.by_class:
            if not isinstance(prompt, Sequence):
                raise TypeError(f"prompt must be a text or a list of texts, got {type(prompt).__name__}: {prompt!r}")
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not texts:
                raise ValueError("prompt is empty: give at least one text")
            encoded = self.encode_prompt(texts)
            return encoded.select(_repeat(len(texts), copies).to(encoded.mask_BT.device))
        labels = check_classes(class_labels, self.transformer.config.num_classes)
        return ClassPrompt(torch.tensor(labels, device=self.transformer.device)).select(_repeat(len(labels), copies))

    def _negative(self, negative: str | Sequence[str] | TextPrompt | None, batch: int, copies: int) -> Prompt | None:
        if negative is None:
            return None
        if self.by_class:
            raise ValueError("negative_prompt is for text models; this model knows classes")
        if not isinstance(negative, Sequence | TextPrompt):
            raise TypeError(f"negative_prompt must be a text or a list of texts, got {negative!r}")
        texts = [negative] if isinstance(negative, str) else negative
        if len(texts) not in (1, batch // copies):
            raise ValueError(
                f"negative_prompt must be one text or one a prompt, got {len(texts)} for {batch // copies}"
            )
        encoded = texts if isinstance(texts, TextPrompt) else self.encode_prompt(texts)
        encoded = encoded.to(self.transformer.device)
        return encoded.select(_repeat(len(texts), batch // len(texts)).to(encoded.mask_BT.device))

    @property
    def by_class(self) -> bool:
        """Whether the model is conditioned on classes; on texts otherwise."""
        return self.transformer.config.conditioning == "class"


class ProgressHook(Hook):
    """Advances a progress bar by one, every scale."""

    def __init__(self, bar: Any):
        self.bar = bar

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        self.bar.update()


class CallbackHook(Hook):
    """diffusers' `callback_on_step_end` as a hook; a returned f_hat is what the image goes on from.

    Raises:
        ValueError: if it asks for a tensor that does not exist, or returns what is no f_hat of the same shape.
    """

    def __init__(self, pipeline: NextScalePipeline, callback: StepCallback, names: Sequence[str]):
        known = ", ".join(CALLBACK_TENSORS)
        if isinstance(names, str) or not set(names) <= set(CALLBACK_TENSORS):
            raise ValueError(f"callback_on_step_end_tensor_inputs must be a list of {known}, got {names!r}")
        self.pipeline, self.callback, self.names = pipeline, callback, names

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        schedule = state.plan.schedule
        tensors = {"f_hat": state.f_hat_BCHW.clone(), "tokens": state.tokens[k].clone()}  # what is returned counts
        shown = {name: tensors[name] for name in self.names}
        returned = self.callback(self.pipeline, k, schedule.sides[k][0], shown) or {}
        if isinstance(returned, dict) and "tokens" in returned and returned["tokens"] is shown.get("tokens"):
            returned = {name: value for name, value in returned.items() if name != "tokens"}  # handed back as it was
        if not isinstance(returned, dict) or not set(returned) <= {"f_hat"}:
            given = sorted(returned) if isinstance(returned, dict) else type(returned).__name__
            raise ValueError(f'callback_on_step_end must return {{"f_hat": tensor}} or nothing, got {given}')
        if "f_hat" not in returned:
            return
        f_hat, expected = returned["f_hat"], tuple(state.f_hat_BCHW.shape)
        if not isinstance(f_hat, torch.Tensor) or tuple(f_hat.shape) != expected:
            given = tuple(f_hat.shape) if isinstance(f_hat, torch.Tensor) else type(f_hat).__name__
            raise ValueError(f"callback_on_step_end must return f_hat as a tensor of shape {expected}, got {given}")
        state.replace(f_hat)


def image_seeds(
    count: int,
    *,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[int]:
    """The seeds that name `count` images: seed + i, the given ones, drawn from the generator(s), or fresh ones.

    Raises:
        TypeError: if a seed is no number, or a generator none of torch.
        ValueError: if both are given, or a list is not one per image, or a seed is out of [0, 2**63).
    """
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if isinstance(seed, str):
        raise TypeError(f"seed must be a whole number, or one an image, got {seed!r}")
    given = seed if seed is not None else generator
    if isinstance(given, Sequence) and len(given) != count:
        name = "seed" if seed is not None else "generator"
        raise ValueError(f"{name} must be one or one an image, got {len(given)} for {count} images")
    if isinstance(seed, Sequence):
        return check_seeds(seed)
    if seed is not None:
        return list(seeds_from(*check_seeds([seed]), count))
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
    for one in generators:
        if not isinstance(one, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator, or one an image, got {type(one).__name__}: {one!r}")
    return [_drawn_seed(source) for source in generators]


def _drawn_seed(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device, dtype=torch.int64))


def check_sampling(sampling: dict[str, float]) -> dict[str, float]:
    """The sampling defaults, if all of them are known.

    Raises:
        ValueError: on an unknown name.
    """
    unknown = [name for name in sampling if name not in SAMPLING]
    if unknown:
        raise ValueError(f"sampling must hold only {', '.join(SAMPLING)}, got {', '.join(unknown)}")
    return dict(sampling)


def check_classes(class_labels: int | Sequence[int], num_classes: int) -> list[int]:
    """The class labels as a list; num_classes itself is the null class.

    Raises:
        ValueError: if there are none or one is not in [0, num_classes].
        TypeError: if one is not an int.
    """
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, str):
        raise TypeError(
            f"class_labels must be integers (sample.classes.parse_classes reads names), got {class_labels!r}"
        )
    labels = list(class_labels) if isinstance(class_labels, Sequence) else [class_labels]
    if not labels:
        raise ValueError("class_labels is empty: give at least one")
    for label in labels:
        if not isinstance(label, int | np.integer) or isinstance(label, bool):
            raise TypeError(f"class_labels must be integers, got {label!r}")
        if not 0 <= label <= num_classes:
            known = f"0..{num_classes - 1}, or {num_classes} for the null class"
            raise ValueError(f"class_labels must be in {known}, got {label}")
    return labels


def _gpu(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    place = torch.device(device or "cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {place} is not here: offload brings weights to a GPU, and PyTorch sees none")
    return place if gpu_id is None else torch.device(place.type, gpu_id)


def _texts(prompt: str | Sequence[str] | TextPrompt, copies: int) -> list[str]:
    """The text of every image, which a search's reward reads."""
    if isinstance(prompt, TextPrompt):
        raise ValueError("search needs the texts, which its reward reads: give them as prompt, not encoded")
    return [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(copies)]


def _listed(value: Any) -> Any:
    """Arrays, tensors and their scalars as the lists and numbers they hold; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


def _repeat(count: int, copies: int) -> torch.Tensor:
    return torch.arange(count).repeat_interleave(copies)
