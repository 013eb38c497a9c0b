"""Sessions that are used again write what new ones write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.sampler.test_engine import make_generator
from vision_ar.generator import Generator
from vision_ar.interfaces import FREE
from vision_ar.sampler import engine
from vision_ar.sampler.engine import Condition, Session
from vision_ar.sampler.guidance import constant, linear
from vision_ar.sampler.logits import Law
from vision_ar.sampler.pool import SessionPool


@pytest.fixture
def generator() -> Generator:
    return make_generator()


@pytest.fixture(autouse=True)
def always_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: tokens are written by the fixed program."""
    whole = Session.__init__

    def fixed(self, *args, **named) -> None:
        whole(self, *args, **{**named, "fixed": True})

    monkeypatch.setattr(engine.Session, "__init__", fixed)


def batch(first: int, count: int = 3, law=Law(1.0, top_k=8), schedule=None, forced: Tensor | None = None):  # noqa: B008
    """What a pool is asked for: labels and seeds from `first` on."""
    return (
        Condition(labels=torch.arange(first, first + count) % 3),
        torch.arange(first, first + count),
        law,
        schedule,
        forced,
    )


def written(pool: SessionPool, asked) -> tuple[Session, Tensor]:
    """Run a session of the pool to its end and give it back."""
    session = pool.open(*asked)
    while not session.done:
        session.step()
    pool.give_back(session, *asked)
    return session, session.ids.clone()


def forced_at(column: int, value: int) -> Tensor:
    forced = torch.full((3, 8), FREE)
    forced[:, column] = value
    return forced


def test_another_batch_of_the_same_kind_goes_on_with_the_same_tensors(generator) -> None:
    pool = SessionPool(generator)
    cases = [
        [batch(0), batch(5), batch(9)],
        [batch(0, schedule=constant(2.0)), batch(7, schedule=linear(4.0, 1.1))],
        [batch(1, forced=forced_at(2, 3)), batch(4, forced=forced_at(5, 6))],
    ]
    for alike in cases:
        first, _ = written(pool, alike[0])
        held = [first.ids, first.cache.keys, first.cache.lengths, first._seeds, first.positions]
        for asked in alike[1:]:
            session, ids = written(pool, asked)
            assert session is first
            assert all(a is b for a, b in zip(held, [session.ids, session.cache.keys, session.cache.lengths,
                                                     session._seeds, session.positions], strict=True))  # fmt: skip
            assert torch.equal(ids, written(SessionPool(generator), asked)[1])


def test_another_kind_is_a_new_session(generator) -> None:
    pool = SessionPool(generator)
    kinds = [batch(0), batch(0, count=2), batch(0, law=Law(0)), batch(0, schedule=constant(2.0)),
             batch(0, forced=forced_at(0, 1))]  # fmt: skip
    sessions = [written(pool, asked)[0] for asked in kinds]
    assert len({id(session) for session in sessions}) == len(kinds)
    for asked, session in zip(kinds, sessions, strict=True):
        assert torch.equal(session.ids, written(SessionPool(generator), asked)[1])


def test_a_session_in_use_or_unfinished_is_not_given_again(generator) -> None:
    pool, asked = SessionPool(generator), batch(0)
    one = pool.open(*asked)
    two = pool.open(*asked)
    assert one is not two
    one.step()
    pool.give_back(one, *asked)
    assert pool.open(*asked) is not one


def test_the_same_batch_from_a_pipeline_again_and_again() -> None:
    import vision_ar

    pipe = vision_ar.load("cifar10-dar")
    first = pipe.sample([1, 2], seed=4, top_k=50)
    again = pipe.sample([1, 2], seed=4, top_k=50)
    other = pipe.sample([3, 5], seed=9, top_k=50)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.images, again.images)
    assert not torch.equal(first.ids, other.ids)
