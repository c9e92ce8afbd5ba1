"""What a model thought at each token of a text: how probable it was, what else it could have been, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatmodel.generation import mask_calculator_output
from chatmodel.runtime import UserError


@dataclass(frozen=True)
class Alternative:
    """A token that could have stood in a place, and its probability there."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class InspectedToken:
    """A token of a text, as the model saw its place from all that stands before.

    `rank` is 1 for the most probable token. `forced` is True where the calculator wrote the token, not the model.
    """

    token_id: int
    text: str
    probability: float
    rank: int
    forced: bool
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class InspectedLayer:
    """What the model would have said had it ended behind this layer; `tokens` are those of the text."""

    name: str
    tokens: tuple[InspectedToken, ...]


def inspect_tokens(
    model: Any, tokenizer: Any, ids: Sequence[int], *, start: int = 1, top_k: int = 5
) -> list[InspectedToken]:
    """Each token of `ids` from position `start` on, with `top_k` alternatives, the most probable first.

    Probabilities are the model's own: its softmax at temperature 1 over all tokens, whatever settings the text was
    drawn with, and also where the calculator wrote.

    Raises:
        UserError: nothing to inspect, or more ids than the model's context holds.
    """
    _check_ids(model, ids, start)
    with torch.inference_mode():
        input_ids = torch.tensor([ids], device=model.device)
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=len(ids) - start + 1).logits[0, :-1]
    return list(_describe(model, tokenizer, logits, ids, start, top_k))


def inspect_layers(
    model: Any, tokenizer: Any, ids: Sequence[int], *, start: int = 1, top_k: int = 5
) -> list[InspectedLayer]:
    """The logit lens: `inspect_tokens` for the embeddings and behind each layer; the last one is the model's answer.

    Each layer's hidden states go through the model's final norm, head and cap on logits. Where the model takes a share
    of its middle layer off at the end (backout), so does the lens, from the middle layer on.

    Raises:
        UserError: as `inspect_tokens`, or the model has no norm and head in the usual places.
    """
    _check_ids(model, ids, start)
    with torch.inference_mode():
        input_ids = torch.tensor([ids], device=model.device)
        states = model.get_decoder()(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
        layers = []
        for depth, hidden_states in enumerate(_read_states(model, states)):
            logits = _read_logits(model, hidden_states[0, start - 1 : len(ids) - 1])
            name = f"layer {depth}" if depth else "embeddings"
            layers.append(InspectedLayer(name, tuple(_describe(model, tokenizer, logits, ids, start, top_k))))
    return layers


def _check_ids(model: Any, ids: Sequence[int], start: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if not 1 <= start < len(ids):
        raise UserError(f"there is nothing to inspect from token {start} on in a text of {len(ids)} tokens")
    if context is not None and len(ids) > context:
        raise UserError(f"the text has {len(ids)} tokens, but the model's context holds {context}")


def _describe(
    model: Any, tokenizer: Any, logits: torch.Tensor, ids: Sequence[int], start: int, top_k: int
) -> Iterator[InspectedToken]:
    """Args: logits (tokens from `start` on, vocab_size), each row the prediction of its token."""
    chosen = torch.tensor(ids[start:], device=logits.device)
    table = getattr(model.config, "calculator", None)
    chosen_by_model = mask_calculator_output(ids, table)[start:] if table else [1] * len(chosen)
    logits = logits.float()
    probabilities = logits.softmax(dim=-1)
    own = probabilities.gather(1, chosen[:, None])[:, 0].tolist()
    ranks = (1 + (logits > logits.gather(1, chosen[:, None])).sum(dim=-1)).tolist()
    top = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    for place, token_id in enumerate(chosen.tolist()):
        alternatives = tuple(
            Alternative(other, tokenizer.decode([other]), value)
            for other, value in zip(top_ids[place], top_values[place], strict=True)
        )
        yield InspectedToken(
            token_id,
            tokenizer.decode([token_id]),
            own[place],
            ranks[place],
            not chosen_by_model[place],
            alternatives,
        )


def _read_states(model: Any, states: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Normed states (1, T, hidden_size) of the embeddings and of each layer, as the head would get them.

    The last of `states` is normed already, and has had its backout: it is the decoder's own output.
    """
    decoder = model.get_decoder()
    norm = getattr(decoder, "norm", None)
    if norm is None or model.get_output_embeddings() is None:
        raise UserError(
            f"the logit lens needs a decoder with a final norm and a head; {type(model).__name__} has none"
        )
    backout = getattr(decoder, "backout_scale", None)
    middle = model.config.num_hidden_layers // 2 + 1  # in `states`, whose first are the embeddings
    for depth, hidden_states in enumerate(states[:-1]):
        if backout is not None and depth >= middle:
            hidden_states = hidden_states - backout * states[middle]
        yield norm(hidden_states)
    yield states[-1]


def _read_logits(model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits (T, vocab_size) of normed states (T, hidden_size), capped as the model caps its own."""
    logits = model.get_output_embeddings()(hidden_states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
