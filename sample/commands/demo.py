"""What `nextscale demo` draws, without the page: words of the command line in, pictures out, scale by scale.

Whoever opens the page says everything in the words of `nextscale sample` and `nextscale edit`, which the same parsers
read: a setting means the same, a mistake is told in the same line, and the page can show the command that makes the
same pictures.

Shapes: B images, C latent channels, H W the latent grid.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from sample.commands import edit_cli, sample_cli
from sample.commands.parser import Parser
from sample.commands.plan_options import plugins_of
from sample.commands.prompts import read_prompts, texts_or_classes, unread
from sample.commands.sampling_options import call_options, check_sampling, plan_of_call
from sample.commands.search_options import images_of_each, make_search, search_settings
from sample.images import Left, check_origins
from sample.plan import untrained
from sample.plan_text import read_plan
from sample.plugins import plugged
from sample.state import GenerationState, Hook

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from sample.pipeline import NextScalePipeline

DRAW = ("guidance", "top_k", "top_p", "temperature", "negative", "plan", "depth", "cache", "prune", "guidance_until")
DRAW += ("aspect", "size", "search", "images")
EDIT = (*DRAW, "feather", "mask_rule")
LONGEST = 4000  # characters of a visitor's text
MOST_PIXELS = 32 * 2**20  # of a visitor's edits, all together


@dataclass(frozen=True)
class Drawn:
    """Pictures after a scale.

    Attributes:
        images: B of them; of a search, its candidates and, in the end, those that it chose.
        scale: how many scales are drawn.
        scales: of how many.
        seeds: the name of each finished image; None before.
        cautions: what speaks against trusting them, in a line each.
    """

    images: list[Image.Image]
    scale: int
    scales: int
    seeds: list[int] | None = None
    cautions: tuple[str, ...] = ()


class Stopped(Exception):
    """Nobody looks any more."""


class Preview(Hook):
    """Decodes what there is after each scale but the last, and hands it on.

    Args:
        decode: f_hat (B, C, H, W) to images.
        tell: takes the images and how many scales they have.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor], list[Image.Image]],
        tell: Callable[[list[Image.Image], int], None],
    ):
        self.decode, self.tell = decode, tell

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        if k + 1 < len(state.plan.schedule):
            self.tell(self.decode(state.f_hat_BCHW), k + 1)


class Painter:
    """Draws what visitors ask for, with one pipeline.

    Args:
        pipeline: of the model.
        model, refiner: how the command line names them.
        places: the command line's words for its dtype, device, plugins, ...
        reward: of searches, as `--reward` names it; None for the bundled model's own, or none.
        most: images (with a search, candidates) that a visitor may ask for at once.
    """

    def __init__(
        self,
        pipeline: NextScalePipeline,
        *,
        model: str = "scenes",
        refiner: str | None = None,
        places: Sequence[str] = (),
        reward: str | None = None,
        most: int = 32,
    ):
        self.pipeline, self.most = pipeline, most
        self.model, self.refiner, self.reward, self.places = model, refiner, reward, list(places)

    @cached_property
    def own(self) -> dict[str, float]:
        """The model's own value of guidance and of what may be drawn, where it is the same at all scales."""
        plan = self.pipeline.make_plan()
        found = {"guidance": {stage.guidance.scale for stage in plan.stages if isinstance(stage.guidance.scale, Real)}}
        for name in ("temperature", "top_k", "top_p"):
            found[name] = {getattr(stage.filter(k), name) for stage in plan.stages for k in stage.scales}
        return {name: values.pop() for name, values in found.items() if len(values) == 1}

    def words(self, command: str, what: str, *, n: int, seed: int, settings: Mapping[str, Any]) -> list[str]:
        """The words after `nextscale` that ask for this.

        Args:
            command: "sample" or "edit" (of picture.png, where mask.png is white).
            what: a text; of a class model, classes as `--class` takes them.
            n: of `--n`.
            seed: the name of the first image.
            settings: other options by their names with _ for -, of `DRAW` or `EDIT`; None and "" are left out.

        Raises:
            ValueError: if a setting is not among those, or a plan not in words: a visitor names no files.
        """
        unknown = sorted(set(settings) - set(EDIT if command == "edit" else DRAW))
        if unknown:
            raise ValueError(f"settings must be of {', '.join(EDIT if command == 'edit' else DRAW)}, got {unknown[0]}")
        if len(what) > LONGEST:
            raise ValueError(f"at most {LONGEST} characters are read here, and these are {len(what)}")
        given = {name: str(value).strip() for name, value in settings.items() if value is not None}
        given = {name: text for name, text in given.items() if text}
        read_plan(given.get("plan", "var"))
        options = [f"--{name.replace('_', '-')}={text}" for name, text in given.items()]
        options += [f"--n={n}"] if n else []
        options += self.places
        options += [f"--seed={seed}", *([] if self.model == "scenes" else [f"--model={self.model}"])]
        options += [f"--refiner={self.refiner}"] if self.refiner and given.get("plan", "").startswith("code") else []
        options += [f"--reward={self.reward}"] if self.reward and "search" in given else []
        options += ["--mask=mask.png"] if command == "edit" else []
        subject = ["picture.png"] if command == "edit" else []
        if self.pipeline.by_class:
            options += [f"--class={what}"] if what else []
        else:
            subject.append(what)
        if what.startswith("-"):
            return [command, *options, "--", *subject]
        return [command, *subject, *options]

    def draw(self, words: Sequence[str], *, previews: bool = True) -> Iterator[Drawn]:
        """What `nextscale sample` draws of these words: after each scale if there are `previews`, then the images.

        Raises:
            ValueError: as the command; if more than `most` are asked for.
        """
        args = _parsed(sample_cli, words)
        texts, _ = read_prompts(args)
        prompts = texts_or_classes(texts, args.classes, self.pipeline)
        yield from self._drawn(args, prompts, {}, previews)

    def edit(self, words: Sequence[str], picture: Image.Image, mask: Image.Image) -> Iterator[Drawn]:
        """What `nextscale edit` makes of these words, of a picture where a mask of its size is white.

        Raises:
            ValueError: as the command; if nothing is white, or more than `most` are asked for.
        """
        args = _parsed(edit_cli, words)
        if not mask.getbbox():
            raise ValueError("paint over what is to be drawn again: nothing of the picture is covered")
        if picture.width * picture.height * (count := images_of_each(args)) > MOST_PIXELS:
            said = f"{count} of {picture.width} x {picture.height}"
            raise ValueError(f"at most {MOST_PIXELS // 2**20} million pixels are edited at once here, not {said}")
        mask = edit_cli.feathered(mask, args.feather)
        where = {"image": picture, "mask_image": mask, "mask_rule": args.mask_rule}
        yield from self._drawn(args, [edit_cli.read_prompt(args, self.pipeline)], where, previews=False)

    def _drawn(
        self, args: argparse.Namespace, prompts: list[str] | list[int], where: dict[str, Any], previews: bool
    ) -> Iterator[Drawn]:
        check_sampling(args)
        search_settings(args)
        call = plugged(self.pipeline, call_options(args), plugins_of(args))
        copies, plugins = images_of_each(args), call.pop("hooks", [])
        plan = plan_of_call(args, self.pipeline, call)
        search = make_search(args, self.pipeline, prompts, plan)
        asked = len(prompts) * copies * (search.candidates if search is not None else 1)
        if asked > self.most:
            said = "images" if search is None else "candidates"
            raise ValueError(f"at most {self.most} {said} are drawn at once here, and these are {asked}")
        named = {"class_labels" if self.pipeline.by_class else "prompt": prompts}
        how = {"num_images_per_prompt": copies, "seed": args.seed, "search": search}
        cautions = (unread(prompts) if self.model == "scenes" else None, untrained(plan))
        drawn = partial(Drawn, scales=len(plan.schedule), cautions=tuple(filter(None, cautions)))

        def work(tell: Callable[[Drawn], None]) -> Drawn:
            look = Preview(self.pipeline.decode, lambda images, scale: tell(drawn(images, scale)))
            left = [Left()] if plugins and search is None else []
            hooks = [*plugins, *([look] if previews else []), *left]
            made = self.pipeline(**named, **call, **where, **how, hooks=hooks)
            for hook in left:
                check_origins(hook.origins, asked)
            return drawn(made.images, len(plan.schedule), seeds=made.seeds)

        yield from streamed(work)


def _parsed(module: Any, words: Sequence[str]) -> argparse.Namespace:
    """The options of a command's words, which begin with its name."""
    parser = Parser(prog=f"nextscale {words[0]}", allow_abbrev=False)
    module.configure(parser)
    return parser.parse_words(words[1:])


def streamed(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """What `work` hands to its argument as it comes, then what it returns.

    The work is done by a thread, which ends at the next thing it hands over when nobody looks any more (`close`).

    Raises:
        Whatever `work` raises.
    """
    shown: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    gone = threading.Event()

    def tell(item: Any) -> None:
        if gone.is_set():
            raise Stopped
        shown.put(("item", item))

    def run() -> None:
        try:
            shown.put(("last", work(tell)))
        except BaseException as error:
            shown.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        kind = "item"
        while kind == "item":
            kind, item = shown.get()
            if kind == "error":
                raise item
            yield item
    finally:
        gone.set()
        thread.join()
