"""`nextscale compare`: two measured models under common seeds. Torch is imported when the work starts."""

import argparse
import shlex
from pathlib import Path

EXAMPLES = """examples:
  nextscale compare cache/run/a cache/run/b --reference VIRTUAL_imagenet256_labeled.npz --out results/a_b.json
  nextscale compare cache/run/a cache/run/b          on the scenes network, against fresh renders

A and B are --work folders of evaluation.run. Images of one seed and class or text are paired: what they
share cancels."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale compare`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Is A better than B? Frechet distances under common seeds.", EXAMPLES
    parser.add_argument("a", type=Path, metavar="A", help="work folder of one model")
    parser.add_argument("b", type=Path, metavar="B", help="work folder of the other")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="an npz with mu and sigma, for FID")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json and its table")


def run(args: argparse.Namespace) -> int:
    """Compare; 0. Raises ValueError or FileNotFoundError if the folders do not pair or a reference is missing."""
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"--out must be a .json file, got {args.out}")
    from evaluation.compare import compare_works, settings_of
    from evaluation.report import command_line, file_digest, portable, result, table, write_result

    row, sentences = compare_works(args.a, args.b, args.reference)
    print(table([row], [name for name in row if not name.endswith("_ci95")]))
    print("\n".join(sentences))
    if args.out is not None:
        command = command_line("nextscale compare", {"reference": args.reference, "out": args.out}, {})
        works = shlex.join([portable(args.a), portable(args.b)])
        command = command.replace("compare", f"compare {works}", 1)
        cautions = [line.removeprefix("caution: ") for line in sentences if line.startswith("caution: ")]
        sides = {"a": settings_of(args.a), "b": settings_of(args.b)}
        settings = {**sides, "cautions": cautions}
        settings |= {"reference_digest": file_digest(args.reference)} if args.reference is not None else {}
        seeds = sorted({side["seed"] for side in sides.values() if "seed" in side})
        write_result(args.out, result([row], command=command, n=row["n"], seeds=seeds, settings=settings))
        print(f"written: {args.out}")
    return 0
