"""`nextscale report`: one page about runs and results. Nothing heavy is imported to parse."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  nextscale report runs/scenes-var results/scenes_model.json --out report.html
  nextscale report runs/scenes-var --card runs/scenes-var/latest/README.md
  nextscale report runs/scenes-var --push you/your-model         the card of a model that is on the Hub

Beside report.html stands report.md with its pictures in report_files/."""

FRONT = """---
library_name: diffusers
pipeline_tag: {task}
tags:
- next-scale-prediction
- visual-autoregressive
---
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale report`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "One page about runs and results: curves, pictures, tables, settings.", EXAMPLES
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUN", help="training runs, or results files")
    parser.add_argument("--title", help="of the page (the first source's name)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page, .html (report.html); Markdown beside it")
    parser.add_argument("--card", type=Path, metavar="FILE", help="write a model card instead: Markdown for the Hub")
    parser.add_argument("--push", metavar="REPO", help="put the model card on the Hub, into this model's repository")


def run(args: argparse.Namespace) -> int:
    """Write the page; 0. Raises ValueError or FileNotFoundError on sources that are none."""
    out = args.out or Path("report.html")
    if out.suffix != ".html":
        raise ValueError(f"--out must be a .html file, got {out}")
    if args.card is not None and args.card.suffix != ".md":
        raise ValueError(f"--card must be a .md file, got {args.card}")
    if args.card is not None or args.push is None:
        keep_tables("--out" if args.card is None else "--card", args.card or out)
    from evaluation.html import sections_of, to_html

    sections = [section for source in args.sources for section in sections_of(source)]
    title = args.title or args.sources[0].stem.replace("_", " ")
    if args.card is None and args.push is None:
        from sample.files import write_text

        write_text(out, to_html(title, sections))
        write_markdown(out.with_suffix(".md"), title, sections)
        print(f"written: {out}, {out.with_suffix('.md')}")
        return 0
    card = args.card or Path("README.md")
    if args.card is not None:
        write_markdown(card, title, sections, front=front_matter(args.sources))
        print(f"written: {card}")
    if args.push is not None:
        kept = "nothing was written, --card FILE keeps the card" if args.card is None else f"{card} is kept"
        push(args.push, title, sections, front_matter(args.sources), kept)
        print(f"pushed: {args.push}")
    return 0


def keep_tables(option: str, page: Path) -> None:
    """Raise ValueError if a page's Markdown would overwrite the table of a results file."""
    result = page.with_suffix(".json")
    if result.is_file():
        raise ValueError(f"{option} {page} would overwrite {page.with_suffix('.md')}, the table of {result}: rename it")


def front_matter(sources: list[Path]) -> str:
    """What the Hub reads of a card: a text model if a run's transformer is one."""
    text = any(
        "conditioning: text" in (s / "config.yaml").read_text("utf-8") for s in sources if (s / "config.yaml").is_file()
    )
    return FRONT.format(task="text-to-image" if text else "unconditional-image-generation")


def write_markdown(path: Path, title: str, sections: list, front: str = "") -> None:
    """The page and, in PATH_files/, its pictures."""
    from evaluation.html import to_markdown
    from sample.files import atomically, write_text

    folder = path.with_name(f"{path.stem}_files")
    text, files = to_markdown(title, sections, folder.name)
    for name, content in files.items():
        atomically(folder / name, lambda partial, content=content: partial.write_bytes(content))
    write_text(path, front + text)


def push(repo: str, title: str, sections: list, front: str, kept: str) -> None:
    """Put the card and its pictures into a Hub repository, in one commit.

    Raises:
        ConnectionError: if the Hub cannot be reached or refuses it; it says what is `kept` here.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from evaluation.html import to_markdown

    text, files = to_markdown(title, sections, "card_files")
    operations = [CommitOperationAdd("README.md", (front + text).encode())]
    operations += [CommitOperationAdd(f"card_files/{name}", content) for name, content in files.items()]
    hub = HfApi()
    try:
        hub.create_commit(repo_id=repo, operations=operations, commit_message="Model card")
    except Exception as error:  # whose HTTP library differs with huggingface_hub's version
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"--push {repo} failed at {hub.endpoint}: {reason} ({kept})") from error
