"""The commands as a user meets them, on a tiny model of digits that is made here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torchmetrics.functional.image import structural_similarity_index_measure

import vision_ar
from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.checkpoints.store import Description, describe, save_model
from vision_ar.data.images import Digits
from vision_ar.data.pixels import normalise
from vision_ar.evaluation import likelihood, protocols
from vision_ar.evaluation.commands import main, parser
from vision_ar.evaluation.extractors import ClassifierExtractor
from vision_ar.evaluation.scoring import LIBRARIES
from vision_ar.generator import Generator
from vision_ar.interfaces import Tokens, run
from vision_ar.layers.velocity import VelocityConfig
from vision_ar.objectives.next_token import NextToken
from vision_ar.pipeline import Pipeline, Samples
from vision_ar.tokenizers.diffusion import CoderConfig, DiffusionTokenizer

ROOT = Path(__file__).resolve().parents[2]
NUM = 20
DIGITS = ("--protocol", "digits-fast", "--data", "digits", "--device", "cpu")
COMMANDS = ("protocols", "generate-and-score", "sweep", "score", "reconstruct", "likelihood", "make-reference")


def tiny_model(folder: Path, channels: int = 1) -> Path:
    """A model of 8x8 digits whose images depend on seed, class and guidance."""
    torch.manual_seed(0)
    coder = CoderConfig(dim=32, depth=1, head_dim=16, patch_size=4, gate_init=0.5)
    sizes = {"encoder": coder, "decoder": coder, "velocity": VelocityConfig(32, 1, 4, 16)}
    tokenizer = DiffusionTokenizer(8, channels, 8, 4, 16, 4, **sizes)
    generator = Generator(tokenizer.spec, lambda s: Llama(s, LlamaSize("tiny"), num_classes=10), NextToken())
    for weight in [*tokenizer.velocity.parameters(), *generator.parameters()]:
        if weight.ndim > 1:  # untrained, parts of them are zero, and images would depend on the seed alone
            torch.nn.init.normal_(weight, std=0.2)
    parts = {"tokenizer": tokenizer, "generator": generator}
    described = [describe(tokenizer), describe(generator.backbone), describe(generator.objective)]
    return save_model(folder, Description(*described, [str(i) for i in range(10)]), parts, "# Card\n")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("digits") / "tiny")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make-reference` writes of the validation digits."""
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    main(["make-reference", *DIGITS, "--out", str(path)])
    return path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol that takes less time: fewer samples are enough for it, and any reference."""
    protocol = dataclasses.replace(protocols.PROTOCOLS["digits-fast"], num_samples=NUM, closed=False)
    monkeypatch.setitem(protocols.PROTOCOLS, "digits-fast", protocol)


@pytest.fixture
def short_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol for the tokenizer of the tiny model."""
    like = protocols.PROTOCOLS["recon-cifar10"]
    protocol = dataclasses.replace(like, name="recon-digits", image_size=8, channels=1, num_samples=NUM)
    monkeypatch.setitem(protocols.PROTOCOLS, protocol.name, protocol)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Seeds of every batch that is sampled."""
    batches: list[list[int]] = []
    sample = Pipeline.sample

    def noting(self: Pipeline, labels: list[int], seed: list[int], **settings: Any) -> Samples:
        batches.append(list(seed))
        return sample(self, labels, seed, **settings)

    monkeypatch.setattr(Pipeline, "sample", noting)
    yield batches


def digits(start: int, stop: int) -> np.ndarray:
    """Validation digits, (N, 8, 8), uint8."""
    return Digits(image_size=8, channels=1).image_set("val", 8).squares(torch.arange(start, stop))[0][:, 0].numpy()


def write_pngs(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:05d}.png")
    return folder


def generate(model: Path, out: Path, *more: str) -> dict[str, Any]:
    options = ["--protocol", "digits-fast", "--device", "cpu", "--model", str(model), "--out", str(out)]
    main(["generate-and-score", *options, *more])
    return read(out / "result.json")


def score(images: Path, out: Path, *more: str) -> dict[str, Any]:
    options = ["--protocol", "digits-fast", "--device", "cpu", "--images", str(images), "--out", str(out)]
    main(["score", *options, *more])
    return read(out)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("made", "date")}


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of an error with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert "saved in" not in printed.out
    return printed.err


# What a result says


def test_a_result_says_all_that_decided_it(model, reference, short, tmp_path, capsys) -> None:
    capsys.readouterr()
    more = ["--reference", str(reference), "--cfg-scale", "1.5", "--top-k", "9", "--seed", "40"]
    result = generate(model, tmp_path, *more)
    named = {"fd-cifar10", "kd-cifar10", "kd-cifar10_std", "precision-cifar10", "recall-cifar10"}
    assert named <= result["scores"].keys() and all(np.isfinite(value) for value in result["scores"].values())
    assert result["partial"] is False and result["num_images"] == NUM and result["seed"] == 40
    assert result["protocol"] == json.loads(json.dumps(dataclasses.asdict(protocols.PROTOCOLS["digits-fast"])))
    assert result["model"]["name"] == "tiny" and re.fullmatch("[0-9a-f]{16}", result["model"]["hash"])
    assert result["settings"].keys() == {
        "cfg_scale", "cfg_schedule", "cfg_start", "cfg_interval", "temperature", "top_k", "top_p", "min_p", "dtype",
        "quantize", "cache_dtype",
    }  # fmt: skip
    assert (result["settings"]["cfg_scale"], result["settings"]["top_k"]) == (1.5, 9)
    for digest in (result["images"], result["reference"]["digest"], result["extractor"]["weights"]):
        assert re.fullmatch("[0-9a-f]{16}", digest)
    assert result["extractor"]["name"] == "cifar10" and result["reference"]["count"] == 297
    assert set(LIBRARIES) == result["versions"].keys() and torch.__version__.startswith(result["versions"]["torch"])
    assert "date" in result and result["made"]["samples"]["images"] == NUM and result["left_out"] == []
    assert result["reference"]["known_as"] == "validation digits of scikit-learn" and result["extractor"]["official"]
    assert "FlowConfig" in result["tokenizer"]["flow"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width >= 5 * 8
    lines = capsys.readouterr().out.splitlines()  # no number is printed without its name and the protocol
    assert lines[0] == f"protocol digits-fast, {NUM} images, against digits.npz"
    named_scores = [[name, f"{value:.4f}"] for name, value in result["scores"].items()]
    assert [line.split() for line in lines[1:-1]] == named_scores
    assert str(tmp_path / "result.json") in lines[-1]


def test_fewer_samples_are_refused_or_marked(model, reference, tmp_path, capsys) -> None:
    options = ["--protocol", "digits-fast", "--device", "cpu", "--model", model, "--out", tmp_path / "no"]
    error = refused(capsys, "generate-and-score", *options, "--reference", reference, "--num", "12")
    assert "digits-fast must have 100 images, got 12; --allow-partial" in error and not (tmp_path / "no").exists()
    result = generate(model, tmp_path / "yes", "--reference", str(reference), "--num", "12", "--allow-partial")
    assert result["partial"] is True and result["num_images"] == 12
    assert "PARTIAL, 12 of 100 images" in capsys.readouterr().out


def test_more_images_than_the_protocol_asks_are_refused(model, reference, short, tmp_path, capsys) -> None:
    options = ["--protocol", "digits-fast", "--reference", reference, "--device", "cpu"]
    more = ["--model", model, "--out", tmp_path / "out", "--num", NUM + 1]
    assert f"{NUM + 1}" in refused(capsys, "generate-and-score", *options, *more)
    images = write_pngs(tmp_path / "images", digits(0, NUM + 1))
    error = refused(capsys, "score", *options, "--images", images, "--out", tmp_path / "score.json")
    assert f"digits-fast must have {NUM} images, got {NUM + 1}" in error


def test_the_archive_of_samples_scores_as_the_samples_do(model, reference, short, tmp_path) -> None:
    made = generate(model, tmp_path / "out", "--reference", str(reference), "--npz")
    scored = score(tmp_path / "out" / "samples.npz", tmp_path / "again.json", "--reference", str(reference))
    assert scored["images"] == made["images"]
    assert scored["scores"] == {k: v for k, v in made["scores"].items() if not k.startswith("accuracy")}


# Samples


def test_samples_depend_on_their_seed_and_class_alone(model, short, tmp_path, reference) -> None:
    options = ["--reference", str(reference)]
    first = generate(model, tmp_path / "a", *options)
    generate(model, tmp_path / "b", *options, "--batch-size", "7")
    one, two = (np.load(tmp_path / name / "samples" / "pixels.npy").astype(int) for name in "ab")
    assert np.abs(one - two).max() <= 1  # sums of floats may depend on the size of a batch
    assert generate(model, tmp_path / "c", *options, "--seed", "1")["images"] != first["images"]
    assert generate(model, tmp_path / "d", *options, "--cfg-scale", "4")["images"] != first["images"]
    alone = vision_ar.load(model).sample([3], [13], cfg_scale=1.0).images[0].permute(1, 2, 0)
    assert np.abs(one[13] - (127.5 * alone + 127.5).numpy()).max() < 1.6  # sample 13 has seed 13 and class 3


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    model, reference, short, sampled, tmp_path, monkeypatch, capsys
) -> None:
    options = ["--reference", str(reference), "--batch-size", "4"]
    whole = generate(model, tmp_path / "whole", *options)
    assert [batch[0] for batch in sampled] == [0, 4, 8, 12, 16]
    sampled.clear()
    noting = Pipeline.sample

    def stopping(*args: Any, **settings: Any) -> Samples:
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return noting(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "sample", stopping)
        args = ["--model", model, "--out", tmp_path / "parts", "--protocol", "digits-fast", "--device", "cpu"]
        assert "the same command goes on" in refused(capsys, "generate-and-score", *args, *options)
    assert not (tmp_path / "parts" / "result.json").exists()
    sampled.clear()
    resumed = generate(model, tmp_path / "parts", *options)
    assert sampled == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert without_times(resumed) == without_times(whole)
    sampled.clear()
    assert without_times(generate(model, tmp_path / "parts", *options)) == without_times(whole)
    assert sampled == []  # a finished run only says its result again


def test_an_interruption_between_features_loses_none(model, reference, short, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("vision_ar.evaluation.features.FeatureStore.__init__.__defaults__", (8,))
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    whole = score(images, tmp_path / "whole.json", "--reference", str(reference))
    extract, sizes = ClassifierExtractor._extract, list[int]()

    def noting(self: ClassifierExtractor, pixels: torch.Tensor) -> Any:
        if len(sizes) == 1:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(pixels))
        return extract(self, pixels)

    monkeypatch.setattr(ClassifierExtractor, "_extract", noting)
    options = ["--protocol", "digits-fast", "--device", "cpu", "--reference", reference, "--images", images]
    refused(capsys, "score", *options, "--out", tmp_path / "parts.json")
    resumed = score(images, tmp_path / "parts.json", "--reference", str(reference))
    assert sizes == [8, 0, 8, 4]  # the first batch was not read again
    assert without_times(resumed) == without_times(whole)


def test_a_folder_begun_with_other_settings_is_refused_by_name(model, reference, short, tmp_path, capsys) -> None:
    before = generate(model, tmp_path, "--reference", str(reference))
    options = ["--protocol", "digits-fast", "--model", model, "--out", tmp_path, "--reference", reference]
    for args, message in (
        (["--seed", "1"], "seed 0, got 1"),
        (["--cfg-scale", "3"], "cfg_scale 1.0, got 3.0"),
        (["--top-p", "0.5"], "top_p None, got 0.5"),
        (["--num", "8", "--allow-partial"], f"count {NUM}, got 8"),
    ):
        error = refused(capsys, "generate-and-score", *options, *args)
        assert f"{tmp_path / 'samples'} was begun with {message}" in error
    assert read(tmp_path / "result.json") == before


def test_a_folder_begun_in_another_dtype_is_refused_by_name(model, reference, short, tmp_path, capsys) -> None:
    generate(model, tmp_path, "--reference", str(reference))
    options = ["--protocol", "digits-fast", "--model", model, "--out", tmp_path, "--reference", reference]
    error = refused(capsys, "generate-and-score", *options, "--dtype", "bfloat16")
    assert "was begun with dtype float32, got bfloat16" in error


def test_a_folder_of_another_model_is_refused_by_name(model, reference, short, tmp_path, capsys) -> None:
    generate(model, tmp_path / "out", "--reference", str(reference))
    other = tiny_model(tmp_path / "other" / "tiny", 3)
    options = ["--model", other, "--out", tmp_path / "out", "--reference", reference, "--device", "cpu"]
    error = refused(capsys, "generate-and-score", "--protocol", "digits-fast", *options)
    assert "hash" in error or "channels" in error


def test_new_samples_are_never_scored_by_features_of_older_ones(model, reference, short, tmp_path, capsys) -> None:
    options = ["--reference", str(reference)]
    generate(model, tmp_path / "out", *options)
    for file in (tmp_path / "out" / "samples").iterdir():  # the message on other settings advises this
        file.unlink()
    (tmp_path / "out" / "samples").rmdir()
    fresh = generate(model, tmp_path / "fresh", *options, "--seed", "1")
    try:
        again = generate(model, tmp_path / "out", *options, "--seed", "1")
    except SystemExit:  # a refusal is as good
        assert str(tmp_path / "out" / "features") in capsys.readouterr().err
    else:
        assert (again["images"], again["scores"]) == (fresh["images"], fresh["scores"])


def test_images_that_changed_are_never_scored_by_older_features(reference, short, tmp_path, capsys) -> None:
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    before = score(images, tmp_path / "score.json", "--reference", str(reference))
    write_pngs(images, digits(NUM, 2 * NUM))
    try:
        after = score(images, tmp_path / "score.json", "--reference", str(reference))
    except SystemExit:  # a refusal is as good
        assert str(images) in capsys.readouterr().err
    else:
        assert after["images"] != before["images"] and after["scores"] != before["scores"]


def test_a_reference_that_changed_is_never_replaced_by_its_older_features(short, tmp_path, capsys) -> None:
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    other = write_pngs(tmp_path / "other", digits(100, 100 + NUM))
    before = score(images, tmp_path / "score.json", "--reference", str(other))
    write_pngs(other, digits(200, 200 + NUM))
    try:
        after = score(images, tmp_path / "score.json", "--reference", str(other))
    except SystemExit:
        assert str(other) in capsys.readouterr().err
    else:
        assert after["reference"]["digest"] != before["reference"]["digest"]


def test_a_model_of_other_images_than_the_protocol_has_is_refused(reference, short, tmp_path, capsys) -> None:
    colour = tiny_model(tmp_path / "colour", channels=3)
    options = ["--protocol", "digits-fast", "--device", "cpu", "--reference", reference, "--out", tmp_path / "out"]
    assert "channels" in refused(capsys, "generate-and-score", *options, "--model", colour)
    error = refused(capsys, "generate-and-score", *options, "--model", "cifar10-dar")
    assert "images of 8 pixels" in error and "got 32" in error


def test_samples_with_nan_are_refused_by_their_seed(model, reference, short, tmp_path, monkeypatch, capsys) -> None:
    sample = Pipeline.sample

    def broken(self: Pipeline, labels: list[int], seed: list[int], **settings: Any) -> Samples:
        samples = sample(self, labels, seed, **settings)
        if 9 in seed:
            samples.images[seed.index(9), 0, 3, 3] = torch.nan
        return samples

    monkeypatch.setattr(Pipeline, "sample", broken)
    options = ["--model", model, "--out", tmp_path, "--reference", reference, "--batch-size", 4, "--device", "cpu"]
    error = refused(capsys, "generate-and-score", "--protocol", "digits-fast", *options)
    assert "NaN in the one of seed 9" in error
    assert np.load(tmp_path / "samples" / "done.npy").tolist() == [1, 1, 0, 0, 0]  # finished work is kept


# Finished images and references


def test_a_folder_and_an_archive_of_the_same_images_have_one_score(reference, short, tmp_path) -> None:
    pixels = digits(0, NUM)
    write_pngs(tmp_path / "images", pixels)
    np.savez(tmp_path / "images.npz", arr_0=pixels[..., None])
    np.save(tmp_path / "images.npy", pixels[..., None])
    found = [
        score(tmp_path / name, tmp_path / f"score{i}.json", "--reference", str(reference))
        for i, name in enumerate(("images", "images.npz", "images.npy"))
    ]
    for result in found[1:]:
        assert (result["images"], result["scores"]) == (found[0]["images"], found[0]["scores"])
    assert found[0]["scores"]["precision-cifar10"] == 1.0  # they are among the reference


def test_a_reference_file_scores_as_its_data_do(reference, short, tmp_path) -> None:
    images = write_pngs(tmp_path / "images", digits(0, NUM) // 2)
    by_data = score(images, tmp_path / "data.json", "--data", "digits")
    by_file = score(images, tmp_path / "file.json", "--reference", str(reference))
    every = write_pngs(tmp_path / "every", digits(0, 297))
    by_images = score(images, tmp_path / "images.json", "--reference", str(every))
    assert by_data["scores"] == by_file["scores"] == by_images["scores"]
    digests = [result["reference"]["images"] for result in (by_data, by_file, by_images)]
    assert len(set(digests)) == 1


def test_a_reference_can_be_insisted_on(reference, short, tmp_path, capsys) -> None:
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    options = ["--reference", str(reference), "--reference-hash"]
    plain = score(images, tmp_path / "plain.json", *options[:2])
    for digest in (plain["reference"]["digest"], plain["reference"]["images"]):
        insisted = score(images, tmp_path / "insisted.json", *options, digest)
        assert insisted["scores"] == plain["scores"]
        assert insisted["protocol"]["reference_digests"] == [[digest, "the one that was asked for"]]
    args = ["--protocol", "digits-fast", "--images", images, "--out", tmp_path / "no.json"]
    error = refused(capsys, "score", *args, *options, "0123456789abcdef")
    assert "must have digest 0123456789abcdef" in error and "of digits.npz" in error
    error = refused(capsys, "score", *args, "--reference", images, "--reference-hash", "0123456789abcdef")
    assert f"{plain['images']} of {images}" in error


def test_a_reference_that_the_protocol_does_not_know_is_refused_or_said(short, tmp_path, capsys, monkeypatch) -> None:
    images, noise = write_pngs(tmp_path / "images", digits(0, NUM)), write_pngs(tmp_path / "other", digits(50, 90))
    assert score(images, tmp_path / "open.json", "--reference", str(noise))["reference"]["known_as"] is None
    assert "is none that the protocol knows" in capsys.readouterr().out
    closed = dataclasses.replace(protocols.PROTOCOLS["digits-fast"], closed=True)
    monkeypatch.setitem(protocols.PROTOCOLS, "digits-fast", closed)
    args = ["score", "--protocol", "digits-fast", "--images", images, "--reference", noise]
    error = refused(capsys, *args, "--out", tmp_path / "closed.json")
    assert "must have digest df6cbe5b4188ff7a (validation digits of scikit-learn), got" in error
    assert "--reference-hash DIGEST" in error


def test_decoding_settings_are_part_of_the_model_and_stop_a_run_that_was_begun_with_others(
    model, short, reference, tmp_path, capsys
) -> None:
    copied = shutil.copytree(model, tmp_path / "tiny")
    before = generate(copied, tmp_path / "out", "--reference", str(reference))
    config = copied / "config.yaml"
    changed = re.sub(r"noise_scale: [0-9.]+", "noise_scale: 0.5", config.read_text())
    assert changed != config.read_text()
    config.write_text(changed)
    args = ["generate-and-score", "--protocol", "digits-fast", "--reference", reference, "--model", copied]
    assert "was begun with hash" in refused(capsys, *args, "--out", tmp_path / "out")
    after = generate(copied, tmp_path / "new", "--reference", str(reference))
    assert before["model"]["hash"] != after["model"]["hash"] and before["images"] != after["images"]


def test_scores_that_finished_images_cannot_have_are_named(short, reference, tmp_path, capsys) -> None:
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    like = dataclasses.replace(protocols.PROTOCOLS["digits-fast"], name="judged", metrics=("fid", "accuracy"))
    protocols.PROTOCOLS["judged"] = like
    try:
        main(["score", "--protocol", "judged", "--images", str(images), "--reference", str(reference),
              "--out", str(tmp_path / "judged.json")])  # fmt: skip
    finally:
        del protocols.PROTOCOLS["judged"]
    assert read(tmp_path / "judged.json")["left_out"] == ["accuracy"]
    assert "left out, as no wanted classes are known: accuracy" in capsys.readouterr().out
    error = refused(capsys, "score", "--protocol", "recon-cifar10", "--images", images, "--out", tmp_path / "no.json")
    assert "protocol must be one of generation, got recon-cifar10, which is for reconstruction" in error


def test_a_reference_of_another_extractor_is_refused(reference, short, tmp_path, capsys) -> None:
    extractor = ClassifierExtractor("cifar10-classifier")
    with torch.no_grad():
        next(extractor.network.parameters()).mul_(1.01)
    weights = {name: value.contiguous() for name, value in extractor.network.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors", metadata=metadata_of("cifar10-classifier"))
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    args = ["--protocol", "digits-fast", "--images", images, "--out", tmp_path / "no.json", "--reference", reference]
    error = refused(capsys, "score", *args, "--extractor", tmp_path / "other.safetensors")
    assert "must be made with extractor other" in error and str(reference) in error and "cifar10" in error
    own = ["--reference", str(images), "--extractor", str(tmp_path / "other.safetensors")]
    result = score(images, tmp_path / "yes.json", *own)
    assert result["protocol"]["name"] == "digits-fast+other" and "fd-other" in result["scores"]


def metadata_of(name: str) -> dict[str, str]:
    """What a bundled classifier says about itself."""
    with safe_open(str(ROOT / "vision_ar" / "models" / name / "model.safetensors"), "pt") as file:
        return file.metadata()


def test_a_reference_needs_images_of_the_protocols_size(short, tmp_path, capsys) -> None:
    pixels = digits(0, NUM)
    large = write_pngs(tmp_path / "large", pixels.repeat(2, axis=1).repeat(2, axis=2))
    args = ["--protocol", "digits-fast", "--device", "cpu"]
    images = ["--images", write_pngs(tmp_path / "images", pixels), "--out", tmp_path / "no.json"]
    assert str(large) in refused(capsys, "score", *args, *images, "--reference", large)
    error = refused(capsys, "make-reference", *args, "--images", large, "--out", tmp_path / "no.npz")
    assert str(large) in error and "16 x 16" in error


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "features cut", "features text", "pt text", "about"])
def test_a_damaged_reference_is_one_line_with_its_name(reference, short, tmp_path, capsys, damage) -> None:
    copy, features = tmp_path / "copy.npz", tmp_path / "copy.features.npy"
    copy.write_bytes(reference.read_bytes())
    features.write_bytes(reference.with_suffix(".features.npy").read_bytes())
    wrong = {
        "cut": lambda: cut(copy),
        "text": lambda: copy.write_text("no archive"),
        "empty": lambda: copy.write_bytes(b""),
        "features cut": lambda: cut(features),
        "features text": lambda: features.write_text("no array"),
        "pt text": lambda: copy.with_suffix(".pt").write_text("hi"),
        "about": lambda: np.savez(copy, mu=np.zeros(3), sigma=np.eye(3), about=np.array("{")),
    }
    wrong[damage]()
    given = copy.with_suffix(".pt") if damage == "pt text" else copy
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    args = ["--protocol", "digits-fast", "--images", images, "--out", tmp_path / "no.json", "--reference", given]
    assert str(tmp_path / "copy") in refused(capsys, "score", *args)


def test_a_missing_reference_is_named_as_one(short, tmp_path, capsys) -> None:
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    args = ["--protocol", "digits-fast", "--images", images, "--out", tmp_path / "no.json", "--reference"]
    error = refused(capsys, "score", *args, tmp_path / "none.npz")
    assert str(tmp_path / "none.npz") in error and "reference" in error


def test_a_broken_picture_in_the_data_is_one_line(tmp_path, capsys, caplog) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        write_pngs(root / split / "a", digits(0, 6))
    cut(root / "val" / "a" / "00003.png")
    args = ["--protocol", "digits-fast", "--data", root, "--out", tmp_path / "no.npz"]
    assert str(root / "val" / "a" / "00003.png") in refused(capsys, "make-reference", *args)


# Bad images


def two_sizes(folder: Path) -> Path:
    return write_pngs(folder / "b", np.zeros((1, 9, 8), np.uint8)) / "00000.png"


def colour(folder: Path) -> Path:
    return write_pngs(folder / "b", np.zeros((1, 8, 8, 3), np.uint8)) / "00000.png"


def deep(folder: Path) -> Path:
    return write_pngs(folder / "b", np.zeros((1, 8, 8), np.uint16)) / "00000.png"


def transparent(folder: Path) -> Path:
    Image.fromarray(np.full((8, 8, 2), 7, np.uint8), "LA").save(folder / "z.png")
    return folder / "z.png"


def corrupt(folder: Path) -> Path:
    (folder / "z.png").write_bytes(b"no picture")
    return folder / "z.png"


def truncated(folder: Path) -> Path:
    return cut(folder / "00004.png")


def emptied(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder


def archive_with_nan(folder: Path) -> Path:
    pixels = digits(0, NUM)[..., None].astype(np.float32)
    pixels[7, 3, 3] = np.nan
    np.savez(folder.with_suffix(".npz"), arr_0=pixels)
    return folder.with_suffix(".npz")


def truncated_archive(folder: Path) -> Path:
    np.savez(folder.with_suffix(".npz"), arr_0=digits(0, NUM)[..., None])
    return cut(folder.with_suffix(".npz"))


def no_images(folder: Path) -> Path:
    folder.with_suffix(".npz").write_text("a list of samples")
    return folder.with_suffix(".npz")


def other_file(folder: Path) -> Path:
    folder.with_suffix(".txt").write_text("a list of samples")
    return folder.with_suffix(".txt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (two_sizes, "must have 8 x 8 pixels"),
        (colour, "must be grey"),
        (deep, "8 bits"),
        (transparent, "opaque"),
        (corrupt, "not an image"),
        (truncated, ""),
        (emptied, "must hold images"),
        (archive_with_nan, "NaN, first in image 7"),
        (truncated_archive, ""),
        (no_images, ""),
        (other_file, "must be a folder, an .npz or an .npy file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_images_are_one_line_with_their_name(
    reference, short, tmp_path, capsys, spoil: Callable[[Path], Path], message: str
) -> None:
    folder = write_pngs(tmp_path / "images", digits(0, NUM))
    blamed = spoil(folder)
    images = folder if blamed.is_relative_to(folder) else blamed
    args = ["--protocol", "digits-fast", "--reference", reference, "--out", tmp_path / "no.json", "--images", images]
    error = refused(capsys, "score", *args, "--allow-partial")
    assert str(blamed) in error and message in error
    assert not (tmp_path / "no.json").exists()


def test_images_of_another_protocol_are_refused(reference, short, tmp_path, capsys) -> None:
    args = ["--protocol", "digits-fast", "--reference", reference, "--out", tmp_path / "no.json", "--images"]
    rgb = write_pngs(tmp_path / "rgb", np.zeros((NUM, 8, 8, 3), np.uint8))
    error = refused(capsys, "score", *args, rgb)
    assert "8 x 8 with 1 channels, got 8 x 8 with 3 channels" in error and str(rgb) in error
    large = write_pngs(tmp_path / "large", np.zeros((NUM, 16, 16), np.uint8))
    assert f"16 x 16 with 1 channels in {large}" in refused(capsys, "score", *args, large)
    missing = tmp_path / "missing"
    assert str(missing) in refused(capsys, "score", *args, missing)


# Wrong arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--protocol", "nope"], "protocol must be one of .*digits-fast.*, got 'nope'"),
        (["--protocol", "recon-cifar10"], "generation.*recon-cifar10"),
        (["--model", "nope"], "model must be a bundled name .*got nope"),
        (["--model", "cifar10-classifier"], "got cifar10-classifier"),
        (["--data", "nowhere"], "data must be .*got nowhere"),
        (["--num", "0"], "num must be at least 1, got 0"),
        (["--num", "-3", "--allow-partial"], "num must be at least 1, got -3"),
        (["--num", "many"], "--num: invalid int value: 'many'"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--batch-size", "-5"], "batch_size must be at least 1, got -5"),
        (["--cfg-scale", "-1"], "cfg_scale must be at least 0, got -1.0"),
        (["--cfg-scale", "nan"], "cfg_scale must be at least 0, got nan"),
        (["--cfg-schedule", "wavy"], "invalid choice: 'wavy'"),
        (["--top-p", "2"], "top_p must be in"),
        (["--seed", "99999999999999999999"], "seeds must fit into 64 bits"),
        (["--device", "cuda:99"], "device must be one that this machine has, got cuda:99"),
        (["--extractor", "nope"], "must be one of inception, .*got nope"),
        (["--weights", "nowhere.pth"], "weights must be left out for cifar10, got nowhere.pth"),
        (["--extractor", "inception", "--weights", "nowhere.pth"], "nowhere.pth must be a file with Inception"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line_with_code_2_and_nothing_is_scored(
    model, reference, short, tmp_path, capsys, args, message
) -> None:
    options = ["--protocol", "digits-fast", "--model", model, "--out", tmp_path / "out", "--num", "5"]
    options += ["--allow-partial"] if "--data" in args else ["--allow-partial", "--reference", reference]
    assert re.search(message, refused(capsys, "generate-and-score", *options, *args))
    assert not (tmp_path / "out" / "result.json").exists()


def test_what_must_be_given_is_asked_for(model, tmp_path, capsys) -> None:
    assert "required: command" in refused(capsys)
    assert "invalid choice: 'nope'" in refused(capsys, "nope")
    assert "--protocol" in refused(capsys, "generate-and-score", "--model", model, "--out", tmp_path)
    options = ["--protocol", "digits-fast", "--out"]
    error = refused(capsys, "generate-and-score", *options, tmp_path / "out", "--model", model)
    assert "data must be given for protocol digits-fast" in error
    assert "data or images must be given" in refused(capsys, "make-reference", *options, tmp_path / "x.npz")
    assert ".npz" in refused(capsys, "make-reference", "--data", "digits", *options, tmp_path / "x.json")


@pytest.mark.parametrize(
    "args",
    [
        ["score", "--images", "{images}", "--out", "{out}.json", "--reference", "{images}", "--num", "5"],
        ["make-reference", "--images", "{images}", "--out", "{out}.npz", "--num", "5"],
        ["make-reference", "--images", "{images}", "--out", "{out}.npz", "--reference", "{images}"],
        ["make-reference", "--images", "{images}", "--out", "{out}.npz", "--data", "digits"],
        ["reconstruct", "--model", "{model}", "--out", "{out}", "--num", "20", "--reference-hash", "0123"],
        ["reconstruct", "--model", "{model}", "--out", "{out}", "--num", "20", "--reference", "{images}"],
    ],
    ids=lambda args: f"{args[0]} {args[-2]}",
)
def test_an_option_that_would_be_ignored_is_refused(model, short_reconstruction, short, tmp_path, capsys, args) -> None:
    images = write_pngs(tmp_path / "images", digits(0, NUM))
    given = [arg.format(images=images, out=tmp_path / "out", model=model) for arg in args]
    where = ["--protocol", "recon-digits", "--data", "digits"] if args[0] == "reconstruct" else DIGITS[:2]
    error = refused(capsys, *given, *where)
    assert args[-2].strip("-") in error and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused_before_any_work(model, sampled, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "out"
    options = [*DIGITS, "--out"]
    for args in (["generate-and-score", "--model", model], ["sweep", "--model", model, "--cfg-scale", 1]):
        assert str(tmp_path / "file") in refused(capsys, *args, *options, blocked)
    assert str(tmp_path / "file") in refused(capsys, "make-reference", *options, f"{blocked}.npz")
    images = write_pngs(tmp_path / "images", digits(0, 100))
    assert str(tmp_path / "file") in refused(capsys, "score", "--images", images, *options, f"{blocked}.json")
    for name in ("score", "images"):  # without the suffix it would take the place of the folder of features
        assert ".json" in refused(capsys, "score", "--images", images, *options, tmp_path / name)
    assert sampled == [] and not (tmp_path / "score").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m vision_ar.evaluation {command}")
    (commands,) = (action.choices for action in parser()._actions if action.dest == "command")
    assert [action.dest for action in commands[command]._actions if not action.help] == []


def test_the_protocols_are_listed_with_all_they_fix(capsys) -> None:
    main(["protocols"])
    text = capsys.readouterr().out
    for name, protocol in protocols.PROTOCOLS.items():
        assert f"{name}\n" in text and protocol.source in text


# Sweeps and reconstructions


def test_a_sweep_writes_a_table_and_curves(model, reference, short, sampled, tmp_path, capsys) -> None:
    args = [*DIGITS[:2], "--model", str(model), "--out", str(tmp_path), "--reference", str(reference)]
    main(["sweep", *args, "--cfg-scale", "1", "4.5"])
    table = (tmp_path / "sweep.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if re.match(r"\| [\d.]+ ", line)]
    for row, name in zip(rows, ("1", "4.5"), strict=True):
        result = read(tmp_path / f"cfg_{name}" / "result.json")
        assert row[0] == name and result["settings"]["cfg_scale"] == float(name)
        assert row[1] == f"{result['scores']['fd-cifar10']:.4f}"
    assert len({row[1] for row in rows}) == 2
    assert "digits-fast" in table and result["model"]["hash"] in table and f"{NUM} samples" in table
    assert "| cfg_scale | fd-cifar10 | kd-cifar10 |" in table
    sampled.clear()
    capsys.readouterr()
    main(["sweep", *args, "--cfg-scale", "1", "4.5"])
    assert sampled == [] and (tmp_path / "sweep.md").read_text() == table
    printed = capsys.readouterr().out
    if importlib.util.find_spec("matplotlib") is None:
        assert "pip install matplotlib" in printed
        pytest.skip("curves need matplotlib; the table was checked")
    with Image.open(tmp_path / "sweep.png") as curves:
        assert curves.width > 3 * curves.height


def test_a_sweep_says_so_without_matplotlib(model, reference, short, tmp_path, monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    args = ["--protocol", "digits-fast", "--reference", str(reference), "--model", str(model), "--out", str(tmp_path)]
    main(["sweep", *args, "--cfg-scale", "1", "--num", "8", "--allow-partial"])
    assert "for curves: pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "sweep.png").exists()
    assert "PARTIAL" in (tmp_path / "sweep.md").read_text()


def test_a_sweep_checks_all_strengths_first(model, reference, short, sampled, tmp_path, capsys) -> None:
    args = ["--protocol", "digits-fast", "--reference", reference, "--model", model, "--out", tmp_path]
    assert "got -1.0" in refused(capsys, "sweep", *args, "--cfg-scale", "1", "-1")
    assert sampled == []
    assert "--cfg-scale" in refused(capsys, "sweep", *args)
    assert "invalid float value: 'two'" in refused(capsys, "sweep", *args, "--cfg-scale", "1", "two")


def test_a_sweep_reads_its_reference_once(model, short, tmp_path, monkeypatch) -> None:
    extract, seen = ClassifierExtractor._extract, list[int]()

    def noting(self: ClassifierExtractor, pixels: torch.Tensor) -> Any:
        seen.append(len(pixels))
        return extract(self, pixels)

    monkeypatch.setattr(ClassifierExtractor, "_extract", noting)
    images = write_pngs(tmp_path / "images", digits(0, 8))
    args = ["--protocol", "digits-fast", "--reference", str(images), "--model", str(model)]
    main(["sweep", *args, "--out", str(tmp_path / "out"), "--cfg-scale", "1", "4"])
    assert sorted(seen) == [8, NUM, NUM]


def test_reconstructions_are_scored(model, short_reconstruction, tmp_path) -> None:
    args = ["--protocol", "recon-digits", "--data", "digits", "--model", str(model), "--device", "cpu"]
    main(["reconstruct", *args, "--out", str(tmp_path), "--num", str(NUM)])
    result = read(tmp_path / "result.json")
    scores = result["scores"]
    after = {f"psnr_{count}_tokens" for count in (2, 4, 6)}
    assert scores.keys() == {
        *after, "psnr", "ssim", "codebook_usage", "codebook_perplexity", "fd-cifar10",
    }  # fmt: skip
    assert all(np.isfinite(value) for value in scores.values())
    assert 1 / 16 <= scores["codebook_usage"] <= 1 and 1 <= scores["codebook_perplexity"] <= 16
    assert result["partial"] is False and result["num_images"] == NUM
    assert re.fullmatch("[0-9a-f]{16}", result["model"]["hash"]) and result["versions"].keys() == set(LIBRARIES)
    assert (tmp_path / "grid.png").is_file()
    originals = digits(0, NUM).astype(np.float64)
    rebuilt = np.load(tmp_path / "reconstructions" / "pixels.npy")[..., 0]
    error = np.square(rebuilt - originals).mean(axis=(1, 2))
    assert scores["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean(), abs=1e-4)
    assert scores["ssim"] == pytest.approx(
        float(structural_similarity_index_measure(
            *(torch.from_numpy(side)[:, None].double() for side in (rebuilt.astype(np.float64), originals)),
            data_range=255.0,
        )), abs=1e-4,
    )  # fmt: skip
    main(["reconstruct", *args, "--out", str(tmp_path), "--num", str(NUM), "--batch-size", "7"])
    assert without_times(read(tmp_path / "result.json")) == without_times(result)


def test_reconstructions_need_a_fitting_protocol_and_enough_images(
    model, short_reconstruction, tmp_path, capsys
) -> None:
    args = ["reconstruct", "--model", model, "--out", tmp_path / "out", "--protocol"]
    assert "reconstruction" in refused(capsys, *args, "digits-fast", "--data", "digits")
    assert "data must be given" in refused(capsys, *args, "recon-digits")
    assert "tokenizer of 32 pixel images" in refused(capsys, *args, "recon-cifar10", "--data", "digits")
    error = refused(capsys, *args, "recon-digits", "--data", "digits", "--num", "8")
    assert f"recon-digits must have {NUM} images, got 8" in error
    assert "at least 1, got 0" in refused(capsys, *args, "recon-digits", "--data", "digits", "--num", "0")
    error = refused(capsys, *args, "recon-digits", "--data", "digits", "--num", NUM, "--batch-size", "0")
    assert "batch_size must be at least 1, got 0" in error


def test_likelihoods_go_on_and_say_what_they_are_of(model, tmp_path, capsys, monkeypatch) -> None:
    options = ["likelihood", "--model", str(model), "--protocol", "bits-digits", "--data", "digits", "--device", "cpu"]
    main([*options, "--out", str(tmp_path / "whole")])
    whole = read(tmp_path / "whole" / "result.json")
    images, labels = Digits(image_size=8, channels=1).image_set("val", 8).squares(torch.arange(297))[:2]
    pipe = vision_ar.load(model)
    with torch.inference_mode():
        tokens = pipe.tokenizer.encode(normalise(images), labels)
        plan = pipe.generator.objective.plan(tokens)
        nats = float(run(pipe.generator.backbone, pipe.generator.heads, plan)["loss"]) * 8
    scores = whole["scores"]
    assert scores["token_nats_per_image"] == pytest.approx(nats, rel=1e-5)
    assert scores["bits_per_token"] == pytest.approx(nats / 8 / np.log(2), rel=1e-5)
    assert scores["token_bits_per_dim"] == pytest.approx(nats / 64 / np.log(2), rel=1e-5)
    assert 0 < scores["token_nats_per_image_se"] < nats
    assert whole["num_images"] == 297 and not whole["partial"]
    assert whole["model"]["hash"] == pipe.digest and whole["reference"]["digest"] == whole["images"]

    measured: list[int] = []
    token_nats = likelihood.token_nats

    def stops(generator: Generator, tokens: Tokens) -> torch.Tensor:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(tokens.batch_size)
        return token_nats(generator, tokens)

    monkeypatch.setattr(likelihood, "token_nats", stops)
    assert "the same command goes on" in refused(capsys, *options, "--out", tmp_path / "cut")
    monkeypatch.setattr(likelihood, "token_nats", lambda *a: measured.append(0) or token_nats(*a))
    main([*options, "--out", str(tmp_path / "cut")])
    assert len(measured) == 3  # 297 images in three batches, none twice
    assert without_times(read(tmp_path / "cut" / "result.json")) == without_times(whole)


def test_likelihoods_need_their_protocol_their_data_and_a_model_of_such_images(
    model, short_reconstruction, tmp_path, capsys
) -> None:
    out = ("--out", tmp_path / "out", "--device", "cpu")
    given = ("likelihood", "--model", model, *out)
    message = refused(capsys, *given, "--protocol", "digits-fast", "--data", "digits")
    assert "protocol must be one of likelihood, got digits-fast" in message
    assert "data must be given for protocol bits-digits" in refused(capsys, *given, "--protocol", "bits-digits")
    message = refused(capsys, *given, "--protocol", "bits-cifar10", "--data", "digits")
    assert "model must have a tokenizer of 32 pixel images" in message
    message = refused(capsys, *given, "--protocol", "bits-digits", "--data", "digits", "--num", 5)
    assert "bits-digits must have 297 images, got 5; --allow-partial" in message
    for number in range(3):
        write_pngs(tmp_path / "data" / "train" / str(number), digits(0, 2))
        write_pngs(tmp_path / "data" / "val" / str(number), digits(0, 2))
    few = ("--data", tmp_path / "data", "--allow-partial")
    message = refused(capsys, *given, "--protocol", "bits-digits", *few)
    assert "data must have 10 classes, as the model has, got 3" in message
    make = ("make-reference", "--protocol", "bits-digits", "--data", "digits", "--out", tmp_path / "r.npz")
    assert "protocol must have an extractor, got bits-digits" in refused(capsys, *make, "--device", "cpu")


# Several processes


def test_two_processes_make_the_images_and_the_score_of_one(model, tmp_path) -> None:
    # one thread each, in all libraries: sums of float32 differ in their last digits with the number of threads
    run = partial(
        subprocess.run, capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    options = ["--protocol", "digits-fast", "--device", "cpu", "--model", str(model), "--data", "digits"]
    options += ["--batch-size", "30", "--num", "80", "--allow-partial", "--out"]
    command = ["vision_ar.evaluation", "generate-and-score", *options]
    alone = run([sys.executable, "-m", *command, str(tmp_path / "one")])
    assert alone.returncode == 0, alone.stderr[-2000:]
    one = read(tmp_path / "one" / "result.json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launcher, "-m", "--", *command, str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-2000:]
    two = read(tmp_path / "two" / "result.json")
    assert without_times(two) == without_times(one)
    assert done.stdout.count("protocol digits-fast, PARTIAL, 80 of 100 images") == 1  # the first process speaks for all
