from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from vision_ar.data.images import Digits
from vision_ar.data.sampler import EpochSampler, key_seed

FirstBatch = Callable[..., dict[str, Tensor]]
pytestmark = pytest.mark.filterwarnings("ignore")


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 4) == order(0, 4)
    assert sorted(order(0, 4)) == list(range(200, 250))
    assert len({tuple(key % 50 for key in order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_seeds_of_different_keys_differ() -> None:
    assert len({key_seed("order", seed, epoch) for seed in range(30) for epoch in range(30)}) == 900


@pytest.mark.parametrize(("drop_last", "shares"), [(False, 17), (True, 16)])
def test_processes_divide_the_samples_evenly(drop_last: bool, shares: int) -> None:
    parts = [list(EpochSampler(50, drop_last=drop_last, num_replicas=3, rank=rank)) for rank in range(3)]
    assert [len(part) for part in parts] == [shares] * 3
    assert len(set(sum(parts, []))) == min(50, 3 * shares)
    together = [key for keys in zip(*parts, strict=True) for key in keys]
    assert together[:48] == list(EpochSampler(50))[:48]


def test_more_processes_than_samples_get_one_each() -> None:
    parts = [list(EpochSampler(2, num_replicas=5, rank=rank)) for rank in range(5)]
    assert [len(part) for part in parts] == [1] * 5


def test_data_module_takes_its_share_from_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 1})
    data = Digits(image_size=8)
    data.trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    data.setup("fit")
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, torch.utils.data.DistributedSampler)  # so that Lightning does not wrap it
    assert (len(sampler), sampler.rank, sampler.num_replicas) == (750, 1, 2)


def test_empty_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        EpochSampler(0)


class Recorder(L.LightningModule):
    """Note every training batch, and save a checkpoint within a step when asked."""

    def __init__(self, save_in: int | None = None, path: str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int], float]] = []
        self.save_in, self.path = save_in, path

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.seen.append((self.current_epoch, batch["labels"].tolist(), float(batch["images"].sum())))
        if len(self.seen) == self.save_in:
            self.trainer.save_checkpoint(self.path)
        return self.weight * batch["images"].mean()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    model: Recorder, ckpt_path: str | None = None, callbacks: tuple[L.Callback, ...] = (), **options: Any
) -> Recorder:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        **quiet, callbacks=list(callbacks), enable_checkpointing=bool(callbacks), num_sanity_val_steps=0, **options
    )
    data = Digits(image_size=8, batch_size=256, flip=True, crop="random")  # 6 batches in an epoch
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=False)
    return model


@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_steps": 15, "val_check_interval": 2}])
def test_resumed_training_sees_the_batches_of_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    every = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole = fit(Recorder(), callbacks=(every,), **options).seen
    assert len({batch[2] for batch in whole}) == len(whole)
    for step in (2, 6, 10, 12):  # within the first epoch, at its end, within the second, at its end
        assert fit(Recorder(), str(tmp_path / f"step={step}.ckpt"), **options).seen == whole[step:]


def test_checkpoint_saved_within_a_step_repeats_that_step(tmp_path: Path) -> None:
    path = str(tmp_path / "inside.ckpt")
    whole = fit(Recorder(8, path), max_epochs=2).seen
    assert fit(Recorder(), path, max_epochs=2).seen == whole[7:]


def test_loader_continues_from_its_state_without_lightning() -> None:
    def loader() -> Any:
        data = Digits(image_size=8, batch_size=256)
        data.setup("fit")
        return data.train_dataloader()

    first = loader()
    batches: Iterator[dict[str, Tensor]] = iter(first)
    seen = [next(batches)["labels"] for _ in range(2)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"epoch": 0, "batches": 2}
    seen += [batch["labels"] for batch in second]
    assert len(second) == 6 and torch.equal(torch.cat(seen), torch.cat([batch["labels"] for batch in loader()]))
    second.load_state_dict({"epoch": 0, "batches": 2})
    second.sampler.set_epoch(1)
    assert len(list(second)) == 6  # another epoch starts from its first batch


def test_overfitting_one_batch_works() -> None:
    assert {len(labels) for _, labels, _ in fit(Recorder(), max_epochs=2, overfit_batches=1).seen} == {256}


def test_data_module_survives_pickling(first_batch: FirstBatch) -> None:
    data = Digits(image_size=8)
    data.setup("fit")
    assert torch.equal(first_batch(pickle.loads(pickle.dumps(data)))["images"], first_batch(data)["images"])
