from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import seeded
from vision_ar.backbones.llama import PRESETS, Llama, LlamaSize
from vision_ar.interfaces import FREE, AttentionPattern, Tokens, TokenSpec
from vision_ar.layers.attention import prefixed_mask
from vision_ar.objectives.heads import TokenHead

PLAIN = TokenSpec(8, (2, 2, 2, 2), vocab_size=16)
GRID = TokenSpec(8, (8,), vocab_size=16, grid=(2, 4))
VARIANTS: dict[str, dict[str, Any]] = {
    "1d": {},
    "1d_silent": {"silent_prefix": True},
    "2d": {"rotary": "2d", "spec": GRID},
    "2d_silent": {"rotary": "2d", "spec": GRID, "silent_prefix": True},
    "none": {"rotary": "none"},
    "grouped": {"num_kv_heads": 2},
    "features": {"cond_dim": 5, "cond_len": 3},
}
PUBLISHED_SIZES = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
}
"""LlamaGen with 1000 classes and 16384 ids, output layer included."""


def make_llama(spec: TokenSpec = PLAIN, num_kv_heads: int | None = None, **settings: Any) -> Llama:
    """4 heads of width 8; weights large enough that attention is not flat."""
    torch.manual_seed(0)
    llama = Llama(spec, LlamaSize("tiny", dim=32, num_heads=4, num_kv_heads=num_kv_heads), num_classes=3, **settings)
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return llama.eval()


def make_tokens(llama: Llama, batch_size: int = 2, seed: int = 0) -> Tokens:
    generator = seeded(seed)
    ids = torch.randint(16, (batch_size, llama.spec.seq_len), generator=generator)
    if llama.condition is None:
        return Tokens.of(llama.spec, ids=ids, labels=torch.randint(3, (batch_size,), generator=generator))
    return Tokens.of(llama.spec, ids=ids, cond=torch.randn(batch_size, llama.prefix_len, 5, generator=generator))


def hidden(llama: Llama, tokens: Tokens, pattern: AttentionPattern = AttentionPattern()) -> Tensor:  # noqa: B008
    with torch.no_grad():
        return llama(llama.embed(tokens), llama.place(tokens), pattern, cond_mask=tokens.cond_mask)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(vector: Tensor, place: list[int] | None) -> Tensor:
    """Rotary of one head at one place; None turns nothing."""
    if place is None:
        return vector
    if min(place) < 0:
        return torch.zeros_like(vector)
    part = len(vector) // len(place)
    angles = torch.tensor([p * 10000 ** (-2 * i / part) for p in place for i in range(part // 2)])
    pairs = torch.view_as_complex(vector.view(-1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()


def slow_llama(llama: Llama, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """One row (S, D) by the formulas, a loop over heads and vectors; `mask` (S, S), True may attend."""
    dim, width = llama.dim, llama.head_dim
    for block in llama.blocks:
        normed = rms_norm(x, block.attention_norm.weight)
        queries, keys, values = (normed @ block.qkv.weight.T).split(
            [dim, width * llama.num_kv_heads, width * llama.num_kv_heads], dim=-1
        )
        attended = torch.zeros_like(x)
        for head in range(dim // width):
            own = slice(head * width, (head + 1) * width)
            start = head * llama.num_kv_heads // (dim // width) * width
            shared = slice(start, start + width)
            at = [None if llama.rotary == "none" else place for place in places.tolist()]
            q = torch.stack([turned(queries[t, own], at[t]) for t in range(len(x))])
            k = torch.stack([turned(keys[t, shared], at[t]) for t in range(len(x))])
            scores = (q @ k.T / math.sqrt(width)).masked_fill(~mask, -math.inf)
            attended[:, own] = scores.softmax(-1) @ values[:, shared]
        x = x + attended @ block.out.weight.T
        gate, up = (rms_norm(x, block.mlp_norm.weight) @ block.mlp.gate_up.weight.T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ block.mlp.down.weight.T
    return rms_norm(x, llama.norm.weight)


@pytest.mark.parametrize("preset", PUBLISHED_SIZES)
def test_presets_have_as_many_weights_as_published(preset: str) -> None:
    with torch.device("meta"):
        llama = Llama(TokenSpec(256, (256,), vocab_size=16384), LlamaSize(preset), num_classes=1000)
        head = TokenHead(llama.dim, 16384)
    assert sum(p.numel() for part in (llama, head) for p in part.parameters()) == PUBLISHED_SIZES[preset]


@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_pass_equals_the_formulas(variant: str, kind: str) -> None:
    llama = make_llama(**VARIANTS[variant])
    tokens, pattern = make_tokens(llama), AttentionPattern(kind)
    found, places = hidden(llama, tokens, pattern), llama.place(tokens)
    mask = prefixed_mask(pattern, 8, llama.prefix_len, "cpu", None)[0]
    with torch.no_grad():
        rows = [slow_llama(llama, x, places[row], mask) for row, x in enumerate(llama.embed(tokens))]
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, "one by one", [3, 1, 4]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_one_forward(variant: str, sizes: list[int] | str | None) -> None:
    llama = make_llama(**VARIANTS[variant])
    tokens, prefix = make_tokens(llama), llama.prefix_len
    chunks = {None: [prefix + 8], "one by one": [prefix] + [1] * 8}.get(sizes if sizes != [3, 1, 4] else 0)  # type: ignore[call-overload]
    embeddings, places, cache = llama.embed(tokens), llama.place(tokens), llama.new_cache(2)
    parts = []
    with torch.no_grad():
        for x, place in zip(*(y.split(chunks or [prefix + 3, 1, 4], dim=1) for y in (embeddings, places)), strict=True):
            parts.append(llama(x, place, AttentionPattern(), cache))
            cache.commit()
    torch.testing.assert_close(torch.cat(parts, dim=1), hidden(llama, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["1d", "2d_silent", "grouped"])
def test_rows_of_different_length_continue_alike(variant: str) -> None:
    llama = make_llama(**VARIANTS[variant])
    tokens = make_tokens(llama)
    embeddings, places, whole = llama.embed(tokens), llama.place(tokens), hidden(llama, tokens)
    cache = llama.new_cache(2)
    lengths = [6, 3]  # vectors that row 0 and row 1 keep, the prefix among them
    with torch.no_grad():
        llama(embeddings[:, :7], places[:, :7], AttentionPattern(), cache)
        cache.commit()
        cache.set_lengths(torch.tensor(lengths))
        columns = torch.tensor([[length, length + 1, length + 2] for length in lengths])
        rows = torch.arange(2)[:, None]
        found = llama(embeddings[rows, columns], places[rows, columns], AttentionPattern(), cache)
    torch.testing.assert_close(found, whole[rows, columns], rtol=1e-4, atol=1e-5)


def test_a_tree_of_drafts_is_read_like_its_paths() -> None:
    llama = make_llama()
    tokens, prefix = make_tokens(llama, 1), 1
    ids = tokens.ids[0].tolist()
    # two columns are known; entries 0-1 continue as tokens 2 and 3, entries 2-3 are another choice for them
    other = [(ids[2] + 1) % 16, (ids[3] + 5) % 16]
    tree = Tokens.of(PLAIN, ids=torch.tensor([ids[:2] + ids[2:4] + other + [0, 0]]), labels=tokens.labels)
    embeddings = llama.embed(tree)
    places = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])[..., None]
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()[None]
    cache = llama.new_cache(1)
    with torch.no_grad():
        llama(embeddings[:, :3], places[:, :3], AttentionPattern(), cache)
        cache.commit()
        found = llama(embeddings[:, 3:7], places[:, 3:7], AttentionPattern("explicit", mask=mask), cache)
        cache.commit(torch.tensor([[2, 3]]), torch.tensor([2]))
        path = Tokens.of(PLAIN, ids=torch.tensor([ids[:2] + other + ids[4:]]), labels=tokens.labels)
        after = llama(llama.embed(path)[:, 5:6], torch.tensor([[[5]]]), AttentionPattern(), cache)
    first, second = hidden(llama, tokens), hidden(llama, path)
    torch.testing.assert_close(found[:, :2], first[:, prefix + 2 : prefix + 4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 2:], second[:, prefix + 2 : prefix + 4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, second[:, 5:6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(num_kv_heads: int) -> None:
    grouped, full = make_llama(num_kv_heads=num_kv_heads), make_llama()
    state = grouped.state_dict()
    for layer in range(2):
        parts = state[f"blocks.{layer}.qkv.weight"].split([32, 8 * num_kv_heads, 8 * num_kv_heads])
        repeated = [
            x.view(num_kv_heads, 8, 32).repeat_interleave(4 // num_kv_heads, 0).flatten(0, 1) for x in parts[1:]
        ]
        state[f"blocks.{layer}.qkv.weight"] = torch.cat([parts[0], *repeated])
    full.load_state_dict(state)
    tokens = make_tokens(full)
    torch.testing.assert_close(hidden(grouped, tokens), hidden(full, tokens), rtol=1e-4, atol=1e-5)
    assert grouped.new_cache(1).keys.shape[2] == num_kv_heads and full.new_cache(1).keys.shape[2] == 4


def test_flex_equals_the_plain_kernel() -> None:
    pattern = AttentionPattern("block", group=PLAIN.group_of().expand(2, -1))
    plain, flex = make_llama(), make_llama(flex=True)
    tokens = make_tokens(plain)
    with torch.no_grad():
        torch.testing.assert_close(hidden(flex, tokens, pattern), hidden(plain, tokens, pattern), rtol=1e-4, atol=1e-5)


def test_flex_trains_on_a_cpu_with_the_plain_kernel() -> None:
    pattern = AttentionPattern("block", group=PLAIN.group_of().expand(2, -1))
    gradients = []
    for llama in (make_llama(), make_llama(flex=True)):
        tokens = make_tokens(llama)
        llama(llama.embed(tokens), llama.place(tokens), pattern).square().sum().backward()
        gradients.append(llama.token_table.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("1d", [[i] for i in range(9)]),
        ("1d_silent", [[-1]] + [[i] for i in range(1, 9)]),
        ("2d", [[0, 0]] + [[i, j] for i in range(2) for j in range(4)]),
        ("2d_silent", [[-1, -1]] + [[i, j] for i in range(2) for j in range(4)]),
        ("features", [[i] for i in range(11)]),
    ],
)
def test_prefix_and_tokens_have_their_places(variant: str, expected: list[list[int]]) -> None:
    llama = make_llama(**VARIANTS[variant])
    assert llama.place(make_tokens(llama)).tolist() == [expected, expected]


def test_one_axis_counts_the_tokens_of_a_grid_through() -> None:
    llama = make_llama(GRID)
    assert llama.place(make_tokens(llama))[0, :, 0].tolist() == list(range(9))


def test_without_rotation_full_attention_does_not_know_the_order() -> None:
    llama = make_llama(rotary="none")
    tokens, order = make_tokens(llama), torch.randperm(8, generator=seeded(1))
    shuffled = Tokens.of(PLAIN, ids=tokens.ids[:, order], labels=tokens.labels)
    full = AttentionPattern("full")
    first, second = hidden(llama, tokens, full)[:, 1:], hidden(llama, shuffled, full)[:, 1:]
    torch.testing.assert_close(second, first[:, order], rtol=1e-4, atol=1e-5)
    rotated = make_llama()
    first, second = hidden(rotated, tokens, full)[:, 1:], hidden(rotated, shuffled, full)[:, 1:]
    assert not torch.allclose(second, first[:, order], atol=1e-2)


def test_a_silent_prefix_acts_through_its_values_only() -> None:
    llama = make_llama(rotary="2d", spec=GRID, silent_prefix=True)
    tokens = make_tokens(llama)
    embeddings, places = llama.embed(tokens).detach(), llama.place(tokens)
    before = hidden(llama, tokens)
    with torch.no_grad():
        for block in llama.blocks:  # all later scores of the prefix are 0 whatever the key: turn its embedding's sign
            block.qkv.weight.mul_(1)
        keys = llama.blocks[0].qkv(llama.blocks[0].attention_norm(embeddings))[..., 32:64]
        assert keys[:, 0].abs().max() > 0.1
    assert places[0, 0].tolist() == [-1, -1]
    heard = make_llama(rotary="2d", spec=GRID)
    assert not torch.allclose(hidden(heard, tokens), before, atol=1e-3)


def test_the_condition_is_the_row_of_the_label() -> None:
    llama = make_llama()
    tokens = make_tokens(llama)
    assert torch.equal(llama.embed_condition(tokens)[:, 0], llama.label_table.weight[tokens.labels])
    assert not torch.allclose(hidden(llama, tokens)[0], hidden(llama, Tokens.of(PLAIN, ids=tokens.ids))[0], atol=1e-3)


def test_no_label_is_the_null_label() -> None:
    llama = make_llama()
    ids = make_tokens(llama).ids
    null = torch.full((2,), llama.null_label)
    assert llama.null_label == 3 and llama.label_table.num_embeddings == 4
    assert torch.equal(
        llama.embed_condition(Tokens.of(PLAIN, ids=ids)), llama.embed_condition(Tokens.of(PLAIN, ids=ids, labels=null))
    )


def test_features_pass_two_layers_and_absent_ones_are_the_learned_null() -> None:
    llama = make_llama(cond_dim=5, cond_len=3)
    tokens = make_tokens(llama)
    condition = llama.condition

    def projected(features: Tensor) -> Tensor:
        return F.gelu(features @ condition.fc1.weight.T, approximate="tanh") @ condition.fc2.weight.T

    torch.testing.assert_close(llama.embed_condition(tokens), projected(tokens.cond))
    absent = Tokens.of(PLAIN, ids=tokens.ids)
    expected = projected(condition.null_features).expand(2, -1, -1)
    torch.testing.assert_close(llama.embed_condition(absent), expected)
    assert llama.prefix_len == 3 and llama.label_table is None


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_masked_features_are_not_read(kind: str) -> None:
    llama = make_llama(cond_dim=5, cond_len=3)
    tokens = make_tokens(llama)
    tokens.cond_mask = torch.tensor([[True, True, False], [False, True, True]])
    before = hidden(llama, tokens, AttentionPattern(kind))
    tokens.cond = tokens.cond.masked_fill(~tokens.cond_mask[..., None], 100.0)
    after = hidden(llama, tokens, AttentionPattern(kind))
    assert torch.equal(after[:, 3:], before[:, 3:])
    tokens.cond_mask = None
    assert not torch.allclose(hidden(llama, tokens, AttentionPattern(kind))[:, 3:], before[:, 3:], atol=1e-2)


def test_a_masked_prefix_equals_a_shorter_one() -> None:
    long, short = make_llama(cond_dim=5, cond_len=3, rotary="none"), make_llama(cond_dim=5, cond_len=2, rotary="none")
    state = long.state_dict()
    short.load_state_dict(state | {"condition.null_features": state["condition.null_features"][:2]})
    tokens = make_tokens(long)
    tokens.cond_mask = torch.tensor([[True, True, False]] * 2)
    cut = Tokens.of(PLAIN, ids=tokens.ids, cond=tokens.cond[:, :2])
    torch.testing.assert_close(hidden(long, tokens)[:, 3:], hidden(short, cut)[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[3] + [1] * 8, [5, 2, 4], [11]], ids=str)
def test_cached_decoding_with_masked_features_equals_one_forward(sizes: list[int]) -> None:
    llama = make_llama(cond_dim=5, cond_len=3)
    tokens = make_tokens(llama)
    tokens.cond_mask = torch.tensor([[True, True, False], [False, True, True]])
    cache, parts = llama.new_cache(2), []
    with torch.no_grad():
        for x, place in zip(*(y.split(sizes, dim=1) for y in (llama.embed(tokens), llama.place(tokens))), strict=True):
            parts.append(llama(x, place, AttentionPattern(), cache, cond_mask=tokens.cond_mask))
            cache.commit()
    torch.testing.assert_close(torch.cat(parts, dim=1), hidden(llama, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"cond_dim": 5, "cond_len": 3}], ids=["labels", "features"])
def test_the_condition_is_dropped_in_training_only(settings: dict[str, int]) -> None:
    llama = make_llama(cond_dropout=1.0, **settings)
    tokens = make_tokens(llama)
    kept, null = llama.embed_condition(tokens), llama.embed_condition(Tokens.of(PLAIN, ids=tokens.ids))
    assert not torch.allclose(kept, null, atol=1e-3)
    assert torch.equal(llama.train().embed_condition(tokens), null)
    llama.cond_dropout = 0.0
    assert torch.equal(llama.embed_condition(tokens), kept)


def test_the_asked_share_of_the_samples_loses_its_condition() -> None:
    # 4000 samples at 0.25: 5 standard errors are 0.034, fails with probability 1e-6
    llama = make_llama(cond_dropout=0.25).train()
    tokens = Tokens.of(PLAIN, ids=torch.zeros(4000, 8, dtype=torch.int64), labels=torch.ones(4000, dtype=torch.int64))
    torch.manual_seed(0)
    dropped = (llama.embed_condition(tokens)[:, 0] == llama.label_table.weight[3]).all(dim=-1)
    assert abs(float(dropped.float().mean()) - 0.25) < 0.034


def test_dropout_acts_in_training_only() -> None:
    llama = make_llama(dropout=0.5, cond_dropout=0.0)
    tokens = make_tokens(llama)
    assert torch.equal(hidden(llama, tokens), hidden(make_llama(), tokens))
    llama.train()
    torch.manual_seed(0)
    assert not torch.equal(hidden(llama, tokens), hidden(llama, tokens))


def test_null_rows_follow_the_labels() -> None:
    rows = make_llama().with_null_rows({"labels": torch.tensor([2, 0])})
    assert {name: value.tolist() for name, value in rows.items()} == {"labels": [2, 0, 3, 3]}


def test_null_rows_follow_the_features() -> None:
    llama = make_llama(cond_dim=5, cond_len=3)
    tokens = make_tokens(llama)
    rows = llama.with_null_rows({"cond": tokens.cond})
    assert torch.equal(rows["cond"][:2], tokens.cond)
    unconditional = llama.embed_condition(Tokens.of(PLAIN, ids=tokens.ids))
    with_null = Tokens.of(PLAIN, ids=tokens.ids.repeat(2, 1), cond=rows["cond"])
    assert torch.equal(llama.embed_condition(with_null)[2:], unconditional)


def test_null_rows_of_nothing_are_nothing_and_the_given_condition_is_not_changed() -> None:
    llama, condition = make_llama(), {"labels": torch.tensor([1])}
    llama.with_null_rows(condition)
    assert llama.with_null_rows({}) == {} and condition["labels"].tolist() == [1]


def test_hidden_tokens_have_a_vector_of_their_own() -> None:
    llama = make_llama(mask_token=True)
    ids = torch.tensor([[3, FREE, 0, FREE, 5, 6, 7, 8]])
    vectors = llama.embed_tokens(Tokens.of(PLAIN, ids=ids))[0]
    assert torch.equal(vectors[[1, 3]], llama.mask_vector.expand(2, -1))
    assert torch.equal(vectors[[0, 2, 4]], llama.token_table.weight[[3, 0, 5]])


def test_embeddings_of_ids_and_latents_add() -> None:
    spec = TokenSpec(8, (8,), vocab_size=16, latent_dim=3)
    llama, latents = make_llama(spec), torch.randn(2, 8, 3, generator=seeded(0))
    ids = make_tokens(make_llama()).ids
    both = llama.embed_tokens(Tokens.of(spec, ids=ids, latents=latents))
    parts = llama.embed_tokens(Tokens.of(spec, ids=ids)), llama.embed_tokens(Tokens.of(spec, latents=latents))
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_continuous_tokens_need_no_table() -> None:
    spec = TokenSpec(8, (8,), latent_dim=3)
    llama = make_llama(spec)
    assert llama.token_table is None
    tokens = Tokens.of(spec, latents=torch.randn(2, 8, 3, generator=seeded(0)), labels=torch.tensor([0, 1]))
    assert hidden(llama, tokens).shape == (2, 9, 32)


def test_weights_start_normal_with_the_published_spread() -> None:
    torch.manual_seed(0)
    llama = Llama(TokenSpec(8, (8,), vocab_size=512), LlamaSize("small"))
    for name, parameter in llama.named_parameters():
        if parameter.dim() == 2:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_a_cache_has_room_for_prefix_and_tokens() -> None:
    llama = make_llama(cond_dim=5, cond_len=3)
    for cache, shape in ((llama.new_cache(2), (2, 2, 4, 11, 8)), (llama.new_cache(4, 5), (2, 4, 4, 8, 8))):
        cache.set_lengths(cache.lengths)  # then all slots are there
        assert cache.keys.shape == cache.values.shape == shape
    assert llama.bfloat16().new_cache(1).keys.dtype == torch.bfloat16


def test_sizes_override_the_preset() -> None:
    assert LlamaSize("B").resolved() == (768, 12, 12, 12)
    assert LlamaSize("B", depth=3, num_kv_heads=4).resolved() == (768, 3, 12, 4)
    assert all(LlamaSize(name).resolved()[:3] == sizes for name, sizes in PRESETS.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "huge"}, "preset must be one of tiny, small, B, L, XL, XXL, 3B, got 'huge'"),
        ({"preset": "tiny", "num_heads": 3}, "dim must be a multiple of num_heads .* got 64, 3, 3"),
        ({"preset": "B", "num_kv_heads": 5}, "num_heads of num_kv_heads, got 768, 12, 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaSize(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotary": "3d"}, "rotary must be 1d, 2d or none, got '3d'"),
        ({"rotary": "2d"}, "rotary 2d needs tokens on a grid of two axes, got grid None"),
        (
            {"rotary": "2d", "spec": TokenSpec(8, (8,), vocab_size=4, grid=(2, 2, 2))},
            r"rotary 2d needs tokens on a grid of two axes, got grid \(2, 2, 2\)",
        ),
    ],
)
def test_rotations_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_llama(**settings)
