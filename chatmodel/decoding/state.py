"""What does decoding keep between two tokens? Keys and values, and a small table of numbers for each row."""

from dataclasses import dataclass

import torch

from chatmodel.decoding.weights import DecoderWeights

# The table's lines, one number for each row:
TOKEN = 0  # the newest token, whose keys and values are not kept yet
POSITION = 1  # where it stands
ACTIVE = 2  # 1 if the next step moves the row; 0 if it has ended, waits for the calculator, or is free
REMAINING = 3  # tokens it may still get
SEED = 4
FORCED_AT, FORCED_END = 5, 6  # which of its forced tokens comes next, and how many there are
NUM_FIELDS = 7

# splitmix64's constants (Steele, Lea, Flood 2014) as signed numbers
GOLDEN, MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass
class LayerCache:
    """Keys and values (rows, kv_heads, capacity, head_dim) of a layer; position p lies at p % capacity.

    A layer with a window keeps as many positions as it sees and no more.
    """

    keys: torch.Tensor
    values: torch.Tensor


class DecodingState:
    """Room for `rows` sequences of up to `length` tokens."""

    def __init__(self, weights: DecoderWeights, *, rows: int, length: int, longest_forced: int) -> None:
        self.rows, self.length = rows, length
        self.table = torch.zeros(NUM_FIELDS, rows, dtype=torch.long, device=weights.device)
        self.forced = torch.zeros(rows, max(longest_forced, 1), dtype=torch.long, device=weights.device)
        self.caches = []
        for layer in weights.layers:
            capacity = length if layer.window is None else min(layer.window, length)
            shape = (rows, weights.kv_heads, capacity, weights.head_dim)
            self.caches.append(
                LayerCache(*(torch.zeros(shape, dtype=weights.dtype, device=weights.device) for _ in range(2)))
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self.caches)

    def keep_prompt(
        self, index: int, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Keep a layer's keys and values of prompts in some rows.

        Args:
            index: of the layer.
            keys, values: (len(rows), T, kv_heads, head_dim), padded on the right.
            lengths: (len(rows),) without the padding.
        """
        cache = self.caches[index]
        capacity, width = cache.keys.shape[2], keys.shape[1]
        for kept, states in ((cache.keys, keys), (cache.values, values)):
            if width <= capacity:
                kept[rows, :, :width] = states.transpose(1, 2)
                continue
            # Of the positions that share a place, the last one of the prompt.
            places = torch.arange(capacity, device=rows.device)
            turns = (lengths[:, None] - 1 - places).div(capacity, rounding_mode="floor").clamp(min=0)
            positions = (places + turns * capacity).clamp(max=width - 1)
            picked = states.gather(1, positions[:, :, None, None].expand(-1, -1, *states.shape[2:]))
            kept[rows] = picked.transpose(1, 2)

    def release(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Let rows go on that have waited, with so many forced tokens first."""
        self.table[FORCED_AT, rows] = 0
        self.table[FORCED_END, rows] = counts
        self.table[ACTIVE, rows] = 1

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows to free ones."""
        origin, goal = (torch.tensor(rows, device=self.table.device) for rows in (sources, targets))
        self.table[:, goal] = self.table[:, origin]
        self.forced[goal] = self.forced[origin]
        for cache in self.caches:
            for states in (cache.keys, cache.values):
                for source, target in zip(sources, targets, strict=True):
                    states[target].copy_(states[source])


def draw_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each seed and position (B,): the same wherever and beside whatever it is drawn."""
    bits = seeds + (positions + 1) * GOLDEN
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * MIX_1
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * MIX_2
    bits = bits ^ ((bits >> 31) & 0x1FFFFFFFF)
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24


def advance(
    table: torch.Tensor, forced: torch.Tensor, chosen: torch.Tensor, end_ids: torch.Tensor, call_end: int | None
) -> torch.Tensor:
    """Give each active row its next token; returns those tokens (B,), -1 for rows that were not active.

    Args:
        table: (NUM_FIELDS, B), changed in place.
        forced: (B, F), tokens that come before what was chosen.
        chosen: (B,), what the model chose.
        end_ids: tokens that end a row.
        call_end: the token after which a row waits for the calculator; None without a calculator.
    """
    token, position, active, remaining, _, forced_at, forced_end = table
    follows = forced_at < forced_end
    due = forced.gather(1, forced_at.clamp(max=forced.shape[1] - 1)[:, None])[:, 0]
    chosen = torch.where(follows, due, chosen)
    moves = active.bool()
    emitted = torch.where(moves, chosen, -1)
    stops = torch.isin(chosen, end_ids) | (remaining <= 1)
    if call_end is not None:
        stops |= ~follows & (chosen == call_end)
    token.copy_(torch.where(moves, chosen, token))
    position += active
    remaining -= active
    forced_at += active * follows
    active *= ~stops
    return emitted
