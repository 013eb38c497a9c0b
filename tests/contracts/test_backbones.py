import pytest
import torch

from tests.contracts.finding import concrete
from vision_ar.checkpoints.store import build, describe
from vision_ar.interfaces import AttentionPattern, Backbone, Tokens

BACKBONES = concrete(Backbone)


@pytest.fixture(params=BACKBONES, ids=lambda cls: cls.__name__)
def backbone(request) -> Backbone:
    torch.manual_seed(0)
    return request.param.tiny().eval()


def tokens_for(backbone: Backbone, count: int = 2) -> Tokens:
    spec = backbone.spec
    ids = torch.randint(spec.vocab_size, (count, spec.seq_len), generator=torch.Generator().manual_seed(0))
    return Tokens.of(spec, ids=ids, labels=torch.arange(count))


def full_forward(backbone: Backbone, tokens: Tokens, attention: AttentionPattern | None = None) -> torch.Tensor:
    return backbone(backbone.embed(tokens), backbone.place(tokens), attention or AttentionPattern())


def test_there_is_something_to_test() -> None:
    assert BACKBONES


def test_hidden_vectors_have_the_promised_shape(backbone) -> None:
    hidden = full_forward(backbone, tokens_for(backbone))
    assert hidden.shape == (2, backbone.prefix_len + backbone.spec.seq_len, backbone.dim)


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 1, 4], [0, 8], [0, 2, 6]], ids=str)
def test_cached_decoding_equals_one_forward(backbone, chunks) -> None:
    tokens = tokens_for(backbone)
    whole = full_forward(backbone, tokens)
    embedded, positions = backbone.embed(tokens), backbone.place(tokens)
    cache, start, parts = backbone.new_cache(2), 0, []
    for number, size in enumerate(chunks):
        stop = start + size + (backbone.prefix_len if number == 0 else 0)
        part = backbone(embedded[:, start:stop], positions[:, start:stop], AttentionPattern(), cache)
        cache.commit()
        parts.append(part)
        start = stop
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_a_rejected_draft_leaves_no_trace(backbone) -> None:
    tokens = tokens_for(backbone)
    whole = full_forward(backbone, tokens)
    embedded, positions = backbone.embed(tokens), backbone.place(tokens)
    cache, known = backbone.new_cache(2), backbone.prefix_len + 3
    backbone(embedded[:, :known], positions[:, :known], AttentionPattern(), cache)
    cache.commit()
    wrong = torch.randn_like(embedded[:, known : known + 2])
    backbone(wrong, positions[:, known : known + 2], AttentionPattern(), cache)  # staged, never committed
    rest = backbone(embedded[:, known:], positions[:, known:], AttentionPattern(), cache)
    torch.testing.assert_close(rest, whole[:, known:], rtol=1e-5, atol=1e-5)


def test_rows_of_different_length_decode_as_if_alone(backbone) -> None:
    tokens = tokens_for(backbone)
    whole = full_forward(backbone, tokens)
    embedded, positions, prefix = backbone.embed(tokens), backbone.place(tokens), backbone.prefix_len
    cache = backbone.new_cache(2)
    backbone(embedded[:, : prefix + 4], positions[:, : prefix + 4], AttentionPattern(), cache)
    cache.commit()
    lengths = torch.tensor([prefix + 4, prefix + 2])
    cache.set_lengths(lengths)
    columns = lengths[:, None] + torch.arange(2)
    rows = torch.arange(2)[:, None]
    got = backbone(embedded[rows, columns], positions[rows, columns], AttentionPattern(), cache)
    torch.testing.assert_close(got, whole[rows, columns], rtol=1e-5, atol=1e-5)


def test_causal_hidden_vectors_ignore_later_tokens(backbone) -> None:
    tokens = tokens_for(backbone)
    changed = tokens_for(backbone)
    changed.ids = tokens.ids.clone()
    changed.ids[:, 5:] = (changed.ids[:, 5:] + 1) % backbone.spec.vocab_size
    before, after = (full_forward(backbone, t)[:, : backbone.prefix_len + 5] for t in (tokens, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_a_described_backbone_is_built_again(backbone) -> None:
    again = build(describe(backbone), Backbone, backbone.spec).eval()
    again.load_state_dict(backbone.state_dict(), strict=True)
    tokens = tokens_for(backbone)
    assert torch.equal(full_forward(again, tokens), full_forward(backbone, tokens))
