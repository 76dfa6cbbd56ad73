"""A model's name or folder to a pipeline that is ready to draw."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

from sample.fast import FAST, accelerate, supported
from sample.offload import OFFLOADS, keep_on_cpu
from sample.pipeline import NextScalePipeline
from sample.processes import works_on_cpu
from tokenizer.model import MultiScaleVQ
from tokenizer.precision import cast, native_half
from var.transformer import NextScaleTransformer

BUNDLED = "scenes"
PARTS = ("transformer", "refiner", "vqvae", "text_encoder", "tokenizer")  # of a pipeline, each in its folder
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(
    model: str | Path = BUNDLED,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    text_device: str | torch.device | None = None,
    refiner: str | Path | None = None,
    fast: str = "off",
    offload: str = "none",
) -> NextScalePipeline:
    """The pipeline of a model, in eval mode.

    Args:
        model: "scenes" (the bundled model); a folder made by `save_pretrained`; a training run's folder (its newest
            export); or a Hub id, OWNER/NAME or OWNER/NAME@REVISION (a branch, tag or commit).
        dtype: float32, bfloat16, float16 (or fp32, bf16, fp16, or a torch dtype); "auto": see `resolve_dtype`. The
            quantiser and the output head stay float32.
        device: a torch device; "auto" is this process's accelerator where there is one, else the CPU.
        text_device: where the text encoder goes instead, e.g. "cpu" to keep its weights out of the accelerator.
        refiner: another model, whose transformer makes the last scales where a plan says so.
        fast: "on" takes all that is fast here (see `sample.fast`) and lets "auto" dtypes be the fastest; "auto" what
            keeps the dtype and, on a GPU, no memory between calls: no CUDA graphs; "off" is the plain path.
        offload: for a device with too little memory, weights wait in CPU memory: "model" brings the text encoder, a
            transformer or the decoder as a whole, while it works; "layers" brings a transformer layer by layer, which
            takes least memory and longest (see `sample.offload`).

    Raises:
        FileNotFoundError: if there is no such model, or its folder lacks a part.
        ValueError: on an unknown dtype, device, fast or offload, on an offload that the others rule out, if the folder
            holds another kind of pipeline, or if the refiner has another tokenizer or text encoder.
    """
    place = resolve_device(device)
    check_fast(fast, offload, place)
    precision = resolve_dtype(dtype, place, fastest=fast == "on")
    folder = model_folder(model)
    with silent_loading():
        pipeline = open_folder(folder)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            check_whole(component.eval(), model)
    if refiner is not None:
        other = load_pipeline(refiner, dtype="float32", device="cpu")
        check_refiner(pipeline, other, str(refiner))
        pipeline.register_modules(refiner=other.transformer)
    put(pipeline, place, precision, text_device=text_device, offload=offload)
    if offload != "none" or fast == "off":
        return pipeline
    possible = supported(place, precision)
    return accelerate(pipeline, possible if fast == "on" else replace(possible, graphs=False))


def open_folder(folder: Path) -> NextScalePipeline:
    """The pipeline in a folder, float32 and on the CPU.

    Raises:
        FileNotFoundError: if a part is missing.
        ValueError: if a file is damaged or does not fit the others.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return assemble(folder)
    try:
        named = json.loads(index.read_text(encoding="utf-8"))
        parts = [name for name in PARTS if named.get(name, [None])[0] is not None]
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{index} is no list of a pipeline's parts") from None
    for part in parts:
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"model folder {str(folder)!r} has no {part}/, which its model_index.json names")
    try:
        return NextScalePipeline.from_pretrained(folder, variant=variant_of(folder / "transformer"))
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"model folder {str(folder)!r} cannot be loaded: {type(error).__name__}: {error}") from error


def variant_of(folder: Path) -> str | None:
    """The variant that a part's weights are all of, as fp16 of NAME.fp16.safetensors; None where there are plain ones.

    Raises:
        ValueError: if they are of several, and none is plain.
    """
    name = re.compile(r"diffusion_pytorch_model(?:-\d+-of-\d+)?(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
    found = {match[1] for path in folder.glob("*.safetensors") if (match := name.fullmatch(path.name))}
    if None in found or not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{folder} holds the variants {', '.join(sorted(found))}, and none is plain: keep one of them")
    return found.pop()


def load_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> MultiScaleVQ:
    """A frozen tokenizer: of "scenes" (the bundled model), of its own folder, or of a pipeline's or a run's folder.

    Raises:
        FileNotFoundError: naming the path, if there is none.
        ValueError: if it is of a class of its own, or weights are missing.
    """
    vqvae = open_vqvae(part_folder("tokenizer", path, "vqvae"))
    check_whole(vqvae, path)
    return vqvae.requires_grad_(False).eval().to(resolve_device(device))


def open_vqvae(folder: Path) -> MultiScaleVQ:
    """The tokenizer in a folder. Raises ValueError if it is of a class of its own: its tokens may mean other things."""
    name = MultiScaleVQ.load_config(folder).get("_class_name", MultiScaleVQ.__name__)
    if name != MultiScaleVQ.__name__:
        raise ValueError(f"{folder} holds a {name}, not a {MultiScaleVQ.__name__}: load it with its own class")
    return MultiScaleVQ.from_pretrained(folder)


def part_folder(name: str, path: str | Path, part: str) -> Path:
    """The folder of a `part` of a pipeline: "scenes" (the bundled one's), the part's own, or a pipeline's or a run's.

    Raises:
        FileNotFoundError: if there is none, naming the path after `name`, what it is to the user.
    """
    path = model_folder(path) if str(path) == BUNDLED else Path(path)
    for folder in (path, path / part, path / "latest" / part):
        if (folder / "config.json").is_file():
            return folder.resolve()  # a run's link may move on while we load
    raise FileNotFoundError(f"{name} {path} has no config.json, nor a {part} folder with one")


def check_whole(component: torch.nn.Module, model: str | Path) -> None:
    """Raise ValueError, naming the first, if weights that a configuration asks for were not in the files."""
    for name, parameter in component.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model {str(model)!r}: its {type(component).__name__} lacks the weights {name}")


def check_fast(fast: str, offload: str, device: torch.device) -> None:
    """Raise ValueError unless the two are known and go together on a device."""
    for name, value, known in (("fast", fast, FAST), ("offload", offload, OFFLOADS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if offload != "none" and device.type == "cpu":
        raise ValueError(
            f"offload {offload} keeps weights in CPU memory until the device needs them: device is the CPU"
        )
    if offload != "none" and fast == "on":
        raise ValueError(f"offload {offload} moves weights, and fast on needs them in one place: give only one of them")


def put(
    pipeline: NextScalePipeline,
    device: torch.device,
    dtype: torch.dtype,
    *,
    text_device: str | torch.device | None,
    offload: str,
) -> None:
    """Cast a pipeline and move it to its device, the text encoder to its own; or keep its weights in CPU memory."""
    encoder = None if text_device is None else pipeline.text_encoder
    if encoder is not None:
        pipeline.register_modules(text_encoder=None)
    if offload == "none":
        pipeline.to(device, dtype)
    else:
        keep_on_cpu(pipeline.to(dtype), offload, device)
    if encoder is not None:
        cast(encoder, dtype)
        pipeline.register_modules(text_encoder=encoder.to(resolve_device(text_device)))


def check_refiner(pipeline: NextScalePipeline, other: NextScalePipeline, name: str) -> None:
    """Raise ValueError unless the two models' tokens and texts mean the same."""
    mine, theirs = pipeline.vqvae, other.vqvae
    options = ("latent_channels", "vocab_size", "phi_ratio", "cosine", "bitwise", "normalize_scales")
    same = all(getattr(mine.config, option) == getattr(theirs.config, option) for option in options)
    # Bits have no codebook: what they mean is in the encoder and the decoder alone.
    one, two = (mine, theirs) if mine.config.bitwise else (mine.quantizer, theirs.quantizer)
    if not (same and _same_weights(one, two)):
        raise ValueError(f"refiner {name} was trained with another tokenizer than the model it goes on from")
    if not _same_weights(pipeline.text_encoder, other.text_encoder):
        raise ValueError(f"refiner {name} was trained with another text encoder than the model it goes on from")
    ours, its = (part.transformer.config for part in (pipeline, other))
    if ours.conditioning != its.conditioning or (pipeline.by_class and ours.num_classes != its.num_classes):
        raise ValueError(
            f"refiner {name} must have the conditioning and classes of the model it goes on from: "
            f"{ours.conditioning}, {ours.num_classes}; it has {its.conditioning}, {its.num_classes}"
        )


def _same_weights(one: torch.nn.Module | None, other: torch.nn.Module | None) -> bool:
    if one is None or other is None:
        return one is other
    ours, theirs = (dict(module.state_dict()) for module in (one, other))
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name]) for name in ours
    )


def model_folder(model: str | Path) -> Path:
    """The local folder of a model, downloaded first if `model` is a Hub id.

    Raises:
        FileNotFoundError: if there is none.
    """
    if str(model) == BUNDLED:
        folder = Path(str(importlib.resources.files("sample.bundled")))
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"the bundled model is not in this installation ({folder}): name another model")
        return folder
    path = Path(model)
    for folder in (path, path / "latest"):
        if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
            return folder.resolve()  # a run's link may move on while we load
    if path.exists():
        raise FileNotFoundError(
            f"model {str(model)!r} has no model_index.json, transformer/ or latest/transformer/ in it"
        )
    return _download(str(model))


def assemble(folder: Path) -> NextScalePipeline:
    """The pipeline of a folder without model_index.json, from the parts in it (what training exports).

    Raises:
        FileNotFoundError: if a part is missing.
    """
    for part in ("transformer", "vqvae"):
        if not (folder / part / "config.json").is_file():
            raise FileNotFoundError(f"model folder {str(folder)!r} has no {part}/config.json")
    transformer = NextScaleTransformer.from_pretrained(folder / "transformer")
    vqvae = open_vqvae(folder / "vqvae")
    if transformer.config.conditioning == "class":
        return NextScalePipeline(transformer, vqvae)
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"model folder {str(folder)!r} holds a text model but no {part}/")
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    encoder = AutoModelForTextEncoding.from_pretrained(folder / "text_encoder")
    return NextScalePipeline(transformer, vqvae, AutoTokenizer.from_pretrained(folder / "tokenizer"), encoder)


def model_digest(model: str | Path) -> str:
    """Twelve hexadecimal digits that change with any weight or configuration of a model."""
    folder, digest = model_folder(model), hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def made_by(pipeline: NextScalePipeline, folder: Path, refiner: str | Path | None, **call: Any) -> dict[str, Any]:
    """What decides the images of a model's folder beside prompts and seeds: its digest, dtype and settings.

    Args:
        refiner: the model that makes the last scales, if it is another one.
        call: settings of the pipeline's call, over the model's own.
    """
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    settings = {"model_digest": model_digest(folder), "dtype": dtype, **(pipeline.config.sampling or {}), **call}
    return settings if refiner is None else {**settings, "refiner_digest": model_digest(refiner)}


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" is this process's own accelerator, or the CPU.

    Raises:
        ValueError: if there is no such device on this machine.
    """
    if str(device) == "auto":
        from accelerate import PartialState

        return PartialState(cpu=works_on_cpu()).device
    try:
        place = torch.device(device)
        torch.empty(1, device=place).tolist()  # which "meta" has none of
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # of a backend that was not built in, a screenful follows
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None
    return place


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, *, fastest: bool = False) -> torch.dtype:
    """The torch dtype of a name; "auto" is `native_half` on CUDA, else float32, so that all CPUs draw the same images.

    Args:
        fastest: "auto" is `native_half` everywhere: bfloat16 on a CPU that has it in hardware.

    Raises:
        ValueError: on an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return native_half(device) if device.type == "cuda" or fastest else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _download(name: str) -> Path:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(NextScalePipeline.download(repository, revision=revision or None))
    except HFValidationError:
        reason = "cannot be the name of one on the Hub"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r} on the Hub"
    except RepositoryNotFoundError:
        reason = "is not on the Hub"
    except OSError:
        reason = "could not be had from the Hub, which cannot be reached"
    raise FileNotFoundError(f"model {name!r} is not {BUNDLED!r}, is no folder here, and {reason}")


@contextmanager
def silent_loading() -> Iterator[None]:
    """No progress bars over the few parts of a pipeline."""
    from transformers.utils import logging as transformers_logging

    switches = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in switches:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in switches:
            library.enable_progress_bar()
