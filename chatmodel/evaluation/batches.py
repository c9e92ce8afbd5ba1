"""In which batches are requests scored, so that little is computed twice and little is padding?

Requests that begin with the same tokens (the choices of a question) are a family. A batch of families computes their
beginnings first, all of one length and without padding, then the rest of each request on copies of the caches. So no
row needs a mask, and sliding windows, learned positions and recurrent layers see what they would see without sharing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatmodel.evaluation.scoring import Request, plan_batches

# A family shares its beginning where that saves so many tokens, and such a part of all its tokens: a second pass and
# attention to a cache cost something too.
MIN_SAVED_TOKENS = 16
MIN_SAVED_PART = 0.2


@dataclass(frozen=True)
class Part:
    """Rows that a model sees at once, with what is scored of them.

    ids: (R, W), padded on the right. positions: (K,), those whose logits are needed. rows, columns, targets: (N,), the
    place of each scored token in the (R, K) logits, and the token. owners: whose tokens these are, in turn; counts:
    how many each has. parents: (R,) the shared beginning that each row continues, or None.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    owners: list[int]
    counts: list[int]
    parents: Tensor | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Part":
        """The same with each tensor changed, as by a move to a device."""
        return Part(
            ids=change(self.ids),
            positions=change(self.positions),
            rows=change(self.rows),
            columns=change(self.columns),
            targets=change(self.targets),
            owners=self.owners,
            counts=self.counts,
            parents=None if self.parents is None else change(self.parents),
        )


@dataclass(frozen=True)
class Batch:
    """Shared beginnings (F, L), or None, and the parts that continue them."""

    beginnings: Tensor | None
    parts: list[Part]


@dataclass(frozen=True)
class Plan:
    """Batches of distinct requests, and for each request that was given the number of its distinct one."""

    batches: list[Batch]
    numbers: list[int]
    num_distinct: int

    def count_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        shared = sum(batch.beginnings.numel() for batch in self.batches if batch.beginnings is not None)
        return shared + sum(part.ids.numel() for batch in self.batches for part in batch.parts)


@dataclass(frozen=True)
class Limits:
    """Tokens of a pass over padded rows; cached tokens that rows continue; positions with logits."""

    tokens: int
    cached_tokens: int
    logits: int


@dataclass(frozen=True)
class Family:
    """Numbers of requests whose first `length` tokens are the same and not scored."""

    members: list[int]
    length: int

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again."""
        return (len(self.members) - 1) * self.length


def plan_scoring(requests: Sequence[Request], *, limits: Limits, share: bool) -> Plan:
    """The batches in which requests are scored; equal requests are scored once, so that equal choices tie exactly.

    Args:
        share: compute shared beginnings once.
    """
    found: dict[tuple[bytes, int], int] = {}
    distinct: list[tuple[NDArray[np.int32], int]] = []
    numbers = []
    for request in requests:
        tokens = np.asarray(request.tokens, dtype=np.int32)
        number = found.setdefault((tokens.tobytes(), request.start), len(distinct))
        if number == len(distinct):
            distinct.append((tokens, request.start))
        numbers.append(number)
    families = find_families(distinct) if share else []
    shared = {number for family in families for number in family.members}
    alone = [number for number in range(len(distinct)) if number not in shared]
    batches = [
        Batch(None, [_build_part(distinct, members, 0)])
        for group in plan_batches([len(distinct[number][0]) for number in alone], batch_tokens=limits.tokens)
        for members in _split_rows(distinct, [alone[index] for index in group], 0, limits)
    ]
    batches += [_build_batch(distinct, group, length, limits) for group, length in _group_families(families, limits)]
    return Plan(batches, numbers, len(distinct))


def find_families(requests: Sequence[tuple[NDArray[np.int32], int]]) -> list[Family]:
    """Families among requests, each given as its tokens and the index of the first scored one.

    The last token before the scored ones is never shared, because its logits are needed.
    """
    # Bytes with the most significant one first sort as the ids do.
    order = sorted(range(len(requests)), key=lambda number: requests[number][0].astype(">u4").tobytes())
    families: list[Family] = []
    current: Family | None = None
    for before, number in zip([None, *order], order, strict=False):
        room = requests[number][1] - 1
        alone = Family([number], room)
        if current is None or before is None:
            current = alone
            continue
        length = min(current.length, room, common_length([requests[before][0], requests[number][0]]))
        joined = Family([*current.members, number], length)
        if joined.saved > current.saved and joined.saved >= MIN_SAVED_TOKENS:
            current = joined
        else:
            families.append(current)
            current = alone
    families += [current] if current else []
    totals = [sum(len(requests[number][0]) for number in family.members) for family in families]
    return [family for family, total in zip(families, totals, strict=True) if family.saved > MIN_SAVED_PART * total]


def common_length(sequences: Sequence[Sequence[int] | NDArray[np.int32]]) -> int:
    """How many leading items all sequences have in common."""
    length = min(len(sequence) for sequence in sequences)
    first = np.asarray(sequences[0][:length])
    same = np.ones(length, dtype=bool)
    for sequence in sequences[1:]:
        same &= np.asarray(sequence[:length]) == first
    return length if same.all() else int(same.argmin())


def _group_families(families: list[Family], limits: Limits) -> Iterator[tuple[list[Family], int]]:
    """Families for one batch and the length of their beginnings: the shortest, what others have more is not shared."""
    group: list[Family] = []
    unshared = 0
    for family in sorted(families, key=lambda family: family.length, reverse=True):
        # Shortening all beginnings to this family's makes every member but one of each family compute more again.
        shorter = group[-1].length - family.length if group else 0
        unshared += shorter * sum(len(other.members) - 1 for other in group)
        if group and ((len(group) + 1) * family.length > limits.tokens or unshared > limits.tokens // 8):
            yield group, group[-1].length
            group, unshared = [], 0
        group.append(family)
    if group:
        yield group, group[-1].length


def _build_batch(
    requests: list[tuple[NDArray[np.int32], int]], group: list[Family], length: int, limits: Limits
) -> Batch:
    beginnings = np.stack([requests[family.members[0]][0][:length] for family in group])
    parent = {number: row for row, family in enumerate(group) for number in family.members}
    members = sorted(parent, key=lambda number: len(requests[number][0]), reverse=True)
    parts = [
        _build_part(requests, rows, length, parents=[parent[number] for number in rows])
        for rows in _split_rows(requests, members, length, limits)
    ]
    return Batch(_as_tensor(beginnings), parts)


def _split_rows(
    requests: list[tuple[NDArray[np.int32], int]], members: list[int], shared: int, limits: Limits
) -> Iterator[list[int]]:
    """Rows, longest first, in parts within the limits; `shared` tokens of each lie in a cache."""
    part: list[int] = []
    width = first = 0
    for number in members:
        tokens, start = requests[number]
        if not part:
            width, first = len(tokens) - shared, start
        first = min(first, start)
        rows = len(part) + 1
        logits = rows * (shared + width - first + 1)
        fits = rows * width <= limits.tokens and rows * shared <= limits.cached_tokens and logits <= limits.logits
        if part and not fits:
            yield part
            part, width, first = [], len(tokens) - shared, start
        part.append(number)
    if part:
        yield part


def _build_part(
    requests: list[tuple[NDArray[np.int32], int]], members: list[int], shared: int, parents: list[int] | None = None
) -> Part:
    width = max(len(requests[number][0]) for number in members) - shared
    ids = np.zeros((len(members), width), dtype=np.int64)
    # Position p predicts token p + 1: logits are needed from the token before the first scored one on.
    first = min(requests[number][1] for number in members) - 1 - shared
    rows, columns, targets, counts = [], [], [], []
    for row, number in enumerate(members):
        tokens, start = requests[number]
        ids[row, : len(tokens) - shared] = tokens[shared:]
        count = max(0, len(tokens) - start)
        rows.append(np.full(count, row))
        columns.append(np.arange(count) + (start - 1 - shared - first))
        targets.append(tokens[start:])
        counts.append(count)
    last = max([first, *(first + int(column[-1]) for column in columns if len(column))])
    return Part(
        ids=torch.from_numpy(ids),
        positions=torch.arange(first, last + 1),
        rows=_as_tensor(np.concatenate(rows)),
        columns=_as_tensor(np.concatenate(columns)),
        targets=_as_tensor(np.concatenate(targets)),
        owners=list(members),
        counts=counts,
        parents=None if parents is None else torch.tensor(parents),
    )


def _as_tensor(array: NDArray[np.signedinteger]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
