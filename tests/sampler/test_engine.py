import copy
from functools import partial

import pytest
import torch

from tests.sampler.plain import plain_sample
from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.generator import Generator
from vision_ar.interfaces import FREE, AttentionPattern, Tokens, TokenSpec
from vision_ar.layers.noise import keyed_gumbel
from vision_ar.layers.packed import pack
from vision_ar.objectives.block import Block
from vision_ar.objectives.masked import Masked
from vision_ar.objectives.next_token import NextToken
from vision_ar.sampler import loop
from vision_ar.sampler.engine import Condition, Session, stream
from vision_ar.sampler.guidance import constant, cosine, interval, linear
from vision_ar.sampler.logits import Law
from vision_ar.tokenizers.diffusion import DiffusionTokenizer

LABELS = torch.tensor([0, 2, 1])
SEEDS = torch.tensor([11, 12, 13])
LAWS = [Law(0), Law(), Law(0.7, top_k=5, top_p=0.8), Law(1.3, min_p=0.2)]
SCHEDULES = [None, constant(3.0), linear(4.0, 1.1), cosine(2.0), interval(3.0, 0.3, 0.8)]


def make_generator(objective=None, **settings) -> Generator:
    torch.manual_seed(0)
    spec = TokenSpec(8, (2, 2, 2, 2), vocab_size=16, grid=settings.pop("grid", None))
    size = LlamaSize("tiny", dim=32, num_kv_heads=settings.pop("num_kv_heads", None))
    generator = Generator(spec, lambda s: Llama(s, size, num_classes=3, **settings), objective or NextToken())
    torch.nn.init.normal_(generator.heads["token"].output.weight, std=0.5)
    return generator.eval()


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make_generator()


def write(generator: Generator, labels=LABELS, seeds=SEEDS, law=LAWS[1], schedule=None, forced=None) -> torch.Tensor:
    session = Session(generator, Condition(labels=labels), seeds, law, schedule, forced)
    for _ in stream(session):
        pass
    return session.ids


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["off", "constant", "linear", "cosine", "interval"])
def test_cached_batched_sampling_equals_the_plain_sampler(generator, law, schedule) -> None:
    expected = [plain_sample(generator, int(c), int(s), law, schedule) for c, s in zip(LABELS, SEEDS, strict=True)]
    assert torch.equal(write(generator, law=law, schedule=schedule), torch.stack(expected))


@pytest.mark.parametrize(
    "settings",
    [{"rotary": "none"}, {"rotary": "2d", "grid": (2, 4), "silent_prefix": True}, {"num_kv_heads": 1}],
    ids=str,
)
def test_every_backbone_variant_samples_like_the_plain_sampler(settings) -> None:
    generator = make_generator(**settings)
    expected = [plain_sample(generator, int(c), int(s), LAWS[1]) for c, s in zip(LABELS, SEEDS, strict=True)]
    assert torch.equal(write(generator), torch.stack(expected))


@pytest.mark.parametrize("schedule", [None, constant(3.0)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rotary": "2d", "grid": (2, 4), "silent_prefix": True}, {"num_kv_heads": 1}],
    ids=str,
)
def test_weights_laid_out_for_the_cpu_write_the_tokens_of_the_plain_sampler(settings, schedule) -> None:
    generator = make_generator(**settings)
    expected = [plain_sample(generator, int(c), int(s), LAWS[1], schedule) for c, s in zip(LABELS, SEEDS, strict=True)]
    pack(generator)
    assert torch.equal(write(generator, schedule=schedule), torch.stack(expected))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_with_other_weights_a_sample_still_does_not_depend_on_its_batch(quantize) -> None:
    generator = make_generator()
    pack(generator, quantize)
    labels, seeds = torch.arange(20) % 3, torch.arange(20)
    alone = torch.cat([write(generator, labels[i : i + 1], seeds[i : i + 1]) for i in range(20)])
    for size in (3, 20):
        together = [write(generator, *pair) for pair in zip(labels.split(size), seeds.split(size), strict=True)]
        assert torch.equal(torch.cat(together), alone)


def test_a_sample_does_not_depend_on_its_batch(generator) -> None:
    together = write(generator, schedule=constant(2.0))
    alone = write(generator, LABELS[1:2], SEEDS[1:2], schedule=constant(2.0))
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("schedule", [None, linear(4.0, 1.1)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rotary": "2d", "grid": (2, 4), "silent_prefix": True}, {"num_kv_heads": 1}, {"rotary": "none"}],
    ids=str,
)
def test_the_fixed_program_equals_the_plain_sampler(settings, law, schedule) -> None:
    generator = make_generator(**settings)
    expected = [plain_sample(generator, int(c), int(s), law, schedule) for c, s in zip(LABELS, SEEDS, strict=True)]
    session = Session(generator, Condition(labels=LABELS), SEEDS, law, schedule, fixed=True)
    assert session._loop is not None
    events = [event.ids for event in stream(session) if event.kind == "tokens"]
    assert torch.equal(session.ids, torch.stack(expected))
    for written, ids in enumerate(events, start=1):  # one column a step, from left to right
        assert torch.equal(ids[:, :written], session.ids[:, :written]) and bool((ids[:, written:] == FREE).all())


def test_keys_and_values_of_8_bits_write_nearly_the_same(generator) -> None:
    labels, seeds = torch.arange(60) % 3, torch.arange(60)
    named = {"law": Law(1.0, top_k=8), "cfg_schedule": constant(2.0), "fixed": True}
    exact, rounded = (
        Session(generator, Condition(labels=labels), seeds, **named, cache_dtype=dtype)
        for dtype in (None, torch.float8_e4m3fn)
    )
    for session in (exact, rounded):
        list(stream(session))
    same = (exact.ids == rounded.ids).float()
    assert 0.5 < same.mean() < 1


def test_the_fixed_program_keeps_forced_tokens(generator) -> None:
    forced = torch.full((3, 8), FREE)
    forced[:, 2], forced[1, 5] = 7, 3
    session = Session(generator, Condition(labels=LABELS), SEEDS, forced=forced, fixed=True)
    list(stream(session))
    assert torch.equal(session.ids, write(generator, forced=forced))
    assert session.ids[:, 2].tolist() == [7, 7, 7] and int(session.ids[1, 5]) == 3


def test_steps_that_are_not_one_token_each_have_no_fixed_program(generator) -> None:
    blocks, laws = make_generator(Block(2)), [Law(), Law(0), Law()]
    assert Session(blocks, Condition(labels=LABELS), SEEDS, fixed=True)._loop is None
    assert Session(generator, Condition(labels=LABELS), SEEDS, laws, fixed=True)._loop is None
    assert Session(generator, Condition(labels=LABELS), SEEDS)._loop is None  # a CPU


def test_the_fixed_program_is_taken_whole_by_the_compiler(generator, monkeypatch) -> None:
    monkeypatch.setattr(loop.torch, "compile", partial(torch.compile, backend="eager"))
    session = Session(generator, Condition(labels=LABELS), SEEDS, Law(0), constant(2.0), compile=True)
    list(stream(session))
    assert torch.equal(session.ids, write(generator, law=Law(0), schedule=constant(2.0)))


def test_rows_of_different_settings_are_what_they_are_alone(generator) -> None:
    count = len(LAWS) * len(SCHEDULES)
    laws, schedules = [law for law in LAWS for _ in SCHEDULES], SCHEDULES * len(LAWS)
    labels, seeds = torch.arange(count) % 3, torch.arange(count) + 70
    together = write(generator, labels, seeds, laws, schedules)
    for row in range(count):
        one = slice(row, row + 1)
        alone = write(generator, labels[one], seeds[one], laws[row], schedules[row])
        assert torch.equal(together[one], alone), (laws[row], row)
    blocks = make_generator(Block(2))
    together = write(blocks, labels, seeds, laws, schedules)
    assert torch.equal(together[7:8], write(blocks, labels[7:8], seeds[7:8], laws[7], schedules[7]))


def test_settings_are_for_all_rows_or_one_per_row(generator) -> None:
    with pytest.raises(ValueError, match="law must be one or one per row, got 2 for 3 rows"):
        write(generator, law=[Law(), Law()])
    with pytest.raises(ValueError, match="cfg_schedule must be one or one per row, got 1 for 3 rows"):
        write(generator, schedule=[None])


def test_forced_tokens_stay_and_the_rest_equals_the_plain_sampler(generator) -> None:
    forced = torch.full((3, 8), FREE)
    forced[:, [0, 3, 7]] = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    ids = write(generator, forced=forced)
    assert torch.equal(ids[:, [0, 3, 7]], forced[:, [0, 3, 7]])
    expected = plain_sample(generator, int(LABELS[2]), int(SEEDS[2]), LAWS[1], forced=forced[2])
    assert torch.equal(ids[2], expected)


def test_other_seeds_give_other_samples(generator) -> None:
    labels = torch.zeros(32, dtype=torch.int64)
    ids = write(generator, labels, torch.arange(32))
    assert len({tuple(row.tolist()) for row in ids}) > 28


def test_the_draws_follow_the_law(generator) -> None:
    # chi-square over the 16 first tokens of 4000 seeds; 15 degrees of freedom, 0.1 % quantile 37.7
    count = 4000
    session = Session(generator, Condition(labels=torch.ones(count, dtype=torch.int64)), torch.arange(count))
    session.step()
    seen = torch.bincount(session.ids[:, 0], minlength=16).double()
    with torch.no_grad():
        tokens = Tokens.of(generator.spec, ids=session.ids[:1].clamp(min=0), labels=torch.tensor([1])).columns(0, 0)
        backbone = generator.backbone
        hidden = backbone(backbone.embed(tokens), backbone.place(tokens), AttentionPattern())
        expected = count * generator.heads["token"](hidden[:, -1])[0].double().softmax(-1)
    common = expected >= 5
    statistic = ((seen - expected).square() / expected)[common].sum()
    rest = (seen[~common].sum() - expected[~common].sum()).square() / expected[~common].sum().clamp_min(1e-9)
    assert statistic + (rest if (~common).any() else 0) < 37.7


def test_streaming_gives_the_tokens_and_pictures_of_decoding_at_the_end(generator) -> None:
    torch.manual_seed(1)
    tokenizer = DiffusionTokenizer.tiny().eval()
    for block in tokenizer.velocity.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    torch.nn.init.normal_(tokenizer.velocity.conv_out.weight, std=0.1)
    session = Session(generator, Condition(labels=LABELS), SEEDS)
    events = list(stream(session, tokenizer, SEEDS))
    previews = [event for event in events if event.kind == "preview"]
    assert [event.written for event in previews] == list(generator.spec.ends)
    assert torch.equal(session.ids, write(generator))
    with torch.no_grad():
        whole = tokenizer.decode(Tokens.of(tokenizer.spec, ids=session.ids), SEEDS)
    torch.testing.assert_close(events[-1].preview, whole, rtol=1e-5, atol=1e-5)


def test_block_size_one_samples_like_next_token() -> None:
    assert torch.equal(write(make_generator(Block(1))), write(make_generator(NextToken())))


def test_block_sampling_equals_one_forward_over_the_result() -> None:
    generator = make_generator(Block(2))
    ids = write(generator, law=Law(0))
    plan = generator.objective.plan(Tokens.of(generator.spec, ids=ids, labels=LABELS))
    backbone = generator.backbone
    with torch.no_grad():
        hidden = backbone(backbone.embed(plan.inputs), backbone.place(plan.inputs), plan.attention)
        rows, columns = plan.readouts[0].at.unbind(-1)
        greedy = generator.heads["token"](hidden[rows, columns + 1]).argmax(-1)
    assert torch.equal(greedy, plan.readouts[0].target)


def test_a_masked_model_says_that_it_cannot_write() -> None:
    generator = make_generator(Masked(), mask_token=True)
    with pytest.raises(ValueError, match="Masked cannot write sequences"):
        write(generator)


def test_half_precision_changes_tokens_only_at_near_ties() -> None:
    count, generator = 2000, make_generator()
    torch.nn.init.normal_(generator.heads["token"].output.weight, std=0.1)  # logits of size 1: rounding goes with it
    labels, seeds = torch.arange(count) % 3, torch.arange(count)
    exact = write(generator, labels, seeds)
    rounded = copy.deepcopy(generator).to(torch.bfloat16)
    # the same keys and the same law: rounding may only decide between tokens that are about as good
    differing = (write(rounded, labels, seeds) != exact).nonzero()
    firsts = {row: column for row, column in reversed(differing.tolist())}
    assert 0 < len(firsts) < count / 20
    gaps = []
    for row, column in firsts.items():
        law = logprobs_of(generator, exact[row], int(labels[row]), column)
        scores = law + keyed_gumbel(torch.tensor(row), torch.tensor(column), torch.arange(16))
        best = scores.topk(2).values
        gaps.append(float(best[0] - best[1]))
    assert max(gaps) < 1e-2


def logprobs_of(generator: Generator, ids: torch.Tensor, label: int, column: int) -> torch.Tensor:
    """The law of one token given those before it, by a full forward pass."""
    tokens = Tokens.of(generator.spec, ids=ids[None], labels=torch.tensor([label])).columns(0, column)
    backbone = generator.backbone
    with torch.no_grad():
        hidden = backbone(backbone.embed(tokens), backbone.place(tokens), AttentionPattern())
        return LAWS[1](generator.heads["token"](hidden[0, -1]))


@pytest.mark.gpu
def test_a_gpu_writes_the_same_tokens(generator) -> None:
    labels, seeds = torch.arange(64) % 3, torch.arange(64)
    there = copy.deepcopy(generator).to("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    for law, schedule in ((LAWS[1], None), (LAWS[2], constant(2.0))):
        assert torch.equal(
            write(there, labels, seeds, law, schedule).cpu(), write(generator, labels, seeds, law, schedule)
        )


def test_a_tiny_temperature_is_greedy_and_broken_logits_are_refused(generator) -> None:
    assert torch.equal(write(generator, law=Law(1e-40)), write(generator, law=Law(0)))
    with pytest.raises(ValueError, match="logits must be finite, got NaN; use a smaller cfg_scale"):
        write(generator, schedule=constant(1e39))


def test_wrong_arguments_are_refused(generator) -> None:
    with pytest.raises(ValueError, match="forced must hold ids below 16 or -1, got 16"):
        write(generator, forced=torch.full((3, 8), 16))
    with pytest.raises(ValueError, match="forced must have shape"):
        write(generator, forced=torch.zeros(3, 7, dtype=torch.int64))
    session = Session(generator, Condition(labels=LABELS), SEEDS)
    list(stream(session))
    with pytest.raises(RuntimeError, match="finished session"):
        session.step()
