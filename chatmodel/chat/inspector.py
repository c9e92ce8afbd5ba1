"""The inspector's view of a reply as HTML: coloured tokens, their alternatives, and the logit lens."""

import math
from collections.abc import Sequence

from chatmodel.chat.display import escape_text
from chatmodel.chat.inspection import Alternative, InspectedLayer, InspectedToken
from chatmodel.tokenizer import SPECIAL_TOKENS

MAX_GRID_TOKENS = 48
COLOURS = ((249, 115, 22, 0.8), (250, 204, 21, 0.5), (45, 212, 191, 0.5))  # red, green, blue, opacity
LEGEND = """<div class="legend"><span>improbable <span class="scale"></span> certain</span>
<span><span class="forced-sample">42</span> written by the calculator, not chosen</span>
<span>point at a token for what else it could have been; click it for its layers</span></div>"""


def show_tokens(tokens: Sequence[InspectedToken]) -> str:
    """The tokens in their colours, each with its alternatives on hover or focus."""
    if not tokens:
        return "<p>There is no answer to inspect yet.</p>"
    chosen = [token for token in tokens if not token.forced]
    bits = sum(-math.log2(max(token.probability, 1e-12)) for token in chosen)
    first = sum(token.rank == 1 for token in chosen)
    facts = (
        f"{len(tokens)} tokens, {len(chosen)} of them chosen by the model: {first} were its first choice, "
        f"{bits / max(len(chosen), 1):.2f} bits of surprise a token"
    )
    body = "".join(_show_token(place, token) for place, token in enumerate(tokens))
    return f'{LEGEND}<div class="tokens">{body}</div><div class="legend"><span>{facts}</span></div>'


def _show_token(place: int, token: InspectedToken) -> str:
    kinds = ["token"]
    if token.text in SPECIAL_TOKENS:
        kinds.append("control")
    if token.forced:
        kinds.append("forced")
    note = "<br>written by the calculator; what the model itself would have said:" if token.forced else ""
    facts = f"<b>token {token.token_id}</b> · {show_percent(token.probability)} · rank {token.rank}{note}"
    tip = facts + _show_bars(token)
    colour = "" if token.forced else f"background-color:{find_colour(token.probability)}"
    return (
        f'<span class="{" ".join(kinds)}" style="{colour}" data-place="{place}" tabindex="0">'
        f'{show_text(token.text)}<span class="tip">{tip}</span></span>' + ("<br>" if "\n" in token.text else "")
    )


def _show_bars(token: InspectedToken) -> str:
    rows = list(token.alternatives)
    if all(row.token_id != token.token_id for row in rows):
        rows.append(Alternative(token.token_id, token.text, token.probability))
    return "".join(_show_bar(row, is_own=row.token_id == token.token_id) for row in rows)


def _show_bar(row: Alternative, *, is_own: bool) -> str:
    return (
        f'<div class="bar{" own" if is_own else ""}"><code>{show_text(row.text)}</code>'
        f'<i style="width:{100 * row.probability:.1f}%"></i><span>{show_percent(row.probability)}</span></div>'
    )


def show_layers(layers: Sequence[InspectedLayer], place: int = 0) -> str:
    """The lens at one token: behind each layer the token's probability and rank, and what led there."""
    token = layers[-1].tokens[place]
    width = max(len(layer.tokens[place].alternatives) for layer in layers)
    head = "".join(f"<th>choice {number + 1}</th>" for number in range(width))
    rows = "".join(_show_layer(layer.name, layer.tokens[place]) for layer in reversed(layers))
    return (
        f"<p>What the model would have said at <code>{show_text(token.text)}</code> had it ended behind each layer; "
        'framed is what stands there.</p><div class="lens"><table>'
        f"<tr><th></th><th>its share</th><th>rank</th>{head}</tr>{rows}</table></div>"
    )


def _show_layer(name: str, token: InspectedToken) -> str:
    cells = "".join(_show_cell(row, is_hit=row.token_id == token.token_id) for row in token.alternatives)
    return (
        f'<tr><th>{name}</th><td class="number" style="background:{find_colour(token.probability)}">'
        f'{show_percent(token.probability)}</td><td class="number">{token.rank}</td>{cells}</tr>'
    )


def show_grid(layers: Sequence[InspectedLayer]) -> str:
    """The lens at every token of an answer (its first 48): the first choice behind each layer, the last on top."""
    tokens = layers[-1].tokens[:MAX_GRID_TOKENS]
    head = "".join(f"<td><b>{show_text(token.text)}</b></td>" for token in tokens)
    rows = "".join(
        f"<tr><th>{layer.name}</th>"
        + "".join(
            _show_cell(token.alternatives[0], is_hit=token.rank == 1) for token in layer.tokens[:MAX_GRID_TOKENS]
        )
        + "</tr>"
        for layer in reversed(layers)
    )
    cut = "" if len(layers[-1].tokens) <= MAX_GRID_TOKENS else f" (the first {MAX_GRID_TOKENS} tokens)"
    return (
        f"<p>The first choice behind each layer{cut}; framed where it is what stands there.</p>"
        f'<div class="lens"><table><tr><th>the answer</th>{head}</tr>{rows}</table></div>'
    )


def _show_cell(row: Alternative, *, is_hit: bool) -> str:
    return (
        f'<td class="{"hit" if is_hit else ""}" style="background:{find_colour(row.probability)}" '
        f'title="{show_percent(row.probability)}"><code>{show_text(row.text)}</code></td>'
    )


def find_colour(probability: float) -> str:
    """From orange (improbable) over yellow to teal; by the square root, as most differences lie near 0."""
    share = 2 * math.sqrt(min(max(probability, 0.0), 1.0))
    low, high = COLOURS[:2] if share < 1 else COLOURS[1:]
    mixed = [a + (b - a) * (share % 1 if share < 2 else 1) for a, b in zip(low, high, strict=True)]
    return f"rgba({mixed[0]:.0f},{mixed[1]:.0f},{mixed[2]:.0f},{mixed[3]:.2f})"


def show_percent(probability: float) -> str:
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "&lt; 0.05 %"


def show_text(text: str) -> str:
    """A token's text, with line breaks and tabs made visible."""
    return escape_text(text).replace("\n", "↵").replace("\t", "⇥")
