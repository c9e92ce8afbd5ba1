"""Families of requests, and batches whose parts hold each scored token once."""

import numpy as np
import torch

from chatmodel.evaluation.batches import Limits, common_length, find_families, plan_scoring
from chatmodel.evaluation.scoring import Request

ROOMY = Limits(tokens=10_000, cached_tokens=10_000, logits=10_000)


def choices(prefix, *ends):
    return [Request((*prefix, *end), len(prefix)) for end in ends]


def as_distinct(requests):
    return [(np.array(request.tokens, dtype=np.int32), request.start) for request in requests]


def test_choices_of_a_question_are_a_family_and_questions_are_not():
    first = choices(range(100, 130), [1], [2, 3], [4])
    second = choices([100, *range(200, 240)], [1], [2])
    families = find_families(as_distinct([*first, *second]))
    # The last token before the scored ones stays with the rest.
    assert [(sorted(family.members), family.length) for family in families] == [([0, 1, 2], 29), ([3, 4], 40)]
    assert [family.saved for family in families] == [58, 40]


def test_a_long_beginning_that_all_share_wins_over_short_own_ones():
    shots = list(range(300, 400))
    questions = [choices([*shots, 7 + n, 8 + n], [1], [2]) for n in range(3)]
    (family,) = find_families(as_distinct([request for group in questions for request in group]))
    assert (len(family.members), family.length) == (6, 100)


def test_little_is_not_shared():
    assert find_families(as_distinct(choices(range(9), [1], [2]))) == []
    assert find_families(as_distinct([Request(tuple(range(50)), 3), Request((*range(49), 9), 3)])) == []
    assert find_families([]) == []


def read_back(plan, requests):
    """The tokens and scored tokens of each distinct request, as the batches hold them."""
    found = {}
    for batch in plan.batches:
        for part in batch.parts:
            scored = torch.split(part.targets, part.counts)
            places = torch.split(part.columns, part.counts)
            for row, owner in enumerate(part.owners):
                shared = [] if batch.beginnings is None else batch.beginnings[part.parents[row]].tolist()
                at = part.positions[places[row]] + len(shared) + 1
                found[owner] = (shared + part.ids[row].tolist(), scored[row].tolist(), at.tolist())
    for request, number in zip(requests, plan.numbers, strict=True):
        tokens, scored, at = found[number]
        assert tokens[: len(request.tokens)] == list(request.tokens)
        assert scored == list(request.tokens[request.start :])
        assert at == list(range(request.start, len(request.tokens)))
    assert len(found) == plan.num_distinct


def test_every_scored_token_is_in_one_place_whatever_the_limits():
    generator = np.random.default_rng(0)
    requests = []
    for size in (3, 40, 55, 90, 41):
        prefix = generator.integers(0, 50, size).tolist()
        requests += choices(prefix, *(generator.integers(0, 50, n).tolist() for n in (1, 4, 2)))
    requests += [requests[4], Request((1, 2), 2)]
    for limits in (ROOMY, Limits(64, 64, 64), Limits(1, 1, 1), Limits(500, 100, 30)):
        for share in (True, False):
            plan = plan_scoring(requests, limits=limits, share=share)
            read_back(plan, requests)
            assert plan.num_distinct == len(requests) - 1
            assert any(batch.beginnings is not None for batch in plan.batches) == share


def test_sharing_saves_tokens():
    requests = [request for n in range(20) for request in choices([n, *range(50 + n % 3)], [1], [2], [3], [4])]
    shared, alone = (plan_scoring(requests, limits=ROOMY, share=share).count_tokens() for share in (True, False))
    assert alone > 3 * shared


def test_common_length_of_lists_and_arrays():
    assert common_length([[1, 2, 3], np.array([1, 2, 4, 5], dtype=np.int32)]) == 2
    assert common_length([[1, 2], [1, 2, 3]]) == 2
    assert common_length([[1], [2]]) == 0
