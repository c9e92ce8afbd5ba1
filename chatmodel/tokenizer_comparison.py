"""How many tokens our tokenizer needs for a text, next to those of GPT-2 and GPT-4."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import requests
import tiktoken

from chatmodel.runtime import logger

# Report's name -> tiktoken's name.
PEER_ENCODINGS = {"gpt2": "gpt2", "gpt4": "cl100k_base"}

# Source: tiktoken_ext/openai_public.py of tiktoken 0.14; the files that tiktoken downloads for each encoding.
_RANKS = "https://openaipublic.blob.core.windows.net"
RANK_ADDRESSES = {
    "gpt2": (f"{_RANKS}/gpt-2/encodings/main/vocab.bpe", f"{_RANKS}/gpt-2/encodings/main/encoder.json"),
    "cl100k_base": (f"{_RANKS}/encodings/cl100k_base.tiktoken",),
}
CONNECT_SECONDS = 5

# Written for this comparison, one text of each type.
NEWS_TEXT = """\
HARTWELL BAY, March 14 — The harbor authority said on Thursday that it will reopen the north ferry terminal on \
April 2, eleven months after a winter storm tore away two of its three piers and left about 6,400 daily commuters \
with a detour of nearly forty minutes by bus.

The repair cost $48.3 million, roughly 12 percent more than the council approved last June. Officials blamed the \
overrun on the price of marine steel and on a crane barge that arrived six weeks late. "Nobody enjoys asking for \
more money," said Miriam Okafor, the authority's chief engineer, "but the alternative was a pier built for the \
storms of 1974, and those are not the storms we have now."

The new piers stand 1.8 meters higher than the old ones and rest on piles driven 31 meters into the sea floor. Two \
hybrid ferries, the Albatross and the Little Tern, will run every 20 minutes at rush hour and every 45 minutes at \
night. Fares rise from $4.75 to $5.25, the first increase since 2019; children under 12 still travel free.

Not everyone is pleased. Shop owners on Cannery Street, who lost much of their morning trade, asked for a year \
without rent and were offered four months. "We will believe in the timetable when we see the queue," said Daniel \
Reyes, whose bakery opens at 5:30 a.m. The council votes on the request next Tuesday.
"""

KOREAN_TEXT = """\
우리 동네 도서관은 언덕 위에 있습니다. 버스에서 내려 십 분쯤 걸어 올라가면 붉은 벽돌 건물이 보이고, 문 앞에는 백 \
년이 넘은 느티나무가 서 있습니다. 여름이면 아이들이 그 그늘에 앉아 만화책을 읽고, 겨울이면 사서 선생님이 따뜻한 \
보리차를 내어 주십니다.

지난 토요일에는 오랜만에 그곳에 들렀습니다. 이 층 창가 자리에 앉아 바다에 관한 책을 펼쳤는데, 옆자리의 할아버지께서 \
조용히 말을 거셨습니다. "그 책, 내가 젊었을 때 번역한 거라네." 처음에는 농담인 줄 알았지만, 표지 안쪽의 사진을 보니 \
정말 그분이었습니다.

우리는 한 시간 가까이 이야기를 나누었습니다. 번역은 다리를 놓는 일과 같아서, 너무 빨리 지으면 무너지고 너무 늦게 \
지으면 아무도 건너지 않는다고 하셨습니다. 집으로 돌아오는 길에 저는 그 말을 몇 번이고 되뇌었습니다. 다음 주에도 2시 \
30분에 같은 자리에서 만나기로 했습니다.
"""

CODE_TEXT = '''\
from collections import deque


class RateLimiter:
    """Allows at most `limit` events in any window of `seconds`."""

    def __init__(self, limit, seconds, clock):
        if limit < 1 or seconds <= 0:
            raise ValueError(f"bad limit: {limit} per {seconds} s")
        self.limit = limit
        self.seconds = seconds
        self.clock = clock
        self.times = deque()

    def allow(self):
        now = self.clock()
        while self.times and now - self.times[0] >= self.seconds:
            self.times.popleft()
        if len(self.times) >= self.limit:
            return False
        self.times.append(now)
        return True

    def wait_time(self):
        """Seconds until `allow` would return True."""
        if len(self.times) < self.limit:
            return 0.0
        return max(0.0, self.times[0] + self.seconds - self.clock())


def shortest_path(graph, source, target):
    previous = {source: None}
    queue = deque([source])
    while queue:
        node = queue.popleft()
        if node == target:
            path = []
            while node is not None:
                path.append(node)
                node = previous[node]
            return path[::-1]
        for neighbour in graph.get(node, ()):
            if neighbour not in previous:
                previous[neighbour] = node
                queue.append(neighbour)
    return None


if __name__ == "__main__":
    print(shortest_path({"a": ["b", "c"], "b": ["d"], "c": ["d"]}, "a", "d"))
'''

MATH_TEXT = r"""
\section{Long gaps and short sums}

\begin{lemma}
For every $n \ge 2$ the numbers $n!+2, n!+3, \dots, n!+n$ are all composite.
\end{lemma}

\begin{proof}
Let $2 \le k \le n$. Then $k \mid n!$ and $k \mid k$, hence $k \mid n!+k$. Since $1 < k < n!+k$, the number $n!+k$ has
a proper divisor and is composite.
\end{proof}

\begin{theorem}[Sum of a geometric series]
Let $q \in \mathbb{R}$ with $|q| < 1$. Then
\[
\sum_{k=0}^{\infty} q^k = \frac{1}{1-q},
\qquad
\sum_{k=1}^{\infty} k\,q^{k} = \frac{q}{(1-q)^2}.
\]
\end{theorem}

\begin{proof}
Write $S_n = 1 + q + \dots + q^n$. Multiplying by $(1-q)$ telescopes:
\begin{align*}
(1-q)S_n &= \sum_{k=0}^{n} q^k - \sum_{k=1}^{n+1} q^{k} = 1 - q^{n+1}, \\
S_n &= \frac{1-q^{n+1}}{1-q} \xrightarrow[n\to\infty]{} \frac{1}{1-q},
\end{align*}
because $|q|^{n+1} \to 0$. A power series may be differentiated term by term inside its radius of convergence, so
$\sum_{k\ge1} k q^{k-1} = \frac{d}{dq}(1-q)^{-1} = (1-q)^{-2}$; multiply by $q$.
\end{proof}

\begin{example}
With $q = \tfrac{1}{2}$ we get $\sum k/2^k = 2$. Numerically, $0.5 + 0.5 + 0.375 + 0.25 + 0.15625 = 1.78125$ after
five terms, and $1.98828125$ after ten.
\end{example}
"""

SCIENCE_TEXT = """\
When an action potential arrives at the presynaptic terminal, depolarization opens voltage-gated calcium channels, \
and the local Ca²⁺ concentration rises within microseconds from about 100 nM to more than 10 µM. Calcium binds to \
synaptotagmin, which displaces complexin and lets the SNARE proteins (syntaxin, SNAP-25 and synaptobrevin) zip \
together, so that the vesicle membrane fuses with the plasma membrane and glutamate diffuses across a cleft some 20 \
nm wide. On the postsynaptic side AMPA receptors open first and carry Na⁺ inward; NMDA receptors conduct only after \
the membrane has been depolarized enough to expel the Mg²⁺ ion that blocks their pore. They therefore act as \
coincidence detectors, and the calcium they admit activates CaMKII, whose autophosphorylation at threonine 286 \
outlasts the signal itself. If the synapse is driven repeatedly, more AMPA receptors are inserted and the dendritic \
spine grows: long-term potentiation. Weak, slow stimulation does the reverse through calcineurin and protein \
phosphatase 1. The released transmitter is cleared by astrocytic transporters at a cost of roughly three Na⁺ and \
one H⁺ per molecule, converted to glutamine and handed back to the neuron.
"""

SAMPLE_TEXTS = {
    "news": NEWS_TEXT.strip(),
    "korean": KOREAN_TEXT.strip(),
    "code": CODE_TEXT.strip(),
    "math": MATH_TEXT.strip(),
    "science": SCIENCE_TEXT.strip(),
}


def join_documents(documents: Iterable[str], *, num_chars: int) -> str:
    """The first documents, a line break between them, up to `num_chars` characters; the last one is whole."""
    chosen = []
    length = 0
    for document in documents:
        chosen.append(document)
        length += len(document)
        if length >= num_chars:
            break
    return "\n".join(chosen)


def compare_token_counts(texts: Mapping[str, str], count_tokens: Callable[[str], int]) -> dict[str, Any]:
    """The `comparison` of the report: bytes and tokens of each text, ours by `count_tokens`.

    The peers' counts are None where their ranks cannot be had; `not_run` then says why, and `how` what to do.
    """
    found = {peer: load_encoding(name) for peer, name in PEER_ENCODINGS.items()}
    peers = {peer: encoding for peer, encoding in found.items() if encoding is not None}
    missing = [PEER_ENCODINGS[peer] for peer in found if peer not in peers]
    rows = []
    for label, text in texts.items():
        row: dict[str, Any] = {"text": label, "bytes": len(text.encode()), "ours": count_tokens(text)}
        rows.append(row | {p: len(peers[p].encode_ordinary(text)) if p in peers else None for p in PEER_ENCODINGS})
    return {
        "texts": rows,
        "vocab_sizes": {peer: peers[peer].n_vocab if peer in peers else None for peer in PEER_ENCODINGS},
        "not_run": _explain_absence(missing) if missing else None,
        "how": _explain_cache(missing) if missing else None,
    }


def load_encoding(name: str) -> tiktoken.Encoding | None:
    """A published encoding from tiktoken's cache or the network, or None where it cannot be had.

    tiktoken downloads without a time limit; so where the cache lacks a file, its server is first asked for an answer
    within five seconds.
    """
    missing = [address for address in RANK_ADDRESSES[name] if not _cache_path(address).is_file()]
    try:
        for address in missing:
            requests.head(address, timeout=CONNECT_SECONDS).raise_for_status()
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # the exceptions of requests are OSErrors; ValueError is a wrong hash
        logger.debug("the ranks of %s: %s", name, error)
        return None


def _cache_folder() -> str:
    """Where tiktoken itself looks; it reads these variables, and an empty one turns its cache off."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))


def _cache_path(address: str) -> Path:
    return Path(_cache_folder()) / hashlib.sha1(address.encode()).hexdigest()


def _explain_absence(names: list[str]) -> str:
    host = _RANKS.removeprefix("https://")
    return (
        f"tiktoken's files of {' and '.join(names)} are neither in {_cache_folder() or 'a cache'} nor had from {host}"
    )


def _explain_cache(names: list[str]) -> str:
    """The command that fills a cache, and what to do with it; commands stand between backticks."""
    download = "; ".join(f'tiktoken.get_encoding("{name}")' for name in names)
    return (
        f"`TIKTOKEN_CACHE_DIR=ranks python -c 'import tiktoken; {download}'` where that server can be reached, and "
        "`export TIKTOKEN_CACHE_DIR=ranks` before the tokenizer of the next run is trained"
    )
