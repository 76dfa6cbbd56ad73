"""The images of a GenEval tree, judged: scores with intervals, a line per image."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evaluation.judge import Verdict, judge, score
from evaluation.scenes import TAGS
from evaluation.sources import FileImages, geneval_tree, progress


@dataclass(frozen=True)
class Judged:
    """Images of a GenEval tree with the metadata of their captions and their verdicts, in one order."""

    images: FileImages
    metadatas: list[dict]
    verdicts: list[Verdict]

    @classmethod
    def of(cls, folder: Path) -> "Judged":
        """Judge every image of a tree. Raises as `geneval_tree` and `judge` do."""
        images, metadatas = geneval_tree(folder)
        verdicts = []
        seen = progress(images, "judging", len(images))
        for image, metadata, path in zip(seen, metadatas, images.paths, strict=True):
            try:
                verdicts.append(judge(image, metadata))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return cls(images, metadatas, verdicts)

    @property
    def correct(self) -> list[bool]:
        """Whether each image shows its caption."""
        return [verdict.correct for verdict in self.verdicts]

    @property
    def prompts(self) -> list[Path]:
        """The folder of each image's prompt."""
        return [path.parent.parent for path in self.images.paths]

    def scores(self, seed: int = 0) -> dict:
        """`judge.score`. Where a prompt has several images, intervals also cover a bootstrap over prompts."""
        scores = score(self.correct, self.metadatas)
        if len(set(self.prompts)) == len(self.images):
            return scores
        return widened(scores, prompt_intervals(self.correct, self.metadatas, self.prompts, seed=seed))

    def lines(self) -> Iterator[str]:
        """A JSON object per image: file (below the tree), prompt, tag, correct, reason, details."""
        for path, metadata, verdict in zip(self.images.paths, self.metadatas, self.verdicts, strict=True):
            file = Path(*path.parts[-3:]).as_posix()
            yield json.dumps({"file": file, "prompt": metadata["prompt"], "tag": metadata["tag"], **asdict(verdict)})

    def first_of_each_tag(self, count: int) -> tuple[list[np.ndarray], list[str], list[bool]]:
        """Images, prompts and verdicts of the first `count` images of every tag, unselected."""
        rows: list[int] = []
        for tag in TAGS:
            rows += [i for i, metadata in enumerate(self.metadatas) if metadata["tag"] == tag][:count]
        images = list(FileImages([self.images.paths[i] for i in rows]))
        return images, [self.metadatas[i]["prompt"] for i in rows], [self.correct[i] for i in rows]


def widened(scores: dict, intervals: dict[str, list[float]]) -> dict:
    """The scores with each of their intervals widened to cover another under the same name, too."""
    found = {name: [min(low, scores[name][0]), max(high, scores[name][1])] for name, (low, high) in intervals.items()}
    return scores | found


def prompt_intervals(
    correct: Sequence[bool], metadatas: Sequence[dict], prompts: Sequence[Path], *, resamples: int = 2000, seed: int = 0
) -> dict[str, list[float]]:
    """95 % intervals under `NAME_ci95` of the scores of `judge.score`, by resampling whole prompts within each tag."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}
    groups: dict[str, dict[Path, list[bool]]] = {}
    for good, metadata, prompt in zip(correct, metadatas, prompts, strict=True):
        names = [metadata["tag"]]
        if "unseen" in metadata:
            names.append("unseen" if metadata["unseen"] else "seen")
        for name in names:
            groups.setdefault(name, {}).setdefault(prompt, []).append(good)
    for name, by_prompt in groups.items():
        right = np.array([sum(goods) for goods in by_prompt.values()])
        total = np.array([len(goods) for goods in by_prompt.values()])
        weights = rng.multinomial(len(right), np.full(len(right), 1 / len(right)), size=resamples)
        drawn[name] = (weights @ right) / (weights @ total)
    drawn["overall"] = np.mean([drawn[tag] for tag in TAGS if tag in drawn], axis=0)
    names = [*(tag for tag in TAGS if tag in drawn), *(n for n in ("seen", "unseen") if n in drawn), "overall"]
    return {f"{name}_ci95": np.quantile(drawn[name], [0.025, 0.975]).tolist() for name in names}
