"""Official checkpoint files to our models in memory. Families say which files belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path, PurePosixPath

import torch
from diffusers.models.modeling_utils import ModelMixin

from sample import adapters
from sample.adapters import Adapter
from sample.checkpoints import State, read_state, shard_names, stream
from tokenizer import convert_bitwise as bitwise_keys
from tokenizer.aspects import aspect_schedule
from tokenizer.precision import cast
from tokenizer.schedule import ScaleSchedule
from var import convert_hmar as hmar_keys
from var import convert_infinity as infinity_keys
from var.presets import VAR_SAMPLING


@dataclass(frozen=True)
class Family:
    """Checkpoints that make one pipeline.

    Attributes:
        parts: the transformers among our components, in order.
        sampling: the published settings, saved as the pipeline's defaults.
    """

    parts: tuple[str, ...]
    sampling: Mapping[str, float]


FAMILIES = {
    "var": Family(("transformer",), VAR_SAMPLING),
    "code": Family(("transformer", "refiner"), {"guidance_scale": 1.5, "top_k": 600, "top_p": 0.96}),  # and CODE_HEAT
    "hmar": Family(("transformer",), {"guidance_scale": 1.6, "top_k": 650, "top_p": 0.99}),  # or HMAR_SAMPLING
    "infinity": Family(  # cfg 3 on every scale
        ("transformer",), {"guidance_scale": 2.0, "guidance_ramp": "constant", "top_p": 0.97, "temperature": 0.5}
    ),
}
HMAR_SAMPLING = {16: (1.7, 1000), 20: (1.9, 950), 24: (2.1, 900), 30: (1.6, 650)}  # guidance and top-k by depth
CODE_HEAT = {"temperature": [1.1] * 7 + [1.0] * 3, "temperature_last": True}  # of its ten scales
INFINITY_TOKENIZERS = {  # (depth, width, bits) of a published transformer: the tokenizer it was trained on
    (32, 2048, 32): "infinity_vae_d32reg.pth",
    (40, 3584, 56): "infinity_vae_d56_f8_14_patchify.pth",
}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the tensors of an official checkpoint cannot tell, with the official values; None is read off the tensors.

    Attributes:
        schedule: the scales; needed only if they are not square or the checkpoint does not record them.
        heads, refiner_heads: attention heads of a transformer and of a refiner without QK-norm; one per 64 channels
            when None.
        depth: refuse a transformer of another depth.
        phi_ratio, cosine, beta: of the quantiser, see `MultiScaleQuantizer` (the reference's `quant_resi`,
            `using_znorm` and `beta`).
        norm_eps: of the transformer's layer norms.
        handover: scales that a drafter makes before its refiner.
        size: of Infinity: 0.06M, 0.25M, 0.60M or 1M, the square that is drawn unless another aspect is asked for.
        level_every: of Infinity: blocks of a chunk, where the level embedding is added before every chunk; 0 in all
            published models.
    """

    schedule: str | None = None
    heads: int | None = None
    refiner_heads: int | None = None
    depth: int | None = None
    phi_ratio: float = 0.5
    cosine: bool = False
    beta: float = 0.25
    norm_eps: float = 1e-6
    handover: int | None = None
    size: str = "1M"
    level_every: int = 0

    def __post_init__(self):
        """Raise ValueError on what no checkpoint can have."""
        for name in ("heads", "refiner_heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not abs(self.phi_ratio) <= 1:
            raise ValueError(f"phi_ratio must be in -1..1, got {self.phi_ratio}")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be 0 or more, got {self.beta}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be above 0 and below 1, got {self.norm_eps}")


@dataclass(frozen=True)
class Component:
    """One network on its way: its config, and its weights as views of a file that is mapped anew at each call."""

    adapter: Adapter
    config: dict
    weights: Callable[[], State]
    buffers: State = field(default_factory=dict)

    def on_meta(self) -> ModelMixin:
        """Our model without weights."""
        with torch.device("meta"):
            return self.adapter.model(**self.config)

    def load(self) -> ModelMixin:
        """Our model with its weights, in eval mode."""
        model = self.on_meta()
        state = {key: tensor.clone() for key, tensor in stream(self.weights)}
        model.load_state_dict(state, assign=True)
        floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
        cast(model, reduce(torch.promote_types, floats))  # of a file in half precision, some parts stay float32
        return model.eval()


def load_official(
    *,
    vae: str | Path,
    transformer: str | Path,
    refiner: str | Path | None = None,
    masked: str | Path | None = None,
    family: str | None = None,
    flags: Flags | None = None,
) -> dict[str, object]:
    """Official checkpoint files as the arguments of `NextScalePipeline`: models in memory and sampling defaults.

    Args:
        vae, transformer, refiner, masked: `.pth` or `.safetensors` files, or hf://OWNER/NAME/FILE for one on the Hub.
        family: one of `FAMILIES`; "code" if there is a `refiner`, "hmar" if there is a `masked`, else "var" when None.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is not what it should be, keys are missing or unknown, or files do not belong together.
    """
    family = family or ("code" if refiner is not None else "hmar" if masked is not None else "var")
    files = {"vae": vae, "transformer": transformer, "refiner": refiner, "masked": masked}
    components, settings = read_components(family, **files, flags=flags)
    return {name: component.load() for name, component in components.items()} | settings


def read_components(
    family: str,
    *,
    vae: str | Path,
    transformer: str | Path,
    refiner: str | Path | None = None,
    masked: str | Path | None = None,
    flags: Flags | None = None,
) -> tuple[dict[str, Component], dict[str, object]]:
    """The networks of a family by our component names, checked against each other, with no weight read yet.

    Args:
        masked: of HMAR: the file of its second training, where it is not in `transformer`.

    Returns:
        The components, and what `NextScalePipeline` takes beside its models.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    flags, parts = flags or Flags(), FAMILIES[family].parts
    files = {name: file for name, file in (("transformer", transformer), ("refiner", refiner)) if file is not None}
    if set(files) != set(parts):
        raise ValueError(f"the {family} family needs the files vae, {', '.join(parts)}; got vae, {', '.join(files)}")
    if masked is not None and family != "hmar":
        raise ValueError(f"the {family} family has no file of masked prediction: leave out {masked}")
    if family == "infinity":
        return _read_infinity(vae, transformer, flags)
    adapter = adapters.HMAR if family == "hmar" else adapters.VAR
    sources = {name: partial(read_state, fetch(file), adapter.roots, adapter.what) for name, file in files.items()}
    if family == "hmar":
        sources["transformer"] = _hmar_source(sources["transformer"], transformer, masked)
    schedule = _schedule(sources["transformer"], transformer, flags)
    tokenizer = {"phi_ratio": flags.phi_ratio, "cosine": flags.cosine, "beta": flags.beta}
    source = partial(read_state, fetch(vae), adapters.VQVAE.roots, adapters.VQVAE.what)
    components = {"vqvae": _component(adapters.VQVAE, source, vae, schedule=schedule, **tokenizer)}
    for name in parts:
        heads = flags.refiner_heads if name == "refiner" else flags.heads
        own = {"heads": heads, "norm_eps": flags.norm_eps}
        components[name] = _component(adapter, sources[name], files[name], schedule=schedule, **own)
    _check_together(components, flags)
    sampling = dict(FAMILIES[family].sampling)
    if family == "code" and len(CODE_HEAT["temperature"]) == len(schedule):
        sampling |= CODE_HEAT
    if family == "hmar" and components["transformer"].config["depth"] in HMAR_SAMPLING:
        names, values = ("guidance_scale", "top_k"), HMAR_SAMPLING[components["transformer"].config["depth"]]
        sampling |= dict(zip(names, values))
    settings: dict[str, object] = {"sampling": sampling}
    if "refiner" in parts:
        settings["handover"] = _handover(files, len(schedule), flags)
    return components, settings


def _hmar_source(source: Callable[[], State], file: str | Path, masked: str | Path | None) -> Callable[[], State]:
    """The state dict of a whole HMAR model, out of one file or two."""
    second = None if masked is None else partial(read_state, fetch(masked), adapters.HMAR.roots, adapters.HMAR.what)

    shared: list[int] = []  # blocks, once they are known: all of both files is compared for it

    def whole() -> State:
        one, two = source(), None if second is None else second()
        try:
            if two is not None and not shared:
                shared.append(hmar_keys.shared_blocks(one, two))
            return hmar_keys.normalized(one, two, *shared)
        except ValueError as error:
            raise ValueError(f"{file} and {masked}: {error}") from None

    return whole


def _read_infinity(
    vae: str | Path, transformer: str | Path, flags: Flags
) -> tuple[dict[str, Component], dict[str, object]]:
    schedule = aspect_schedule("1:1", flags.size)

    def source() -> State:
        return infinity_keys.normalized(read_state(fetch(transformer), adapters.INFINITY.roots, adapters.INFINITY.what))

    def vae_source() -> State:
        return bitwise_keys.normalized(read_state(fetch(vae), adapters.BSQ.roots, adapters.BSQ.what))

    own = {"rope_grid": schedule.grid, "heads": flags.heads, "level_every": flags.level_every}
    own["norm_eps"] = flags.norm_eps
    found = _component(adapters.INFINITY, source, transformer, schedule=schedule, **own)
    patch = _token_patch(found.config, vae_source(), vae)
    tokenizer = _component(adapters.BSQ, vae_source, vae, schedule=schedule, token_patch=patch)
    components = {"vqvae": tokenizer, "transformer": found}
    if flags.depth not in (None, found.config["depth"]):
        raise ValueError(f"depth is given as {flags.depth}, the transformer has {found.config['depth']} blocks")
    sampling = dict(FAMILIES["infinity"].sampling)
    if patch == 2:
        sampling["temperature"] = 1.0  # as published for 8B
    return components, {"sampling": sampling}


def _token_patch(config: Mapping, vae: State, file: str | Path) -> int:
    """Latent cells along a token's side.

    Raises:
        ValueError: if the tokenizer is not the transformer's, by its bits or, of published models, by its name.
    """
    weight = vae.get("encoder.conv_out.conv.weight")
    if weight is None:
        raise ValueError(f"{file}: {adapters.BSQ.what} checkpoint lacks encoder.conv_out.conv.weight")
    if weight.ndim != 4:
        raise ValueError(f"{file}: encoder.conv_out.conv.weight is {tuple(weight.shape)}, expected four dimensions")
    bits, channels = config["latent_channels"], weight.shape[0]
    published = INFINITY_TOKENIZERS.get((config["depth"], config["width"], bits))
    advice = f": give {published}" if published else ""
    if bits not in (channels, 4 * channels):
        raise ValueError(
            f"the tokenizer and the transformer do not belong together: {channels} bits a cell ({4 * channels} for 2x2 "
            f"cells) and {bits} bits a token{advice}"
        )
    name = Path(file).name.lower()
    if published == "infinity_vae_d32reg.pth" and "d32" in name and "reg" not in name:
        raise ValueError(f"{name} has the right shape but is not the tokenizer of this transformer{advice}")
    return 1 if bits == channels else 2


def fetch(file: str | Path) -> Path:
    """A local path, downloaded first if it is hf://OWNER/NAME/FILE or hf://OWNER/NAME@REVISION/FILE.

    Of an index (`.index.json`), all shards are downloaded as well.

    Raises:
        FileNotFoundError: if it cannot be had from the Hub.
    """
    if not str(file).startswith("hf://"):
        return Path(file)
    owner, name, inner = [*str(file).removeprefix("hf://").split("/", 2), "", ""][:3]
    name, _, revision = name.partition("@")
    if not (owner and name and inner):
        raise ValueError(f"{file} must be hf://OWNER/NAME/FILE, like hf://FoundationVision/var/var_d16.pth")
    from huggingface_hub import hf_hub_download, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what goes wrong is said once, here
    download = partial(hf_hub_download, f"{owner}/{name}", revision=revision or None)
    try:
        path = Path(download(filename=inner))
        for shard in shard_names(path) if inner.endswith(".index.json") else ():
            download(filename=(PurePosixPath(inner).parent / shard).as_posix())
        return path
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{file} could not be had from the Hub: {str(error).splitlines()[0]}") from None
    finally:
        logging.set_verbosity(verbosity)


def _schedule(source: Callable[[], State], file: str | Path, flags: Flags) -> ScaleSchedule:
    if flags.schedule:
        return ScaleSchedule.of(flags.schedule)
    state = source()
    try:
        return adapters.read_schedule(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _component(adapter: Adapter, source: Callable[[], State], file: str | Path, **flags: object) -> Component:
    state = source()
    try:
        config = adapters.read_config(adapter, state, **flags)
        adapters.from_official(adapter, state, config)  # every key and shape
        kept = adapters.kept_buffers(adapter, state, config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    buffers = {key: tensor.clone() for key, tensor in kept.items()}
    return Component(adapter, config, lambda: adapters.from_official(adapter, source(), config), buffers)


def _check_together(components: Mapping[str, Component], flags: Flags) -> None:
    configs = {name: component.config for name, component in components.items()}
    depth = configs["transformer"]["depth"]
    if flags.depth not in (None, depth):
        raise ValueError(f"depth is given as {flags.depth}, the transformer has {depth} blocks")
    for part in configs.keys() - {"vqvae"}:
        for name in ("vocab_size", "latent_channels", "schedule"):
            mine, theirs = configs["vqvae"][name], configs[part][name]
            if mine != theirs:
                raise ValueError(f"the tokenizer and the {part} do not belong together: {name} is {mine} and {theirs}")
    if "refiner" in configs:
        mine, theirs = (configs[part]["num_classes"] for part in ("transformer", "refiner"))
        if mine != theirs:
            raise ValueError(
                f"the drafter and the refiner do not belong together: they know {mine} and {theirs} classes"
            )


def _handover(files: Mapping[str, str | Path], scales: int, flags: Flags) -> int:
    """Scales of the drafter: as given, else as the published files are named (drafter_8.pth)."""
    named = {int(n) for file in files.values() for n in re.findall(r"(?:drafter|refiner)_(\d+)", Path(file).stem)}
    if flags.handover is None and len(named) > 1:
        raise ValueError(f"the drafter and the refiner are for {sorted(named)} scales: give the same, or handover")
    if flags.handover is None and not named:
        raise ValueError("handover must be given: how many scales the drafter makes is not in the names of its files")
    handover = flags.handover if flags.handover is not None else next(iter(named))
    if not 0 < handover < scales:
        raise ValueError(f"handover must be in 1..{scales - 1} scales, got {handover}")
    return handover
