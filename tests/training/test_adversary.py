"""A tokenizer and its adversary in one run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.training.test_training import data, trainer
from vision_ar.layers.adversary import Adversary, PatchDiscriminator
from vision_ar.tokenizers.vq import VQTokenizer
from vision_ar.training.callbacks import EMA
from vision_ar.training.schedules import Schedule
from vision_ar.training.tokenizer import TokenizerModule

START = 4


def module(**settings) -> TokenizerModule:
    torch.manual_seed(0)
    tokenizer = VQTokenizer.tiny()
    adversary = Adversary(width=8, num_layers=1, **{"start_step": START, **settings})
    return TokenizerModule(tokenizer, schedule=Schedule("cosine", warmup_steps=2, total_steps=20), adversary=adversary)


def weights(part: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(part.parameters()).detach().clone()


class Watch(L.Callback):
    """Keeps both sets of weights and the counted steps after every batch."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.logged: list[set[str]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append(trainer.global_step)
        self.seen.append((weights(pl_module.tokenizer), weights(pl_module.adversary)))
        self.logged.append(set(trainer.logged_metrics) | set(trainer.callback_metrics))


def test_the_adversary_learns_from_its_first_step_on_and_counts_no_steps(tmp_path) -> None:
    watch, trained = Watch(), module()
    start = weights(trained.adversary)
    trainer(tmp_path, 8, [watch]).fit(trained, data())
    assert watch.steps == list(range(1, 9))  # the steps of the tokenizer alone
    judges = [judge for _, judge in watch.seen]
    assert all(torch.equal(judge, start) for judge in judges[:START])
    assert all(not torch.equal(a, b) for a, b in zip(judges[START - 1 :], judges[START:], strict=False))
    own = [tokenizer for tokenizer, _ in watch.seen]
    assert all(not torch.equal(a, b) for a, b in zip(own, own[1:], strict=False))
    assert "train/adversary" not in watch.logged[START - 1]
    assert {"train/adversary", "train/discriminator", "train/logits_real"} <= watch.logged[-1]


def test_before_its_first_step_a_run_is_the_run_without_it(tmp_path) -> None:
    ends = []
    for adversary in (None, Adversary(width=8, num_layers=1, start_step=100)):
        torch.manual_seed(0)
        tokenizer = VQTokenizer.tiny()
        schedule = Schedule("cosine", warmup_steps=2, total_steps=20)
        trained = TokenizerModule(tokenizer, schedule=schedule, adversary=adversary)
        clip = {"gradient_clip_val": 1.0} if adversary is None else {}
        trainer(tmp_path / str(len(ends)), 6, **clip).fit(trained, data())
        ends.append(weights(trained.tokenizer))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"adaptive": True, "loss": "softplus"}, id="adaptive", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_equal_ten_and_ten_resumed(tmp_path, settings) -> None:
    whole, first, second = (module(**settings) for _ in range(3))
    trainer(tmp_path / "whole", 20, [EMA(0.9)]).fit(whole, data())
    trainer(tmp_path / "parts", 10, [EMA(0.9)]).fit(first, data())
    last = tmp_path / "parts/checkpoints/last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 10 and len(saved["optimizer_states"]) == 2
    trainer(tmp_path / "parts", 20, [EMA(0.9)]).fit(second, data(), ckpt_path=last)
    for (name, wanted), got in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_saved_model_has_no_adversary(tmp_path) -> None:
    trained = module()
    trainer(tmp_path, 1).fit(trained, data())
    assert trained.parts().keys() == {"tokenizer"}


def test_half_precision_with_a_scaler_is_refused(tmp_path) -> None:
    trained, run = module(), trainer(tmp_path, 1)
    run.precision_plugin.scaler = object()  # as 16-mixed has it on a GPU
    with pytest.raises(ValueError, match="precision must be 32-true or bf16-mixed with an adversary, got 16-mixed"):
        run.fit(trained, data())


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_a_discriminator_learns_to_tell_and_the_judgement_falls_when_it_is_fooled(kind: str) -> None:
    torch.manual_seed(0)
    adversary = Adversary(1, 8, 1, loss=kind)
    real, fake = torch.full((8, 1, 16, 16), 0.5), torch.full((8, 1, 16, 16), -0.5)
    noise = 0.1 * torch.randn(8, 1, 16, 16)
    optimizer = torch.optim.Adam(adversary.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        adversary.losses(real + noise, fake + noise)["discriminator"].backward()
        optimizer.step()
    told = adversary.eval().losses(real + noise, fake + noise)
    assert told["logits_real"] > 0 > told["logits_rebuilt"]
    assert adversary.judge(real + noise) < adversary.judge(fake + noise)


def test_the_balance_is_the_ratio_of_gradients_at_the_last_layer() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    loss, judgement = (weight**2).sum() / 2, 0.1 * weight.sum()
    ratio = 5.0 / (0.1 * 2**0.5 + 1e-4)
    assert float(Adversary(adaptive=True).balance(loss, judgement, weight)) == pytest.approx(ratio, rel=1e-5)
    assert float(Adversary().balance(loss, judgement, weight)) == 1.0
    assert float(Adversary(adaptive=True).balance(loss, judgement, None)) == 1.0


def test_three_layers_judge_patches_of_seventy_pixels() -> None:
    discriminator = PatchDiscriminator().eval()
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss must be hinge or softplus, got 'no'"):
        Adversary(loss="no")
    with pytest.raises(ValueError, match="weight and start_step must be at least 0, got -1"):
        Adversary(weight=-1)
