"""Texts as features: how they lie, how they are kept, and what a generator makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import seeded
from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.checkpoints.store import Description, describe, save_model
from vision_ar.data.text_features import TextFeatures, encode_prompts, main, pad_left
from vision_ar.generator import Generator
from vision_ar.objectives.next_token import NextToken
from vision_ar.pipeline import load
from vision_ar.sample_cli import main as sample
from vision_ar.sampler.engine import Condition
from vision_ar.tokenizers.vq import VQTokenizer

SLOTS, DIM = 5, 6


def features(count: int = 3) -> TextFeatures:
    values = torch.randn(count, SLOTS, DIM, generator=seeded(0)).bfloat16().float()
    mask = torch.ones(count, SLOTS, dtype=torch.bool)
    mask[0, :3] = False
    return TextFeatures(values * mask[..., None], mask, [f"text {number}" for number in range(count)])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small generator of texts with random weights."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer.tiny()
    size = LlamaSize("tiny", dim=32)
    generator = Generator(
        tokenizer.spec,
        lambda spec: Llama(spec, size, cond_dim=DIM, cond_len=SLOTS, rotary="2d", silent_prefix=True),
        NextToken(),
    )
    torch.nn.init.normal_(generator.heads["token"].output.weight, std=0.5)
    torch.nn.init.normal_(generator.backbone.condition.fc1.weight, std=0.5)
    described = Description(describe(tokenizer), describe(generator.backbone), describe(generator.objective))
    folder = tmp_path_factory.mktemp("text")
    return save_model(folder, described, {"tokenizer": tokenizer, "generator": generator}, "")


def encoder(folder: Path) -> str:
    """A T5 of random weights with a vocabulary of words, as a folder."""
    pytest.importorskip("transformers", reason="the extra text is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5Model

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "bird": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    config = T5Config(vocab_size=5, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(config).save_pretrained(folder)
    return str(folder)


def test_texts_lie_at_the_end_of_their_slots() -> None:
    values = torch.arange(1, 7).float().view(2, 3, 1)
    padded, kept = pad_left(values, torch.tensor([[1, 1, 0], [1, 1, 1]]), 4)
    assert padded[..., 0].tolist() == [[0, 0, 1, 2], [0, 4, 5, 6]]
    assert kept.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert pad_left(values, torch.ones(2, 3), 2)[0][..., 0].tolist() == [[1, 2], [4, 5]]


def test_an_encoder_gives_each_text_the_features_it_has_alone(tmp_path) -> None:
    name = encoder(tmp_path)
    texts = ["a red bird", "bird", "a bird"]
    together = encode_prompts(texts, name, slots=4)
    assert together.features.shape == (3, 4, 8) and together.mask.sum(dim=1).tolist() == [3, 1, 2]
    for row, text in enumerate(texts):
        alone = encode_prompts([text], name, slots=4)
        torch.testing.assert_close(together.features[row], alone.features[0], rtol=1e-4, atol=1e-5)
    assert not together.features[~together.mask].any()
    batched = encode_prompts(texts, name, slots=4, batch_size=2)
    torch.testing.assert_close(batched.features, together.features, rtol=1e-4, atol=1e-5)


def test_the_command_writes_what_can_be_read(tmp_path, capsys) -> None:
    name = encoder(tmp_path / "encoder")
    (tmp_path / "prompts.txt").write_text("a bird\n\na red bird\n")
    out = tmp_path / "out.safetensors"
    main(
        [
            "--encoder",
            name,
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "--prompt",
            "red",
            "--slots",
            "3",
            "--out",
            str(out),
        ]
    )
    assert "3 texts, 3 vectors of 8 each" in capsys.readouterr().out
    found = TextFeatures.read(out)
    assert found.prompts == ["red", "a bird", "a red bird"] and found.mask.sum(dim=1).tolist() == [1, 2, 3]
    exact = encode_prompts(found.prompts, name, slots=3)
    torch.testing.assert_close(found.features, exact.features, rtol=2**-7, atol=1e-3)
    with pytest.raises(SystemExit):
        main(["--encoder", name, "--out", str(out)])
    assert "prompts must have at least one text" in capsys.readouterr().err


def test_a_generator_samples_from_features_and_does_not_see_their_padding(model) -> None:
    pipe, texts = load(model), features()
    settings = {"seed": 3, "cfg_scale": 2.0, "top_k": 8}
    samples = pipe.sample(Condition(cond=texts.features, cond_mask=texts.mask), **settings)
    assert samples.labels == [] and samples.images.shape == (3, 3, 8, 8)
    alone = pipe.sample(Condition(cond=texts.features[1:2], cond_mask=texts.mask[1:2]), **{**settings, "seed": 4})
    assert torch.equal(alone.ids[0], samples.ids[1])
    noisy = torch.where(texts.mask[..., None], texts.features, 7.0)
    padded = pipe.sample(Condition(cond=noisy, cond_mask=texts.mask), batch_size=2, **settings)
    assert torch.equal(padded.ids, samples.ids)
    other = pipe.sample(Condition(cond=-texts.features, cond_mask=texts.mask), **settings)
    assert not torch.equal(other.ids, samples.ids)


def test_the_script_samples_a_picture_for_every_text(model, tmp_path, capsys) -> None:
    features().write(tmp_path / "texts.safetensors")
    sample(["--model", str(model), "--features", str(tmp_path / "texts.safetensors"), "--out", str(tmp_path / "out")])
    told = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [image["prompt"] for image in told["images"]] == ["text 0", "text 1", "text 2"]
    sample(["--model", str(model), "--features", str(tmp_path / "texts.safetensors"), "--num", "4",
            "--out", str(tmp_path / "four")])  # fmt: skip
    told = json.loads((tmp_path / "four" / "samples.json").read_text())
    assert [image["prompt"] for image in told["images"]] == ["text 0", "text 1", "text 2", "text 0"]


def test_the_wrong_kind_of_condition_is_refused(model, tmp_path, capsys) -> None:
    pipe, texts = load(model), features()
    with pytest.raises(ValueError, match="labels must be left out: this generator is conditioned on features"):
        pipe.sample([1])
    with pytest.raises(ValueError, match="features must be left out: this generator is conditioned on class labels"):
        load("cifar10-dar").sample(Condition(cond=texts.features))
    with pytest.raises(ValueError, match=r"features must have shape \(B, S=5, D=6\), got \(3, 5, 4\)"):
        pipe.sample(Condition(cond=texts.features[..., :4]))
    (tmp_path / "no.safetensors").write_text("no")
    with pytest.raises(ValueError, match="features must be a file of vision_ar.data.text_features"):
        TextFeatures.read(tmp_path / "no.safetensors")
    with pytest.raises(SystemExit):
        sample(["--model", str(model), "--out", str(tmp_path / "out")])
    assert "features must be given for a model of texts" in capsys.readouterr().err
