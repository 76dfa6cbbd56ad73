"""The drawn domain: captions, the layouts that satisfy them, and their rendering.

A scene is 1 to 4 plain shapes on a grey gradient. Its caption belongs to one of GenEval's six tags, so a generator
trained here can be scored like one trained on photographs, but against a truth that is known exactly
(`evaluation.judge`). Layouts live on a canvas of `CANVAS` units; `render` draws them at any pixel size.

Every image holds exactly the objects its caption names and nothing else, whatever the tag. Two objects named in one
caption always differ in shape and, where both colours are named, in colour (as in GenEval).
"""

import functools
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from sample.scene_words import COLOURS, COUNTS, RELATION_THRESHOLD, RELATIONS, SHAPES

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNT_WORDS = {count: word for word, count in COUNTS.items()}
OPPOSITE = {a: b for a, (axis, sign) in RELATIONS.items() for b, way in RELATIONS.items() if way == (axis, -sign)}

CANVAS = 64.0  # side of the canvas, in units; one unit is one pixel at size 64
BORDER = 1.0  # free units between an object and the edge of the image
GAP = 3.0  # free units between the bounding boxes of two objects
DIAMETERS = {1: (18.0, 28.0), 2: (18.0, 28.0), 3: (13.0, 18.0), 4: (13.0, 18.0)}  # by number of objects
LEVELS = (105.0, 165.0)  # grey levels of the background gradient
NOISE = 3.0  # standard deviation of the background noise, in grey levels
JITTER = 8  # half range of the per-object, per-channel colour jitter, in levels
SHADING = 0.06  # half range of the brightness gradient across an object
RELATION_MARGIN = 0.05  # drawn scenes clear the threshold by this much
_UNIT = 1024  # samples along the side of a unit shape's area table

Caption = tuple[tuple[str, ...], tuple[str, ...], int, str | None]  # shapes, colours, count, relation


@dataclass(frozen=True)
class SceneObject:
    """One shape. `cx`, `cy`, `diameter` in canvas units (y grows downwards); its bounding box is the square around it.

    `rgb` is the jittered colour, levels 0..255; `shade_angle` (radians) is the direction in which it gets brighter.
    """

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    cx: float
    cy: float
    diameter: float
    shade_angle: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in canvas units."""
        r = self.diameter / 2
        return self.cx - r, self.cy - r, self.cx + r, self.cy + r


@dataclass(frozen=True)
class Scene:
    """Objects on a grey gradient from `levels[0]` to `levels[1]` along `angle` (radians), and the caption they satisfy.

    `metadata` is the caption in GenEval's format, see `scene_metadata`; `noise_seed` fixes the background noise.
    """

    objects: tuple[SceneObject, ...]
    levels: tuple[float, float]
    angle: float
    noise_seed: int
    caption: str
    tag: str
    metadata: dict


def is_unseen(colour: str, shape: str) -> bool:
    """Whether this pair is held out of the training split: `crc32(f"{colour} {shape}") % 10 == 0`."""
    return zlib.crc32(f"{colour} {shape}".encode()) % 10 == 0


# ---------------------------------------------------------------------------------------------------------- captions


def scene_metadata(
    tag: str,
    shapes: tuple[str, ...],
    colours: tuple[str, ...] = (),
    *,
    count: int = 1,
    relation: str | None = None,
) -> dict:
    """A caption in GenEval's metadata format: `tag`, `include`, `exclude`, `prompt`.

    `shapes` (1 or 2) are in the order the caption names them, `colours` one per shape or none. As in GenEval, a
    relation's reference object (named last) comes first in `include`, and the other points at it with
    `position: [relation, 0]`; counting excludes `count + 1` of the shape. Captions that name colours also carry
    `unseen`: whether any pair they name is held out of training.
    """
    include = [{"class": shape, "count": count} for shape in shapes]
    for item, colour in zip(include, colours, strict=False):
        item["color"] = colour
    if relation is not None:
        include[0]["position"] = [relation, 0]
        include.reverse()
    exclude = [{"class": shapes[0], "count": count + 1}] if tag == "counting" else []
    metadata = {"tag": tag, "include": include, "exclude": exclude}
    metadata["prompt"] = caption_of(metadata)
    if colours:
        metadata["unseen"] = any(map(is_unseen, colours, shapes))
    return metadata


def check_metadata(metadata: dict, where: str) -> None:
    """Raise ValueError, naming the place, unless entries of a caption's metadata are as GenEval's rules read them."""
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        raise ValueError(f"{where}: include must be a list of one object or more, got {include!r}")
    for place, item in enumerate([*include, *exclude]):
        kinds = isinstance(item, dict) and isinstance(item.get("class"), str) and type(item.get("count")) is int
        if not kinds or item["count"] < 1 or not isinstance(item.get("color", ""), str):
            raise ValueError(f"{where}: an object needs a class, a count of 1 or more and maybe a color, got {item!r}")
        if "position" in item:
            found = item["position"] if isinstance(item["position"], list) else []
            if len(found) != 2 or str(found[0]) not in RELATIONS or found[1] not in range(place):
                said = f"one of {', '.join(RELATIONS)} and the number of an object before it"
                raise ValueError(f"{where}: position must be {said}, got {item['position']!r}")


def read_caption(metadata: dict) -> Caption:
    """What a caption names, in the order it names it: the arguments of `scene_metadata`."""
    include = metadata["include"]
    named = include[::-1] if "position" in include[-1] else include
    relation = include[-1]["position"][0] if "position" in include[-1] else None
    colours = tuple(item["color"] for item in named if "color" in item)
    return tuple(item["class"] for item in named), colours, named[0]["count"], relation


def other_of(rng: np.random.Generator, all_of: Sequence, but: Sequence) -> object:
    """One of `all_of` that is not in `but`, alike."""
    left = [value for value in all_of if value not in but]
    return left[rng.integers(len(left))]


def caption_of(metadata: dict) -> str:
    """The caption of a GenEval metadata object, e.g. "a star left of an orange ring", "three crosses"."""
    include = metadata["include"]
    if include[0]["count"] > 1:
        shape = include[0]["class"]
        return f"{COUNT_WORDS[include[0]['count']]} {shape}{'es' if shape.endswith('s') else 's'}"
    phrases = [_phrase(item) for item in include]
    if len(phrases) == 1:
        return phrases[0]
    if "position" in include[1]:
        return f"{phrases[1]} {include[1]['position'][0]} {phrases[0]}"
    return f"{phrases[0]} and {phrases[1]}"


def _phrase(item: dict) -> str:
    words = f"{item['color']} {item['class']}" if "color" in item else item["class"]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _check_tag(tag: str) -> None:
    if tag not in TAGS:
        raise ValueError(f"tag must be one of {', '.join(TAGS)}, got {tag!r}")


def _draw_metadata(rng: np.random.Generator, tag: str) -> dict:
    shapes = tuple(SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    colours = tuple(list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
    if tag == "single_object":
        return scene_metadata(tag, shapes[:1])
    if tag == "two_object":
        return scene_metadata(tag, shapes)
    if tag == "counting":
        return scene_metadata(tag, shapes[:1], count=int(rng.integers(2, 5)))
    if tag == "colors":
        return scene_metadata(tag, shapes[:1], colours[:1])
    if tag == "color_attr":
        return scene_metadata(tag, shapes, colours)
    relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
    return scene_metadata(tag, shapes, colours if rng.random() < 0.5 else (), relation=relation)


@functools.cache
def _all_prompts(tag: str) -> tuple[tuple, ...]:
    """Every caption of a tag as arguments of `scene_metadata`: (shapes, colours, count, relation)."""
    singles = [(shape,) for shape in SHAPES]
    pairs = list(itertools.permutations(SHAPES, 2))
    colour_pairs = list(itertools.permutations(COLOURS, 2))
    if tag == "single_object":
        return tuple((shapes, (), 1, None) for shapes in singles)
    if tag == "two_object":
        return tuple((shapes, (), 1, None) for shapes in pairs)
    if tag == "counting":
        return tuple((shapes, (), count, None) for shapes in singles for count in COUNT_WORDS)
    if tag == "colors":
        return tuple((shapes, (colour,), 1, None) for shapes in singles for colour in COLOURS)
    if tag == "color_attr":
        return tuple((shapes, colours, 1, None) for shapes in pairs for colours in colour_pairs)
    plain = [(shapes, (), 1, relation) for shapes in pairs for relation in RELATIONS]
    coloured = [(*p[:1], colours, *p[2:]) for p in plain for colours in colour_pairs]
    return tuple(plain + coloured)


def _names_unseen(prompt: tuple) -> bool:
    return any(map(is_unseen, prompt[1], prompt[0]))


def prompt_suite(per_tag: int, seed: int = 0, unseen: bool | None = None) -> list[dict]:
    """`per_tag` captions of each tag as GenEval metadata, grouped in the order of `TAGS`; the same for the same seed.

    Captions of a tag are distinct until its grammar is exhausted (single_object has 8, counting 24, two_object 56,
    colors 80, position and color_attr thousands), then they repeat in the same order. Half of the position captions
    name colours. `unseen=False` keeps captions that name no held-out pair; `unseen=True` keeps only those that name
    one, which leaves the tags colors, position (all coloured) and color_attr; None keeps all.
    Raises ValueError if `per_tag` is not positive.
    """
    if per_tag < 1:
        raise ValueError(f"per_tag must be at least 1, got {per_tag}")
    suite = []
    for index, tag in enumerate(TAGS):
        rng = np.random.default_rng((seed, index))
        prompts = [p for p in _all_prompts(tag) if unseen is None or _names_unseen(p) == unseen]
        prompts = [prompts[i] for i in rng.permutation(len(prompts))]
        if tag == "position" and not unseen:
            plain, coloured = ([p for p in prompts if bool(p[1]) == named] for named in (False, True))
            prompts = [p for both in zip(itertools.cycle(plain), coloured, strict=False) for p in both]
            prompts = list(dict.fromkeys(prompts))
        for shapes, colours, count, relation in itertools.islice(itertools.cycle(prompts), per_tag if prompts else 0):
            suite.append(scene_metadata(tag, shapes, colours, count=count, relation=relation))
    return suite


# ----------------------------------------------------------------------------------------------------------- layouts


def relation_vector(offset: np.ndarray, size_a: np.ndarray, size_b: np.ndarray) -> np.ndarray:
    """GenEval's relative position of box A to box B: (..., 2) offsets of centres (A - B) and (w, h) sizes -> (..., 2).

    Each component is shrunk towards 0 by 0.1 x the summed sizes, then divided by the norm of the unshrunk offset.
    """
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * (size_a + size_b), 0.0)
    return shrunk / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-9)


def relations(box_a: tuple, box_b: tuple) -> set[str]:
    """The relations of box A to box B, boxes (x0, y0, x1, y1): none, one or two of `RELATIONS` (GenEval's rule)."""
    a, b = np.asarray(box_a, float), np.asarray(box_b, float)
    vector = relation_vector((a[:2] + a[2:] - b[:2] - b[2:]) / 2, a[2:] - a[:2], b[2:] - b[:2])
    return {name for name, (axis, sign) in RELATIONS.items() if sign * vector[axis] > RELATION_THRESHOLD}


def _place(rng: np.random.Generator, diameters: np.ndarray, relation: tuple[int, int] | None) -> np.ndarray:
    """(n, 2) centres of boxes that stay inside the canvas and `GAP` apart; object 1 in `relation` to object 0."""
    n, tries = len(diameters), 128
    low = diameters[:, None] / 2 + BORDER
    first, second = np.triu_indices(n, 1)
    reach = (diameters[first] + diameters[second]) / 2 + GAP
    while True:
        centres = low + rng.random((tries, n, 2)) * (CANVAS - 2 * low)
        offsets = centres[:, second] - centres[:, first]
        fits = (np.abs(offsets).max(-1) >= reach).all(-1)
        if relation is not None:
            axis, sign = relation
            vector = relation_vector(offsets[:, 0], diameters[1], diameters[0])
            fits &= sign * vector[:, axis] > RELATION_THRESHOLD + RELATION_MARGIN
        if fits.any():
            return centres[fits.argmax()]


def _draw_colour(rng: np.random.Generator, shape: str, split: str) -> str:
    choices = [colour for colour in COLOURS if split == "all" or not is_unseen(colour, shape)]
    return choices[rng.integers(len(choices))]


def sample_scene(rng: np.random.Generator, *, tag: str | None = None, split: str = "train") -> Scene:
    """Draw a caption (`tag` uniform over `TAGS` unless given) and a layout that satisfies it.

    Whatever the caption leaves open is random. In split "train" no held-out (colour, shape) pair occurs in the image:
    captions naming one are redrawn, and open colours avoid them; split "all" has no such limit. Relations clear
    GenEval's threshold by `RELATION_MARGIN`. Raises ValueError on an unknown tag or split.
    """
    if split not in ("train", "all"):
        raise ValueError(f"split must be 'train' or 'all', got {split!r}")
    if tag is None:
        tag = TAGS[rng.integers(len(TAGS))]
    _check_tag(tag)
    metadata = _draw_metadata(rng, tag)
    while split == "train" and metadata.get("unseen", False):
        metadata = _draw_metadata(rng, tag)
    items = [item for item in metadata["include"] for _ in range(item["count"])]
    diameters = rng.uniform(*DIAMETERS[len(items)], size=len(items))
    position = items[-1].get("position")
    centres = _place(rng, diameters, RELATIONS[position[0]] if position else None)
    objects = []
    for item, diameter, (cx, cy) in zip(items, diameters, centres, strict=True):
        colour = item.get("color") or _draw_colour(rng, item["class"], split)
        rgb = np.clip(COLOURS[colour] + rng.integers(-JITTER, JITTER + 1, size=3), 0, 255)
        angle = rng.uniform(0, 2 * np.pi)
        objects.append(SceneObject(item["class"], colour, tuple(map(int, rgb)), cx, cy, diameter, angle))
    return Scene(
        objects=tuple(objects),
        levels=tuple(rng.uniform(*LEVELS, size=2)),
        angle=rng.uniform(0, 2 * np.pi),
        noise_seed=int(rng.integers(2**31)),
        caption=metadata["prompt"],
        tag=tag,
        metadata=metadata,
    )


def scene_at(index: int, seed: int, split: str = "train", tags: tuple[float, ...] | None = None) -> Scene:
    """Item `index` (>= 0) of the infinite data set named by `seed` (>= 0); independent of every other item.

    `tags` are shares of the six `TAGS` in their order, adding up to 1; alike when None.
    """
    rng = np.random.default_rng((seed, index))
    return sample_scene(rng, tag=None if tags is None else TAGS[rng.choice(len(TAGS), p=tags)], split=split)


def fresh_scenes(n: int, seed: int) -> list[Scene]:
    """`n` scenes over all compositions, the six tags in turn."""
    rng = np.random.default_rng((seed, 7))
    return [sample_scene(rng, tag=TAGS[i % len(TAGS)], split="all") for i in range(n)]


def tag_shares(weights: dict[str, float] | None) -> tuple[float, ...] | None:
    """Weights of some `TAGS` (1 for those not named) as shares for `scene_at`; None for None.

    Raises ValueError on an unknown tag, a negative weight or nothing but zeros.
    """
    if weights is None:
        return None
    for tag, weight in weights.items():
        _check_tag(tag)
        if weight < 0:
            raise ValueError(f"the weight of tag {tag} must be 0 or more, got {weight}")
    drawn = np.array([float(weights.get(tag, 1.0)) for tag in TAGS])
    if drawn.sum() == 0:
        raise ValueError("weights of all tags are 0: there is nothing to draw")
    return tuple(drawn / drawn.sum())


# --------------------------------------------------------------------------------------------------------- rendering


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Membership of points in a unit shape, whose bounding box is [-1, 1]^2 (y downwards)."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return (np.abs(x) <= 1) & (np.abs(y) <= 1)
    if shape == "triangle":
        return np.abs(x) <= (y + 1) / 2
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= 1
    if shape == "cross":
        return np.minimum(np.abs(x), np.abs(y)) <= 0.34
    if shape == "ring":
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.55**2)
    if shape == "star":
        return _inside_star(x * np.sin(0.4 * np.pi), y * (1 + np.cos(0.2 * np.pi)) / 2 - (1 - np.cos(0.2 * np.pi)) / 2)
    u, v = x * 1.139, 0.112 - y * 1.112  # the sextic heart spans |u| <= 1.139, -1 <= v <= 1.224
    return (u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0


def _inside_star(x: np.ndarray, y: np.ndarray, inner: float = 0.42) -> np.ndarray:
    """A five-pointed star of circumradius 1 with one tip upwards (y downwards), its notches at radius `inner`."""
    fifth = 2 * np.pi / 5
    turn = np.arctan2(x, -y) % fifth
    turn = np.minimum(turn, fifth - turn)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(turn), radius * np.sin(turn)
    nx, ny = inner * np.cos(fifth / 2), inner * np.sin(fifth / 2)
    return (1 - px) * ny - py * (1 - nx) >= 0


@functools.cache
def _area_table(shape: str) -> np.ndarray:
    """Summed-area table of a unit shape's mask: (_UNIT + 1, _UNIT + 1) int32, read-only."""
    axis = (np.arange(_UNIT, dtype=np.float64) + 0.5) * (2 / _UNIT) - 1
    table = np.zeros((_UNIT + 1, _UNIT + 1), np.int32)
    table[1:, 1:] = _inside(shape, axis[None, :], axis[:, None]).cumsum(0).cumsum(1)
    table.setflags(write=False)
    return table


def coverage(shape: str, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
    """Share of each pixel a unit shape covers, (h, w) float in [0, 1]; pixel edges (w + 1,), (h + 1,) in its frame.

    The shape's bounding box is [-1, 1]^2. An area table with `_UNIT` samples per side stands in for supersampling: at
    least 4 samples per pixel and axis for shapes of up to 256 pixels.
    """
    table = _area_table(shape)
    columns = np.rint((x_edges + 1) * (_UNIT / 2)).astype(np.int64)
    rows = np.rint((y_edges + 1) * (_UNIT / 2)).astype(np.int64)
    sums = table[np.clip(rows, 0, _UNIT)[:, None], np.clip(columns, 0, _UNIT)[None, :]]
    covered = np.diff(np.diff(sums, axis=0), axis=1)
    return covered / (np.diff(rows)[:, None] * np.diff(columns)[None, :])


def _background(scene: Scene, size: int) -> np.ndarray:
    """(size, size) float32 grey levels: linear gradient plus noise."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1) / 2
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    low, high = scene.levels
    slope = (high - low) / (abs(cos) + abs(sin))
    noise = np.random.default_rng(scene.noise_seed).standard_normal((size, size), dtype=np.float32)
    gradient = ((low + high) / 2 + slope * cos * axis[None, :]) + slope * sin * axis[:, None]
    return gradient.astype(np.float32) + np.float32(NOISE) * noise


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw the scene: (size, size, 3) uint8 sRGB. The same scene and size always give the same bytes."""
    grey = _background(scene, size)
    image = np.repeat(grey[:, :, None], 3, axis=2)
    scale = size / CANVAS
    for item in scene.objects:
        x0, y0, x1, y1 = (edge * scale for edge in item.box)
        left, top = max(int(x0), 0), max(int(y0), 0)
        right, bottom = min(int(np.ceil(x1)), size), min(int(np.ceil(y1)), size)
        radius = item.diameter * scale / 2
        x_edges = (np.arange(left, right + 1) - item.cx * scale) / radius
        y_edges = (np.arange(top, bottom + 1) - item.cy * scale) / radius
        alpha = coverage(item.shape, x_edges, y_edges).astype(np.float32)[:, :, None]
        ramp = np.cos(item.shade_angle) * x_edges[None, :-1] + np.sin(item.shade_angle) * y_edges[:-1, None]
        shade = (1 + SHADING * np.clip(ramp, -1, 1)).astype(np.float32)[:, :, None]
        patch = image[top:bottom, left:right]
        patch += alpha * (shade * np.asarray(item.rgb, np.float32) - patch)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


class SceneDataset(Dataset):
    """The first `n` scenes of the data set named by `seed`, as a map-style torch data set.

    Item i is {"image": (3, size, size) uint8 RGB, "caption": str, "label": index of its tag in `TAGS`}. `tags` weighs
    the tags, see `tag_shares`.
    Raises ValueError if `n` or `size` is not positive, or on an unknown split or tag.
    """

    def __init__(
        self, n: int, seed: int = 0, size: int = 64, split: str = "train", tags: dict[str, float] | None = None
    ) -> None:
        if n < 1 or size < 1:
            raise ValueError(f"n and size must be at least 1, got n={n}, size={size}")
        if split not in ("train", "all"):
            raise ValueError(f"split must be 'train' or 'all', got {split!r}")
        self.n, self.seed, self.size, self.split = n, seed, size, split
        self.shares = tag_shares(tags)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.n:
            raise IndexError(f"index must be in [0, {self.n}), got {index}")
        scene = scene_at(index, self.seed, self.split, self.shares)
        image = np.ascontiguousarray(render(scene, self.size).transpose(2, 0, 1))
        return {"image": torch.from_numpy(image), "caption": scene.caption, "label": TAGS.index(scene.tag)}
