"""FastVAR: pruned layers against a plain loop over tokens; what is skipped; compositions; mistakes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import nextscale
from sample.costs import cache_peak
from sample.generate import generate
from sample.plan import Plan, Stage, plain
from sample.plan_text import PlanConfig, pruning_of, read_prune
from sample.state import Hook
from tokenizer.aspects import aspect_schedule
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache
from var.conditioning import ClassPrompt, TextPrompt
from var.layers import attention, modulate
from var.presets import PRESETS
from var.pruning import PrunedCache, Pruning, farthest, resize
from var.transformer import NextScaleTransformer

SIDES = [[1, 1], [2, 2], [3, 4], [4, 6], [5, 6]]
KINDS = [
    {"num_classes": 4},
    {"conditioning": "text", "text_width": 12, "text_length": 9, "positions": "rope", "cross_gate": 0.5},
    {"conditioning": "text", "text_width": 12, "text_length": 9, "shared_ada": True, "level_every": 2},
]


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    config = {"depth": 5, "width": 32, "heads": 2, "vocab_size": 20, "latent_channels": 5, "schedule": SIDES}
    model = NextScaleTransformer(**{**config, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def prompt_for(model, count=3):
    if model.config.conditioning == "class":
        return ClassPrompt(torch.arange(count) % 4)
    generator = torch.Generator().manual_seed(1)
    mask_BT = torch.arange(7) < torch.tensor([[7], [4], [2]])[:count]
    return TextPrompt(torch.randn(count, 7, 12, generator=generator), mask_BT)


@pytest.fixture(scope="module")
def model():
    return make_model(num_classes=4)


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(3)
    return MultiScaleQuantizer(vocab_size=20, channels=5, num_scales=5)


def run(plan, quantizer, seeds=(5, 6, 7), **options):
    return generate(plan, quantizer, ClassPrompt(torch.tensor([s % 4 for s in seeds])), seeds, **options)


# --- the layers ------------------------------------------------------------------------------------------------------


def far(x_lD, count):
    """The places of the `count` tokens farthest from the mean, one by one."""
    mean = sum(x_lD) / len(x_lD)
    return sorted(range(len(x_lD)), key=lambda i: -float(((x_lD[i] - mean) ** 2).sum()))[:count]


def branches(block, cond, layer, rope, past):
    """What a block adds, part by part: functions of some tokens (1, n, D) and their places."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = cond.blocks[layer][:, :, None].unbind(1)

    def read(few, places):
        q, key, value = block.attn.project(modulate(few, scale1, shift1), None if rope is None else rope[places])
        past.append((key, value))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*past))
        return block.attn.to_out(attention(q, keys, values, None, block.attn.scale)) * gamma1

    def look(few, places):
        gate = 1 if block.cross_gate_D is None else block.cross_gate_D
        return block.cross(block.cross_norm(few), cond.memory[layer], cond.memory_mask_B11T) * gate

    def feed(few, places):
        return block.ffn(modulate(few, scale2, shift2)) * gamma2

    return [read, look, feed] if cond.memory else [read, feed]


def reference(model, inputs, cond, shares, layers, source):
    """Hidden states of every scale: one row after the other, each branch with its own choice, keys in lists."""
    every, schedule = model.config.level_every, model.schedule
    hidden = [[] for _ in schedule.sides]
    for row in range(len(cond.start_BD)):
        own = cond.select(torch.tensor([row]))
        past, added = [[] for _ in model.blocks], {}
        for k, (h, w) in enumerate(schedule.sides):
            scales = range(k, k + 1)
            x = model._embed(inputs[k - 1][row : row + 1] if k else None, own, scales, schedule)
            rope = model._rope(schedule, scales, "cpu")
            for layer, block in enumerate(model.blocks):
                if every and layer and layer % every == 0:
                    x = x + model._levels(schedule, scales)
                for number, branch in enumerate(branches(block, own, layer, rope, past[layer])):
                    left = int(h * w * shares[k]) if layer in layers else 0
                    places = far(x[0], h * w - left) if left else list(range(h * w))
                    whole = torch.zeros_like(x)
                    if left:
                        before = added[layer, number].T.reshape(1, -1, *schedule.sides[source])
                        whole = F.adaptive_avg_pool2d(before, (h, w)).flatten(2).mT.clone()
                    whole[:, places] = branch(x[:, places], torch.tensor(places))
                    if k == source:
                        added[layer, number] = whole[0]
                    x = x + whole
            hidden[k].append(x)
    return [torch.cat(rows) for rows in hidden]


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("shares", [(0, 0, 0, 0.4, 0.5), (0, 0, 0.3, 0.9, 0), (0, 0.5, 0, 0.25, 0.97)], ids=str)
def test_layers_are_those_of_the_paper(options, shares):
    """Also where a whole scale follows a pruned one, and where the source is the first scale."""
    model = make_model(**options)
    pruning = Pruning(model.schedule, shares, range(1, 4))
    assert pruning.source == (2, 1, 0)[[0.4, 0.9, 0.25].index(shares[3])]
    cond = model.condition(prompt_for(model))
    inputs = [torch.randn(3, length, 5) for length in model.schedule.lengths[1:]]
    wanted = reference(model, inputs, cond, shares, pruning.layers, pruning.source)
    cache = PrunedCache(5, pruning)
    for k in range(5):
        got = model(inputs[k - 1] if k else None, cond, scales=range(k, k + 1), cache=cache)
        torch.testing.assert_close(got, wanted[k], atol=2e-5, rtol=1e-5)
    plain_cache = KVCache(5, model.schedule.begins[-1])
    for k in range(5):
        whole = model(inputs[k - 1] if k else None, cond, scales=range(k, k + 1), cache=plain_cache)
    assert (whole - got).abs().max() > 1e-2
    stored = [sum(pruning.count(layer, k) for k in range(4)) for layer in range(5)]
    assert [keys.shape[2] for keys in cache.keys] == cache.lengths == stored  # no room but for what is stored
    assert stored[0] == stored[4] == model.schedule.begins[4] > stored[1] == stored[3]


@torch.no_grad()
def test_a_prefill_is_whole_and_gives_what_is_used_again():
    """One pass over scales 0 to 3 and then a pruned scale; the same as scale by scale with nothing left out there."""
    model, shares = make_model(num_classes=4), (0, 0, 0, 0.4, 0.5)
    cond = model.condition(prompt_for(model))
    inputs = [torch.randn(3, length, 5) for length in model.schedule.lengths[1:]]
    caches = [PrunedCache(5, Pruning(model.schedule, shares, range(1, 4))) for _ in range(2)]
    caches[1].pruning = Pruning(model.schedule, (0, 0, 0, 0, 0.5), range(1, 4))
    model(torch.cat(inputs[:3], dim=1), cond, scales=range(4), cache=caches[0], attention_backend="grouped")
    for k in range(4):
        model(inputs[k - 1] if k else None, cond, scales=range(k, k + 1), cache=caches[1])
    assert {name for _, name in caches[0].added} == {"self", "ffn"} and caches[0].lengths == caches[1].lengths
    for place, tensor in caches[0].added.items():  # of scale 2: the last before what would have been left out
        assert tensor.shape == (3, 12, 32) and tensor.is_contiguous(), place
    caches[1].pruning, caches[1].added = caches[0].pruning, {place: t.clone() for place, t in caches[0].added.items()}
    got, again = (model(inputs[3], cond, scales=range(4, 5), cache=cache) for cache in caches)
    torch.testing.assert_close(got, again, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_that_are_freed_begin_anew():
    model = make_model(num_classes=4)
    cond, cache = (
        model.condition(prompt_for(model)),
        PrunedCache(5, Pruning(model.schedule, (0, 0, 0.5, 0, 0), range(5))),
    )
    for k in range(2):
        model(torch.randn(3, 4, 5) if k else None, cond, scales=range(k, k + 1), cache=cache)
    kept = {"self", "ffn"}
    assert {name for layer, name in cache.added if layer == 1} == kept and cache.given == [5] * 5
    before = cache.nbytes
    cache.free_layers(iter([1, 2]))
    assert {layer for layer, _ in cache.added} == {0, 3, 4} and cache.given == [5, 0, 0, 5, 5]
    assert cache.nbytes == before * 3 / 5
    cache.reset()
    assert cache.nbytes == 0 and not cache.added and cache.given == [0] * 5


def test_choosing_and_resizing():
    x = torch.tensor([[[0.0], [5.0], [1.0], [-4.0], [0.5]], [[9.0], [0.0], [0.1], [0.2], [-8.0]]])
    assert farthest(x, 2).tolist() == [[1, 3], [0, 4]] and farthest(x, 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    half = torch.randn(2, 900, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert farthest(half, 400).equal(farthest(half.double(), 400))  # distances are summed with more digits
    small = torch.arange(6.0).reshape(1, 6, 1)
    assert resize(small, (2, 3), (2, 3)).equal(small)
    assert resize(small, (2, 3), (4, 3)).flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert resize(small, (2, 3), (1, 1)).item() == 2.5  # a mean over the area


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6), st.data())
def test_counts(steps, data):
    schedule = ScaleSchedule(tuple((1 + k, 1 + k) for k in range(len(steps))))
    shares = data.draw(st.lists(st.sampled_from([0, 0.1, 0.4, 0.5, 0.99]), min_size=len(steps), max_size=len(steps)))
    undrawn = data.draw(st.integers(0, len(steps) - 1))
    shares = (0.0, *shares[1 : len(steps) - undrawn], *[1.0] * undrawn)
    pruning = Pruning(schedule, shares, range(1, 3))
    assert pruning.drawn == len(steps) - undrawn
    for k, (length, share) in enumerate(zip(schedule.lengths, shares)):
        assert pruning.count(0, k) == length
        if share < 1:
            assert pruning.count(1, k) == length - int(share * length) >= 1
    source = pruning.source
    if source is None:
        assert all(pruning.count(1, k) == schedule.lengths[k] for k in range(len(steps)))
    else:
        assert all(pruning.count(1, k) == schedule.lengths[k] for k in range(source + 1))
        assert pruning.count(1, source + 1) < schedule.lengths[source + 1]


@pytest.mark.parametrize("depth,layers", [(32, range(3, 28)), (16, range(2, 14)), (8, range(1, 7)), (2, range(2))])
def test_released_layers(depth, layers):
    """The released code prunes layers 3 to 27 of 32; the same part of other depths."""
    assert Pruning.of_last([0.5], ScaleSchedule.of("1,2,3"), depth).layers == layers


# --- the loop --------------------------------------------------------------------------------------------------------


def test_images_do_not_depend_on_the_batch(model, quantizer):
    plan = PlanConfig(prune="40%,50%").build(model, guidance=1.5)
    together = torch.cat(run(plan, quantizer).tokens, dim=1)
    for row, seed in enumerate((5, 6, 7)):
        alone = torch.cat(run(plan, quantizer, seeds=(seed,)).tokens, dim=1)
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together, torch.cat(run(plain(model), quantizer).tokens, dim=1))


def test_pruning_may_begin_with_a_stage(model, quantizer):
    """A stage that prunes does not go on with a cache that kept nothing for it: it reads the scales before anew."""
    wanted = PlanConfig(prune="40%,50%").build(model)
    late = Stage(model, range(3, 5), pruning=wanted.stages[0].pruning)
    made = run(Plan((Stage(model, range(3)), late)), quantizer)
    assert all(torch.equal(mine, other) for mine, other in zip(made.tokens, run(wanted, quantizer).tokens))


def test_whole_scales_are_those_of_the_plain_plan(model, quantizer):
    made, whole = run(PlanConfig(prune="40%,50%").build(model), quantizer), run(plain(model), quantizer)
    assert all(torch.equal(mine, other) for mine, other in zip(made.tokens[:3], whole.tokens[:3]))


class Seen(Hook):
    """What the loop calls, and the sum of codes after each scale."""

    def __init__(self):
        self.begun, self.drawn, self.sums = [], [], []

    def on_scale_begin(self, state, k):
        self.begun.append(k)

    def on_tokens(self, state, k, logits_BlV, tokens_Bl):
        self.drawn.append(k)
        return tokens_Bl

    def on_scale_end(self, state, k):
        self.sums.append(state.f_hat_BCHW.clone())


def test_scales_of_all_are_not_drawn(model, quantizer):
    """The image is the sum of the codes before them: the plain one's, as nothing else is left out."""
    seen, whole = Seen(), Seen()
    made = run(PlanConfig(prune="100%,100%").build(model), quantizer, hooks=[seen])
    run(plain(model), quantizer, hooks=[whole])
    assert torch.equal(made.f_hat_BCHW, whole.sums[2]) and not torch.equal(whole.sums[2], whole.sums[4])
    assert seen.begun == [0, 1, 2, 3, 4] and seen.drawn == [0, 1, 2] and len(seen.sums) == 5
    assert [tuple(tokens.shape) for tokens in made.tokens] == [(3, n) for n in model.schedule.lengths]
    assert all((made.tokens[k] == -1).all() for k in (3, 4)) and made.tokens[2].min() >= 0
    assert type(PlanConfig(prune="100%").build(model).stages[0].make_cache()) is KVCache


@pytest.mark.parametrize("words", [{"plan": "supernet:3", "depth": 3}, {"plan": "self:3", "depth": 3}], ids=str)
def test_compositions_draw_every_image_as_alone(model, quantizer, words):
    plan = PlanConfig(prune="30%,60%", **words).build(model)
    together = torch.cat(run(plan, quantizer).tokens, dim=1)
    assert torch.equal(together[1:2], torch.cat(run(plan, quantizer, seeds=(6,)).tokens, dim=1))


# --- words and mistakes ----------------------------------------------------------------------------------------------


def test_words():
    assert read_prune(None) == read_prune("off") == () and read_prune("50%") == (0.5,)
    assert read_prune("40%, 50%,100%") == read_prune([0.4, "50%", 1]) == read_prune("0.4,0.5,1") == (0.4, 0.5, 1.0)
    assert read_prune(0.25) == read_prune(".25") == (0.25,) and read_prune(1e-5) == (1e-5,)
    assert PlanConfig(prune="0%", cache="50%").prune == "0%"  # which leaves nothing out


@pytest.mark.parametrize("text", ["50", "-10%", "110%", "half", "40%,,50%", "", [], "40%,50", float("nan")])
def test_texts_that_are_no_shares(text):
    with pytest.raises(ValueError, match="prune must be like 50% or"):
        read_prune(text)


def test_mistakes(model):
    cases = [
        ({"prune": "10%,10%,10%,10%,10%,10%"}, "prune must have at most 5 shares"),
        ({"prune": "10%,0%,0%,0%,0%"}, "prune must leave the first scale whole"),
        ({"prune": "100%,50%"}, "prune must leave out the last scales where it leaves out any, got 0%,0%,0%,100%,50%"),
        ({"prune": "50%", "cache": "window:50%"}, "prune 50% needs a cache of 100%, got window:50%"),
        ({"prune": "50%", "cache": "nonsense"}, "cache must be like 10%"),
        ({"cache": "0%"}, "cache must be like 10%"),
        ({"plan": "code:4", "depth": 2, "prune": "100%"}, "prune leaves scale 4 out, where a stage of the plan begins"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            PlanConfig(**words).build(model)
    markov = make_model(num_classes=4, mask="block_diagonal")
    with pytest.raises(ValueError, match="prune is for models that read earlier scales"):
        PlanConfig(prune="50%").build(markov)
    with pytest.raises(ValueError, match="one for each of 5 scales"):
        Pruning(model.schedule, (0.0, 0.5), range(2))
    assert pruning_of("0%", model) is None
    late = Pruning(model.schedule, (0, 0, 1, 1, 1), range(2))
    with pytest.raises(ValueError, match="plan draws scales after one that it leaves out"):
        Plan((Stage(model, range(3), pruning=late), Stage(model, range(3, 5))))


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_bytes_of_the_cache_are_known_beforehand(options):
    """Of text models as well, whose blocks have a branch more."""
    model = make_model(**options)
    plan, prompt = PlanConfig(prune="40%,50%").build(model, guidance=0.0), prompt_for(model)
    cache, cond = plan.stages[0].make_cache(), model.condition(prompt)
    cache.reserve(plan.reserved(plan.stages[0]))
    for k, length in enumerate(model.schedule.lengths):
        model(torch.randn(3, length, 5) if k else None, cond, scales=range(k, k + 1), cache=cache)
    assert cache.peak_nbytes == cache_peak(plan, 3, torch.float32)


def test_shares_are_of_tokens_to_the_last_one():
    """29 % of 100 tokens are 29, though the product of floats is below."""
    schedule = ScaleSchedule.of("1,5,10")
    assert [Pruning.of_last([n / 100], schedule, 4).count(0, 2) for n in range(100)] == list(range(100, 0, -1))


def test_guidance_of_scales_that_are_not_drawn_is_none(model):
    assert PlanConfig(prune="100%").build(model, guidance=[0.0, 0.0, 0.0, 0.0, 2.0]).guided_scales == 0
    assert PlanConfig(prune="100%").build(model, guidance=[0.0, 3.0, 0.0, 0.0, 2.0]).guided_scales == 2


def test_the_command_line(class_folder, class_pipeline, tmp_path, capsys):
    words = ["sample", "--model", str(class_folder), "--class", "1", "--seed", "3", "--device", "cpu"]
    assert nextscale.main([*words, "--prune", "60%", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/settings.json").read_text())["prune"] == "60%"
    (tmp_path / "how.yaml").write_text("prune: [10%, 60%]\n")
    assert nextscale.main([*words, "--plan", str(tmp_path / "how.yaml"), "--out", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    assert nextscale.main([*words, "--prune", "60", "--out", str(tmp_path / "bad")]) == 2
    assert "prune must be like 50% or 40%,50%,100%" in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_the_benchmark(tmp_path, monkeypatch):
    """Operations and caches are of the shapes; the timed model is a tiny one here."""
    from benchmarks import pruning

    tiny = PRESETS["infinity-125m"] | {"depth": 4, "width": 32, "heads": 2, "pool_heads": 2}
    monkeypatch.setitem(PRESETS, "infinity-125m", tiny)
    out = tmp_path / "p.json"
    assert pruning.main(["--pixels", "0.06M", "--rounds", "1", "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    own, published = rows[:4], rows[4:]
    assert [row["row"] for row in own] == list(pruning.PRUNES) == [row["row"] for row in published]
    assert all(row["speed"] > 0 and row["seconds"] > 0 for row in own) and "speed" not in published[0]
    lengths = aspect_schedule("1:1", "0.06M").lengths
    assert own[2]["computed"] == published[2]["computed"] == sum(lengths[:-2]) / sum(lengths)
    assert own[0]["computed"] == own[0]["ceiling"] == 1 < own[1]["ceiling"] < own[2]["ceiling"] < own[3]["ceiling"]
    assert out.with_suffix(".md").read_text().count("\n") == 10
    with pytest.raises(SystemExit):
        pruning.main(["--out", str(tmp_path / "p.txt")])
