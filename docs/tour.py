# %% [markdown]
# # A tour of nextscale
#
# Next-scale ("visual autoregressive") models draw a picture from coarse to fine: first one token for all of it, then a
# 2 x 2 map, and so on, each map in one go. This page draws with the small model in the package, looks inside while it
# draws, changes how it draws, and measures the result. It runs on a laptop in about a minute; nothing is downloaded.
#
# `docs/tour.ipynb` is made of `docs/tour.py` by `python -m docs.notebook`: what you see is what ran.

# %%
import numpy as np
import torch
from PIL import Image

from nextscale import Hook, Search, load_pipeline
from sample.sinks import grid

pipe = load_pipeline("scenes", device="cpu")
pipe.set_progress_bar_config(disable=True)

made = pipe("a red star left of a blue heart", num_images_per_prompt=6, seed=0)
grid(made.images, columns=6, least=96)

# %% [markdown]
# Six pictures of one text. A seed names a picture: number 5 is the same alone, in any batch, and in any number of
# processes.

# %%
alone = pipe("a red star left of a blue heart", seed=5).images[0]
print("picture 5 drawn alone is the same:", np.array_equal(alone, made.images[5]))
print("tokens of each scale:", ", ".join(str(tokens.shape[1]) for tokens in made.tokens))

# %% [markdown]
# ## From coarse to fine
#
# Whatever looks on, or interferes, is a *hook* of the one loop that draws. This one decodes what there is after each
# scale. Layout and colours are decided within the first few tokens; the rest is edges.


# %%
class Watch(Hook):
    """Keeps the pictures after each scale."""

    def __init__(self):
        self.pictures = []

    def on_scale_end(self, state, k):
        self.pictures.append(pipe.decode(state.f_hat_BCHW))


watch = Watch()
pipe("a purple heart above a green ring", num_images_per_prompt=3, seed=1, hooks=[watch])
grid([picture for row in zip(*watch.pictures) for picture in row], columns=7, least=96)

# %% [markdown]
# ## Where the model is unsure
#
# A hook also sees the distribution that each token was drawn from. Its entropy at each scale (black: one code was
# certain; white: all 1,024 were alike), and the picture that came out:


# %%
class Entropy(Hook):
    """Keeps how wide the choice of each token was, in nats."""

    def __init__(self):
        self.maps = []

    def on_tokens(self, state, k, logits, tokens):
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        self.maps.append(entropy.reshape(len(state), *state.plan.schedule.sides[k]))
        return tokens


def as_picture(values, side=96):
    """Entropies (h, w) as grey levels, enlarged."""
    levels = (255 * values / np.log(pipe.transformer.config.vocab_size)).to(torch.uint8).numpy()
    return Image.fromarray(levels).resize((side, side), Image.Resampling.NEAREST).convert("RGB")


entropy = Entropy()
unfiltered = pipe.make_plan(top_p=1.0)  # else most of the distribution is cut off
made = pipe("a purple heart above a green ring", num_images_per_prompt=3, seed=1, plan=unfiltered, hooks=[entropy])
shown = [
    picture
    for image, maps in zip(made.images, zip(*entropy.maps))
    for picture in (*map(as_picture, maps), image.resize((96, 96), Image.Resampling.BICUBIC))
]
grid(shown, columns=8, least=96)

# %% [markdown]
# ## Draw otherwise, with the same seeds
#
# Guidance follows the text more closely, `top_p` draws likelier tokens only. From top to bottom: the model's own
# settings, no guidance, strong guidance, everything allowed. With common seeds only what the setting changes is
# different.

# %%
ways = [{}, {"guidance_scale": 0.0}, {"guidance_scale": 4.0}, {"top_p": 1.0}]
rows = [pipe("a purple heart left of a brown cross", num_images_per_prompt=6, seed=20, **way).images for way in ways]
grid([picture for row in rows for picture in row], columns=6, least=96)

# %% [markdown]
# ## Spend less: forget most of the cache
#
# Each scale reads what all earlier scales left in the key/value cache. ScaleKV keeps a share of it, the most in layers
# that look around. From top to bottom: all of it, 20 %, 5 %. `docs/elastic.md` has more ways to spend less, and how
# good they are.

# %%
shares = ["100%", "20%", "5%"]
rows = [pipe("three stars", num_images_per_prompt=6, seed=0, cache=share).images for share in shares]
grid([picture for row in rows for picture in row], columns=6, least=96)

# %% [markdown]
# ## Spend more: search
#
# Many candidates begin, few go on. Here eight are thinned out to four different layouts after the second scale
# (index 1), to the two of the highest reward after the fifth, and to the best in the end. The reward is a network
# that came with the model, not the judge that measures.

# %%
from sample.reward_names import load_reward
from sample.search_steps import make_steps
from sample.search_tree import family_tree

candidates, steps = make_steps("8 cluster@1:4 best@4:2 best", 1, num_scales=7)
search = Search(candidates=candidates, steps=steps, reward=load_reward("scenes"), pictures=True)
found = pipe("a ring and a square", seed=3, search=search)
family_tree(found.search.choices[0])

# %% [markdown]
# ## Change a part of a picture
#
# White of the mask is drawn again, for another text; black stays as it is. The picture, what is drawn again (grey),
# and four ways to do it:

# %%
picture = pipe("a red star left of a blue heart", seed=5).images[0]
mask = Image.new("L", picture.size, 0)
mask.paste(255, (32, 0, 64, 64))
edits = pipe("a red star left of a green ring", image=picture, mask_image=mask, num_images_per_prompt=4, seed=0).images
covered = Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask)
grid([picture, covered, *edits], columns=6, least=96)

# %% [markdown]
# ## A method of your own
#
# What a hook returns goes on. Here all pictures of a call share the tokens of the first three scales of the first
# one, so that they have one layout; `docs/architecture.md` lists what else can be exchanged, and how to bring it into
# the commands.


# %%
class SameLayout(Hook):
    """Gives every image the first three scales of the first one."""

    def on_tokens(self, state, k, logits, tokens):
        return tokens[:1].expand_as(tokens).contiguous() if k < 3 else tokens


alike = pipe("a green square and a pink circle", num_images_per_prompt=6, seed=2, hooks=[SameLayout()])
grid(alike.images, columns=6, least=96)

# %% [markdown]
# ## Measure
#
# Scenes are drawn by rules, so a program can judge them exactly. Twenty captions of each kind, with the model's own
# settings; then the pictures that the judge found wrong. `nextscale evaluate` does this (and FID, and more) for as
# many images as you like, with intervals, in several processes.

# %%
from evaluation.judge import judge, score
from evaluation.scenes import prompt_suite
from nextscale import image_stream, make_requests

suite = prompt_suite(20)
requests = make_requests([metadata["prompt"] for metadata in suite], seed=0, metadata=suite)
images = [image for _, image in image_stream(pipe, requests, batch_size=32)]
right = [judge(image, metadata).correct for image, metadata in zip(images, suite)]
for tag, share in score(right, suite).items():
    if not tag.endswith("_ci95"):
        print(f"{tag:15} {share:.2f}")

# %%
wrong = [place for place, correct in enumerate(right) if not correct][:12]
print("\n".join(f"{number:2}  {suite[place]['prompt']}" for number, place in enumerate(wrong, 1)))
grid([Image.fromarray(images[place]) for place in wrong], columns=6, least=96)

# %% [markdown]
# ## Where to go from here
#
# * Draw, edit and search from the command line or in a browser: [quickstart](quickstart.md), [editing](editing.md),
#   [search](search.md)
# * Draw with the official weights of VAR, CoDe, HMAR or Infinity: [official checkpoints](official-checkpoints.md),
#   [Infinity](infinity.md)
# * Teach the model a new word: [fine-tuning](fine-tuning.md). Train on images of your own: [data](data.md),
#   [training](training.md)
# * Understand the code, and build on it: [architecture](architecture.md)
