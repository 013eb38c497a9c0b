import pytest
import torch

from tests.contracts.finding import concrete
from vision_ar.checkpoints.store import build, describe
from vision_ar.data.codes import tokenizer_hash
from vision_ar.interfaces import Tokenizer, Tokens

TOKENIZERS = concrete(Tokenizer)


@pytest.fixture(params=TOKENIZERS, ids=lambda cls: cls.__name__)
def tokenizer(request) -> Tokenizer:
    torch.manual_seed(0)
    return request.param.tiny().eval()


def images_for(tokenizer: Tokenizer, count: int = 3) -> torch.Tensor:
    size, channels = tokenizer.image_size, tokenizer.channels
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_there_is_something_to_test() -> None:
    assert TOKENIZERS


def test_encoding_gives_tokens_as_the_spec_says(tokenizer) -> None:
    tokens = tokenizer.encode(images_for(tokenizer), torch.tensor([0, 1, 2]))
    spec = tokenizer.spec
    assert tokens.ids.shape == (3, spec.seq_len)
    assert tokens.ids.dtype == torch.int64
    assert int(tokens.ids.min()) >= 0 and int(tokens.ids.max()) < spec.vocab_size
    assert torch.equal(tokens.group[0], spec.group_of())
    assert tokens.labels.tolist() == [0, 1, 2]


def test_encoding_is_deterministic_and_does_not_mix_the_batch(tokenizer) -> None:
    images = images_for(tokenizer)
    assert torch.equal(tokenizer.encode(images).ids[1:2], tokenizer.encode(images[1:2]).ids)


def test_decoding_gives_data_of_the_same_shape(tokenizer) -> None:
    images = images_for(tokenizer)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


def test_the_last_preview_is_the_decoded_data(tokenizer) -> None:
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = tokenizer.encode(images_for(tokenizer)).ids
    seeds = torch.tensor([3, 4, 5])
    preview = tokenizer.open_preview(3, seeds)
    shown = [preview.feed(part) for part in ids.split(list(tokenizer.spec.groups), dim=1)]
    whole = tokenizer.decode(Tokens.of(tokenizer.spec, ids=ids), seeds)
    torch.testing.assert_close(shown[-1], whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="at most"):
        preview.feed(ids[:, : tokenizer.spec.groups[0]])


def test_training_losses_are_named_finite_and_train_something(tokenizer) -> None:
    tokenizer.train()
    losses = tokenizer.training_losses(images_for(tokenizer), torch.Generator().manual_seed(0))
    assert all(bool(value.isfinite()) for value in losses.values())
    losses["loss"].backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tokenizer.parameters())


def test_training_losses_are_repeatable(tokenizer) -> None:
    draws = [tokenizer.training_losses(images_for(tokenizer), torch.Generator().manual_seed(5)) for _ in range(2)]
    assert float(draws[0]["loss"]) == float(draws[1]["loss"])


def test_a_described_tokenizer_is_built_again(tokenizer) -> None:
    again = build(describe(tokenizer), Tokenizer)
    assert again.spec == tokenizer.spec
    again.load_state_dict(tokenizer.state_dict(), strict=True)
    images = images_for(tokenizer)
    assert torch.equal(again.eval().encode(images).ids, tokenizer.encode(images).ids)


def test_tokenizers_that_make_the_same_tokens_are_known_by_their_makers(tokenizer) -> None:
    again = build(describe(tokenizer), Tokenizer)
    assert tokenizer_hash(again) != tokenizer_hash(tokenizer)  # other random weights
    again.load_state_dict(tokenizer.state_dict(), strict=True)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    again.drop_training_parts()
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
