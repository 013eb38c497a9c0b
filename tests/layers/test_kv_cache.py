from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded
from vision_ar.layers.kv_cache import ColumnCache, KVCache, new_cache

DEPTH, HEADS, SLOTS, WIDTH = 2, 3, 10, 4
kind: type[KVCache] = KVCache


@pytest.fixture(autouse=True, params=[KVCache, ColumnCache])
def each_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs for both; the one that grows does so in small steps."""
    monkeypatch.setitem(globals(), "kind", request.param)
    monkeypatch.setattr(ColumnCache, "GROWTH", 3)


def make_cache(batch_size: int, slots: int = SLOTS) -> KVCache:
    return kind(DEPTH, batch_size, HEADS, slots, WIDTH, torch.zeros(()))


def entries(batch_size: int, new: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of `new` tokens in every layer."""
    generator = seeded(seed)
    shape = (2, batch_size, HEADS, new, WIDTH)
    return [tuple(torch.randn(shape, generator=generator)) for _ in range(DEPTH)]  # type: ignore[misc]


def stage(cache: KVCache, new: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Stage them, and return what may be read of every layer: less than all slots only while rows are equally long."""
    pairs = [cache.append(layer, *pair) for layer, pair in enumerate(new)]
    if cache.common_length is None:
        return pairs
    end = cache.common_length + new[0][0].shape[2]
    return [(keys[:, :, :end], values[:, :, :end]) for keys, values in pairs]


def committed(cache: KVCache, row: int) -> Tensor:
    """Committed keys and values of a row, (2, L, N, S', E)."""
    return torch.stack([cache.keys, cache.values])[:, :, row, :, : int(cache.lengths[row])]


def columns(new: list[tuple[Tensor, Tensor]], row: int, kept: list[int]) -> Tensor:
    """The same layout of staged entries `kept`, in order."""
    return torch.stack([torch.stack([pair[side][row][:, kept] for pair in new]) for side in (0, 1)])


def test_a_new_cache_is_empty_and_takes_device_and_dtype_of_like() -> None:
    cache = kind(1, 2, 1, 3, 4, torch.zeros((), dtype=torch.bfloat16))
    assert cache.keys.shape == cache.values.shape == (1, 2, 1, 0 if kind is ColumnCache else 3, 4)
    assert cache.keys.dtype == torch.bfloat16
    assert cache.lengths.tolist() == [0, 0] and cache.common_length == 0 and cache.max_seq_len == 3


def test_append_returns_what_is_committed_and_staged_of_that_layer() -> None:
    cache, first, second = make_cache(2), entries(2, 3, 0), entries(2, 2, 1)
    for keys_values, returned in zip(first, stage(cache, first), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(keys_values, returned, strict=True))
    cache.commit()
    for before, after, returned in zip(first, second, stage(cache, second), strict=True):
        assert all(torch.equal(torch.cat(pair, dim=2), y) for *pair, y in zip(before, after, returned, strict=True))
    assert cache.lengths.tolist() == [3, 3]


def test_what_is_not_committed_is_overwritten() -> None:
    cache, wrong, right = make_cache(2), entries(2, 4, 0), entries(2, 1, 1)
    stage(cache, wrong)
    stage(cache, right)
    cache.commit()
    assert cache.lengths.tolist() == [1, 1]
    assert torch.equal(committed(cache, 0), columns(right, 0, [0]))


@pytest.mark.parametrize("ragged", [False, True])
def test_rolling_back_forgets_the_newest_entries(ragged: bool) -> None:
    cache, first, second = make_cache(2), entries(2, 5, 0), entries(2, 2, 1)
    stage(cache, first)
    cache.commit()
    cache.set_lengths(torch.tensor([2, 4 if ragged else 2]))
    stage(cache, second)
    cache.commit()
    for row, length in enumerate([2, 4 if ragged else 2]):
        expected = torch.cat([columns(first, row, list(range(length))), columns(second, row, [0, 1])], dim=3)
        assert torch.equal(committed(cache, row), expected)


def test_set_lengths_keeps_a_copy() -> None:
    cache, lengths = make_cache(2), torch.tensor([0, 0])
    cache.set_lengths(lengths)
    stage(cache, entries(2, 1, 0))
    cache.commit()
    assert lengths.tolist() == [0, 0] and cache.lengths.tolist() == [1, 1]


def test_rows_of_different_length_stage_behind_their_own_end() -> None:
    cache, first, second = make_cache(3), entries(3, 4, 0), entries(3, 2, 1)
    stage(cache, first)
    cache.commit()
    cache.set_lengths(torch.tensor([1, 4, 0]))
    returned = stage(cache, second)
    for row, length in enumerate([1, 4, 0]):
        for layer in range(DEPTH):
            for side in (0, 1):
                found = returned[layer][side][row, :, : length + 2]
                parts = [first[layer][side][row, :, :length], second[layer][side][row]]
                assert torch.equal(found, torch.cat(parts, dim=1))


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 0, 2]])
def test_the_mask_shows_committed_entries_and_the_staged_ones_that_may_be_seen(lengths, tree: bool) -> None:
    cache, new = make_cache(3), 4
    stage(cache, entries(3, 3, 0))
    cache.commit()
    if lengths is not None:
        cache.set_lengths(torch.tensor(lengths))
    staged_mask = torch.rand(3, new, new, generator=seeded(1)) < 0.5 if tree else None
    mask = cache.visible(new, staged_mask)
    assert mask is not None
    width = 3 + new if lengths is None and kind is KVCache else cache.keys.shape[3]
    assert width == (7 if lengths is None and kind is KVCache else 9 if lengths is None else SLOTS)
    expected = torch.zeros(3, new, width, dtype=torch.bool)
    for row, length in enumerate(lengths or [3, 3, 3]):
        for i in range(new):
            expected[row, i, :length] = True
            for j in range(new):
                expected[row, i, length + j] = j <= i if staged_mask is None else staged_mask[row, i, j]
    assert torch.equal(mask.expand(3, -1, -1), expected)


def sees(cache: KVCache, count: int) -> bool:
    """True when one new token of equally long rows sees so many entries, or all that there are without a mask."""
    mask = cache.visible(1)
    if kind is KVCache:
        return mask is None and cache.common_length == count - 1
    assert mask is not None
    return mask.shape == (1, 1, cache.keys.shape[3]) and mask[0, 0].nonzero().flatten().tolist() == list(range(count))


def test_one_new_token_of_equally_long_rows_sees_all_before_it() -> None:
    cache = make_cache(2)
    stage(cache, entries(2, 3, 0))
    cache.commit()
    assert sees(cache, 4)


def test_committing_a_path_of_a_tree_equals_a_cache_filled_in_order() -> None:
    cache, start, tree = make_cache(3), entries(3, 2, 0), entries(3, 5, 1)
    stage(cache, start)
    cache.commit()
    paths = [[0, 2, 4], [1, 3], []]  # of entries 0 to 4 of the tree; each row accepts another path
    stage(cache, tree)
    kept = torch.tensor([path + [0] * (3 - len(path)) for path in paths])
    cache.commit(kept, torch.tensor([len(path) for path in paths]))
    assert cache.lengths.tolist() == [5, 4, 2]
    after = entries(3, 2, 2)
    stage(cache, after)
    cache.commit()
    for row, path in enumerate(paths):
        ordered = make_cache(1)
        for part in (columns(start, row, [0, 1]), columns(tree, row, path), columns(after, row, [0, 1])):
            stage(ordered, [(part[0, layer][None], part[1, layer][None]) for layer in range(DEPTH)])
            ordered.commit()
        assert torch.equal(committed(cache, row), committed(ordered, 0))


def test_a_path_that_moves_entries_onto_each_other_is_gathered_first() -> None:
    cache, tree = make_cache(1), entries(1, 4, 0)
    stage(cache, tree)
    cache.commit(torch.tensor([[3, 0, 1]]), torch.tensor([3]))
    assert torch.equal(committed(cache, 0), columns(tree, 0, [3, 0, 1]))


def test_a_path_may_fill_a_row_to_the_last_slot() -> None:
    cache, start, tree = make_cache(2, slots=6), entries(2, 3, 0), entries(2, 3, 1)
    stage(cache, start)
    cache.commit()
    stage(cache, tree)
    cache.commit(torch.tensor([[0, 1, 2], [2, 0, 0]]), torch.tensor([3, 1]))
    assert torch.equal(committed(cache, 0), torch.cat([columns(start, 0, [0, 1, 2]), columns(tree, 0, [0, 1, 2])], 3))
    assert torch.equal(committed(cache, 1), torch.cat([columns(start, 1, [0, 1, 2]), columns(tree, 1, [2])], 3))


def test_select_reorders_drops_and_forks_rows() -> None:
    cache, first, second = make_cache(3), entries(3, 3, 0), entries(4, 1, 1)
    stage(cache, first)
    cache.commit()
    cache.set_lengths(torch.tensor([1, 2, 3]))
    cache.select(torch.tensor([2, 0, 0, 1]))
    assert cache.lengths.tolist() == [3, 1, 1, 2]
    stage(cache, second)
    cache.commit()
    for row, source in enumerate([2, 0, 0, 1]):
        expected = torch.cat([columns(first, source, list(range(source + 1))), columns(second, row, [0])], dim=3)
        assert torch.equal(committed(cache, row), expected)  # forks do not share their slots


def test_select_keeps_the_fast_path_of_equally_long_rows() -> None:
    cache = make_cache(2)
    stage(cache, entries(2, 3, 0))
    cache.commit()
    cache.select(torch.tensor([1]))
    assert cache.common_length == 3 and sees(cache, 4)


def test_a_full_cache_says_how_much_room_it_would_need() -> None:
    cache = make_cache(2, slots=4)
    stage(cache, entries(2, 3, 0))
    cache.commit()
    with pytest.raises(RuntimeError, match="kv_cache must have room for 5 entries, it was made for 4"):
        stage(cache, entries(2, 2, 1))
    stage(cache, entries(2, 1, 1))
    cache.commit()
    assert cache.common_length == 4


def test_entries_take_the_dtype_of_the_cache() -> None:
    cache = kind(1, 1, 1, 4, 2, torch.zeros((), dtype=torch.bfloat16))
    keys, values = torch.randn(2, 1, 1, 1, 2, generator=seeded(0)).unbind()
    assert cache.append(0, keys, values)[0].dtype == torch.bfloat16
    cache.commit()
    cache.set_lengths(torch.tensor([1]))
    assert cache.append(0, keys, values)[0].dtype == torch.bfloat16


def test_a_cache_that_grows_keeps_what_it_has_and_stays_laid_out_by_column() -> None:
    cache, parts = ColumnCache(DEPTH, 2, HEADS, SLOTS, WIDTH, torch.zeros(())), [entries(2, 2, n) for n in range(5)]
    slots = []
    for part in parts:
        stage(cache, part)
        cache.commit()
        slots.append(cache.keys.shape[3])
    assert slots == [3, 6, 6, 9, 10]
    for row in range(2):
        assert torch.equal(committed(cache, row), torch.cat([columns(part, row, [0, 1]) for part in parts], dim=3))
    cache.select(torch.tensor([1, 0]))
    assert cache.keys.transpose(-1, -2).is_contiguous() and cache.values.is_contiguous()


def test_a_cpu_gets_the_cache_that_grows() -> None:
    assert type(new_cache(1, 1, 1, 4, 2, torch.zeros(()))) is ColumnCache
    assert type(new_cache(1, 1, 1, 4, 2, torch.zeros((), device="meta"))) is KVCache


def test_a_cache_of_8_bits_rounds_entries_and_reads_them_in_the_dtype_of_the_queries() -> None:
    like = torch.zeros((), dtype=torch.float8_e4m3fn)
    cache = new_cache(1, 2, HEADS, SLOTS, WIDTH, like)
    assert type(cache) is KVCache and cache.full_bytes == 2 * 2 * HEADS * SLOTS * WIDTH
    (keys, values), *_ = entries(2, 3, 0)
    keys[0, 0, 0, 0] = 1e4  # beyond the largest number of the format
    cache.append(0, keys, values)
    cache.commit()
    cache.set_lengths(torch.tensor([3, 2]))
    (more, _), *_ = entries(2, 1, 1)
    found, _ = cache.append(0, more, more)
    cache.commit()
    keys[0, 0, 0, 0] = 448
    torch.testing.assert_close(found[:, :, :2].float(), keys[:, :, :2], rtol=2**-4, atol=2**-9)
    torch.testing.assert_close(found[0, :, 3].float(), more[0, :, 0], rtol=2**-4, atol=2**-9)
    torch.testing.assert_close(found[1, :, 2].float(), more[1, :, 0], rtol=2**-4, atol=2**-9)


def test_a_restarted_cache_is_empty_and_its_buffers_stay() -> None:
    cache = make_cache(2)
    stage(cache, entries(2, 3, 0))
    cache.commit()
    lengths = cache.lengths
    cache.restart()
    assert cache.common_length == 0 and cache.lengths is lengths and lengths.tolist() == [0, 0]
    new = entries(2, 2, 1)
    for (keys, _), (found, _) in zip(new, stage(cache, new), strict=True):
        torch.testing.assert_close(found, keys)
