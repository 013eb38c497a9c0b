"""The no-peek test guards every objective; the identities tie them to each other."""

import pytest
import torch

from tests.contracts.finding import concrete
from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.checkpoints.store import build, describe
from vision_ar.evaluation.likelihood import token_nats
from vision_ar.generator import Generator
from vision_ar.interfaces import Objective, Plan, Tokens, TokenSpec, run
from vision_ar.objectives.block import Block
from vision_ar.objectives.masked import Masked
from vision_ar.objectives.multi_token import MultiToken
from vision_ar.objectives.next_token import NextToken

OBJECTIVES = concrete(Objective)


def generator_for(objective: Objective) -> Generator:
    torch.manual_seed(0)
    generator = Generator(Llama.tiny().spec, lambda spec: Llama.tiny(), objective).eval()
    for head in generator.heads.values():
        torch.nn.init.normal_(head.output.weight, std=0.3)
    return generator


def batch(seed: int = 0) -> Tokens:
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(16, (3, 8), generator=draws)
    return Tokens.of(Llama.tiny().spec, ids=ids, labels=torch.tensor([0, 1, 2]))


def plan_of(objective: Objective, tokens: Tokens) -> Plan:
    return objective.plan(tokens, torch.Generator().manual_seed(7))


def logits_of(generator: Generator, plan: Plan) -> list[torch.Tensor]:
    backbone = generator.backbone
    hidden = backbone(backbone.embed(plan.inputs), backbone.place(plan.inputs), plan.attention)
    read = []
    for readout in plan.readouts:
        rows, columns = readout.at.unbind(-1)
        read.append(generator.heads[readout.head](hidden[rows, columns + backbone.prefix_len]))
    return read


@pytest.fixture(params=OBJECTIVES, ids=lambda cls: cls.__name__)
def objective(request) -> Objective:
    return request.param.tiny()


def test_no_readout_can_see_the_token_it_predicts(objective) -> None:
    generator, tokens = generator_for(objective), batch()
    before_plan = plan_of(objective, tokens)
    with torch.no_grad():
        before = logits_of(generator, before_plan)
        for column in range(tokens.seq_len):
            changed = batch()
            changed.ids[:, column] = (changed.ids[:, column] + 1) % 16
            after = logits_of(generator, plan_of(objective, changed))
            for readout, old, new in zip(before_plan.readouts, before, after, strict=True):
                of_it = readout.of[:, 1] == column
                torch.testing.assert_close(old[of_it], new[of_it], rtol=0, atol=1e-6)


def test_targets_are_the_tokens_they_name(objective) -> None:
    tokens = batch()
    for readout in plan_of(objective, tokens).readouts:
        assert torch.equal(readout.target, tokens.ids[readout.of[:, 0], readout.of[:, 1]])


def test_given_and_padded_tokens_are_never_targets(objective) -> None:
    tokens = batch()
    tokens.given = torch.zeros(3, 8, dtype=torch.bool)
    tokens.given[:, :2] = True
    tokens.group = tokens.group.clone()
    tokens.group[:, 7] = -1
    for readout in plan_of(objective, tokens).readouts:
        assert int(readout.of[:, 1].min()) >= 2 and int(readout.of[:, 1].max()) <= 6


def test_a_plan_is_repeatable(objective) -> None:
    generator = generator_for(objective)
    losses = [run(generator.backbone, generator.heads, plan_of(objective, batch()))["loss"] for _ in range(2)]
    assert float(losses[0]) == float(losses[1])


def test_the_steps_write_every_token_once_and_only_feed_what_is_known(objective) -> None:
    steps = objective.steps(Llama.tiny().spec)
    if steps is None:
        assert isinstance(objective, Masked)
        return
    known, fed = set(), set()
    for step in steps:
        assert set(step.feed) <= known - fed
        assert len(step.read) == len(step.fill) and not set(step.fill) & known
        known |= set(step.fill)
        fed |= set(step.feed)
    assert known == set(range(8))


def test_a_described_objective_is_built_again(objective) -> None:
    assert describe(build(describe(objective), Objective)) == describe(objective)


def test_a_likelihood_sums_to_one_over_all_sequences(objective) -> None:
    spec = TokenSpec(4, (4,), vocab_size=3)
    torch.manual_seed(0)
    generator = Generator(spec, lambda spec: Llama(spec, LlamaSize("tiny"), num_classes=2), objective).eval()
    for head in generator.heads.values():
        torch.nn.init.normal_(head.output.weight, std=0.3)
    ids = torch.cartesian_prod(*[torch.arange(3)] * 4)
    tokens = Tokens.of(spec, ids=ids, labels=torch.ones(81, dtype=torch.int64))
    if objective.likelihood(tokens) is None:
        with pytest.raises(ValueError, match="must have a likelihood, the objective Masked has none"):
            token_nats(generator, tokens)
        return
    with torch.no_grad():
        nats = token_nats(generator, tokens)
    assert nats.shape == (81, 4)
    probs = (-nats.double().sum(dim=1)).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    assert float(probs.max() / probs.min()) > 2  # not the uniform law, of which this would say nothing


def test_a_likelihood_is_the_loss_without_smoothing() -> None:
    plain, smooth = (generator_for(NextToken(smoothing)) for smoothing in (0.0, 0.3))
    with torch.no_grad():
        losses = [run(g.backbone, g.heads, plan_of(g.objective, batch()))["loss"] for g in (plain, smooth)]
        nats = [token_nats(g, batch()) for g in (plain, smooth)]
    torch.testing.assert_close(nats[0].mean(), losses[0])
    assert torch.equal(nats[0], nats[1]) and abs(float(losses[0] - losses[1])) > 0.01


def test_given_tokens_count_nothing_in_a_likelihood() -> None:
    tokens = batch()
    tokens.given = torch.zeros(3, 8, dtype=torch.bool)
    tokens.given[:, :3] = True
    with torch.no_grad():
        nats, free = (token_nats(generator_for(NextToken()), t) for t in (tokens, batch()))
    assert not nats[:, :3].any() and torch.equal(nats[:, 3:], free[:, 3:])


def loss_and_gradient(objective: Objective) -> tuple[float, torch.Tensor]:
    generator = generator_for(objective)
    loss = run(generator.backbone, generator.heads, plan_of(objective, batch()))["loss"]
    loss.backward()
    return float(loss.detach()), generator.backbone.token_table.weight.grad


@pytest.mark.parametrize("same", [Block(1), MultiToken(0)], ids=["block(1)", "multi(0)"])
def test_identities_with_next_token(same) -> None:
    (loss, gradient), (wanted, wanted_gradient) = loss_and_gradient(same), loss_and_gradient(NextToken())
    assert loss == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-7)


def test_a_fixed_share_hides_that_share_and_a_range_hides_shares_within_it() -> None:
    tokens = Tokens.of(Llama.tiny().spec, ids=torch.zeros(200, 8, dtype=torch.int64))
    fixed = Masked(0.5, 0.5).plan(tokens, torch.Generator().manual_seed(0)).readouts[0].of
    assert torch.bincount(fixed[:, 0]).unique().tolist() == [4]
    counts = torch.bincount(Masked(0.25, 0.75).plan(tokens, torch.Generator().manual_seed(0)).readouts[0].of[:, 0])
    assert int(counts.min()) == 2 and int(counts.max()) == 6
    columns = torch.bincount(fixed[:, 1])
    assert int(columns.min()) > 60  # 100 expected each, standard deviation 7: every place is hidden alike


def test_mlm_u_at_a_fixed_ratio_is_masked_at_that_ratio() -> None:
    plans = [Masked(r, r).plan(batch(), torch.Generator().manual_seed(3)) for r in (0.5, 0.5)]
    assert torch.equal(plans[0].inputs.ids, plans[1].inputs.ids)
    assert int((plans[0].inputs.ids == -1).sum()) == 12


@pytest.mark.parametrize(
    ("build_wrong", "message"),
    [
        (lambda: Block(0), "size must be at least 1"),
        (lambda: Block(3).plan(batch()), "size must divide seq_len=8, got 3"),
        (lambda: MultiToken(-1), "ahead must be at least 0"),
        (lambda: Masked(0.6, 0.5), "low and high must satisfy"),
    ],
)
def test_wrong_arguments_are_refused(build_wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_wrong()
