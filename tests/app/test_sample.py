"""The command line as a user meets it, on a tiny model made here."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision_ar
from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.checkpoints.store import Description, bundled_names, describe, save_model
from vision_ar.generator import Generator
from vision_ar.objectives.next_token import NextToken
from vision_ar.pictures import read_image
from vision_ar.sample_cli import main
from vision_ar.sampler import memory
from vision_ar.tokenizers.diffusion import DiffusionTokenizer

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = DiffusionTokenizer.tiny()
    torch.nn.init.normal_(tokenizer.velocity.conv_out.weight, std=0.3)
    generator = Generator(tokenizer.spec, lambda s: Llama(s, LlamaSize("tiny"), num_classes=3), NextToken())
    torch.nn.init.normal_(generator.heads["token"].output.weight, std=0.3)
    described = Description(
        describe(tokenizer), describe(generator.backbone), describe(generator.objective), NAMES, {"cfg_scale": 2.0}
    )
    parts = {"tokenizer": tokenizer, "generator": generator}
    return save_model(tmp_path_factory.mktemp("model"), described, parts, "# Card\n")


def sample(model: Path, out: Path, *args: str) -> dict:
    main(["--model", str(model), "--out", str(out), "--device", "cpu", *args])
    return json.loads((out / "samples.json").read_text())


def pixels(out: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(out / f"{number:05d}.png"))


def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_the_folder_holds_images_grid_and_report(model, tmp_path) -> None:
    report = sample(model, tmp_path / "out", "--num", "5", "--labels", "2", "ant", "--seed", "40")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [*(f"{i:05d}.png" for i in range(5)), "grid.png", "samples.json"]
    assert report["images"] == [{"file": f"{i:05d}.png", "label": [2, 0][i % 2], "seed": 40 + i} for i in range(5)]
    assert report["settings"]["cfg_scale"] == 2.0
    assert set(report) == {"images", "model", "settings", "seconds"}
    assert len(report["model"]["hash"]) == 16
    assert pixels(tmp_path / "out", 0).shape == (8, 8, 3)


def test_without_labels_every_class_gets_its_turn(model, tmp_path) -> None:
    report = sample(model, tmp_path, "--num", "4")
    assert [image["label"] for image in report["images"]] == [0, 1, 2, 0]


def test_image_i_of_seed_s_is_image_zero_of_seed_s_plus_i(model, tmp_path) -> None:
    sample(model, tmp_path / "all", "--num", "3", "--labels", "bee", "--seed", "5")
    sample(model, tmp_path / "one", "--num", "1", "--labels", "bee", "--seed", "7")
    assert np.array_equal(pixels(tmp_path / "all", 2), pixels(tmp_path / "one", 0))


def test_batch_size_and_previews_do_not_change_the_images(model, tmp_path) -> None:
    sample(model, tmp_path / "a", "--num", "5")
    sample(model, tmp_path / "b", "--num", "5", "--batch-size", "2", "--previews")
    for number in range(5):
        assert np.abs(pixels(tmp_path / "a", number).astype(int) - pixels(tmp_path / "b", number)).max() <= 1


def test_previews_are_a_sheet_and_an_animation_that_ends_with_the_images(model, tmp_path) -> None:
    sample(model, tmp_path, "--num", "3", "--previews")
    with Image.open(tmp_path / "previews.gif") as animation:
        assert animation.n_frames == 4  # one per group
    sheet = Image.open(tmp_path / "previews.png")
    assert sheet.width // 4 == pytest.approx(sheet.height // 3, abs=3)  # 3 rows of samples, 4 columns of groups


def test_a_prefix_keeps_the_first_tokens_of_a_picture(model, tmp_path) -> None:
    reference = tmp_path / "reference.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 14, 3), dtype=np.uint8)).save(reference)
    sample(model, tmp_path / "out", "--num", "2", "--prefix-from", str(reference), "--prefix-tokens", "6")
    pipe = vision_ar.load(model)
    wanted = pipe.tokenizer.encode(read_image(reference, 8)).ids[0, :6]
    forced = pipe.keep_prefix(read_image(reference, 8), 6, 2)
    samples = pipe.sample([0, 1], forced=forced)
    assert torch.equal(samples.ids[:, :6], wanted.expand(2, -1))
    assert not torch.equal(samples.ids[0, 6:], samples.ids[1, 6:])


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P"])
def test_a_reference_is_read_as_training_reads_it(model, tmp_path, mode) -> None:
    values = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    picture = (
        Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    )
    picture.save(tmp_path / "reference.png")
    read = read_image(tmp_path / "reference.png", 16)
    assert read.shape == (1, 3, 16, 16)
    expected = torch.linspace(-1, 1, 16).expand(3, 16, 16)
    torch.testing.assert_close(read[0], expected, rtol=0, atol=0.02)


def test_a_huge_picture_is_refused_in_one_line(model, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (40, 40)).save(tmp_path / "huge.png")
    error = refused(
        capsys, "--model", str(model), "--out", str(tmp_path / "out"), "--prefix-from", str(tmp_path / "huge.png")
    )
    assert "image must be a whole picture" in error


def test_a_second_run_leaves_no_files_of_the_first(model, tmp_path) -> None:
    sample(model, tmp_path, "--num", "4", "--previews")
    (tmp_path / "mine.txt").write_text("keep")
    sample(model, tmp_path, "--num", "2")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"00000.png", "00001.png", "grid.png", "samples.json", "mine.txt"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--labels", "3"], "labels must be 0 to 2, got 3"),
        (["--labels", "-1"], "labels must be 0 to 2, got -1"),
        (["--labels", "dog"], "labels must be class ids or names .ant, bee, cow., got 'dog'"),
        (["--cfg-scale", "-1"], "cfg_scale must be at least 0, got -1.0"),
        (["--cfg-schedule", "wavy"], "invalid choice: 'wavy'"),
        (["--temperature", "-0.5"], "temperature must be at least 0, got -0.5"),
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--top-p", "1.5"], "top_p must be in"),
        (["--num", "0"], "num must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--seed", "99999999999999999999"], "seeds must fit into 64 bits, got 99999999999999999999"),
        (["--cfg-scale", "1e39"], "logits must be finite, got NaN"),
        (["--model", ""], "model must be a bundled name .*, got an empty name"),
        (["--prefix-from", str(ROOT / "README.md")], "image must be a whole picture, .*README.md is not"),
        (["--prefix-from", "nowhere.png"], "image must be a file, got nowhere.png"),
        (["--device", "cuda:99"], "device must be one that this machine has, got cuda:99"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=str,
)
def test_errors_are_one_line_with_code_2_and_nothing_written(model, tmp_path, capsys, args, message) -> None:
    error = refused(capsys, "--model", str(model), "--out", str(tmp_path / "out"), *args)
    import re

    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_lists_the_known_ones(tmp_path, capsys) -> None:
    error = refused(capsys, "--model", "nope", "--out", str(tmp_path))
    assert all(name in error for name in bundled_names()) and "got nope" in error


def test_an_unwritable_folder_is_refused_before_any_work(model, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    error = refused(capsys, "--model", str(model), "--out", str(tmp_path / "file" / "out"))
    assert "out must be a folder that can be written" in error


@pytest.mark.parametrize("damage", ["truncated", "garbage", "other sizes", "pickle"])
def test_damaged_weights_are_refused(model, tmp_path, capsys, damage) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.yaml", "README.md", "model.safetensors"):
        (broken / name).write_bytes((model / name).read_bytes())
    target = broken / "model.safetensors"
    if damage == "truncated":
        target.write_bytes(target.read_bytes()[:-1000])
    elif damage == "garbage":
        target.write_bytes(b"not weights at all" * 100)
    elif damage == "other sizes":
        config = (broken / "config.yaml").read_text()
        (broken / "config.yaml").write_text(config.replace("vocab_size: 16", "vocab_size: 32"))
    else:
        target = broken / "evil.ckpt"
        torch.save({"state_dict": {}, "vision_ar": Evil()}, target)
        broken = target
    error = refused(capsys, "--model", str(broken), "--out", str(tmp_path / "out"))
    assert "broken" in error
    assert not (tmp_path / "pwned").exists()


class Evil:
    """What a pickle could do if it were run."""

    def __reduce__(self):  # noqa: ANN204
        return (Path("pwned").write_text, ("",))


def test_a_config_cannot_name_foreign_code(model, tmp_path, capsys) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    config = (model / "config.yaml").read_text()
    (broken / "config.yaml").write_text(
        config.replace("vision_ar.tokenizers.diffusion.DiffusionTokenizer", "subprocess.Popen")
    )
    assert "class_path must name a class of vision_ar" in refused(
        capsys, "--model", str(broken), "--out", str(tmp_path / "out")
    )


def test_weights_of_8_bits_are_an_option_that_the_report_names(model, tmp_path, capsys) -> None:
    plain = sample(model, tmp_path / "plain", "--num", "3")
    coarse = sample(model, tmp_path / "coarse", "--num", "3", "--quantize", "int8", "--roofline")
    assert (plain["settings"]["quantize"], coarse["settings"]["quantize"]) == (None, "int8")
    out = capsys.readouterr().out
    assert "3 images at a time need" in out  # before the images
    assert re.search(r"a step of 3 images took [0-9.]+ ms; .* [0-9.]+ ms here: [0-9]+% of the limit", out)
    message = refused(capsys, "--model", str(model), "--out", str(tmp_path), "--quantize", "int8", "--compile")
    assert "quantize must be left out with compile, got int8" in message


def test_a_batch_that_will_not_fit_is_refused_with_one_that_would(model, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40_000)
    message = refused(capsys, "--model", str(model), "--out", str(tmp_path / "out"), "--num", "64")
    fits = int(re.search("batch_size must be at most ([0-9]+) here, got 64", message)[1])
    assert 0 < fits < 64 and not (tmp_path / "out").exists()
    capsys.readouterr()
    sample(model, tmp_path / "out", "--num", "3", "--batch-size", str(min(fits, 3)))


def test_images_of_one_batch_may_have_settings_of_their_own(model) -> None:
    pipe = vision_ar.load(model)
    each = [{"cfg_scale": 1.0}, {"temperature": 0.0}, {"cfg_scale": 3.0, "top_k": 2}]
    together = pipe.sample([0, 1, 2], seed=4, each=each, batch_size=2)
    for number, own in enumerate(each):
        alone = pipe.sample([number], seed=4 + number, **own)
        assert torch.equal(together.ids[number], alone.ids[0])
    with pytest.raises(ValueError, match="each must have settings for every image, got 1 for 2 images"):
        list(pipe.stream([0, 1], each=[{}]))


def test_the_script_itself_runs(model, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(model), "--num", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 images in" in done.stdout and (tmp_path / "grid.png").exists()


def test_streaming_tells_every_token_and_every_preview(model) -> None:
    pipe = vision_ar.load(model)
    events = list(pipe.stream([1], seed=3))
    assert [event.kind for event in events].count("tokens") == 8
    assert [event.written for event in events if event.kind == "preview"] == [2, 4, 6, 8]
    last = events[-1]
    whole = pipe.sample([1], seed=3)
    assert last.kind == "done" and torch.equal(last.ids, whole.ids)
    torch.testing.assert_close(last.preview.clamp(-1, 1), whole.images, rtol=0, atol=1e-5)


def test_saved_models_come_back_the_same(model, tmp_path) -> None:
    saved = vision_ar.load(model)
    description = Description(
        describe(saved.tokenizer), describe(saved.generator.backbone), describe(saved.generator.objective), NAMES
    )
    again = save_model(tmp_path, description, {"tokenizer": saved.tokenizer, "generator": saved.generator}, "")
    first, second = (vision_ar.load(path).sample([0, 1, 2], seed=9, cfg_scale=1.5) for path in (model, again))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.images, second.images)
    assert dataclasses.asdict(description)["tokenizer"]["init_args"]["image_size"] == 8
