"""The drawn domain keeps its promises, and its judge is right about it."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from evaluation import judge as judging
from evaluation.intervals import wilson
from evaluation.judge import Detection, apply_rules, detect, judge, judge_batch, judge_report
from evaluation.scenes import (
    CANVAS,
    COLOURS,
    GAP,
    SHAPES,
    TAGS,
    Scene,
    SceneDataset,
    SceneObject,
    caption_of,
    coverage,
    is_unseen,
    prompt_suite,
    relations,
    render,
    sample_scene,
    scene_at,
    scene_metadata,
    tag_shares,
)

seeds = st.integers(0, 2**32)


def scene_of(*objects: SceneObject) -> Scene:
    return Scene(objects, (120.0, 150.0), 0.7, 5, "", "", {})


def thing(shape: str = "circle", colour: str = "red", cx: float = 32, cy: float = 32, d: float = 20) -> SceneObject:
    return SceneObject(shape, colour, COLOURS[colour], cx, cy, d, 0.3)


def fresh(n: int, seed: int = 11) -> list[Scene]:
    """`n` scenes of every tag, over all compositions."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, tag=tag, split="all") for tag in TAGS for _ in range(n)]


def share_correct(images: list[np.ndarray], scenes: list[Scene]) -> float:
    return float(np.mean([v.correct for v in judge_batch(images, [s.metadata for s in scenes])]))


def altered(image: np.ndarray, blur: float = 0.0, noise: float = 0.0) -> np.ndarray:
    soft = ndimage.gaussian_filter(image.astype(np.float64), (blur, blur, 0))
    return np.clip(np.rint(soft + np.random.default_rng(0).normal(0, noise, soft.shape)), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ scenes


@settings(max_examples=60)
@given(seed=seeds, tag=st.sampled_from(TAGS), split=st.sampled_from(["train", "all"]))
def test_a_scene_holds_what_its_caption_names_apart_and_uncut(seed, tag, split):
    scene = sample_scene(np.random.default_rng(seed), tag=tag, split=split)
    named = [item["class"] for item in scene.metadata["include"] for _ in range(item["count"])]
    assert [item.shape for item in scene.objects] == named
    assert scene.tag == scene.metadata["tag"] == tag
    assert scene.caption == scene.metadata["prompt"] == caption_of(scene.metadata)
    truth = [Detection(item.shape, item.colour, 1.0, item.box) for item in scene.objects]
    assert apply_rules(truth, scene.metadata).correct
    for item in scene.objects:
        assert min(item.box) >= 1 and max(item.box) <= CANVAS - 1
    for a, b in itertools.combinations(scene.objects, 2):
        apart = max(abs(a.cx - b.cx), abs(a.cy - b.cy)) - (a.diameter + b.diameter) / 2
        assert apart >= GAP - 1e-9
    if split == "train":
        assert not any(is_unseen(item.colour, item.shape) for item in scene.objects)


def test_rendering_is_deterministic_and_an_item_depends_only_on_its_name():
    scene = scene_at(7, seed=3)
    assert scene == scene_at(7, seed=3)
    assert scene != scene_at(7, seed=4)
    assert np.array_equal(render(scene), render(scene))
    assert render(scene).shape == (64, 64, 3) and render(scene, 96).shape == (96, 96, 3)
    item = SceneDataset(10, seed=3)[7]
    assert np.array_equal(item["image"].numpy().transpose(1, 2, 0), render(scene))
    assert (item["caption"], TAGS[item["label"]]) == (scene.caption, scene.tag)


def test_tags_are_drawn_by_weight():
    weights = {"counting": 5, "position": 0}
    data = SceneDataset(600, seed=1, tags=weights)
    drawn = Counter(scene_at(i, 1, tags=data.shares).tag for i in range(600))
    assert drawn["position"] == 0 and drawn["counting"] / 600 == pytest.approx(5 / 9, abs=0.07)
    assert data[3]["caption"] == scene_at(3, 1, tags=data.shares).caption
    assert tag_shares(None) is None and tag_shares({}) == (1 / 6,) * 6


@pytest.mark.parametrize("bad", [{"colour": 1}, {"colors": -1}, dict.fromkeys(TAGS, 0)])
def test_weights_of_tags_are_checked(bad):
    with pytest.raises(ValueError, match="tag"):
        SceneDataset(4, tags=bad)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_fills_the_unit_box_and_conserves_area(shape):
    fine, coarse = np.linspace(-1, 1, 129), np.linspace(-1.3, 1.3, 14)
    mask = coverage(shape, fine, fine)
    assert all(edge.max() > 0 for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    area = coverage(shape, coarse, coarse).sum() * (2.6 / 13) ** 2
    assert area == pytest.approx(mask.mean() * 4, rel=0.01)


def test_background_is_grey_with_the_stated_noise():
    flat = Scene((), (130.0, 130.0), 0.0, 1, "", "", {})
    image = render(flat).astype(float)
    assert np.ptp(image, axis=-1).max() == 0
    assert image.mean() == pytest.approx(130, abs=0.3) and image.std() == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-30, 0), {"left of"}),
        ((30, 4), {"right of"}),
        ((0, -30), {"above"}),
        ((30, 30), {"right of", "below"}),
        ((3, 0), set()),  # shrunk to nothing: the boxes all but coincide
        ((10, 9), {"right of"}),  # 10 - 0.1 * 30 = 7 > 0.5 * 13.45; 9 - 3 = 6 is not
    ],
)
def test_relations_follow_genevals_formula(offset, expected):
    x, y = offset
    assert relations((x - 5, y - 5, x + 5, y + 5), (-10, -10, 10, 10)) == expected


def test_captions_and_metadata_follow_the_grammar():
    assert scene_metadata("counting", ("cross",), count=3)["prompt"] == "three crosses"
    assert scene_metadata("colors", ("ring",), ("orange",))["prompt"] == "an orange ring"
    both = scene_metadata("color_attr", ("star", "heart"), ("red", "blue"))
    assert both["prompt"] == "a red star and a blue heart" and both["unseen"] is False
    placed = scene_metadata("position", ("star", "heart"), relation="left of")
    assert placed["prompt"] == "a star left of a heart" and "unseen" not in placed
    assert [item.get("position") for item in placed["include"]] == [None, ["left of", 0]]


def test_prompt_suite_is_distinct_balanced_and_deterministic():
    suite = prompt_suite(24, seed=2)
    assert suite == prompt_suite(24, seed=2) and suite != prompt_suite(24, seed=3)
    for tag in TAGS:
        prompts = [m["prompt"] for m in suite if m["tag"] == tag]
        assert len(prompts) == 24 and len(set(prompts)) == (8 if tag == "single_object" else 24)
    assert len({m["prompt"] for m in prompt_suite(200)}) >= 550
    assert not any(m.get("unseen", False) for m in prompt_suite(40, unseen=False))
    unseen = prompt_suite(6, unseen=True)
    assert {m["tag"] for m in unseen} == {"colors", "position", "color_attr"} and all(m["unseen"] for m in unseen)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="tag must be one of"):
        sample_scene(np.random.default_rng(0), tag="texture")
    with pytest.raises(ValueError, match="split must be"):
        SceneDataset(4, split="test")
    with pytest.raises(ValueError, match="per_tag"):
        prompt_suite(0)
    with pytest.raises(ValueError, match="image must be a square"):
        detect(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="metadata classes"):
        judge(np.zeros((64, 64, 3), np.uint8), {"include": [{"class": "dog", "count": 1}]})
    with pytest.raises(ValueError, match="same length"):
        judge_batch([], [{}])


# ------------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("d", [13.0, 28.0])
def test_detect_names_every_shape_in_every_colour(shape, d):
    for colour in COLOURS:
        (found,) = detect(render(scene_of(thing(shape, colour, 30.3, 27.8, d))))
        assert (found.shape, found.colour) == (shape, colour)
        assert np.allclose(found.box, (30.3 - d / 2, 27.8 - d / 2, 30.3 + d / 2, 27.8 + d / 2), atol=0.7)


def test_judge_accepts_fresh_renders_and_rejects_other_captions():
    scenes = fresh(40)
    found = [detect(render(scene)) for scene in scenes]
    assert np.mean([apply_rules(d, s.metadata).correct for d, s in zip(found, scenes)]) >= 0.995
    mismatched = accepted = 0
    for detections, scene, other in zip(found, scenes, scenes[1:] + scenes[:1]):
        truth = [Detection(item.shape, item.colour, 1.0, item.box) for item in scene.objects]
        if not apply_rules(truth, other.metadata).correct:
            mismatched += 1
            accepted += apply_rules(detections, other.metadata).correct
    assert mismatched > 200 and accepted == 0


@pytest.mark.parametrize(("blur", "noise"), [(0.8, 0.0), (0.0, 8.0), (0.8, 4.0)])
def test_judge_forgives_soft_and_noisy_images(blur, noise):
    scenes = fresh(8)
    assert share_correct([altered(render(s), blur, noise) for s in scenes], scenes) >= 0.97


def test_judge_takes_larger_images():
    scenes = fresh(3)
    assert share_correct([render(s, 128) for s in scenes], scenes) == 1.0


def test_images_without_objects_have_none():
    for image in (
        render(scene_of()),
        np.full((64, 64, 3), 128, np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8),
    ):
        assert detect(image) == []


@pytest.mark.parametrize(
    "objects",
    [
        (thing(cx=24), thing(cx=38)),  # overlapping
        (thing(cx=22), thing(cx=41)),  # touching
        (thing(cx=3),),  # cut off by the border
        (thing("square", cx=30), thing("triangle", cx=38, cy=38)),
        (thing(d=24), thing("square", "blue", cx=40, d=14)),  # one in front of the other
        (thing("square", d=20), thing("circle", "orange", d=12)),  # one inside the other
        (thing(d=7),),  # too small to tell
    ],
)
def test_unclear_blobs_are_no_shape(objects):
    assert all(found.shape == judging.UNKNOWN for found in detect(render(scene_of(*objects))))


def test_a_foreign_colour_is_unknown():
    (found,) = detect(render(scene_of(dataclasses.replace(thing(), rgb=(0, 200, 200)))))
    assert (found.shape, found.colour) == ("circle", judging.UNKNOWN)


def test_extras_are_forbidden_only_where_counted():
    star, ring = thing("star", "red", 18, 20, 16), thing("ring", "blue", 46, 44, 16)
    image = render(scene_of(star, ring))
    assert judge(image, scene_metadata("single_object", ("star",))).correct
    assert judge(image, scene_metadata("colors", ("star",), ("red",))).correct
    wrong = judge(image, scene_metadata("colors", ("star",), ("blue",)))
    assert not wrong.correct and wrong.reason == "expected blue star, found red"
    three = [thing("star", "red", x, y, 15) for x, y in ((14, 16), (14, 46), (46, 16))]
    blob = [thing("star", "red", 42, 46, 14), thing("star", "red", 50, 48, 14)]
    counted = scene_metadata("counting", ("star",), count=3)
    assert judge(render(scene_of(*three)), counted).correct
    assert not judge(render(scene_of(*three, thing("star", "red", 46, 46, 15))), counted).correct
    assert not judge(render(scene_of(*three, *blob)), counted).correct
    assert not judge(render(scene_of(*three[:2])), counted).correct


def test_report_averages_tags_and_brackets_its_shares():
    scenes = fresh(4)
    images, metadatas = [render(s) for s in scenes], [s.metadata for s in scenes]
    blank = np.full((64, 64, 3), 128, np.uint8)
    report = judge_report([blank, *images[1:]], metadatas)
    assert report["n"] == 24
    assert report["single_object"] == 0.75 and report["overall"] == pytest.approx(1 - 0.25 / 6)
    for name in (*TAGS, "overall"):
        low, high = report[f"{name}_ci95"]
        assert 0 <= low <= report[name] <= high <= 1
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)


def test_the_self_check_passes(capsys):
    assert judging.main(["--n", "60"]) == 0
    assert "color_attr" in capsys.readouterr().out
