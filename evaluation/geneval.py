"""GenEval's own formats: its prompts and their metadata, read, made and parsed, and the results of its detector.

A user with the detector (github.com/djghosh13/geneval) scores our images unchanged: `nextscale evaluate --suite
geneval` writes the image tree it reads, and takes in the results file it writes. Nothing here looks at images.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.judge import score
from evaluation.scenes import COLOURS, RELATIONS, TAGS, check_metadata
from evaluation.verdicts import prompt_intervals, widened

# COCO's 80 classes under GenEval's names, in COCO's order; the order decides which prompts a seed gives.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COUNTS = {"two": 2, "three": 3, "four": 4}
OFFICIAL_SEED, DRAWN = 43, 100  # prompts drawn of each tag but the first; repeated ones are dropped
RESULT_FIELDS = {"filename", "tag", "prompt", "correct", "metadata"}

_PREFIX = "a photo of "
_RELATION = re.compile(rf" ({'|'.join(RELATIONS)}) ")


# --- prompts ---------------------------------------------------------------------------------------------------------


def metadata_of(
    tag: str,
    classes: Sequence[str],
    colours: Sequence[str] = (),
    *,
    count: int = 1,
    relation: str | None = None,
) -> dict:
    """A prompt in GenEval's metadata format: `tag`, `include`, for counting `exclude`, and `prompt`.

    `classes` and `colours` are in the order the prompt names them; a relation's reference (named last) comes first in
    `include`, and the other entry points at it.
    """
    include: list[dict] = [{"class": name, "count": count} for name in classes]
    for item, colour in zip(include, colours):
        item["color"] = colour
    phrases = [" ".join(filter(None, (item.get("color"), item["class"]))) for item in include]
    if relation is not None:
        prompt = f"{_article(phrases[0])} {relation} {_article(phrases[1])}"
        include = [include[1], {**include[0], "position": [relation, 0]}]
    elif count > 1:
        word = next(word for word, number in COUNTS.items() if number == count)
        prompt = f"{word} {_plural(phrases[0])}"
    else:
        prompt = " and ".join(map(_article, phrases))
    exclude = {"exclude": [{"class": classes[0], "count": count + 1}]} if tag == "counting" else {}
    return {"tag": tag, "include": include, **exclude, "prompt": _PREFIX + prompt}


def suite(seed: int = OFFICIAL_SEED) -> list[dict]:
    """GenEval's prompts: with the official seed its 553, in its order; with others as many of other draws.

    80 of single objects, then 100 draws of each other tag, without those that repeat (with the official seed 99, 80,
    94, 100 and 100 are left).
    """
    rng = np.random.default_rng(seed)
    names, colours, relations = list(CLASSES), list(COLOURS), ("left of", "right of", "above", "below")

    def two() -> list[str]:
        return [names[i] for i in rng.choice(len(names), size=2, replace=False)]

    def inanimate(i: int) -> str:
        return names[i + 1]  # anything but the person, who comes first

    drawn = [metadata_of("single_object", [names[i]]) for i in rng.choice(len(names), size=len(names), replace=False)]
    drawn += [metadata_of("two_object", two()) for _ in range(DRAWN)]
    for _ in range(DRAWN):
        name = names[rng.choice(len(names))]
        drawn.append(metadata_of("counting", [name], count=int(rng.integers(2, 4, endpoint=True))))
    for _ in range(DRAWN):
        name = inanimate(rng.choice(len(names) - 1))
        drawn.append(metadata_of("colors", [name], [colours[rng.choice(len(colours))]]))
    for _ in range(DRAWN):
        pair = two()
        drawn.append(metadata_of("position", pair, relation=relations[rng.choice(len(relations))]))
    for _ in range(DRAWN):
        pair = [inanimate(i) for i in rng.choice(len(names) - 1, size=2, replace=False)]
        hues = [colours[i] for i in rng.choice(len(colours), size=2, replace=False)]
        drawn.append(metadata_of("color_attr", pair, hues))
    return list({metadata["prompt"]: metadata for metadata in drawn}.values())


def parse_prompt(prompt: str) -> dict:
    """A prompt of GenEval's grammar as metadata: the inverse of `metadata_of(...)["prompt"]`.

    Raises:
        ValueError: if it is not of the grammar, or names a class or colour that GenEval does not know.
    """
    text = prompt.strip()
    if not text.startswith(_PREFIX):
        raise ValueError(f'a GenEval prompt begins with "{_PREFIX.strip()}", got {prompt!r}')
    text = text.removeprefix(_PREFIX)
    word, _, rest = text.partition(" ")
    if word in COUNTS:
        name = next((name for name in CLASSES if _plural(name) == rest), None)
        if name is None:
            raise ValueError(f"GenEval knows no plural {rest!r}, in {prompt!r}")
        return metadata_of("counting", [name], count=COUNTS[word])
    found = _RELATION.search(text)
    parts = _RELATION.split(text)[::2] if found else text.split(" and ")
    things = [_thing(part, prompt) for part in parts]
    classes = [name for name, _ in things]
    colours = [colour for _, colour in things if colour]
    if len(things) > 2 or len(colours) not in (0, len(things)) or (found and colours):
        raise ValueError(f"this is no prompt of GenEval's six tags: {prompt!r}")
    if found:
        return metadata_of("position", classes, relation=found[1])
    if len(things) == 1:
        return metadata_of("colors" if colours else "single_object", classes, colours)
    return metadata_of("color_attr" if colours else "two_object", classes, colours)


def _thing(phrase: str, prompt: str) -> tuple[str, str | None]:
    """The class and colour of "a red X" or "an X"."""
    article, _, words = phrase.partition(" ")
    colour, _, name = words.partition(" ")
    if words in CLASSES:  # before colours: an orange is a thing too
        name, colour = words, ""
    if article not in ("a", "an") or name not in CLASSES or (colour and colour not in COLOURS):
        raise ValueError(f"GenEval knows no {phrase!r}, in {prompt!r}")
    return name, colour or None


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    return f"{name}{'es' if name.endswith('s') else 's'}"


# --- files -----------------------------------------------------------------------------------------------------------


def read_suite(path: str | Path) -> list[dict]:
    """The prompts of a file: GenEval's metadata, a JSON object a line, or plain prompts of its grammar.

    Classes need not be GenEval's own where metadata is given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the line that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"suite {path} is not a file")
    numbered = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)  # universal newlines, and no others
    lines = {number: line.strip() for number, line in numbered if line.strip()}
    if not lines:
        raise ValueError(f"suite {path} holds no prompt")
    return [_read_line(path, number, line) for number, line in lines.items()]


def _read_line(path: Path, number: int, line: str) -> dict:
    try:
        metadata = json.loads(line) if line.startswith("{") else parse_prompt(line)
    except ValueError as error:
        raise ValueError(f"suite {path} line {number}: {error}") from None
    if not isinstance(metadata.get("prompt"), str) or metadata.get("tag") not in TAGS or "include" not in metadata:
        raise ValueError(f"suite {path} line {number} needs a prompt, include, and a tag of {', '.join(TAGS)}")
    check_metadata(metadata, f"suite {path} line {number}")
    return metadata


def write_suite(folder: str | Path, metadatas: Sequence[dict]) -> None:
    """`evaluation_metadata.jsonl` and `generation_prompts.txt` in a folder, as GenEval has them."""
    from sample.files import write_text

    folder = Path(folder)
    write_text(folder / "evaluation_metadata.jsonl", "".join(f"{json.dumps(m)}\n" for m in metadatas))
    write_text(folder / "generation_prompts.txt", "".join(f"{m['prompt']}\n" for m in metadatas))


def read_results(path: str | Path) -> list[dict]:
    """The rows of the results file GenEval's detector writes, an image each, `metadata` parsed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the line that is no such row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results {path} is not a file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["metadata"] = json.loads(row["metadata"]) if isinstance(row["metadata"], str) else row["metadata"]
        except (json.JSONDecodeError, KeyError, TypeError):
            row = {}
        if row and not (isinstance(row.get("correct"), bool) and isinstance(row["metadata"], dict)):
            raise ValueError(f"results {path} line {number}: correct must be true or false, and metadata an object")
        if not row.keys() >= RESULT_FIELDS or row["tag"] not in TAGS:
            fields = ", ".join(sorted(RESULT_FIELDS))
            raise ValueError(f"results {path} line {number} is no row of GenEval's ({fields}, a tag of the six)")
        rows.append(row)
    if not rows:
        raise ValueError(f"results {path} holds no row")
    names = Counter(row["filename"] for row in rows if "filename" in row)
    for name, count in names.items():
        if count > 1:
            raise ValueError(f"results {path} has {count} rows of the image {name}")
    return rows


def result_cautions(rows: Sequence[dict]) -> list[str]:
    """What makes scores of such rows no GenEval scores: tags that are missing, prompts with fewer images."""
    lines = []
    if missing := [tag for tag in TAGS if tag not in {row["tag"] for row in rows}]:
        lines.append(f"no images of {', '.join(missing)}: overall is the mean of the other tags, not GenEval's of six")
    counts = Counter(json.dumps(row["metadata"], sort_keys=True) for row in rows)
    if len(set(counts.values())) > 1:
        least, most = min(counts.values()), max(counts.values())
        lines.append(f"prompts have {least} to {most} images: GenEval draws four of each")
    return lines


def summarize(rows: Sequence[dict], *, seed: int = 0) -> dict:
    """GenEval's scores of result rows: each tag's share of correct images, `overall` (the mean of the six), and
    `prompts_correct`, the share of prompts with a correct image; 95 % intervals by resampling prompts within tags.
    """
    correct, metadatas = [bool(row["correct"]) for row in rows], [row["metadata"] for row in rows]
    metadatas = [{**metadata, "tag": row["tag"]} for metadata, row in zip(metadatas, rows)]
    prompts = [Path(json.dumps(metadata, sort_keys=True)) for metadata in metadatas]
    found = widened(score(correct, metadatas), prompt_intervals(correct, metadatas, prompts, seed=seed))
    solved = {prompt for prompt, good in zip(prompts, correct) if good}
    return {"prompts": len(set(prompts)), "prompts_correct": len(solved) / len(set(prompts)), **found}
