"""Speaking: many rows decoded at once say what each would say alone, and tokens are drawn as often as the softmax says.

pytest tests/test_generate.py
"""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from conftest import random_model
from test_single_pass import make_model, noise

from yojo.core.data import Record, collate
from yojo.core.generate import Cache, generate, sample
from yojo.core.grpo import prompt_row, sample_groups
from yojo.core.mask import PROMPT, AttentionMask
from yojo.core.reward import RewardModel
from yojo.store import place_separator
from yojo.weights import load_backbone

QUESTIONS = [
    Record("Describe the star.", images=[noise(1)]),
    Record("What?"),
    Record("Which of these two is larger, and why?", images=[noise(2), noise(3)]),
    Record("Which colour has the circle?", images=[noise(4)]),
]
N, MOST = 16, 9  # answers to each question, tokens


@pytest.fixture(scope="module")
def speaker(tiny_folder):
    """A random network in float64 that can see and speak."""
    rm = make_model(tiny_folder)
    backbone = load_backbone(tiny_folder, torch.float64)
    place_separator(backbone, rm.processor.tokenizer.separator_id)
    return RewardModel(backbone, rm.processor, rm.head, "joint", rm.base, rm.fingerprint).eval()


def spoken(speaker, temperature):
    """64 rows in one loop, and each prompt's ids and features."""
    rows = [prompt_row(speaker, question) for question in QUESTIONS]
    batch, generator = collate(rows, "joint"), torch.Generator().manual_seed(5)
    inputs = batch.input_ids, speaker.backbone.encode_images(batch.pictures), batch.mask
    return rows, generate(speaker.backbone, *inputs, N, MOST, temperature, generator)


def alone(model, row, uniforms, temperature):
    """One row token by token, without a cache: everything is read again for each. The token is found by hand."""
    said, ends = [], model.config.eos_ids
    for u in uniforms.tolist():
        batch = collate([row.continued([said])], "joint")
        logits = model.logits(model(batch.input_ids, model.encode_images(row.pictures), batch.mask)[0, -1])
        if temperature == 0:
            said.append(int(logits.argmax()))
        else:
            totals = accumulate((logits / temperature).softmax(-1).tolist())
            said.append(next(token for token, total in enumerate(totals) if total > u))
        if said[-1] in ends:
            break
    return said + [model.config.pad_id] * (len(uniforms) - len(said))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_64_rows_decoded_at_once_are_each_what_it_would_be_alone(speaker, temperature):
    """Prompts of unequal length, with no, one and two pictures; sampled with the same uniforms."""
    rows, out = spoken(speaker, temperature)
    assert out.shape == (64, MOST) and len({len(row.ids) for row in rows}) == 4
    uniforms = torch.rand(64, MOST, generator=torch.Generator().manual_seed(5))
    for i, said in enumerate(out.tolist()):
        assert said == alone(speaker.backbone, rows[i // N], uniforms[i], temperature)
    assert len(out.unique(dim=0)) > (32 if temperature else 1)


def test_groups_sampled_beside_each_other_are_those_sampled_one_after_the_other(speaker):
    """With one generator: its numbers are a list for each row, whoever stands beside it."""
    rows = [prompt_row(speaker, question) for question in QUESTIONS]
    how = (speaker.backbone, N, MOST, 1.0)
    together, one_by_one = (torch.Generator().manual_seed(5) for _ in range(2))
    groups = sample_groups(how[0], rows, *how[1:], together, None)
    each = [sample_groups(how[0], [row], *how[1:], one_by_one, None)[0] for row in rows]
    assert [[a.tolist() for a in group] for group in groups] == [[a.tolist() for a in group] for group in each]


@torch.no_grad()
def test_reading_in_pieces_with_a_cache_equals_reading_at_once():
    model = random_model()
    ids = torch.randint(0, 399, (1, 12))
    cache = Cache(model.config, 12)
    pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 4, 2], dim=1)]
    assert (torch.cat(pieces, dim=1) - model(ids)).abs().max() < 1e-12


@torch.no_grad()
def test_samples_share_one_reading_of_the_prompt_and_are_independent():
    model = random_model()
    ids = torch.randint(0, 399, (1, 6))
    a, b = (generate(model, ids, n=5, max_new_tokens=4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (5, 4) and len(a.unique(dim=0)) > 1
    cold = generate(model, ids, n=3, max_new_tokens=4, temperature=1e-4)
    assert torch.equal(cold, generate(model, ids, n=3, max_new_tokens=4, temperature=0))


@torch.no_grad()
def test_a_sample_ends_with_the_end_token_and_is_padded_after_it():
    model = random_model()
    ids = torch.randint(0, 399, (1, 6))
    first, second = generate(model, ids, max_new_tokens=2, temperature=0)[0].tolist()
    model.config = replace(model.config, eos_ids=(second,), pad_id=0)
    assert generate(model, ids, max_new_tokens=9, temperature=0).tolist() == [[first, second]]
    model.config = replace(model.config, eos_ids=(second, first))
    assert generate(model, ids, max_new_tokens=9, temperature=0).tolist() == [[first]], "any of them ends it"


def test_the_sampler_draws_from_the_softmax():
    """Chi-square over 20,000 draws at two temperatures: below the 0.999 quantile for 7 degrees of freedom."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, 1.5]])
    for temperature in (1.0, 0.7):
        uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
        drawn = sample(logits.expand(20_000, -1), temperature, uniforms)
        expected = 20_000 * (logits[0] / temperature).softmax(-1)
        chi = ((torch.bincount(drawn, minlength=8) - expected).square() / expected).sum()
        assert chi < 24.3


def test_a_token_is_always_found_and_never_one_without_probability():
    """The smallest and the largest number that can be drawn, with impossible tokens at both ends."""
    gap = -torch.inf
    logits = torch.tensor([[gap, 1.0, gap, 0.3, gap], [gap, gap, 7.0, gap, gap], [gap, *[0.1] * 3, gap]])
    for u, ends in ((0.0, [1, 2, 1]), (1 - 2**-24, [3, 2, 3])):
        assert sample(logits, 1.0, torch.full((3,), u)).tolist() == ends


def test_among_150_000_tokens_none_is_missed():
    """All are as likely: number u finds token u V."""
    V = 150_000
    wanted = torch.arange(7, V, 997)
    found = sample(torch.zeros(len(wanted), V), 1.0, ((wanted + 0.5) / V).float())
    assert (found - wanted).abs().max() <= 1


@torch.no_grad()
def test_a_cache_has_its_room_from_the_start_and_nothing_more():
    """Keys and values alone: a view of what was read would keep the queries, too."""
    model, cache = random_model(), Cache(random_model().config, 10)
    model(torch.randint(0, 399, (1, 6)), cache=cache)
    places = [layer.k.data_ptr() for layer in cache.layers]
    model(torch.randint(0, 399, (1, 4)), cache=cache)
    with pytest.raises(ValueError, match="room for 10 tokens was given 11"):
        model(torch.tensor([[1]]), cache=cache)
    cache.layers[0].length = 10
    assert cache.length == 10 and [layer.k.data_ptr() for layer in cache.layers] == places
    for x in (y for layer in cache.layers for y in (layer.k, layer.v)):
        assert x.shape[2] == 10 and x.untyped_storage().nbytes() == x.nbytes


@torch.no_grad()
def test_padding_that_was_read_is_attended_to_by_no_later_token():
    """Rows of 7 and 4 tokens, read padded and then together in pieces of 1 and 3."""
    model, real = random_model(), torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool()
    ids, more = torch.randint(0, 399, (2, 7)), torch.randint(0, 399, (2, 4))
    cache, lengths = Cache(model.config, 11, ~real), real.sum(1, keepdim=True)
    mask = AttentionMask(real.long() - 1, torch.full_like(ids, PROMPT), torch.zeros_like(real), "joint")
    model(ids, mask=mask, cache=cache)
    pieces = [(more[:, :1], 0), (more[:, 1:], 1)]
    read = [model(p, positions=lengths + start + torch.arange(p.shape[1]), cache=cache) for p, start in pieces]
    for b, length in enumerate((7, 4)):
        whole = model(torch.cat([ids[b, :length], more[b]])[None])[0, length:]
        assert (torch.cat(read, dim=1)[b] - whole).abs().max() < 1e-12
