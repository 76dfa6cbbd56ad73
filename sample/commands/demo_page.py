"""The page of `nextscale demo`, in Gradio: what may be asked for, and the pictures. What is drawn: `demo.py`."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from math import ceil, sqrt
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from sample.classes import names_of
from sample.commands.demo import DRAW, EDIT, Drawn, Painter
from sample.commands.info import describe
from sample.edit import RULES
from sample.processes import line_about
from sample.search_steps import METHODS
from tokenizer.aspects import SIZES

CANVAS = 512  # pixels, about, that a small picture is enlarged to before it is painted on
FONTS = ("system-ui", "sans-serif")  # none that a browser would have to fetch
CSS = ".crisp img {image-rendering: pixelated} footer {display: none !important}"
SCENES = ("a red star left of a blue heart", "two green rings", "a purple heart above a green ring", "four circles")
KEPT = 3600  # seconds that pictures and what is known of a visitor are kept
LIMITS = {"max_file_size": "20mb", "state_session_capacity": 100}
DRAWING = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal"}  # one at a time

# name -> (label, what it says about itself); the names and their words are those of `nextscale sample`
LIKELY = {
    "guidance": ("Guidance", "how closely to follow what is asked for; 0 is none"),
    "temperature": ("Temperature", "below 1 draws likelier tokens"),
    "top_p": ("Top p", "draw from the likeliest tokens that make up this probability"),
    "top_k": ("Top k", "draw from the k likeliest tokens; 0 is all"),
    "negative": ("Not", "what to steer away from"),
}
SHAPE = {"aspect": ("Width to height", "16:9, 2:3, ..."), "size": ("Pixels", "about so many")}
LESS = {
    "plan": ("Plan", "supernet:N, code:N or self:N, N scales before the border"),
    "depth": ("Layers", "of the plan's subnet: 4, or 6,4,4"),
    "cache": ("Cache", "share to keep: 20%, or window:, streaming:, snapkv:, pyramidkv:20%"),
    "prune": ("Prune", "shares of the last scales' tokens to leave out: 50%"),
    "guidance_until": ("Guided scales", "those after them cost half as much"),
}
MORE = {
    "search": ("Search", "several candidates of an image, as many as asked for above; the best goes on"),
    "images": ("Images", "that a search is to give"),
}
EDGE = {
    "feather": ("Feather", "pixels to blend into the kept part"),
    "mask_rule": ("Rule", "which tokens are kept"),
}
CHOICES = {"search": METHODS, "size": SIZES, "mask_rule": RULES}
SLIDERS = {"guidance": (0, 10, 0.1), "temperature": (0.1, 2, 0.05), "top_p": (0.05, 1, 0.05)}


def build(painter: Painter) -> gr.Blocks:
    """The page: a tab to draw, one to edit, and one that says what the model is."""
    facts = dict(describe(painter.pipeline))
    with gr.Blocks(title="nextscale", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(f"## nextscale\n`{painter.model}` draws {facts['draws']}.")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                said, history, chosen, to_edit = draw_tab(painter)
            with gr.Tab("Edit", id="edit"):
                what, original, editor = edit_tab(painter)
            with gr.Tab("The model", id="model"):
                gr.Markdown("\n".join(f"* **{name}**: {what}" for name, what in facts.items()))
        taken = to_edit.click(on_canvas, [history, chosen], [original, editor, tabs], api_visibility="private")
        taken.success(lambda text: text, said, what, api_visibility="private")
    return page


def serve(page: gr.Blocks, *, host: str, port: int | None, share: bool, browser: bool) -> None:
    """Serve the page until interrupted. Raises OSError if the port is taken."""
    theme = gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))
    page.queue(max_size=64)
    try:
        page.launch(server_name=host, server_port=port, share=share, inbrowser=browser, theme=theme, css=CSS, **LIMITS)
    except OSError as error:
        asked = "a free --port from 7860 on" if port is None else f"--port {port}"
        raise OSError(f"{asked} at --host {host} could not be had: choose another") from error


def draw_tab(painter: Painter) -> tuple[gr.Textbox, gr.State, gr.State, gr.Button]:
    """The tab to draw on: what to draw, what was drawn, which picture was chosen, the button that takes it away."""
    history, chosen = gr.State([], time_to_live=KEPT), gr.State(0)
    with gr.Row():
        with gr.Column(scale=2):
            go, stop = gr.Button("Draw", variant="primary", render=False), gr.Button("Stop", render=False)
            what, *asks = ask(painter, DRAW, [go, stop])
        with gr.Column(scale=3):
            gallery = pictures()
            scale = gr.Slider(1, len(painter.pipeline.transformer.schedule), step=1, label="After so many scales")
            command = gr.Textbox(label="The command that makes the same pictures", interactive=False)
            to_edit = gr.Button("Edit the chosen picture")

    def draw(*values: Any) -> Iterator[tuple]:
        shown: list[Drawn] = []
        with in_words():
            words = asked(painter, "sample", DRAW, values)
            with closing(painter.draw(words)) as stream:
                for drawn in stream:
                    tell_cautions(drawn, first=not shown)
                    shown.append(drawn)
                    at = gr.Slider(maximum=drawn.scales, value=drawn.scale)
                    yield in_gallery(drawn), at, shlex.join(["nextscale", *words]), shown, 0

    inputs, outputs = [what, *asks], [gallery, scale, command, history, chosen]
    runs = [
        go.click(draw, inputs, outputs, api_name="draw", **DRAWING),
        what.submit(draw, inputs, outputs, api_visibility="private", **DRAWING),
    ]
    stop.click(None, cancels=runs, api_visibility="private")
    scale.input(at_scale, [history, scale], gallery, api_visibility="private")
    gallery.select(place, None, chosen, api_visibility="private")
    return what, history, chosen, to_edit


def edit_tab(painter: Painter) -> tuple[gr.Textbox, gr.State, gr.ImageEditor]:
    """The tab to edit on: what to draw, the picture as it was before it was enlarged, and what is painted on."""
    original = gr.State(time_to_live=KEPT)
    with gr.Row():
        with gr.Column(scale=2):
            brush = gr.Brush(colors=["#ff00ff"], color_mode="fixed", default_size=40)
            label = "Paint over what is to be drawn again"
            options = {"type": "pil", "sources": ("upload", "clipboard"), "transforms": (), "layers": False}
            editor = gr.ImageEditor(label=label, brush=brush, elem_classes="crisp", **options)
            go = gr.Button("Draw again", variant="primary", render=False)
            what, *asks = ask(painter, EDIT, [go])
        with gr.Column(scale=3):
            gallery = pictures()
            label = "The command that does the same with picture.png, where mask.png is white"
            command = gr.Textbox(label=label, interactive=False)

    def edit(canvas: dict[str, Any] | None, before: Image.Image | None, *values: Any) -> Iterator[tuple]:
        with in_words():
            words = asked(painter, "edit", EDIT, values)
            for drawn in painter.edit(words, *painted(canvas, before)):
                tell_cautions(drawn, first=True)
                yield in_gallery(drawn), shlex.join(["nextscale", *words])

    go.click(edit, [editor, original, what, *asks], [gallery, command], api_name="edit", **DRAWING)
    return what, original, editor


def pictures() -> gr.Gallery:
    """Where pictures are shown."""
    return gr.Gallery(label="Pictures", columns=2, height=740, object_fit="contain", format="png", elem_classes="crisp")


# --- what is asked for -----------------------------------------------------------------------------------------------


def ask(painter: Painter, names: Sequence[str], buttons: Sequence[gr.Button]) -> list[gr.components.Component]:
    """Fields for what to draw, how many, the seed and the settings of these names, in that order; buttons amid them."""
    what = subject(painter)
    with gr.Row(equal_height=True):
        n = gr.Number(4, label="How many", precision=0, minimum=1, min_width=80)
        seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=120)
        dice = gr.Button("Another seed", min_width=80, size="sm")
    with gr.Row():
        for button in buttons:
            button.render()
    dice.click(lambda: random.randrange(2**31), None, seed, api_visibility="private")
    fields = {}
    groups = {"How": LIKELY, "Its edge": EDGE, "Its shape": SHAPE}
    groups |= {"Spend less": LESS, "Spend more: search": MORE}
    for title, group in groups.items():
        shown = [name for name in group if name in names and fits(painter, name)]
        with gr.Accordion(title, open=group is LIKELY, visible=bool(shown)):
            fields |= {name: field(painter, name, *group[name]) for name in shown}
    absent = {name: gr.State() for name in names if name not in fields}
    return [what, n, seed, *({**fields, **absent}[name] for name in names)]


def subject(painter: Painter) -> gr.Textbox:
    """The field for what to draw: a text, or classes."""
    config, pipeline = painter.pipeline.transformer.config, painter.pipeline
    if not pipeline.by_class:
        what = gr.Textbox(SCENES[0] if painter.model == "scenes" else "", label="What to draw", lines=1, autofocus=True)
        if painter.model == "scenes":
            gr.Examples([[text] for text in SCENES], what)
        return what
    names = names_of(pipeline.config.class_names, config.num_classes)
    example = "3, or 0-9" if names is None else f"3, 0-9, or {names[0][0]}"
    return gr.Textbox("0", label=f"Classes ({example})", lines=1, autofocus=True)


def fits(painter: Painter, name: str) -> bool:
    """Whether a setting could do anything with this model."""
    if name in SHAPE:
        return painter.pipeline.transformer.config.positions == "rope"
    return name != "negative" or not painter.pipeline.by_class


def field(painter: Painter, name: str, label: str, info: str) -> gr.components.Component:
    """The field of a setting: a slider at the model's own value, choices, or a text."""
    own = painter.own.get(name)
    if name in SLIDERS and own is not None:
        low, high, step = SLIDERS[name]
        return gr.Slider(min(low, own), max(high, own), own, step=step, label=label, info=info)
    if name in CHOICES:
        return gr.Dropdown(["", *CHOICES[name]], value="", label=label, info=info)
    return gr.Textbox(label=label, info=info, placeholder=None if own is None else f"{own:g}")


def asked(painter: Painter, command: str, names: Sequence[str], values: Sequence[Any]) -> list[str]:
    """The words of what the fields of `ask` hold; what the model does by itself is not said."""
    what, n, seed, *rest = values
    settings = {name: value for name, value in zip(names, rest, strict=True) if value != painter.own.get(name)}
    return painter.words(command, (what or "").strip(), n=n or 1, seed=seed or 0, settings=settings)


# --- pictures in and out ---------------------------------------------------------------------------------------------


def in_gallery(drawn: Drawn) -> gr.Gallery:
    """Pictures in about a square, finished ones with their seeds."""
    seeds = [None] * len(drawn.images) if drawn.seeds is None else [f"seed {seed}" for seed in drawn.seeds]
    return gr.Gallery(list(zip(drawn.images, seeds)), columns=ceil(sqrt(len(drawn.images))))


def at_scale(history: list[Drawn], scale: int) -> gr.Gallery:
    """The pictures after so many scales, or the nearest before them that there are."""
    return in_gallery([drawn for drawn in history if drawn.scale <= scale][-1]) if history else gr.Gallery()


def place(event: gr.SelectData) -> int:
    """Which picture of a gallery was chosen."""
    return event.index


def on_canvas(history: list[Drawn], chosen: int) -> tuple[Image.Image | None, Image.Image | None, gr.Tabs]:
    """The chosen picture, the same enlarged, and the tab where it is painted on."""
    if not history:
        raise gr.Error("draw something first", title="", print_exception=False)
    picture = history[-1].images[min(chosen, len(history[-1].images) - 1)]
    return picture, enlarged(picture), gr.Tabs(selected="edit")


def enlarged(picture: Image.Image) -> Image.Image:
    """A picture by a whole factor, so that it is about `CANVAS` pixels high or is not changed."""
    factor = max(1, round(CANVAS / picture.height))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def painted(canvas: dict[str, Any] | None, before: Image.Image | None) -> tuple[Image.Image, Image.Image]:
    """The picture to edit and its mask, white where something is painted over it.

    Args:
        canvas: of the editor.
        before: the picture that was enlarged to be painted on; it is edited itself while it is what is shown.

    Raises:
        ValueError: if there is no picture.
    """
    if canvas is None or canvas["background"] is None:
        raise ValueError("give a picture to edit: put one here, or draw one and choose it")
    picture = canvas["background"].convert("RGB")
    mask = Image.new("L", picture.size)
    for layer in canvas["layers"]:
        mask = ImageChops.lighter(mask, layer.getchannel("A"))
    if before is not None and picture.tobytes() == enlarged(before.convert("RGB")).tobytes():
        picture = before
    mask = mask.resize(picture.size, Image.Resampling.BOX)
    return picture, mask.point([0] * 128 + [255] * 128)


def tell_cautions(drawn: Drawn, *, first: bool) -> None:
    """A note of each caution, once."""
    for caution in drawn.cautions if first else ():
        gr.Warning(caution, title="")


@contextmanager
def in_words() -> Iterator[None]:
    """Tell mistakes as the command does, in a line."""
    try:
        yield
    except Exception as error:
        line = line_about(error)
        if line is None:
            raise
        raise gr.Error(line, title="", print_exception=False) from error
