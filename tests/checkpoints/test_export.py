import json

import pytest
import torch
from safetensors import safe_open

import vision_ar
from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.checkpoints.__main__ import main
from vision_ar.checkpoints.store import Description, describe, load_model, save_model
from vision_ar.generator import Generator
from vision_ar.layers.velocity import VelocityConfig
from vision_ar.objectives.next_token import NextToken
from vision_ar.tokenizers.diffusion import CoderConfig, DiffusionTokenizer, LossConfig


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    coder = CoderConfig(dim=32, depth=1, head_dim=16, patch_size=4)
    sizes = {"encoder": coder, "decoder": coder, "velocity": VelocityConfig(32, 1, 4, 16)}
    tokenizer = DiffusionTokenizer(8, 3, 8, 4, 16, 4, losses=LossConfig(anchor=1.0), **sizes)
    generator = Generator(tokenizer.spec, lambda s: Llama(s, LlamaSize("tiny"), num_classes=3), NextToken())
    described = Description(describe(tokenizer), describe(generator.backbone), describe(generator.objective), ["a"] * 3)
    parts = {"tokenizer": tokenizer, "generator": generator}
    return save_model(tmp_path / "source", described, parts, "# The card\n")


def test_an_export_drops_training_parts_and_samples_the_same(source, tmp_path) -> None:
    main(["export", str(source), "--out", str(tmp_path / "out"), "--sampling", "cfg_scale=1.5", "temperature=0.9"])
    with safe_open(str(tmp_path / "out" / "model.safetensors"), "pt") as file:
        assert not [name for name in file.keys() if "anchor" in name]  # noqa: SIM118
    assert (tmp_path / "out" / "README.md").read_text() == "# The card\n"
    before, after = vision_ar.load(source), vision_ar.load(tmp_path / "out")
    assert after.defaults == {"cfg_scale": 1.5, "temperature": 0.9}
    first, second = (pipe.sample([0, 2], seed=4, cfg_scale=2.0) for pipe in (before, after))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.images, second.images)


def test_a_tokenizer_with_a_better_decoder_can_be_taken_one_with_other_tokens_not(source, tmp_path, capsys) -> None:
    saved = load_model(source)
    with torch.no_grad():
        saved.tokenizer.velocity.conv_out.weight.add_(0.1)
    better = save_model(tmp_path / "better", Description(describe(saved.tokenizer)), {"tokenizer": saved.tokenizer}, "")
    main(["export", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(better)])
    weight = vision_ar.load(tmp_path / "out").tokenizer.velocity.conv_out.weight
    assert torch.equal(weight, saved.tokenizer.velocity.conv_out.weight)
    with torch.no_grad():
        saved.tokenizer.quantizer.codebook.mul_(-1)
    other = save_model(tmp_path / "other", Description(describe(saved.tokenizer)), {"tokenizer": saved.tokenizer}, "")
    with pytest.raises(SystemExit):
        main(["export", str(source), "--out", str(tmp_path / "no"), "--tokenizer", str(other)])
    assert "tokenizer must make the same tokens" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_half_precision_halves_the_file(source, tmp_path) -> None:
    main(["export", str(source), "--out", str(tmp_path / "whole")])
    main(["export", str(source), "--out", str(tmp_path / "half"), "--dtype", "float16"])
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    assert next(vision_ar.load(tmp_path / "half").generator.parameters()).dtype == torch.float32


def test_an_unknown_source_is_one_line_with_code_2(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "nowhere", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert json.dumps(capsys.readouterr().err).count("\\n") == 1
