"""The transformer: cached = uncached, causality over scales, backends, conditioning, initialisation."""

from dataclasses import replace

import pytest
import torch

from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache
from var.conditioning import ClassPrompt, TextPrompt
from var.layers import rope_table
from var.masks import attention_mask
from var.presets import PRESETS
from var.transformer import NextScaleTransformer

OPTIONS = {
    "class": {},
    "class, plain attention": {"qk_norm": False},
    "class, shared modulation": {"shared_ada": True},
    "class, rope": {"positions": "rope"},
    "class, oblong": {"schedule": "1x1,1x2,2x3", "positions": "both"},
    "text": {"conditioning": "text", "text_width": 12, "text_length": 9},
    "two first tokens": {"schedule": "1x2,2x3,4x4"},
}


def make(**options):
    torch.manual_seed(0)
    config = {"depth": 3, "width": 32, "heads": 2, "vocab_size": 20, "latent_channels": 5, "schedule": "1,2,3"}
    model = NextScaleTransformer(**{**config, "num_classes": 4, **options})
    with torch.no_grad():
        for parameter in model.parameters():  # so that no path is closed by its initialisation
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def prompt_for(model, rows=3):
    if model.config.conditioning == "class":
        return ClassPrompt(torch.arange(rows) % 4)
    mask = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:rows, None]
    return TextPrompt(torch.randn(rows, 7, 12, generator=torch.Generator().manual_seed(1)), mask)


def inputs_for(model, rows=3):
    schedule = model.schedule
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, schedule.total - schedule.lengths[0], 5, generator=generator)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_cached_equals_uncached_at_every_scale(options):
    model = make(**options)
    schedule, cond, x = model.schedule, model.condition(prompt_for(model)), inputs_for(model)
    whole = model.logits(model(x, cond), cond)
    first, cache = schedule.lengths[0], model.new_cache()
    for k, (begin, end) in enumerate(zip(schedule.begins, schedule.ends)):
        part = x[:, begin - first : end - first] if k else None
        hidden = model(part, cond, scales=range(k, k + 1), cache=cache)
        torch.testing.assert_close(model.logits(hidden, cond), whole[:, begin:end], atol=2e-5, rtol=0)
    assert cache.lengths == [schedule.begins[-1]] * 3  # the last scale is never stored


@torch.no_grad()
def test_prefilling_several_scales_equals_going_one_by_one():
    model = make(schedule="1,2,3,4")
    cond, x = model.condition(prompt_for(model)), inputs_for(model)
    stepped, prefilled = model.new_cache(), model.new_cache()
    model(None, cond, scales=range(1), cache=stepped)
    model(x[:, :4], cond, scales=range(1, 2), cache=stepped)
    model(x[:, :4], cond, scales=range(2), cache=prefilled)
    for a, b in zip(stepped.keys, prefilled.keys):
        torch.testing.assert_close(a[:, :, :5], b[:, :, :5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, reach", [("block_causal", "earlier"), ("block_diagonal", "own")])
@torch.no_grad()
def test_what_a_scale_can_see(kind, reach):
    model = make(mask=kind)
    cond, x = model.condition(prompt_for(model)), inputs_for(model)
    before = model(x, cond)
    changed = x.clone()
    changed[:, :4] += 1  # scale 1: tokens 1..4 of 14
    moved = (model(changed, cond) - before).abs().amax(dim=(0, 2)) > 1e-6
    assert not moved[:1].any() and moved[1:5].all()
    assert moved[5:].any() == (reach == "earlier")


@torch.no_grad()
@pytest.mark.parametrize("backend", ["flex", "grouped"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": "block_diagonal"},
        {"schedule": "1,3,9,10"},
        {"schedule": "8,9"},
        {"schedule": "1,8,9", "mask": "block_diagonal"},
    ],
    ids=str,
)
def test_backends_of_attention_agree(options, backend):
    model = make(**options)
    cond, x = model.condition(prompt_for(model)), inputs_for(model)
    torch.testing.assert_close(
        model(x, cond, attention_backend=backend), model(x, cond, attention_backend="sdpa"), atol=1e-5, rtol=0
    )


def test_groups_are_the_small_scales_and_each_large_one():
    schedule = ScaleSchedule.of("var256")
    groups = attention_mask(schedule, range(10), "cpu", backend="grouped")
    places = [(0, 91), (91, 155), (155, 255), (255, 424), (424, 680)]
    assert groups.spans == tuple((begin, end, 0) for begin, end in places) and groups.first_nn.shape == (91, 91)
    diagonal = attention_mask(schedule, range(10), "cpu", kind="block_diagonal", backend="grouped")
    assert diagonal.spans == tuple((begin, end, begin) for begin, end in places)
    assert attention_mask(schedule, range(3, 4), "cpu", kind="block_diagonal") is None
    assert attention_mask(schedule, range(3, 10), "cpu", backend="grouped", cached=True).shape == (666, 680)
    assert attention_mask(ScaleSchedule.of("8,9"), range(2), "cpu", backend="grouped").first_nn is None


def test_a_mask_is_of_the_keys_that_there_are():
    schedule = ScaleSchedule.of("1,2,3")
    assert attention_mask(schedule, range(2, 3), "cpu", cached=True) is None  # everything is seen
    own = attention_mask(schedule, range(2, 3), "cpu", kind="block_diagonal", cached=True)
    assert torch.equal(own, (torch.arange(14) >= 5).expand(9, 14))
    later = attention_mask(schedule, range(1, 3), "cpu")  # the keys of scale 0 are not among them
    assert torch.equal(later, attention_mask(schedule, range(3), "cpu")[1:, 1:])
    for wrong in ({"kind": "causal"}, {"backend": "flash"}):
        with pytest.raises(ValueError, match=f"must be one of .*{next(iter(wrong.values()))}"):
            attention_mask(schedule, range(3), "cpu", **wrong)


def test_a_rotary_position_is_the_nearest_place_of_the_grid():
    """Three cells a side on a grid of (4, 8): rows 0, 1, 3, which turn the first half of the pairs; columns 0, 3, 5."""
    schedule = replace(ScaleSchedule.of("1,3"), grid=(4, 8))
    table = rope_table(schedule, range(1, 2), 8, "cpu")
    frequencies = torch.tensor([1.0, 10000.0**-0.5])
    rows, columns = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 3.0, 5.0])
    angles = torch.cat([rows.repeat_interleave(3)[:, None] * frequencies, columns.repeat(3)[:, None] * frequencies], 1)
    torch.testing.assert_close(table, torch.polar(torch.ones(9, 4), angles))


def test_inputs_are_embedded_in_float32_under_autocast():
    """As in the official code; the blocks are in half precision."""
    model, dtypes = make(), {}
    for name in ("input_proj", "blocks.0.ffn.fc1"):
        hook = lambda _, __, out, name=name: dtypes.__setitem__(name, out.dtype)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs_for(model), model.condition(prompt_for(model)))
    assert dtypes == {"input_proj": torch.float32, "blocks.0.ffn.fc1": torch.bfloat16}


@torch.no_grad()
def test_text_padding_changes_nothing():
    model = make(conditioning="text", text_width=12, text_length=9)
    prompt, x = prompt_for(model), inputs_for(model)
    longer = TextPrompt(
        torch.cat([prompt.states_BTE, torch.full((3, 2, 12), 5.0)], 1),
        torch.cat([prompt.mask_BT, torch.zeros(3, 2) != 0], 1),
    )
    short, long = (model(x, model.condition(p)) for p in (prompt, longer))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_gradients_reach_every_parameter_also_with_checkpointing(conditioning):
    model = make(conditioning=conditioning, text_width=12, text_length=9).train()
    prompt, x = prompt_for(model), inputs_for(model)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        conds = [model.condition(p) for p in (prompt, model.null_prompt(prompt))]
        sum(model.logits(model(x, c), c).square().mean() for c in conds).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_skipped_layers_pass_their_input_on():
    model = make()
    cond, x = model.condition(prompt_for(model)), inputs_for(model)
    nothing = model(x, cond, layers=[])
    assert torch.equal(nothing, model._embed(x, cond, range(3), model.schedule))
    assert torch.equal(model(x, cond, layers=[0, 1, 2]), model(x, cond))
    for missing in ([3], [-1], [0, 7]):
        with pytest.raises(ValueError, match=r"layers must be some of 0\.\.2, got"):
            model(x, cond, layers=missing)


def test_round_trip_and_parameter_counts(tmp_path):
    model = make(conditioning="text", text_width=12, text_length=9, shared_ada=True)
    model.save_pretrained(tmp_path)
    again = NextScaleTransformer.from_pretrained(tmp_path)
    assert again.schedule == model.schedule
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("preset, millions", [("d16", 310), ("d20", 601), ("d24", 1030), ("d30", 2010), ("d36", 2350)])
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        schedule = "var512" if preset == "d36" else "var256"
        model = NextScaleTransformer(**PRESETS[preset], schedule=schedule)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_cache_accounting_is_exact():
    cache = KVCache(2, capacity=14)
    k = torch.randn(2, 4, 5, 8, dtype=torch.bfloat16)
    cache.update(0, k, k)
    cache.update(1, k, k)
    assert cache.nbytes == 2 * 2 * (2 * 4 * 14 * 8) * 2 == cache.peak_nbytes  # k and v, layers, elements, bytes
    cache.free_layers([0])
    assert cache.nbytes == 2 * (2 * 4 * 14 * 8) * 2
    cache.select(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.keys[1][0, :, :5], k[1]) and torch.equal(cache.keys[1][2, :, :5], k[0])
    cache.reserve([14, 20])
    wide = torch.randn(3, 4, 3, 8, dtype=torch.bfloat16)
    cache.update(1, wide, wide, begin=5)
    assert cache.nbytes == 2 * (3 * 4 * 20 * 8) * 2 and torch.equal(cache.keys[1][0, :, :5], k[1])
    assert cache.peak_nbytes == 2 * (3 * 4 * (14 + 20) * 8) * 2  # while a layer grew
    place = cache.keys[1].data_ptr()
    cache.update(1, wide, wide, begin=8)
    assert cache.keys[1].data_ptr() == place  # there was room
    cache.reset()
    assert cache.nbytes == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 30, "heads": 4},
        {"conditioning": "sound"},
        {"positions": "none"},
        {"mask": "full"},
        {"rope_grid": [4]},
        {"vocab_size": 1},
        {"level_every": -1},
    ],
    ids=str,
)
def test_wrong_sizes_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


@torch.no_grad()
def test_a_bridge_may_be_longer_than_the_scales_at_hand():
    model = make()
    cond, x = model.condition(prompt_for(model)), inputs_for(model)[:, :4]
    assert torch.equal(model(x, cond, scales=range(2), layers=[0], bridge=2), model(x, cond, scales=range(2)))
    assert torch.equal(model(None, cond, scales=range(1), layers=[0], bridge=2), model(None, cond, scales=range(1)))


@torch.no_grad()
def test_fewer_scales_of_a_model_keep_its_grid():
    model = make(positions="rope", rope_grid=[8, 8])
    cond, x = model.condition(prompt_for(model)), inputs_for(model)
    own = ScaleSchedule.of(model.config.schedule)
    assert torch.equal(model(x, cond, schedule=own), model(x, cond))
    assert torch.equal(model(x[:, :4], cond, schedule=ScaleSchedule.of("1,2")), model(x[:, :4], cond, scales=range(2)))


@torch.no_grad()
def test_the_whole_model_can_be_compiled():
    torch._dynamo.reset()
    model = make()
    cond, x = model.condition(prompt_for(model)), inputs_for(model).split(model.schedule.lengths[1:], dim=1)
    compiled = torch.compile(model, backend="eager")
    seen = []
    for run in (model, compiled):
        cache = model.new_cache()
        seen.append([run((None, *x)[k], cond, scales=range(k, k + 1), cache=cache) for k in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*seen))


def test_stochastic_depth_keeps_the_mean_and_drops_whole_branches():
    block = make(drop_path=0.5).train().blocks[-1]
    kept = block.kept(torch.rand(2, 2000))
    assert kept.shape == (2, 2000, 1, 1) and set(kept.unique().tolist()) == {0.0, 2.0} and abs(kept.mean() - 1) < 0.1
    assert block.eval().kept(torch.rand(2, 3)) is None
    x, ada = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    out = block(x, ada, kept_2B11=torch.tensor([[1.0, 0.0], [1.0, 0.0]])[..., None, None])
    assert torch.equal(out[1], x[1]) and torch.allclose(out[0], block(x, ada)[0])
    apart = block(x, ada, kept_2B11=torch.tensor([[1.0, 0.0], [0.0, 1.0]])[..., None, None])  # each branch by itself
    closed = [ada.index_fill(1, torch.tensor([gate]), 0.0) for gate in (1, 0)]  # as if the other's gate were shut
    for row in range(2):
        torch.testing.assert_close(apart[row], block(x, closed[row])[row])


@torch.no_grad()
def test_what_is_read_of_a_text_is_gated_channel_by_channel():
    model = make(conditioning="text", text_width=12, text_length=9, cross_gate=0.5)
    block, x = model.blocks[0], torch.randn(3, 5, 32)
    cond = model.condition(prompt_for(model))
    added = block.text_branch(x, cond.memory[0], cond.memory_mask_B11T)
    block.cross_gate_D.mul_(torch.arange(32) % 3)
    again = block.text_branch(x, cond.memory[0], cond.memory_mask_B11T)
    torch.testing.assert_close(again, added * (torch.arange(32) % 3), atol=1e-6, rtol=0)
    assert added.abs().max() > 1e-3


@pytest.mark.parametrize("qk_norm, scale", [(True, 1.0), (False, 0.25 / 4)])
@torch.no_grad()
def test_a_cache_that_chooses_is_told_the_factor_of_logits(qk_norm, scale):
    seen = []

    class Watch(KVCache):
        def update(self, *args, **kwargs):
            seen.append(kwargs["scale"])
            return super().update(*args, **kwargs)

    model = make(qk_norm=qk_norm)
    model(None, model.condition(prompt_for(model)), scales=range(1), cache=Watch(3, 5))
    assert seen == [scale] * 3  # of heads of 16


def test_blocks_that_drop_differently_are_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(depth=12, drop_path=0.1).train()
    for block in model.blocks:
        block.compile(backend="eager", dynamic=False)
    cond = model.condition(prompt_for(model))
    kept = tuple(block.kept(torch.rand(2, len(cond))) for block in model.blocks)
    hidden = model(inputs_for(model), replace(cond, kept=kept))
    assert hidden.isfinite().all() and kept[0] is None and len(kept[1]) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first block drops nothing


@pytest.mark.parametrize(
    "subnets",
    [
        {"depths": [1]},
        {"depths": [3], "bridge": 1},
        {"depths": [0], "bridge": 1},
        {"depths": [1], "bridge": -1},
        {"depths": 1, "bridge": 1},
    ],
)
def test_subnets_that_cannot_be_are_named(subnets):
    assert make(subnets={"depths": [2, 1], "bridge": 1}).config.subnets["bridge"] == 1
    with pytest.raises(ValueError, match=r"subnets must be null or like .* of less than 3 layers"):
        make(subnets=subnets)


def test_a_query_of_zeros_reads_evenly():
    attention = make().blocks[0].attn
    with torch.no_grad():
        attention.to_q.bias.zero_()
        q, k, v = attention.project(torch.zeros(1, 4, 32))
    torch.testing.assert_close(
        attention.read(q, k, v), v.transpose(1, 2).flatten(2).mean(dim=1, keepdim=True).expand(1, 4, -1)
    )


@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "positions": "rope"}])
def test_queries_keys_and_values_by_one_product_are_those_of_three(options):
    model = make(**options)
    inputs, prompt = inputs_for(model), prompt_for(model)
    grads = {}
    for mode in (False, True):
        model.zero_grad()
        hidden = model.train(mode)(inputs, model.condition(prompt))
        hidden.square().sum().backward()
        grads[mode] = [hidden, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(grads[False]) == len(grads[True]) > 20
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(grads[False], grads[True]))


def test_a_half_stream_is_half_under_autocast_only():
    model = make()
    cond, x, seen = model.condition(prompt_for(model)), inputs_for(model), []
    model.blocks[1].register_forward_pre_hook(lambda block, given: seen.append(given[0].dtype))
    for half in (False, True):
        model.half_stream = half
        for precise in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
                model(x, cond)
    assert seen == [torch.float32] * 3 + [torch.bfloat16]


@pytest.mark.parametrize("shared_ada", [False, True])
def test_a_fresh_model_begins_as_the_official_one(shared_ada):
    """Spreads of VAR's `init_weights`: init_std=-1, init_adaln=0.5, init_adaln_gamma=1e-3, init_head=0.02."""
    torch.manual_seed(0)
    sizes = {"depth": 6, "width": 256, "heads": 4, "vocab_size": 512, "latent_channels": 8, "schedule": "1,2,3,4"}
    model = NextScaleTransformer(**sizes, num_classes=64, shared_ada=shared_ada)
    base, block = (1 / 256 / 3) ** 0.5, model.blocks[3]
    expected = {
        base: [block.attn.to_q.weight, block.attn.to_k.weight, block.ffn.fc1.weight, model.level_embedding.weight],
        base / 12**0.5: [block.attn.to_out.weight, block.ffn.fc2.weight],
        base * 0.5: [model.head.ada[1].weight],
        base * 0.02: [model.head.proj.weight],
    }
    if shared_ada:
        expected[base].append(model.ada_shared[1].weight)
        expected[256**-0.5 * 0.5] = [block.ada_offset_6D[2:]]
        expected[256**-0.5 * 1e-3] = [block.ada_offset_6D[:2]]
    else:
        expected[base * 0.5].append(block.ada[1].weight[512:])
        expected[base * 1e-3] = [block.ada[1].weight[:512]]
    for spread, weights in expected.items():
        for weight in weights:
            assert weight.std().item() == pytest.approx(spread, rel=0.1)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert biases and not any(bias.any() for bias in biases)
