"""`nextscale convert`: official checkpoints to our pipeline folder, and back."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

SQUARES = {"from var", "from code", "from hmar"}  # a codebook, and a class model of square scales
FILES = SQUARES | {"from infinity"}
ONLY = {  # options that mean something to some of the conversions alone
    "vae": FILES,
    "transformer": FILES,
    "refiner": {"from code"},
    "masked": {"from hmar"},
    "model": {"to var", "to hmar", "to infinity"},
    "text_encoder": {"from infinity"},
    "schedule": SQUARES,
    "heads": FILES,
    "refiner_heads": {"from code"},
    "depth": FILES,
    "phi_ratio": SQUARES,
    "cosine": SQUARES,
    "beta": SQUARES,
    "norm_eps": FILES,
    "handover": {"from code"},
    "size": {"from infinity"},
    "level_every": {"from infinity"},
    "chunks": {"to infinity"},
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nextscale convert`."""
    parser.description = (
        "Official checkpoints to a folder that --model takes (--from), or such a folder to official .pth files (--to). "
        "Sizes are read off the tensors; options name only what they cannot tell, with the official values."
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    families = ["var", "code", "hmar", "infinity"]
    direction.add_argument("--from", dest="source", choices=families, help="what the files are")
    direction.add_argument("--to", dest="target", choices=["var", "hmar", "infinity"], help="what to write")
    files = parser.add_argument_group("files")
    files.add_argument("--vae", metavar="FILE", help="the tokenizer: .pth, .safetensors or hf://OWNER/NAME/FILE")
    files.add_argument("--transformer", "--drafter", metavar="FILE", help="VAR's or HMAR's, or CoDe's drafter")
    files.add_argument("--refiner", metavar="FILE", help="CoDe's refiner")
    files.add_argument("--masked", metavar="FILE", help="HMAR's second training, where it has a file of its own")
    files.add_argument("--model", metavar="DIR", help="the folder to write as official files (--to)")
    files.add_argument("--out", metavar="DIR", required=True, help="the folder to make")
    files.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    files.add_argument(
        "--text-encoder", metavar="DIR", help="of Infinity: a folder or Hub name of FLAN-T5-XL, copied into the model"
    )
    told = parser.add_argument_group("what tensors cannot tell")
    told.add_argument("--schedule", help="sides of the scales, e.g. 1,2,3,4 or 1x2,2x4, where they are not recorded")
    told.add_argument("--heads", type=int, help="heads of a transformer without QK-norm (one per 64 channels)")
    told.add_argument("--refiner-heads", type=int, help="those of such a refiner (one per 64 channels)")
    told.add_argument("--depth", type=int, help="refuse a transformer of another depth")
    told.add_argument("--phi-ratio", type=float, help="quant_resi (0.5)")
    told.add_argument("--cosine", action="store_true", help="the codebook is searched by angle (using_znorm)")
    told.add_argument("--beta", type=float, help="weight of the commitment loss (0.25)")
    told.add_argument("--norm-eps", type=float, help="of the transformer's layer norms (1e-6)")
    told.add_argument("--size", help="of Infinity: 0.06M, 0.25M, 0.60M or 1M pixels (1M)")
    told.add_argument("--level-every", type=int, help="blocks between level embeddings; 0: only at first (0)")
    told.add_argument("--chunks", type=int, help="chunks of blocks in the files of --to infinity (8)")
    told.add_argument("--handover", type=int, help="scales of CoDe's drafter (as the files are named: drafter_8.pth)")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was found and written.

    Raises:
        FileNotFoundError, ValueError: on a file that is missing or wrong, in one line.
    """
    from sample.convert import convert, convert_back
    from sample.official import Flags

    _check_options(args)
    if args.target:
        _need(args, "--to", "model")
        back = {"family": args.target, "chunks": 8 if args.chunks is None else args.chunks, "overwrite": args.overwrite}
        for path in convert_back(args.model, args.out, **back):
            print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
        return 0
    _need(args, f"--from {args.source}", "vae", "transformer", *(["refiner"] if args.source == "code" else []))
    told = {field.name: getattr(args, field.name) for field in fields(Flags)}
    components = convert(
        args.out,
        family=args.source,
        vae=args.vae,
        transformer=args.transformer,
        refiner=args.refiner,
        masked=args.masked,
        flags=Flags(**{name: value for name, value in told.items() if value is not None}),
        text_encoder=args.text_encoder,
        overwrite=args.overwrite,
    )
    for name, component in components.items():
        print(f"{name:12} {_described(component.config)}")
    config = components["transformer"].config
    what = '"a red star"' if config["conditioning"] == "text" else f"--class {min(207, config['num_classes'] - 1)}"
    print(f"{args.out}: try `nextscale sample --model {args.out} {what} --out pictures/`")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    chosen = f"to {args.target}" if args.target else f"from {args.source}"
    for name, fitting in ONLY.items():
        if getattr(args, name) not in (None, False) and chosen not in fitting:
            wanted = " or ".join(f"--{each}" for each in sorted(fitting))
            raise ValueError(f"--{name.replace('_', '-')} goes with {wanted}, not with --{chosen}")


def _need(args: argparse.Namespace, option: str, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is None:
            raise ValueError(f"{option} needs --{name}")
        if name != "model" and not str(value).startswith("hf://") and not Path(value).exists():
            raise FileNotFoundError(f"--{name} {value} does not exist")


def _described(config: dict) -> str:
    from tokenizer.schedule import ScaleSchedule

    sizes = ("depth", "width", "heads", "num_classes", "qk_norm", "shared_ada", "channels", "num_phis", "phi_ratio")
    sizes += ("vocab_size", "latent_channels", "masked_layers")
    sides = ScaleSchedule.of(config["schedule"]).text
    return ", ".join(f"{name} {config[name]}" for name in sizes if name in config) + f", scales {sides}"
