from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded
from vision_ar.interfaces import AttentionPattern
from vision_ar.layers.attention import Allowed, allow, attend, prefixed_mask, token_mask
from vision_ar.layers.kv_cache import ColumnCache, KVCache

BATCH, LENGTH, PREFIX = 2, 6, 3
GROUP = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 3, 3]])
MARKED = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
EXPLICIT = (torch.rand(BATCH, LENGTH, LENGTH, generator=seeded(0)) < 0.4) | torch.eye(LENGTH, dtype=torch.bool)
PATTERNS = {
    "causal": AttentionPattern(),
    "full": AttentionPattern("full"),
    "prefix": AttentionPattern("prefix", prefix_len=3),
    "block": AttentionPattern("block", group=GROUP),
    "visible": AttentionPattern("visible", mask=MARKED),
    "explicit": AttentionPattern("explicit", mask=EXPLICIT),
}
COND_MASK = torch.tensor([[True, True, False], [False, True, True]])


def may_attend(kind: str, row: int, query: int, key: int) -> bool:
    """Who may attend to whom among the tokens, said in words once more."""
    if kind == "causal":
        return key <= query
    if kind == "full":
        return True
    if kind == "prefix":
        return key < 3 or key <= query
    if kind == "block":
        return bool(GROUP[row, key] <= GROUP[row, query])
    if kind == "visible":
        return key == query or bool(MARKED[row, key])
    return bool(EXPLICIT[row, query, key])


def slow_mask(kind: str, prefix: int, cond_mask: Tensor | None = None) -> Tensor:
    """Condition prefix and tokens, (B, P + T, P + T), entry by entry."""
    total = prefix + LENGTH
    mask = torch.zeros(BATCH, total, total, dtype=torch.bool)
    for row in range(BATCH):
        for query in range(total):
            for key in range(total):
                if key < prefix:
                    allowed = query >= prefix or kind != "causal" or key <= query
                    allowed = allowed and (cond_mask is None or bool(cond_mask[row, key]))
                else:
                    allowed = query >= prefix and may_attend(kind, row, query - prefix, key - prefix)
                mask[row, query, key] = allowed or (cond_mask is not None and query == key)
    return mask


def slow_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention with one loop per axis; grouped keys serve neighbouring query heads."""
    out = torch.zeros_like(queries)
    shared = queries.shape[1] // keys.shape[1]
    for b in range(queries.shape[0]):
        for n in range(queries.shape[1]):
            for t in range(queries.shape[2]):
                seen = mask[b, t].nonzero()[:, 0]
                scores = keys[b, n // shared, seen] @ queries[b, n, t] / math.sqrt(queries.shape[-1])
                out[b, n, t] = scores.softmax(0) @ values[b, n // shared, seen]
    return out


def heads(length: int, key_heads: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(seed)
    counts = (4, key_heads, key_heads)
    queries, keys, values = (torch.randn(BATCH, n, length, 8, generator=generator) for n in counts)
    return queries, keys, values


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_kind_of_mask_says_what_its_words_say(kind: str) -> None:
    mask = token_mask(PATTERNS[kind], LENGTH, "cpu")
    assert torch.equal(mask.expand(BATCH, -1, -1), slow_mask(kind, 0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", PATTERNS)
def test_tokens_see_the_condition_prefix_and_it_never_sees_them(kind: str, masked: bool) -> None:
    cond_mask = COND_MASK if masked else None
    mask = prefixed_mask(PATTERNS[kind], LENGTH, PREFIX, "cpu", cond_mask).expand(BATCH, -1, -1)
    assert torch.equal(mask, slow_mask(kind, PREFIX, cond_mask))
    assert not mask[:, :PREFIX, PREFIX:].any()


@pytest.mark.parametrize(("prefix", "cond_mask"), [(0, None), (PREFIX, None), (PREFIX, COND_MASK)])
@pytest.mark.parametrize("kind", PATTERNS)
def test_attention_equals_slow_attention(kind: str, prefix: int, cond_mask: Tensor | None) -> None:
    queries, keys, values = heads(prefix + LENGTH)
    found = attend(queries, keys, values, allow(PATTERNS[kind], prefix + LENGTH, prefix, "cpu", cond_mask=cond_mask))
    expected = slow_attention(queries, keys, values, slow_mask(kind, prefix, cond_mask))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "prefix", "cond_mask"),
    [(kind, PREFIX, None) for kind in PATTERNS] + [("causal", PREFIX, COND_MASK), ("prefix", 0, None)],
)
@torch.no_grad()
def test_flex_attention_equals_the_plain_kernel(kind: str, prefix: int, cond_mask: Tensor | None) -> None:
    tensors = heads(prefix + LENGTH, key_heads=2)
    plain, flex = (
        allow(PATTERNS[kind], prefix + LENGTH, prefix, "cpu", cond_mask=cond_mask, flex=flex) for flex in (False, True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it runs uncompiled here and says so
        found = attend(*tensors, flex)
    torch.testing.assert_close(found, attend(*tensors, plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("causal", Allowed(causal=True)), ("full", Allowed())])
def test_plain_patterns_need_no_mask(kind: str, expected: Allowed) -> None:
    assert allow(AttentionPattern(kind), LENGTH, 0, "cpu") == expected


def test_flex_gives_a_block_mask_only_where_a_mask_is_needed() -> None:
    assert allow(PATTERNS["causal"], LENGTH, 0, "cpu", flex=True) == Allowed(causal=True)
    with torch.no_grad():
        assert allow(PATTERNS["block"], LENGTH, 0, "cpu", flex=True).block_mask is not None


def test_a_hidden_prefix_vector_changes_nobody_but_itself() -> None:
    queries, keys, values = heads(PREFIX + LENGTH)
    allowed = allow(PATTERNS["causal"], PREFIX + LENGTH, PREFIX, "cpu", cond_mask=COND_MASK)
    before = attend(queries, keys, values, allowed)
    others = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8])  # all but vector 2, hidden in row 0
    keys[0, :, 2], values[0, :, 2] = 7.0, -9.0
    after = attend(queries, keys, values, allowed)
    assert torch.equal(after[0][:, others], before[0][:, others])
    assert not torch.equal(after[0, :, 2], before[0, :, 2])


@pytest.mark.parametrize("kind", ["causal", "prefix"])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(kind: str, key_heads: int) -> None:
    queries, keys, values = heads(LENGTH, key_heads)
    allowed = allow(PATTERNS[kind], LENGTH, 0, "cpu")
    repeated = [x.repeat_interleave(4 // key_heads, dim=1) for x in (keys, values)]
    found = attend(queries, keys, values, allowed)
    torch.testing.assert_close(found, attend(queries, *repeated, allowed), rtol=1e-5, atol=1e-5)
    expected = slow_attention(queries, keys, values, slow_mask(kind, 0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_single_token_attends_to_itself() -> None:
    queries, keys, values = heads(1)
    torch.testing.assert_close(attend(queries, keys, values, allow(AttentionPattern(), 1, 0, "cpu")), values)


def filled_cache(
    lengths: list[int], keys: Tensor, values: Tensor, ragged: bool, kind: type[KVCache] = KVCache
) -> KVCache:
    """One layer, with the first `lengths[b]` of `keys` and `values` committed in row b."""
    cache = kind(1, BATCH, keys.shape[1], 12, keys.shape[3], torch.zeros(()))
    cache.append(0, keys[:, :, : max(lengths)], values[:, :, : max(lengths)])
    cache.commit()
    if ragged:
        cache.set_lengths(torch.tensor(lengths))
    return cache


@pytest.mark.parametrize("masked", [False, True], ids=["all_real", "cond_mask"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kind", ["causal", "full", "explicit"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cached", [KVCache, ColumnCache])
def test_new_tokens_see_the_cache_and_each_other(kind: str, new: int, masked: bool, ragged: bool, cached) -> None:
    lengths = [5, 3] if ragged else [5, 5]
    old_keys, old_values = heads(8, seed=2)[1:]
    queries, keys, values = heads(new, seed=3)
    staged = torch.rand(BATCH, new, new, generator=seeded(4)) < 0.5
    pattern = AttentionPattern(kind, mask=staged if kind == "explicit" else None)
    cache = filled_cache(lengths, old_keys, old_values, ragged, cached)
    cond_mask = COND_MASK if masked else None
    allowed = allow(pattern, new, 0, "cpu", cache, cond_mask)
    found = attend(queries, *cache.append(0, keys, values), allowed)
    for row, length in enumerate(lengths):
        mask = torch.ones(1, new, length + new, dtype=torch.bool)
        if cond_mask is not None:
            mask[:, :, :PREFIX] = cond_mask[row]
        among = {"causal": torch.ones(new, new).tril().bool(), "full": torch.ones(new, new).bool()}
        mask[0, :, length:] = among.get(kind, staged[row])
        joined = [torch.cat([x[row, :, :length], y[row]], 1)[None] for x, y in ((old_keys, keys), (old_values, values))]
        expected = slow_attention(queries[row][None], *joined, mask)
        torch.testing.assert_close(found[row][None], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [KVCache, ColumnCache])
def test_an_empty_cache_changes_nothing(cached) -> None:
    queries, keys, values = heads(PREFIX + LENGTH)
    cache = cached(1, BATCH, 4, 12, 8, torch.zeros(()))
    for kind, pattern in PATTERNS.items():
        allowed = allow(pattern, PREFIX + LENGTH, PREFIX, "cpu", cache)
        found = attend(queries, *cache.append(0, keys, values), allowed)
        expected = slow_attention(queries, keys, values, slow_mask(kind, PREFIX))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "block", "visible"])
def test_kinds_that_need_the_whole_sequence_are_refused_with_a_cache(kind: str) -> None:
    keys, values = heads(5)[1:]
    with pytest.raises(ValueError, match=f"with a kv_cache must be causal, full or explicit, got '{kind}'"):
        allow(PATTERNS[kind], LENGTH, 0, "cpu", filled_cache([5, 5], keys, values, False))
