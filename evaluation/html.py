"""One page about runs and results, to attach to a paper or a model card: self-contained HTML, and Markdown.

A source is a training run (config.yaml, metrics.jsonl, images/, results in it), or a results file (NAME.json, with its
picture NAME.png). A page is sections of blocks; both renderers know the same four kinds of block.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.report import cells_of, flat, is_result, metric_rows, portable


@dataclass(frozen=True)
class Table:
    """Lines of cells under a header."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An encoded picture; `name` is its file name beside a Markdown page."""

    name: str
    content: bytes
    caption: str

    @property
    def kind(self) -> str:
        """The media type, by the name."""
        return "image/svg+xml" if self.name.endswith(".svg") else "image/png"


@dataclass(frozen=True)
class Code:
    """Lines to copy: a command, a configuration. `title` is shown above; the lines are folded away in HTML."""

    title: str
    text: str


Block = Table | Picture | Code | str


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


# --- sources ---------------------------------------------------------------------------------------------------------


def sections_of(source: str | Path) -> list[Section]:
    """What there is to say about a training run or a results file.

    Raises FileNotFoundError if it does not exist, ValueError if it is neither.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist: give a training run's folder or a results file")
    if path.is_file():
        return [result_section(path)]
    results = [file for file in sorted(path.glob("*.json")) if is_result(file)]
    if (path / "metrics.jsonl").is_file():
        return [run_section(path), *map(result_section, results)]
    if not results:
        raise ValueError(f"{source} is no training run (metrics.jsonl) and holds no results file")
    return [result_section(file) for file in results]


def result_section(path: Path) -> Section:
    """A results file: its figures with intervals, picture, cautions, settings, hardware, command.

    Raises ValueError if it is no results file.
    """
    if not is_result(path):
        raise ValueError(f"{path} is no results file: it must hold a JSON object with rows, versions and command")
    content = json.loads(path.read_text(encoding="utf-8"))
    blocks: list[Block] = [Table(*cells_of(content["rows"]))]
    if path.with_suffix(".png").is_file():
        blocks.append(Picture(path.with_suffix(".png").name, path.with_suffix(".png").read_bytes(), path.stem))
    settings = dict(content.get("settings", {}))
    blocks += [f"Caution: {caution}." for caution in settings.pop("cautions", [])]
    facts = {name: content[name] for name in ("n", "seeds", "date", "commit") if content.get(name) is not None}
    made = {**facts, **flat(content.get("hardware", {}), "hardware."), **flat(settings), **flat(content["versions"])}
    blocks.append(Table(["made with", ""], [[name, str(value)] for name, value in made.items()]))
    return Section(path.stem.replace("_", " "), [*blocks, Code("command", content["command"])])


def run_section(folder: Path) -> Section:
    """A training run: where it ended, its curves, its newest pictures, its configuration.

    Raises ValueError if it has no metrics yet.
    """
    rows: dict[tuple[str, int], dict] = {}
    for row in metric_rows(folder / "metrics.jsonl"):
        rows[row["kind"], row["step"]] = row  # a resumed run writes some steps again
    if not rows:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no line yet: nothing to report")
    kinds = {kind: [row for key, row in sorted(rows.items()) if key[0] == kind] for kind in ("train", "validation")}
    newest = [(kind, found[-1]) for kind, found in kinds.items() if found]
    names = list(dict.fromkeys(name for _, row in newest for name in row if name != "kind"))
    lines = [[name, *(_number(row[name]) if name in row else "" for _, row in newest)] for name in names]
    blocks: list[Block] = [curves(kinds), Table(["at the end", *(kind for kind, _ in newest)], lines)]
    for path in newest_pictures(folder / "images"):
        blocks.append(Picture(f"{folder.name}-{path.name}", path.read_bytes(), path.stem.replace("_", " ")))
    if (folder / "config.yaml").is_file():
        text = (folder / "config.yaml").read_text(encoding="utf-8").strip()
        blocks.append(Code("configuration", re.sub(r"(?<=: )/\S+", lambda found: portable(found[0]), text)))
    return Section(f"Training: {portable(folder)}", blocks)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def newest_pictures(folder: Path) -> list[Path]:
    """The last picture of every kind in a run's images/ (KIND_IMAGES.png)."""
    last = {path.stem.rpartition("_")[0]: path for path in sorted(folder.glob("*.png"))}
    return list(last.values())


def curves(kinds: Mapping[str, Sequence[Mapping]]) -> Picture:
    """Loss, accuracy, speed and every scale's loss against images seen, as an SVG.

    Raises ValueError if matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("curves need matplotlib: pip install 'nextscale[plots]'") from None
    validation = kinds["validation"] or kinds["train"]
    scales = [name for name in validation[-1] if name.startswith("loss_")]
    known = {name for rows in kinds.values() for row in rows for name in row}
    panels = [name for name in ("loss", "accuracy", "psnr", "images_per_s") if name in known]
    sheet = Figure(figsize=(4.2 * (len(panels) + bool(scales)), 3.2), layout="constrained")
    FigureCanvasSVG(sheet)
    axes = sheet.subplots(1, len(panels) + bool(scales), squeeze=False)[0]
    for axis, title in zip(axes, panels):
        for kind, colour in (("train", "#8fa8c8"), ("validation", "#c0504d")):
            seen = [row for row in kinds[kind] if title in row]
            if seen:
                axis.plot([r["images"] for r in seen], [r[title] for r in seen], color=colour, label=kind)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, frameon=False)
    for name in scales:
        axes[-1].plot([r["images"] for r in validation], [r[name] for r in validation], label=name[5:], linewidth=1.2)
    if scales:
        axes[-1].set_title("validation loss by scale", fontsize=10)
        axes[-1].legend(fontsize=7, frameon=False)
    for axis in axes:
        axis.set_xlabel("images", fontsize=8)
        axis.grid(alpha=0.25, linewidth=0.5)
    drawn = io.BytesIO()
    with rc_context({"svg.hashsalt": "nextscale"}):  # the same curves are the same bytes
        sheet.savefig(drawn, format="svg", metadata={"Date": None})
    return Picture("curves.svg", drawn.getvalue(), "Curves against images seen in training")


# --- pages -----------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
img { max-width: 100%; height: auto; background: white; }
figure { margin: 1rem 0; } figcaption, .made { color: #888; font-size: 0.85rem; }
pre { overflow-x: auto; background: #8882; padding: 0.8rem; font-size: 0.8rem; white-space: pre-wrap; }
.caution { border-left: 4px solid #c0504d; padding-left: 0.8rem; }
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One HTML file with everything in it: no scripts, nothing to load."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", *map(_html_block, section.blocks)]
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
    )
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, str):
        mark = " class='caution'" if block.startswith("Caution") else ""
        return f"<p{mark}>{html.escape(block)}</p>"
    if isinstance(block, Code):
        return f"<details><summary>{html.escape(block.title)}</summary><pre>{html.escape(block.text)}</pre></details>"
    if isinstance(block, Picture):
        source = f"data:{block.kind};base64,{base64.b64encode(block.content).decode()}"
        caption = html.escape(block.caption)
        return f"<figure><img src='{source}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in line) for line in block.lines]
    header = "".join(f"<th>{html.escape(name)}</th>" for name in block.header)
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def to_markdown(title: str, sections: Sequence[Section], pictures: str) -> tuple[str, dict[str, bytes]]:
    """A Markdown page, and the pictures it shows: file name (in the folder `pictures`) to content."""
    lines, files = [f"# {title}", ""], {}
    for number, section in enumerate(sections):
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Picture):
                name = f"{number}-{block.name}"
                files[name] = block.content
                lines += [f"![{block.caption}]({pictures}/{name})", ""]
            elif isinstance(block, Table):
                lines += [_markdown_line(block.header), _markdown_line(["---"] * len(block.header))]
                lines += [*map(_markdown_line, block.lines), ""]
            elif isinstance(block, Code):
                lines += [f"{block.title}:", "", "```", block.text, "```", ""]
            else:
                lines += [block, ""]
    return "\n".join(lines), files


def _markdown_line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
