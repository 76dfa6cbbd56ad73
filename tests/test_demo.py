"""The page: it draws what the command draws, shows every scale, stops when asked to, and opens no files to visitors."""

import importlib.util
import json
import shlex
import threading

import numpy as np
import pytest
from PIL import Image

import nextscale
from sample.commands import demo_cli
from sample.commands.demo import DRAW, Painter, streamed

SEED = 7


@pytest.fixture
def text_painter(text_pipeline, text_folder, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("reward")
    (folder / "redness.py").write_text("def score(images, prompts):\n    return images[..., 0].mean(axis=(1, 2))\n")
    monkeypatch.syspath_prepend(folder)
    return Painter(text_pipeline, model=str(text_folder), reward="redness:score", most=8)


@pytest.fixture
def class_painter(class_pipeline, class_folder):
    return Painter(class_pipeline, model=str(class_folder), most=8)


def picture(seed=0, side=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def half(side=8):
    return Image.fromarray(np.repeat([[0, 255]], side * side // 2, axis=1).reshape(side, side).astype(np.uint8))


def by_command(words, folder):
    """The pictures that `nextscale` makes of these words, by name."""
    assert nextscale.main([words[0], "--out", str(folder), "--device", "cpu", "--fast", "off", *words[1:]]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*_seed*.png"))]


def same(images, arrays):
    return len(images) == len(arrays) and all(np.array_equal(a, b) for a, b in zip(images, arrays))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance": 2.5, "top_k": 5, "top_p": "", "temperature": None},
        {"plan": "supernet:1", "depth": 1, "cache": "window:50%"},
        {"negative": "a blue star", "guidance": "0,1,2"},
        {"search": "best", "images": 2},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
@pytest.mark.parametrize("text", ["a red star", "-a 'red' star; echo é", "--prompts=/etc/passwd", "--", "--x"])
def test_it_draws_what_the_shown_command_draws(text_painter, settings, text, tmp_path):
    words = text_painter.words("sample", text, n=2, seed=SEED, settings=settings)
    *before, last = text_painter.draw(words)
    assert [drawn.scale for drawn in before] == [1, 2] and last.scale == last.scales == 3
    assert last.seeds == [SEED, SEED + 1]
    assert all(drawn.seeds is None for drawn in before)
    assert same(last.images, by_command(shlex.split(shlex.join(words)), tmp_path))


def test_classes_by_number_range_and_name(class_painter, tmp_path):
    words = class_painter.words("sample", "1,3-4", n=1, seed=SEED, settings={"guidance": 1})
    *_, last = class_painter.draw(words)
    assert last.seeds == [7, 8, 9] and same(last.images, by_command(words, tmp_path))
    with pytest.raises(ValueError, match="--class 9: class_labels"):
        next(class_painter.draw(class_painter.words("sample", "9", n=1, seed=0, settings={})))
    with pytest.raises(ValueError, match="give what to draw"):
        next(class_painter.draw(class_painter.words("sample", "", n=1, seed=0, settings={})))


def test_previews_are_the_scales_that_the_command_shows(text_painter, tmp_path):
    words = text_painter.words("sample", "a red star", n=1, seed=SEED, settings={})
    drawn = [np.asarray(made.images[0]) for made in text_painter.draw(words)]
    assert nextscale.main([*words, "--show-scales", "--out", str(tmp_path), "--device", "cpu", "--fast", "off"]) == 0
    (row,) = (tmp_path / "scales").glob("*.png")
    assert np.array_equal(np.concatenate(drawn, axis=1), np.asarray(Image.open(row)))


def test_without_previews_only_the_images_come(text_painter):
    words = text_painter.words("sample", "a red star", n=1, seed=SEED, settings={})
    (only,) = text_painter.draw(words, previews=False)
    *_, last = text_painter.draw(words)
    assert same(only.images, [np.asarray(last.images[0])])


def test_a_search_shows_its_candidates_becoming_fewer(text_painter):
    words = text_painter.words("sample", "a red star", n=0, seed=SEED, settings={"search": "8 random@1:4 best"})
    assert [len(drawn.images) for drawn in text_painter.draw(words)] == [8, 8, 1]


@pytest.mark.parametrize("settings", [{}, {"feather": 2, "mask_rule": "whole", "guidance": 0}])
def test_it_edits_as_the_shown_command_edits(text_painter, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1, side=16).save("picture.png")
    half(16).save("mask.png")
    words = text_painter.words("edit", "a red star", n=2, seed=SEED, settings=settings)
    (made,) = text_painter.edit(words, picture(1, side=16), half(16))
    assert same(made.images, by_command(words, tmp_path / "edits"))
    assert np.array_equal(np.asarray(made.images[0])[:4], np.asarray(picture(1, side=16))[:4])


def test_a_class_model_edits_without_a_class(class_painter):
    (made,) = class_painter.edit(class_painter.words("edit", "", n=1, seed=0, settings={}), picture(), half())
    assert len(made.images) == 1
    with pytest.raises(ValueError, match="nothing of the picture is covered"):
        next(
            class_painter.edit(
                class_painter.words("edit", "", n=1, seed=0, settings={}),
                picture(),
                picture().convert("1").point(lambda _: 0),
            )
        )


@pytest.mark.parametrize("text", ["--prompts=SECRET", "--prompts", "--plan=SECRET.yaml", "--reward=os:system", "--n=9"])
def test_a_text_is_never_an_option(text_painter, text, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("password")
    text = text.replace("SECRET", str(secret))
    words = text_painter.words("sample", text, n=1, seed=SEED, settings={})
    (made,) = text_painter.draw(words, previews=False)
    plainly = text_painter.pipeline(text, seed=SEED).images[0]
    assert made.seeds == [SEED] and np.array_equal(np.asarray(made.images[0]), np.asarray(plainly))
    (edited,) = text_painter.edit(text_painter.words("edit", text, n=1, seed=0, settings={}), picture(), half())
    assert len(edited.images) == 1


def test_what_strangers_may_ask_for_has_an_end(text_painter):
    with pytest.raises(ValueError, match="at most 4000 characters are read here, and these are 4001"):
        text_painter.words("sample", "a" * 4001, n=1, seed=0, settings={})
    words = text_painter.words("edit", "a red star", n=8, seed=0, settings={})
    large = Image.new("RGB", (2400, 2400))
    with pytest.raises(ValueError, match="at most 32 million pixels are edited at once here, not 8 of 2400 x 2400"):
        next(text_painter.edit(words, large, Image.new("L", large.size, 255)))


def test_the_command_says_where_it_was_drawn(text_pipeline, text_folder):
    painter = Painter(text_pipeline, model=str(text_folder), places=["--dtype=bfloat16", "--fast=off"])
    words = painter.words("sample", "a red star", n=1, seed=0, settings={})
    assert {"--dtype=bfloat16", "--fast=off"} <= {*words}
    (made,) = painter.draw(words, previews=False)
    assert made.seeds == [0]


@pytest.mark.parametrize("plan", ["settings.yaml", "/etc/passwd.yml", "code", "supernet:1\nx", "supernet:1 ../x.yaml"])
def test_a_visitor_names_no_files(text_painter, plan):
    with pytest.raises(ValueError, match=r"plan must be var, supernet:N, code:N or self:N, got "):
        text_painter.words("sample", "a red star", n=1, seed=0, settings={"plan": plan})


@pytest.mark.parametrize("name", ["reward", "model", "out", "refiner", "prompts", "features", "device", "n"])
def test_a_visitor_sets_nothing_else(text_painter, name):
    with pytest.raises(ValueError, match=f"settings must be of guidance, .*, got {name}"):
        text_painter.words("sample", "a red star", n=1, seed=0, settings={name: "x"})


@pytest.mark.parametrize("value", ["50% --out=x", "--out=x", "x --reward os:system", "'; rm -rf /"])
def test_a_value_is_one_word(text_painter, value):
    words = text_painter.words("sample", "a red star", n=1, seed=0, settings={"cache": value})
    assert f"--cache={value}" in words
    with pytest.raises(ValueError, match="cache must be like"):
        next(text_painter.draw(words))


def test_what_is_wrong_is_told_as_the_command_tells_it(text_painter, capsys, tmp_path):
    for settings in ({"guidance": "much"}, {"top_p": 2}, {"images": 2}, {"search": "worst"}, {"guidance_until": 9}):
        words = text_painter.words("sample", "a red star", n=1, seed=0, settings=settings)
        with pytest.raises(ValueError) as raised:
            list(text_painter.draw(words))
        assert nextscale.main([*words, "--out", str(tmp_path), "--device", "cpu"]) == 2
        assert capsys.readouterr().err.strip().endswith(str(raised.value))


def test_so_many_at_once_and_no_more(text_painter):
    words = text_painter.words("sample", "a red star", n=9, seed=0, settings={})
    with pytest.raises(ValueError, match="at most 8 images are drawn at once here, and these are 9"):
        next(text_painter.draw(words))
    words = text_painter.words("sample", "a red star", n=5, seed=0, settings={"search": "best", "images": 2})
    with pytest.raises(ValueError, match="at most 8 candidates are drawn at once here, and these are 10"):
        next(text_painter.draw(words))


def test_the_bundled_models_limits_are_told(text_pipeline):
    painter = Painter(text_pipeline)  # named "scenes", as by default
    (made,) = painter.draw(painter.words("sample", "a dog", n=1, seed=0, settings={}), previews=False)
    assert len(made.cautions) == 1 and "'a dog' it does not understand" in made.cautions[0]
    (made,) = painter.draw(painter.words("sample", "a red star", n=1, seed=0, settings={}), previews=False)
    assert made.cautions == ()


def test_own_settings_are_those_of_all_scales(text_pipeline):
    assert Painter(text_pipeline).own == {"guidance": 1.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    other = type(text_pipeline)(**text_pipeline.components, sampling={"guidance_scale": [0, 1, 2], "top_k": [1, 2, 3]})
    assert Painter(other).own == {"temperature": 1.0, "top_p": 1.0}


# --- the thread ------------------------------------------------------------------------------------------------------


def test_a_stream_gives_what_is_told_then_the_result():
    def work(tell):
        for number in range(3):
            tell(number)
        return "done"

    assert list(streamed(work)) == [0, 1, 2, "done"]


def test_an_error_comes_after_what_was_told():
    def work(tell):
        tell(1)
        raise KeyError("x")

    stream = streamed(work)
    assert next(stream) == 1
    with pytest.raises(KeyError):
        next(stream)


def test_a_stream_that_nobody_follows_ends_its_work():
    told, threads = [], threading.active_count()

    def work(tell):
        while True:
            tell(len(told))
            told.append(len(told))

    stream = streamed(work)
    next(stream)
    stream.close()
    count = len(told)
    assert threading.active_count() == threads and len(told) == count


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--most", "0"], "--most must be 1 or more, got 0"),
        (["--port", "70000"], "--port must be in [1, 65535], got 70000"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_options_that_make_no_sense(words, said, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(
        __import__("sys").modules, "sample.commands.demo_page", type("Page", (), {"build": None, "serve": None})
    )
    assert nextscale.main(["demo", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(demo_cli.importlib.util, "find_spec", lambda name: None)
    assert nextscale.main(["demo"]) == 2
    assert "the page needs Gradio: pip install" in capsys.readouterr().err


# --- the page (with Gradio only) -------------------------------------------------------------------------------------


@pytest.fixture
def page():
    pytest.importorskip("gradio")
    from sample.commands import demo_page

    return demo_page


def test_what_the_model_does_by_itself_is_not_said(page, text_painter):
    own = [text_painter.own.get(name) for name in DRAW]
    model = f"--model={text_painter.model}"
    assert page.asked(text_painter, "sample", DRAW, [" a red star ", 2, 7, *own]) == [
        "sample", "a red star", "--n=2", "--seed=7", model,
    ]  # fmt: skip
    own[0] = 0
    assert "--guidance=0" in page.asked(text_painter, "sample", DRAW, ["a red star", 2, 7, *own])


def test_a_painted_picture_is_edited_as_it_was_before_it_was_enlarged(page):
    before = picture()
    large = page.enlarged(before)
    assert large.size == (512, 512)
    layer = Image.new("RGBA", large.size)
    layer.paste((255, 0, 255, 255), (0, 0, 128, 300))
    canvas = {"background": large.convert("RGBA"), "layers": [layer], "composite": None}
    image, mask = page.painted(canvas, before)
    wanted = np.zeros((8, 8), np.uint8)
    wanted[:5, :2] = 255  # 300 of 64 pixels a cell: the fifth is covered by more than a half
    assert image is before and np.array_equal(np.asarray(mask), wanted)
    image, mask = page.painted(canvas, picture(1))  # another was put in its place
    assert image.size == mask.size == (512, 512)
    with pytest.raises(ValueError, match="give a picture to edit"):
        page.painted({"background": None, "layers": [], "composite": None}, before)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_the_served_page_draws(page, kind, text_painter, class_painter, tmp_path):
    client = pytest.importorskip("gradio_client")
    painter = {"text": text_painter, "class": class_painter}[kind]
    built = page.build(painter)
    _, url, _ = built.launch(prevent_thread_lock=True, quiet=True)
    try:
        visitor = client.Client(url, verbose=False, download_files=str(tmp_path / "seen"))
        settings = [painter.own.get(name) for name in DRAW if page.fits(painter, name)]
        job = visitor.submit("1", 2, SEED, *settings, api_name="/draw")
        gallery, at, command, *_ = job.result(timeout=60)
        made = by_command(shlex.split(command)[1:], tmp_path / "made")
        assert len(job.outputs()) == 3 and at["value"] == 3
        seen = [np.asarray(Image.open(item["image"])) for item in gallery["value"]]
        assert same(seen, made) and [item["caption"] for item in gallery["value"]] == ["seed 7", "seed 8"]
        with pytest.raises(Exception, match="at most 8 images are drawn at once"):
            visitor.predict("1", 9, SEED, *settings, api_name="/draw")
    finally:
        built.close()
    assert json.dumps(built.get_api_info())  # and says what it takes
