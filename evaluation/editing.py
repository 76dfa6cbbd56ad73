"""Editing, measured: an object of a drawn scene is repainted after a new text, and the judge says whether it is right.

A case is a scene of one or two objects. One of them is masked, and the text names a new object, of another shape and
colour, and the other one if there is one. Two tasks: "replace" gives the model the scene as it is, "add" the scene
without the masked object. The baseline draws the text afresh, without a picture.

    python -m evaluation.editing --model scenes --n 200 --out results/editing.json
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.command import Parser, check_least, in_one_line
from evaluation.editing_sheet import Column, editing_sheet
from evaluation.evaluate import model_name
from evaluation.intervals import wilson
from evaluation.judge import Detection, apply_rules, detect
from evaluation.report import command_of, result, table, write_result
from evaluation.scenes import CANVAS, COLOURS, SHAPES, Scene, SceneObject, render, sample_scene, scene_metadata
from sample.commands.plan_options import add_place_options
from sample.edit import RULES
from sample.files import write_png
from sample.load import load_pipeline
from sample.pipeline import NextScalePipeline
from sample.reward_names import load_reward
from sample.search import Search
from sample.search_steps import Step

TASKS = ("replace", "add")
MARGIN = 8  # pixels around the old object that are repainted, where the kept one leaves room
CLEARANCE = 1  # pixels between the mask and the kept object
SHOWN = 10  # cases in the picture: the first ones
FIGURES = ("right", "new_object", "kept_object", "old_object_gone", "nothing_else", "unchanged_outside", "images_per_s")


@dataclass(frozen=True)
class Case:
    """One edit to make.

    Attributes:
        scene: one or two objects, 64x64 pixels.
        old, kept: the object that is masked, and the one that stays, if any.
        box: (x0, y0, x1, y1) in pixels, what is repainted.
        new: (shape, colour) that the text asks for in its place.
        metadata: the text in GenEval's format.
    """

    scene: Scene
    old: SceneObject
    kept: SceneObject | None
    box: tuple[int, int, int, int]
    new: tuple[str, str]
    metadata: dict

    def image(self, task: str) -> np.ndarray:
        """What the model is given: (64, 64, 3) uint8, with the old object ("replace") or without it ("add")."""
        objects = self.scene.objects if task == "replace" else tuple(filter(None, [self.kept]))
        return render(replace(self.scene, objects=objects))

    @property
    def mask(self) -> np.ndarray:
        """True where the picture is repainted: bool (64, 64)."""
        x0, y0, x1, y1 = self.box
        mask = np.zeros((int(CANVAS), int(CANVAS)), bool)
        mask[y0:y1, x0:x1] = True
        return mask


def case_at(index: int, seed: int, objects: int = 2) -> Case:
    """Case `index` of the benchmark named by `seed`, with 1 or 2 `objects`; independent of every other one.

    The scene is one of training; the new object may be a pair of shape and colour that training held out, and
    `metadata["unseen"]` says where it is.
    """
    rng = np.random.default_rng((seed, index, objects))
    tag = {1: "colors", 2: "color_attr"}[objects]
    scene = sample_scene(rng, tag=tag)
    place = int(rng.integers(objects))
    old, kept = scene.objects[place], scene.objects[1 - place] if objects == 2 else None
    shape = rng.choice([shape for shape in SHAPES if shape not in {item.shape for item in scene.objects}])
    colour = rng.choice([colour for colour in COLOURS if colour not in {item.colour for item in scene.objects}])
    new = str(shape), str(colour)
    named = [new] if kept is None else [new, (kept.shape, kept.colour)]
    shapes, colours = zip(*(named if rng.random() < 0.5 else named[::-1]))
    box = repaint_box(old.box, kept.box if kept is not None else None)
    return Case(scene, old, kept, box, new, scene_metadata(tag, shapes, colours))


def repaint_box(
    old: tuple[float, float, float, float], kept: tuple[float, float, float, float] | None
) -> tuple[int, int, int, int]:
    """The old object's box and `MARGIN` pixels around it, inside the canvas and `CLEARANCE` pixels off the kept one.

    Where both boxes would meet, the sides that face the kept object give way along the axis on which they are apart.
    """
    box = [max(old[0] - MARGIN, 0), max(old[1] - MARGIN, 0), min(old[2] + MARGIN, CANVAS), min(old[3] + MARGIN, CANVAS)]
    if kept is None:
        kept = (4 * CANVAS,) * 4  # far away
    gaps = [max(kept[axis] - old[axis + 2], old[axis] - kept[axis + 2]) for axis in (0, 1)]
    axis = int(np.argmax(gaps))
    if kept[axis] >= old[axis + 2]:
        box[axis + 2] = min(box[axis + 2], kept[axis] - CLEARANCE)
    else:
        box[axis] = max(box[axis], kept[axis + 2] + CLEARANCE)
    low, high = np.ceil(np.array(box[:2]) - 1e-9), np.floor(np.array(box[2:]) + 1e-9)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def judge_edit(case: Case, before: np.ndarray | None, after: np.ndarray) -> dict[str, bool]:
    """What is right about an edit; `before` is the given picture, None where there was none.

    `right` asks for all of it: the text's rules, the new object's centre in the mask (where there is one), the kept
    object where it was, the old one gone, nothing else, and every pixel outside the mask as it was.
    """
    found = detect(after)
    inside = [d for d in found if before is None or _within(_centre(d.box), case.box)]
    old = (case.old.shape, case.old.colour)
    parts = {
        "new_object": any((d.shape, d.colour) == case.new for d in inside),
        "kept_object": case.kept is None or any(_is_kept(d, case.kept, before is not None) for d in found),
        "old_object_gone": all((d.shape, d.colour) != old for d in found),
        "nothing_else": len(found) == len(case.scene.objects),
        "unchanged_outside": before is None or bool((after == before)[~case.mask].all()),
    }
    return {"right": all(parts.values()) and apply_rules(found, case.metadata).correct, **parts}


def _is_kept(detection: Detection, kept: SceneObject, in_place: bool) -> bool:
    if (detection.shape, detection.colour) != (kept.shape, kept.colour):
        return False
    return not in_place or np.abs(_centre(detection.box) - _centre(kept.box)).max() < 2


def _centre(box: tuple[float, float, float, float]) -> np.ndarray:
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2


def _within(point: np.ndarray, box: tuple[int, int, int, int]) -> bool:
    return bool(box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3])


# --- the measurement -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One row of the result.

    Attributes:
        task: one of `TASKS`; None draws the text alone.
        fields: what the row says of it.
        call: arguments of the pipeline's call.
    """

    task: str | None
    fields: dict
    call: dict

    @property
    def label(self) -> str:
        """A few words for a bar."""
        return f"{self.task or 'afresh'}, {self.words}"

    @property
    def words(self) -> str:
        """What tells it from the other jobs of its task."""
        if self.fields["candidates"] > 1:
            return f"best of {self.fields['candidates']}"
        return f"rule: {self.fields['mask_rule']}" if self.task else "one image each"


def edits(
    pipeline: NextScalePipeline, cases: Sequence[Case], job: Job, *, batch_size: int, seed: int
) -> Iterator[np.ndarray]:
    """The edited picture of every case, (64, 64, 3) uint8."""
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        given = {}
        if job.task is not None:
            given = {"image": [case.image(job.task) for case in batch], "mask_image": [case.mask for case in batch]}
        prompts = [case.metadata["prompt"] for case in batch]
        seeds = [seed + start + i for i in range(len(batch))]
        yield from map(np.asarray, pipeline(prompts, seed=seeds, **given, **job.call).images)


def measure(
    pipeline: NextScalePipeline, cases: Sequence[Case], job: Job, *, batch_size: int, seed: int
) -> tuple[dict, list[np.ndarray], list[bool]]:
    """One row of the result: shares with their 95 % intervals; the pictures, and which of them are right."""
    started = time.perf_counter()
    stream = edits(pipeline, cases, job, batch_size=batch_size, seed=seed)
    made = list(tqdm(stream, desc=job.label, total=len(cases), unit="image", disable=None))
    seconds = time.perf_counter() - started
    before = [case.image(job.task) if job.task is not None else None for case in cases]
    judged = [judge_edit(*each) for each in zip(cases, before, made, strict=True)]
    row: dict = {"task": job.task or "afresh", **job.fields, "n": len(cases)}
    for name in judged[0]:
        if job.task is None and name in ("unchanged_outside", "old_object_gone"):
            continue
        row[name] = float(np.mean([verdict[name] for verdict in judged]))
        row[f"{name}_ci95"] = wilson(sum(verdict[name] for verdict in judged), len(judged))
    for name, unseen in (("right_seen", False), ("right_unseen", True)):
        chosen = [verdict["right"] for case, verdict in zip(cases, judged) if case.metadata["unseen"] == unseen]
        if chosen:
            row[name], row[f"{name}_ci95"] = float(np.mean(chosen)), wilson(sum(chosen), len(chosen))
    return row | {"images_per_s": len(cases) / seconds}, made, [verdict["right"] for verdict in judged]


def jobs(pipeline: NextScalePipeline, rules: Sequence[str], best_of: int, call: dict) -> list[Job]:
    """The rows to measure: the text alone, then every task by every rule; with `best_of` > 1 again with a search.

    The search takes the candidate that the scenes reward likes best; it edits by the first rule.
    """
    rows = [Job(None, {"candidates": 1}, call)]
    for task in TASKS:
        for rule in rules:
            rows.append(Job(task, {"mask_rule": rule, "candidates": 1}, {**call, "mask_rule": rule}))
    if best_of > 1:
        last = len(pipeline.transformer.schedule) - 1
        reward = load_reward("scenes", device=pipeline.transformer.device)
        searched = {**call, "search": Search(candidates=best_of, steps=(Step(last, 1, "best"),), reward=reward)}
        rows.append(Job(None, {"candidates": best_of}, searched))
        for task in TASKS:
            fields = {"mask_rule": rules[0], "candidates": best_of}
            rows.append(Job(task, fields, {**searched, "mask_rule": rules[0]}))
    return rows


def parser_of() -> Parser:
    """The options of the command."""
    parser = Parser(prog="python -m evaluation.editing", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes", help="scenes (bundled), a model folder, or a training run")
    parser.add_argument("--n", type=int, default=200, help="edits of each task and rule (200)")
    parser.add_argument("--objects", type=int, choices=(1, 2), default=1, help="objects of a scene and its text (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases and the images (0)")
    parser.add_argument("--rules", default=",".join(RULES), help=f"mask rules: some of {','.join(RULES)}")
    parser.add_argument("--best-of", type=int, default=8, help="candidates of the searched edits; 1 searches none (8)")
    parser.add_argument("--batch-size", type=int, default=25, help="images at once (25)")
    parser.add_argument("--guidance", type=float, help="strength of guidance (the model's own)")
    add_place_options(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json; its table and picture beside it")
    return parser


def run(args: argparse.Namespace) -> list[dict]:
    """Measure every task under every rule, and the baseline; print, and write what `--out` asks for.

    Raises:
        ValueError, FileNotFoundError: on options that make no sense, naming them.
    """
    rules = args.rules.split(",")
    check_least(args, n=1, seed=0, best_of=1, batch_size=1)
    if not set(rules) <= set(RULES):
        raise ValueError(f"--rules must be of {', '.join(RULES)}, got {args.rules!r}")
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"--out must be a .json file, got {args.out}")
    pipeline = load_pipeline(args.model, dtype=args.dtype, device=args.device)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.by_class or pipeline.vqvae.image_hw != (int(CANVAS), int(CANVAS)):
        raise ValueError(f"--model {args.model} must be a text model of {CANVAS:.0f}x{CANVAS:.0f} pixels")
    cases = [case_at(i, args.seed, args.objects) for i in range(args.n)]
    call = {} if args.guidance is None else {"guidance_scale": args.guidance}
    rows, columns = [], []
    for job in jobs(pipeline, rules, args.best_of, call):
        row, images, right = measure(pipeline, cases, job, batch_size=args.batch_size, seed=args.seed)
        rows.append({"model": model_name(args.model), **call, **row})
        columns.append(Column(job.task, job.words, images[:SHOWN], right[:SHOWN], row["right"]))
    print(table(rows, ["task", "mask_rule", "candidates", *FIGURES]))
    if args.out is not None:
        write_png(args.out.with_suffix(".png"), editing_sheet(cases[:SHOWN], columns))
        content = result(
            rows,
            command=command_of(parser_of(), args),
            n=args.n,
            seeds=args.seed,
            settings={"objects": args.objects, "margin_px": MARGIN, **(pipeline.config.sampling or {})},
        )
        write_result(args.out, content)
        print(f"written: {args.out}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of()
    args = parser.parse_args(argv)
    with in_one_line(parser):
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
