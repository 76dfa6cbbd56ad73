"""Test-time search: several candidates of each image start together, and scale by scale the promising ones go on.

TTS-VAR, best-of-N, importance sampling and their parts are one hook, whose whole effect is `state.select(rows)`.
Candidates of one image compete among themselves only, and all that is random is drawn from that image's seed: an image
does not depend on what else is in the batch. A row that goes on twice gets a fresh stream for the scales to come.

Shapes: B images, C latent channels, H W the latent grid, S scored scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

import torch
from einops import rearrange

from sample.cluster import POOLINGS, representatives
from sample.draw import derive_seed
from sample.generate import generate
from sample.ledger import Ledger
from sample.plan import Plan
from sample.rewards import Callback, Features, FunctionFeatures, Prompts, Reward, check_scores, to_images
from sample.search_steps import Step, check_steps
from sample.state import GenerationState, Hook
from tokenizer.quantizer import PyramidQuantizer
from var.conditioning import Prompt

CHOICES, ROUNDS = 0x5EA2C4, 0x40D2D5  # apart in the keys of random streams


# --- potentials and draws --------------------------------------------------------------------------------------------


def value(scores_BS: torch.Tensor) -> torch.Tensor:
    """The score now."""
    return scores_BS[:, -1]


def largest(scores_BS: torch.Tensor) -> torch.Tensor:
    """The best score so far."""
    return scores_BS.max(dim=1).values


def total(scores_BS: torch.Tensor) -> torch.Tensor:
    """The sum of all scores so far."""
    return scores_BS.sum(dim=1)


def difference(scores_BS: torch.Tensor) -> torch.Tensor:
    """The gain over the score before; the score itself if there is none before."""
    return scores_BS[:, -1] - scores_BS[:, -2] if scores_BS.shape[1] > 1 else scores_BS[:, -1]


# u of TTS-VAR's weights exp(lambda u): (B, S) scores of the scored scales so far to (B,).
POTENTIALS = {"value": value, "max": largest, "sum": total, "difference": difference}


def weights_of(potential_B: torch.Tensor, sharpness: float) -> torch.Tensor:
    """exp(sharpness * potential) in float64, normalised; shifted by the largest first, so that it cannot overflow."""
    return (potential_B.double() * sharpness).softmax(dim=0)


def multinomial(weights_B: torch.Tensor, keep: int, generator: torch.Generator) -> list[int]:
    """`keep` independent draws of a row, with replacement; ascending."""
    return sorted(torch.multinomial(weights_B, keep, replacement=True, generator=generator).tolist())


def systematic(weights_B: torch.Tensor, keep: int, generator: torch.Generator) -> list[int]:
    """`keep` draws by one random number: a row of weight w is drawn floor(keep w) or ceil(keep w) times; ascending."""
    marks = (torch.rand((), dtype=torch.float64, generator=generator) + torch.arange(keep)) / keep
    cdf = weights_B.cumsum(dim=0)
    rows = torch.searchsorted(cdf, marks.clamp(max=float(cdf[-1]) * (1 - 1e-12)), right=True)
    return rows.tolist()


DRAWS = {"multinomial": multinomial, "systematic": systematic}


# --- the settings ----------------------------------------------------------------------------------------------------


Show = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, and how; see `sample.search_steps.make_steps` for the published methods.

    Attributes:
        candidates: of each image, at the first scale.
        steps: what happens after which scale; the last one leaves one candidate at the last scale.
        reward: scores candidates; needed by steps "resample" and "best". A `Reward`; or, as of a command, any function
            (images, prompts) to B numbers, images being uint8 arrays (B, h, w, 3).
        features: for steps "cluster"; None takes the running reconstruction itself, and decodes nothing.
        pooling: patches to a vector: "pca" (each image's own first principal direction), "pool", "pca_all".
        potential: what resampling weighs: "value", "max", "sum" or "difference" of the scores so far.
        sharpness: lambda of the weights exp(lambda * potential); in units of one over the reward's.
        draw: "multinomial", or "systematic", which has less variance.
        also_score: further scales whose scores "max", "sum" and "difference" take in. "difference" always takes in the
            scale before each resampling.
        rounds: attempts at an image. Images whose best score reaches `enough` stop; the others start again.
        enough: in the reward's units, of the finished image, which is then scored; needed for several rounds.
        pictures: keep pictures of all decisions, for the family tree; costs decoder calls, which are counted.
        decode_batch: candidates given to the decoder at once, which bounds its memory.

    Raises:
        TypeError: on settings of another kind.
        ValueError: on settings that make no sense, naming them.
    """

    candidates: int
    steps: tuple[Step, ...]
    reward: Reward | None = None
    features: Features | None = None
    pooling: str = "pca"
    potential: str = "value"
    sharpness: float = 10.0
    draw: str = "multinomial"
    also_score: tuple[int, ...] = ()
    rounds: int = 1
    enough: float | None = None
    pictures: bool = False
    decode_batch: int = 64

    def __post_init__(self) -> None:
        for name in ("reward", "features"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function of images, got {getattr(self, name)!r}")
        if self.reward is not None and not hasattr(self.reward, "name"):  # of arrays, as a command's MODULE:FUNCTION
            object.__setattr__(self, "reward", Callback(self.reward))
        if self.features is not None and not hasattr(self.features, "name"):
            object.__setattr__(self, "features", FunctionFeatures(self.features))
        check_steps(self.candidates, self.steps)
        for name, known in (("pooling", POOLINGS), ("potential", POTENTIALS), ("draw", DRAWS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.sharpness < inf:
            raise ValueError(f"sharpness must be a number, 0 or more, got {self.sharpness}")
        if self.enough is not None and not isfinite(self.enough):
            raise ValueError(f"enough must be a number, got {self.enough}")
        if not all(0 <= scale <= self.steps[-1].scale for scale in self.also_score):
            given = ", ".join(map(str, self.also_score))
            raise ValueError(f"also_score must be scales of 0 to {self.steps[-1].scale}, got {given}")
        if self.decode_batch < 1:
            raise ValueError(f"decode_batch must be 1 or more, got {self.decode_batch}")
        if self.rounds < 1 or (self.rounds > 1 and self.enough is None):
            raise ValueError(
                f"rounds must be 1, or more with a score that is `enough`; got {self.rounds}, {self.enough}"
            )
        needy = [step.how for step in self.steps if step.how in ("resample", "best")]
        if self.reward is None and ((needy and self.candidates > 1) or self.enough is not None):
            for_what = f"choose by {needy[0]}" if needy else "stop early"
            raise ValueError(f"reward must be named to {for_what}, as scenes or pickscore")

    def __str__(self) -> str:
        steps = " ".join(map(str, (self.candidates, *self.steps)))
        return steps if self.rounds == 1 else f"{steps}, up to {self.rounds} rounds until {self.enough:g}"

    def step(self, k: int) -> Step | None:
        """What happens after scale k."""
        return next((step for step in self.steps if step.scale == k), None)

    @property
    def scored(self) -> set[int]:
        """Scales whose images are scored."""
        scales = {step.scale for step in self.steps if step.how in ("resample", "best")}
        if self.potential == "difference":
            scales |= {step.scale - 1 for step in self.steps if step.how == "resample" and step.scale}
        if self.enough is not None:
            scales.add(self.steps[-1].scale)
        return scales | set(self.also_score)

    def calls(self) -> dict[str, int]:
        """Rows of an image given to the decoder, the reward and the features in one round, by name.

        The decoder's include the one that the image itself needs, if it was not looked at.
        """
        if self.candidates == 1:
            return {"decoder": 1, "reward": int(self.enough is not None), "features": 0}
        scored, described = self.scored, {s.scale for s in self.steps if s.how == "cluster" and self.features}
        found, width = dict.fromkeys(("decoder", "reward", "features"), 0), self.candidates
        for k in range(self.steps[-1].scale + 1):
            contested = width > 1 or (k == self.steps[-1].scale and self.enough is not None)
            found["reward"] += width * (k in scored and contested)
            found["features"] += width * (k in described and contested)
            found["decoder"] += width * (k in scored | described and contested)
            looked = k in scored | described and contested
            width = self.step(k).keep if self.step(k) else width
        return found | {"decoder": found["decoder"] + (not looked)}

    def widths(self, num_scales: int) -> list[int]:
        """Candidates that run each scale: a step takes effect from the next scale on."""
        found, width = [], self.candidates
        for k in range(num_scales):
            found.append(width)
            width = self.step(k).keep if self.step(k) else width
        return found


@dataclass(frozen=True)
class Choice:
    """One decision about one image's candidates, for the family tree.

    Attributes:
        scale, how: after which scale, by what.
        kept: candidates that went on, by number; one may be named several times.
        scores: of all candidates, where they were scored.
        clusters: of all candidates, where they were clustered.
        images: uint8 (candidates, 3, h, w) after that scale, where pictures were asked for.
    """

    scale: int
    how: str
    kept: list[int]
    scores: list[float] | None = None
    clusters: list[int] | None = None
    images: torch.Tensor | None = None


def pick(
    search: Search,
    step: Step,
    count: int,
    history: Sequence[torch.Tensor],
    features_BTD: torch.Tensor | None,
    generator: torch.Generator,
) -> tuple[list[int], list[int] | None]:
    """Which of one image's candidates go on, by number; and their clusters.

    Args:
        count: candidates there are, B.
        history: their scores (B,) at every scored scale so far.
        features_BTD: for step "cluster"; or (B, D).
    """
    if count == 1 or (count <= step.keep and step.how != "resample"):
        return list(range(count)), None
    if step.how == "random":
        return sorted(torch.randperm(count, generator=generator)[: step.keep].tolist()), None
    if step.how == "cluster":
        pooled_BF = features_BTD if features_BTD.ndim == 2 else POOLINGS[search.pooling](features_BTD)
        return representatives(pooled_BF, step.keep, generator)
    if step.how == "best":
        return sorted(history[-1].argsort(descending=True, stable=True)[: step.keep].tolist()), None
    if step.how != "resample":
        raise ValueError(f"nothing says how candidates are chosen by {step.how!r}: see sample.search.pick")
    potential_B = POTENTIALS[search.potential](torch.stack(list(history), dim=1))
    weights_B = weights_of(potential_B, search.sharpness)
    return DRAWS[search.draw](weights_B, step.keep, generator), None


def choices_of(seed: int, scale: int) -> torch.Generator:
    """What decides, after a scale, about the candidates of the image with this seed."""
    return torch.Generator().manual_seed(derive_seed(seed, scale, CHOICES))


def candidate_seeds(seed: int, count: int) -> list[int]:
    """Seeds of `count` images that are, token for token, an image's candidates of a search that nothing ends early."""
    return [seed, *(derive_seed(seed, 0, copy) for copy in range(1, count))]


# --- the hook --------------------------------------------------------------------------------------------------------


class SearchHook(Hook):
    """The search inside the loop, for one call of `generate`; give it last, so that it multiplies what others set up.

    Args:
        search: what to do.
        prompts: of each image.
        decode: latents (rows, C, H, W) to about [-1, 1], (rows, 3, h, w).
        ledger: counts what it calls.
        show: (decoded (rows, 3, h, w), the number of each row's image) to what is judged of it; all of it when None.

    Attributes:
        choices: decisions of each image, in order.
        decoded_BCHW: the final images as the decoder gave them, if they were looked at.
        scores: of the finished images, by rows; None unless the last scale was scored.
    """

    def __init__(
        self,
        search: Search,
        prompts: Prompts,
        decode: Callable[[torch.Tensor], torch.Tensor],
        ledger: Ledger,
        show: Show | None = None,
    ):
        self.search, self.prompts, self.decode, self.ledger, self.show = search, prompts, decode, ledger, show
        self.choices: list[list[Choice]] = [[] for _ in prompts]
        self.decoded_BCHW: torch.Tensor | None = None
        self._names: list[str] = []  # of the scores of each scored scale, which follow their rows in `state.extras`
        self.history: list[torch.Tensor] = []  # those scores, (rows,) each, of the finished images
        self._scored = False  # the scale that ended last

    @property
    def scores(self) -> list[float] | None:
        """The score of each row, if the last scale was scored."""
        return self.history[-1].tolist() if self._scored else None

    def on_start(self, state: GenerationState) -> None:
        """Multiply every image to its candidates; the first goes on as if it were alone."""
        state.select([row for row in range(len(state)) for _ in range(self.search.candidates)])
        state.narrows = tuple(step.scale for step in self.search.steps)

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """Score, choose, go on with the chosen."""
        step, contested = self.search.step(k), len(state) > len(set(state.origins))
        final = step is not None and step is self.search.steps[-1]
        self._scored = scored = k in self.search.scored and (contested or (final and self.search.enough is not None))
        clustered = contested and step is not None and step.how == "cluster"
        decoded = images = None
        pictured = self.search.pictures and step is not None
        if scored or pictured or (clustered and self.search.features is not None):
            decoded = self.ledger.call("decoder", self._decode, state.f_hat_BCHW)
            images = to_images(decoded if self.show is None else self.show(decoded, state.origins))
        if scored:
            self._names.append(f"score{k}")
            state.extras[self._names[-1]] = self._score(state, images).to(state.f_hat_BCHW.device)
        if final and contested and all_alike(state):
            warnings.warn(
                "search had nothing to choose from: the candidates of every image are the same to the last bit. Draw "
                "with more chance: a larger top_p or top_k, or a higher temperature",
                stacklevel=2,
            )
        if step is not None and (contested or pictured):
            features = self._describe(state, images) if clustered else None
            rows = self._choose(state, step, features, images if pictured else None, scored)
            decoded = decoded[rows] if decoded is not None else None
        self.decoded_BCHW = decoded
        if final:
            self.history = [state.extras[name].cpu() for name in self._names]

    def _decode(self, f_hat_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.decode(part) for part in f_hat_BCHW.split(self.search.decode_batch)])

    def _score(self, state: GenerationState, images_BCHW: torch.Tensor) -> torch.Tensor:
        prompts = [self.prompts[origin] for origin in state.origins]
        scores = self.ledger.call("reward", self.search.reward, images_BCHW, prompts)
        return check_scores(scores, self.search.reward, len(state))

    def _describe(self, state: GenerationState, images_BCHW: torch.Tensor | None) -> torch.Tensor:
        if self.search.features is None:
            return rearrange(state.f_hat_BCHW, "b c h w -> b (h w) c").float().cpu()
        return self.ledger.call("features", self.search.features, images_BCHW)

    def _choose(
        self,
        state: GenerationState,
        step: Step,
        features_BTD: torch.Tensor | None,
        images_BCHW: torch.Tensor | None,
        scored: bool,
    ) -> list[int]:
        rows: list[int] = []
        scored_before = [state.extras[name].cpu() for name in self._names]
        for origin in dict.fromkeys(state.origins):
            own = [row for row, of in enumerate(state.origins) if of == origin]
            generator = choices_of(state.seeds[own[0]], step.scale)
            features = features_BTD[own] if features_BTD is not None else None
            history = [scores[own] for scores in scored_before]
            kept, clusters = pick(self.search, step, len(own), history, features, generator)
            rows += [own[place] for place in kept]
            scores = scored_before[-1][own].tolist() if scored else None
            pictures = images_BCHW[own].cpu() if images_BCHW is not None else None
            self.choices[origin].append(Choice(step.scale, step.how, kept, scores, clusters, pictures))
        state.select(rows)
        return rows


# --- the run ---------------------------------------------------------------------------------------------------------


def all_alike(state: GenerationState) -> bool:
    """Whether every row is equal to the first one of its image."""
    first: dict[int, int] = {}
    places = [first.setdefault(origin, row) for row, origin in enumerate(state.origins)]
    return torch.equal(state.f_hat_BCHW, state.f_hat_BCHW[torch.tensor(places, device=state.f_hat_BCHW.device)])


@dataclass
class Found:
    """The images a search found.

    Attributes:
        f_hat_BCHW, tokens, seeds, origins: as `GenerationState` has them, one row an image.
        scores: the reward's of each image; None where the finished images were not scored.
        rounds: attempts each image took.
        choices: decisions of each image, in its best round.
        decoded_BCHW: the images as the decoder gave them, about [-1, 1], where all were looked at; else None.
        ledger: what it cost.
    """

    f_hat_BCHW: torch.Tensor
    tokens: list[torch.Tensor]
    seeds: list[int]
    scores: list[float | None]
    rounds: list[int]
    choices: list[list[Choice]]
    decoded_BCHW: torch.Tensor | None = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def origins(self) -> list[int]:
        """Which image of the request each row is."""
        return list(range(len(self.seeds)))


@dataclass(frozen=True)
class Attempt:
    """What round `number` made of its `place`-th image: `row` of its `state`, and how its hook came to it."""

    score: float | None
    number: int
    state: GenerationState
    hook: SearchHook
    place: int
    row: int


def search_images(
    plan: Plan,
    quantizer: PyramidQuantizer,
    prompt: Prompt,
    seeds: Sequence[int],
    *,
    search: Search,
    prompts: Prompts,
    decode: Callable[[torch.Tensor], torch.Tensor],
    show: Show | None = None,
    negative: Prompt | None = None,
    hooks: Sequence[Hook] = (),
) -> Found:
    """`generate` with a search: one image per seed, the winner of its candidates.

    Args:
        search: what to do; with one candidate this is plain generation, token for token.
        prompts: the text or class of each image, for the reward.
        decode: latents (rows, C, H, W) to images of about [-1, 1], (rows, 3, h, w).
        show: (such images, the number of each row's image in the request) to what the reward and the features see of
            them, as images pasted into the pictures that are edited; the images themselves when None.
        hooks: further ones; later rounds take them `of_images` that remain. A `Ledger` among them counts what the
            search costs.

    Raises:
        ValueError: if the search does not fit the plan's scales, or a hook leaves no candidate of an image.
    """
    check_steps(search.candidates, search.steps, len(plan.schedule))
    ledger = next((hook for hook in hooks if isinstance(hook, Ledger)), Ledger())
    hooks = [*(hook for hook in hooks if hook is not ledger), ledger]
    images = ledger.images + len(seeds)
    best: list[Attempt | None] = [None] * len(seeds)
    todo = list(range(len(seeds)))
    with ledger.clock():
        for attempt in range(search.rounds):
            rows = torch.tensor(todo, device=next(plan.stages[0].model.parameters()).device)
            keys = [derive_seed(seeds[i], attempt, ROUNDS) if attempt else seeds[i] for i in todo]
            hook = SearchHook(search, [prompts[i] for i in todo], decode, ledger, show and _renumbered(show, todo))
            unwanted = negative.select(rows) if negative is not None else None
            plugged = [*(other.of_images(todo) for other in hooks), hook]
            state = generate(plan, quantizer, prompt.select(rows), keys, negative=unwanted, hooks=plugged)
            scores = hook.scores or [None] * len(todo)
            for number, row in enumerate(rows_of(state, len(todo))):
                i = todo[number]
                if best[i] is None or scores[row] > best[i].score:
                    best[i] = Attempt(scores[row], attempt, state, hook, number, row)
            todo = [i for i in todo if search.enough is not None and best[i].score < search.enough]
            if not todo:
                break
    ledger.images = images  # and not once a round
    rounds = [search.rounds if i in todo else attempt.number + 1 for i, attempt in enumerate(best)]
    return _gather(best, ledger, list(seeds), rounds)


def rows_of(state: GenerationState, images: int) -> list[int]:
    """The row of each image when a search is over. Raises ValueError if a hook left none of an image, or several."""
    row_of = {origin: row for row, origin in enumerate(state.origins)}
    if len(state) != images or len(row_of) != images:
        raise ValueError(
            f"a search ends with one candidate of each of {images} images, and hooks left those of {state.origins}"
        )
    return [row_of[number] for number in range(images)]


def _renumbered(show: Show, numbers: Sequence[int]) -> Show:
    """`show` for some images of a request, counted anew."""
    numbers = list(numbers)
    return lambda decoded_BCHW, rows: show(decoded_BCHW, [numbers[row] for row in rows])


def _gather(best: Sequence[Attempt], ledger: Ledger, seeds: list[int], rounds: list[int]) -> Found:
    """The best attempt of each image, in one batch."""
    f_hat = torch.stack([a.state.f_hat_BCHW[a.row] for a in best])
    tokens = [torch.stack([a.state.tokens[k][a.row] for a in best]) for k in range(len(best[0].state.tokens))]
    choices = [a.hook.choices[a.place] for a in best]
    decoded = None
    if all(a.hook.decoded_BCHW is not None for a in best):
        decoded = torch.stack([a.hook.decoded_BCHW[a.row] for a in best])
    return Found(f_hat, tokens, seeds, [a.score for a in best], rounds, choices, decoded, ledger)
