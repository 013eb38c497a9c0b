"""What is particular to the convolutional tokenizer; contracts and recorded outputs are tested elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded
from vision_ar.interfaces import Tokens
from vision_ar.layers import perceptual
from vision_ar.quantizers.vq import VectorQuantizer
from vision_ar.tokenizers.vq import ConvSize, VQLosses, VQTokenizer


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=seeded(0)) * 2 - 1


def tiny(**settings) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(8, 3, ConvSize(32, (1, 1), 1, 8), vocab_size=16, latent_dim=4, num_groups=4, **settings)


def test_tokens_are_cells_row_by_row() -> None:
    tokenizer = tiny().eval()
    assert tokenizer.spec.grid == (4, 4) and tokenizer.spec.groups == (4,) * 4
    assert tokenizer.spec.positions()[5].tolist() == [1, 1]
    tokenizer.decoder = torch.nn.Identity()
    rows = torch.zeros(1, 16, 4)
    rows[0, 6] = 3.0  # row 1, column 2
    with torch.no_grad():
        moved = (tokenizer.pixels(rows) - tokenizer.pixels(torch.zeros(1, 16, 4))).abs().sum(dim=(0, 1))
    assert moved.nonzero().tolist() == [[1, 2]]


def test_previews_show_rows_that_are_there_and_grey_below() -> None:
    tokenizer = tiny().eval()
    with torch.no_grad():
        ids = tokenizer.encode(images()).ids
        preview = tokenizer.open_preview(3)
        shown = [preview.feed(part) for part in ids.split(4, dim=1)]
        whole = tokenizer.decode(Tokens.of(tokenizer.spec, ids=ids))
    for number, image in enumerate(shown, start=1):
        assert not image[:, :, 2 * number :].any() and image[:, :, : 2 * number].abs().amin(dim=(1, 2, 3)).max() >= 0
        assert bool(image[:, :, : 2 * number].abs().sum(dim=(1, 2, 3)).gt(0).all())
    torch.testing.assert_close(shown[-1], whole)


def test_the_loss_is_the_weighted_sum_of_what_is_named() -> None:
    weights = VQLosses(pixels=2.0, codebook=0.5, commitment=0.1, entropy=0.3)
    losses = tiny(losses=weights).training_losses(images())
    named = ("pixels", "codebook", "commitment", "entropy")
    assert losses.keys() == {"loss", *named}
    expected = sum(getattr(weights, name) * losses[name] for name in named)
    torch.testing.assert_close(losses["loss"], expected)


def test_the_estimate_is_the_reconstruction_and_carries_gradients_to_the_encoder() -> None:
    tokenizer = tiny().train()
    found = tokenizer.training_pass(images())
    with torch.no_grad():
        rebuilt = tokenizer.decode(tokenizer.encode(images()))
    torch.testing.assert_close(found.estimate, rebuilt, rtol=1e-4, atol=1e-4)
    found.estimate.sum().backward()
    assert float(tokenizer.encoder.conv_in.weight.grad.abs().sum()) > 0
    assert tokenizer.last_weight.shape[0] == 3


def test_entropy_is_low_for_sure_and_varied_choices() -> None:
    quantizer = VectorQuantizer(8, 8)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(8))
    varied, alike, unsure = torch.eye(8)[None], torch.eye(8)[[0] * 8][None], torch.ones(1, 8, 8)
    values = [float(quantizer.entropy_loss(x)) for x in (varied, alike, unsure)]
    assert values[0] == pytest.approx(-math.log(8), abs=1e-3)
    assert values[1] == pytest.approx(0, abs=1e-3) and values[2] == pytest.approx(0, abs=1e-3)


def test_published_training_parts_are_dropped(monkeypatch) -> None:
    monkeypatch.setattr(perceptual, "load_lpips", lambda weights: torch.nn.Identity())
    tokenizer = tiny(losses=VQLosses(lpips=1.0, lpips_weights="a file"))
    tokenizer.drop_training_parts()
    assert tokenizer.init_args["losses"] == VQLosses() and not tokenizer.perceptual.uses_lpips


def test_lpips_reads_its_trunk_from_a_file(tmp_path) -> None:
    from torchvision.models import vgg16

    torch.manual_seed(0)
    trunk = vgg16(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "vgg.pth")
    judge = perceptual.load_lpips(str(tmp_path / "vgg.pth")).eval()
    a, b = (torch.rand(2, 3, 64, 64, generator=seeded(s)) * 2 - 1 for s in (0, 1))
    with torch.no_grad():
        assert float(judge(a, a).abs().max()) == 0 < float(judge(a, b).mean())
    own = judge.net.state_dict()
    torch.testing.assert_close(own["slice3.10.weight"], trunk.features[10].weight)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="lpips_weights must be those of torchvision's vgg16"):
        perceptual.load_lpips(str(tmp_path / "other.pth"))
    with pytest.raises(FileNotFoundError, match="LPIPS needs the weights of VGG-16 in"):
        perceptual.load_lpips(str(tmp_path / "none.pth"))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of 2 with these levels, got 9"):
        VQTokenizer(9, size=ConvSize(32, (1, 1)))
    with pytest.raises(ValueError, match="num_groups must divide the 4 rows of tokens, got 3"):
        VQTokenizer(8, size=ConvSize(32, (1, 1)), num_groups=3)
    with pytest.raises(ValueError, match="width must be a multiple of 32, got 40"):
        ConvSize(40)
    with pytest.raises(ValueError, match="the weight of pixels must be at least 0, got -1"):
        VQLosses(pixels=-1)
