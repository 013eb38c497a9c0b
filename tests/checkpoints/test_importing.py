"""Published files become models of ours: every tensor by its name and shape, both ways, and outputs as recorded."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.golden import fill as fill_rule
from tests.golden import hashed_input, read_golden
from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.checkpoints import importing, llamagen
from vision_ar.checkpoints.__main__ import main
from vision_ar.checkpoints.families import NO_USE, back, convert, without_use
from vision_ar.checkpoints.foreign import read_foreign
from vision_ar.checkpoints.importing import FAMILIES, import_model, meta_module, open_model
from vision_ar.generator import Generator
from vision_ar.interfaces import Tokens, TokenSpec, run
from vision_ar.objectives.next_token import NextToken
from vision_ar.sampler.engine import Condition, Session
from vision_ar.sampler.guidance import constant, linear
from vision_ar.sampler.logits import Law
from vision_ar.tokenizers.vq import ConvSize, VQTokenizer

MAPS = {
    "llamagen-vq16": "llamagen_vq16", "llamagen-vq8": "llamagen_vq8", "llamagen-gpt-b": "llamagen_gpt_b",
    "llamagen-gpt-l": "llamagen_gpt_l", "llamagen-gpt-xl": "llamagen_gpt_xl", "llamagen-gpt-xxl": "llamagen_gpt_xxl",
    "llamagen-gpt-3b": "llamagen_gpt_3b", "llamagen-gpt-xl-t2i": "llamagen_gpt_xl_t2i",
    "dar-tokenizer": "dar_tokenizer_v1", "dar-l": "dar_l", "dar-xl": "dar_xl",
}  # fmt: skip
PARAMETERS = {
    "llamagen-gpt-b": 110_888_448, "llamagen-gpt-l": 342_910_976, "llamagen-gpt-xl": 774_699_520,
    "llamagen-gpt-xxl": 1_410_972_672, "llamagen-gpt-3b": 3_096_659_200, "llamagen-gpt-xl-t2i": 777_678_080,
    "dar-l": 342_910_976, "dar-xl": 774_699_520,
}  # fmt: skip


def published_map(folder: Path, family: str) -> dict[str, list[int]]:
    return json.loads((folder / f"{MAPS[family]}.json").read_text())


def test_every_family_is_tested() -> None:
    assert MAPS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", MAPS)
def test_the_published_map_loads_strictly_and_comes_back(family: str, shared_reference) -> None:
    kind, shapes = FAMILIES[family], published_map(shared_reference, family)
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    ours, report = convert(kind, published, "model")
    module = meta_module(kind)
    own = module.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in own.items() if not name.endswith(("seen_tokens", "last_used"))
    }
    assert set(report.used) | report.skipped.keys() == shapes.keys()
    assert all(reason in NO_USE.values() for reason in report.skipped.values())
    returned = {name: list(value.shape) for name, value in back(kind, own).items()}
    assert returned == {name: shape for name, shape in shapes.items() if name not in without_use(shapes)}
    if family in PARAMETERS:
        learned = 120 * 2048 if family.endswith("t2i") else 0  # features of "no text" are a buffer there
        assert sum(p.numel() for p in module.parameters()) == PARAMETERS[family] + learned


def filled_vq(family: str, folder: Path) -> tuple[VQTokenizer, dict[str, Any]]:
    """The recorded tokenizer through the table of its family, for images of the recorded size, and the record."""
    shapes, golden = published_map(folder, family), read_golden(folder, MAPS[family])
    names = [name for name in shapes if "codebook_used" not in name]
    weights = fill_rule(names, {name: tuple(shapes[name]) for name in names})
    multipliers = llamagen.VQ[family.removeprefix("llamagen-")]
    tokenizer = VQTokenizer(golden["image_shape"][-1], size=ConvSize(multipliers=multipliers))
    importing.fill(tokenizer, FAMILIES[family], weights, "model")
    return tokenizer, golden


@pytest.mark.parametrize("family", ["llamagen-vq16", "llamagen-vq8"])
def test_the_vq_tokenizers_give_the_recorded_codes_and_pixels(family: str, shared_reference) -> None:
    tokenizer, golden = filled_vq(family, shared_reference)
    images = hashed_input(tuple(golden["image_shape"]), golden["image_seed_j"])
    with torch.no_grad():
        ids = tokenizer.encode(images).ids
        torch.testing.assert_close(tokenizer.latents(images)[0, 0], torch.tensor(golden["prequant_first_vec"]),
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
        pixels = tokenizer.decode(Tokens.of(tokenizer.spec, ids=torch.tensor([golden["codes"]])))
    sure = torch.tensor(golden["cos_gap"]) > 1e-3  # one code of VQ-16 is a near-tie
    assert ids[0][sure].tolist() == torch.tensor(golden["codes"])[sure].tolist() and int((~sure).sum()) <= 1
    first = torch.tensor(golden["decoded_ch0_row0_first8"])
    torch.testing.assert_close(pixels[0, 0, 0, :8], first, rtol=1e-5, atol=1e-5)
    moments = torch.stack([pixels.mean(), pixels.std()])
    recorded = torch.tensor([golden["decoded_mean"], golden["decoded_std"]])
    torch.testing.assert_close(moments, recorded, rtol=1e-5, atol=1e-5)


def tiny_gpt(system: str, golden: dict[str, Any]) -> Generator:
    """The recorded generator, through the table of its family."""
    config = golden["config"]
    tokens, classes = config["block_size"], config["num_classes"]
    size = LlamaSize("tiny", dim=config["dim"], depth=config["n_layer"], num_heads=config["n_head"])
    places = {"rotary": "1d"} if system == "dar" else {"rotary": "2d", "silent_prefix": True}
    spec = TokenSpec(tokens, (tokens,), config["vocab_size"], grid=(4, 4))
    generator = Generator(spec, lambda s: Llama(s, size, num_classes=classes, **places), NextToken())
    kind = replace(FAMILIES["dar-l"], entries=partial(llamagen.gpt_entries, config["n_layer"]))
    own = back(kind, generator.state_dict())
    weights = fill_rule(golden["names"], {name: tuple(own[name].shape) for name in golden["names"]})
    importing.fill(generator, kind, weights, "model")
    return generator


@pytest.mark.parametrize("system", ["dar", "llamagen"])
def test_the_generators_give_the_recorded_logits_loss_and_greedy_tokens(system: str, shared_reference) -> None:
    golden = read_golden(shared_reference, f"{system}_gpt_tiny")
    generator = tiny_gpt(system, golden)
    ids, label = torch.tensor([golden["ids"]]), torch.tensor([golden["class_label"]])
    plan = generator.objective.plan(Tokens.of(generator.spec, ids=ids, labels=label))
    with torch.no_grad():
        loss = run(generator.backbone, generator.heads, plan)["loss"]
        hidden = generator.backbone(
            generator.backbone.embed(plan.inputs), generator.backbone.place(plan.inputs), plan.attention
        )
        logits = generator.heads["token"](hidden)[0]
    assert float(loss) == pytest.approx(golden["loss"], rel=1e-5)
    for row, name in ((0, "logits_first_row"), (len(golden["ids"]) - 1, "logits_last_row")):
        torch.testing.assert_close(logits[row], torch.tensor(golden[name]), rtol=1e-5, atol=1e-5)
    schedules = {"greedy_cfg1": None, "greedy_cfg2": constant(2.0), "greedy_cfg_1.1_to_8.0": linear(8.0, 1.1)}
    for name, schedule in schedules.items():
        if name in golden:
            session = Session(
                generator, Condition(labels=torch.tensor([3, 7])), torch.zeros(2).long(), Law(0), schedule
            )
            while not session.done:
                session.step()
            assert session.ids.tolist() == golden[name], name


@pytest.fixture
def small(monkeypatch, tmp_path) -> dict[str, Path]:
    """Files of small networks under the names of published families."""
    sizes = {"llamagen-vq16": (1, 1), "llamagen-gpt-b": 1, "llamagen-gpt-l": 2, "dar-l": 2}
    families = {}
    for name, size in sizes.items():
        kind = FAMILIES[name]
        if kind.part == "tokenizer":
            entries: Any = partial(llamagen.vq_entries, size, 1)
            describe: Any = small_vq
        else:
            entries = partial(llamagen.gpt_entries, size)
            describe = partial(small_gpt, size, "1d" if name == "dar-l" else "2d")
        sizes_of = (8, 16) if name == "llamagen-gpt-b" else (8,)
        needs = kind.tokenizer and "llamagen-vq16"
        families[name] = replace(kind, entries=entries, describe=describe, image_sizes=sizes_of, tokenizer=needs)
    monkeypatch.setattr(importing, "FAMILIES", families)
    monkeypatch.setattr("vision_ar.checkpoints.__main__.FAMILIES", families)
    torch.manual_seed(0)
    files = {}
    for name, kind in families.items():
        shapes = importing.published_shapes(kind)
        content: dict[str, Any] = {n: torch.randn(shape) * 0.1 for n, shape in shapes.items()}
        content |= {"quantize.codebook_used": torch.zeros(8)} if "vq" in name else {"freqs_cis": torch.zeros(3)}
        files[name] = tmp_path / f"{name}.pt"
        torch.save({"model": content, "optimizer": {}, "steps": 3}, files[name])
    return files


def small_vq(image_size: int) -> dict[str, Any]:
    size = {"width": 32, "multipliers": [1, 1], "num_blocks": 1, "z_channels": 8}
    arguments = {"image_size": image_size, "size": size, "vocab_size": 16, "latent_dim": 4}
    return {"class_path": "vision_ar.tokenizers.vq.VQTokenizer", "init_args": arguments}


def small_gpt(depth: int, rotary: str, image_size: int) -> dict[str, Any]:
    size = {"preset": "tiny", "dim": 32, "depth": depth}
    arguments = {"size": size, "num_classes": 10, "rotary": rotary, "silent_prefix": rotary == "2d"}
    return {"class_path": "vision_ar.backbones.llama.Llama", "init_args": arguments}


def run_main(*args: Any) -> None:
    main([str(arg) for arg in args])


def refused(capsys, *args: Any) -> str:
    """The one line that a wrong command ends with."""
    with pytest.raises(SystemExit) as stopped:
        run_main(*args)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_command_writes_a_folder_that_samples_as_the_files_do(small, tmp_path, capsys) -> None:
    from vision_ar.pipeline import load

    given = ["--tokenizer", small["llamagen-vq16"], "--image-size", 8]
    run_main("import", small["llamagen-gpt-b"], *given, "--out", tmp_path / "out")
    told = capsys.readouterr().out
    assert "llamagen-gpt-b: 11 tensors from model, 1 skipped (a table of rotations, which is computed here)" in told
    assert "llamagen-vq16:" in told and "counts of codes" in told
    folder = load(tmp_path / "out")
    memory = load(small["llamagen-gpt-b"], tokenizer=small["llamagen-vq16"], image_size=8)
    assert folder.defaults == memory.defaults == {"cfg_scale": 2.0}
    first, second = folder.sample([3, 7], seed=1), memory.sample([3, 7], seed=1)
    assert torch.equal(first.ids, second.ids) and torch.equal(first.images, second.images)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["tokenizer"]["class_path"].endswith(
        "VQTokenizer"
    )
    again = load(small["llamagen-gpt-b"], tokenizer=tmp_path / "out", image_size=8)  # the tokenizer of a folder
    assert torch.equal(again.sample([3, 7], seed=1).ids, first.ids)


def test_safetensors_and_plain_dictionaries_are_files_too(small, tmp_path) -> None:
    weights, taken_from = read_foreign(small["llamagen-vq16"], ("model",))
    assert taken_from == "model"
    save_file(weights, tmp_path / "vq.safetensors")
    torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, tmp_path / "plain.pt")
    for name in ("vq.safetensors", "plain.pt"):
        saved, (report,) = import_model(tmp_path / name)
        assert saved.generator is None and report.taken_from == "the file itself"
        assert torch.equal(saved.tokenizer.quantizer.codebook, weights["quantize.embedding.weight"])


def test_the_set_that_counts_is_taken(small, tmp_path) -> None:
    weights, _ = read_foreign(small["llamagen-vq16"], ("model",))
    averaged = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": weights, "ema": averaged}, tmp_path / "both.pt")
    assert read_foreign(tmp_path / "both.pt", FAMILIES["llamagen-vq16"].sets)[1] == "model"
    assert read_foreign(tmp_path / "both.pt", FAMILIES["dar-tokenizer"].sets)[1] == "ema"


def test_what_names_and_shapes_do_not_decide_is_asked_for(small, tmp_path, capsys) -> None:
    out = ["--out", tmp_path / "out"]
    line = refused(capsys, "import", small["dar-l"], *out)
    assert "family must be named" in line and "llamagen-gpt-l or dar-l" in line
    line = refused(capsys, "import", small["llamagen-gpt-b"], *out)
    assert "image_size must be given for llamagen-gpt-b: files for 8 or 16 pixels look the same" in line
    line = refused(capsys, "import", small["dar-l"], "--family", "dar-l", *out)
    assert "tokenizer must name the file or folder of llamagen-vq16 for dar-l" in line
    assert "family must be one of" in refused(capsys, "import", small["dar-l"], "--family", "no", *out)
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_refused_in_one_line(small, tmp_path, capsys) -> None:
    out = ["--out", tmp_path / "out"]
    line = refused(capsys, "import", small["dar-l"], "--family", "llamagen-gpt-b", "--image-size", 8, "--tokenizer",
                   small["llamagen-vq16"], *out)  # fmt: skip
    assert "the file must be llamagen-gpt-b, but it has layers.1.attention.wo.weight too and 6 others" in line
    weights, _ = read_foreign(small["llamagen-vq16"], ("model",))
    files = {
        "missing": {k: v for k, v in weights.items() if k != "quant_conv.bias"},
        "shape": {**weights, "quantize.embedding.weight": torch.zeros(16, 5)},
        "extra": {**weights, "new.weight": torch.zeros(1)},
    }
    wanted = {
        "missing": "lacks quant_conv.bias", "shape": "quantizer.codebook has shape (16, 5) in place of (16, 4)",
        "extra": "has new.weight too",
    }  # fmt: skip
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
        line = refused(capsys, "import", tmp_path / f"{name}.pt", "--family", "llamagen-vq16", *out)
        assert wanted[name] in line
        assert "has other tensors" in refused(capsys, "import", tmp_path / f"{name}.pt", *out)
    whole = small["llamagen-vq16"].read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name in ("cut.pt", "text.pt"):
        assert "must be a whole file of torch.save" in refused(capsys, "import", tmp_path / name, *out)
    assert "checkpoint must be a file" in refused(capsys, "import", tmp_path / "no.pt", "--family", "dar-l", *out)


class Config:
    """Lies in some published files beside the weights."""

    def __init__(self) -> None:
        self.levels = 5


class Trap:
    """Would run code if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (write_text, (str(self.file),))


def write_text(path: str) -> None:
    Path(path).write_text("run")


def test_a_class_in_a_file_is_never_run(small, tmp_path) -> None:
    weights, _ = read_foreign(small["llamagen-vq16"], ("model",))
    torch.save({"model": weights, "config": Config(), "trap": Trap(tmp_path / "ran")}, tmp_path / "odd.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "odd.pt", weights_only=True)
    saved, _ = import_model(tmp_path / "odd.pt")
    assert torch.equal(saved.tokenizer.quantizer.codebook, weights["quantize.embedding.weight"])
    assert not (tmp_path / "ran").exists()


def test_models_of_this_project_open_as_before(tmp_path) -> None:
    assert open_model("cifar10-dar").generator is not None
    with pytest.raises(ValueError, match="family must be left out for a model of this project"):
        open_model("cifar10-dar", "dar-l")
    with pytest.raises(ValueError, match="on the Hub must be hf:owner/name"):
        open_model("hf:alone")


def test_families_lists_what_can_be_imported(capsys) -> None:
    run_main("families")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FAMILIES) and any("dar-xl" in line and "needs dar-tokenizer" in line for line in lines)
