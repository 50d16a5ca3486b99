"""Bytes per token of a run's tokenizer, by domain, beside those of GPT-2 and GPT-4: `python -m core.data.tokenizer
--compare RUN`. The more bytes, the fewer tokens a text takes.

The samples were written for this file; the training and validation text is that of the run, its first SAMPLE_CHARS.
"""

import argparse
import inspect
from collections.abc import Callable, Iterable, Iterator

import tiktoken
from rich.table import Table

from core import checkpoint, report
from core.config import from_dict
from core.data import corpus
from core.data.tokenizer import Tokenizer
from core.run import State
from core.stopping import UserError, check_utf8, expanded

PEERS = ("gpt2", "cl100k_base")
SAMPLE_CHARS = 200_000

NEWS = """\
The city council voted 7-4 on Tuesday to close the harbour bridge for eleven months, the longest shutdown since it was
opened in 1958. Engineers had warned in March that salt water was eating into the cables faster than anybody expected.
"We could have patched it again," said the mayor, Ellen Brandt, after the meeting. "But every winter we wait costs us
another $3.2 million." Ferry operators promised to double their service by September; shop owners on the north bank,
who lost about a fifth of their customers during the last repairs, want compensation and say they will go to court.
"""
KOREAN = """\
오늘 아침 부산에는 올해 들어 가장 많은 비가 내렸다. 기상청은 오후부터 바람이 점점 강해지고 밤늦게야 비가 그칠 것이라고
예보했다. 시장 상인들은 가게 앞에 모래주머니를 쌓았고, 학교 몇 곳은 수업을 일찍 끝냈다. 할머니 한 분은 "이 골목에서
사십 년을 살았지만 물이 이렇게 빨리 차오르는 것은 처음 본다"고 말했다. 그래도 저녁이 되자 이웃들은 따뜻한 국을 끓여
서로 나누어 먹었다. 내일은 전국이 대체로 맑고 기온은 21도까지 오를 전망이다.
"""
LATEX = r"""
\begin{theorem}[Weighted mean]\label{thm:mean}
Let $f\colon [a,b] \to \mathbb{R}$ be continuous and let $w \ge 0$ be integrable with $\int_a^b w(x)\,dx > 0$. Then
there is a $\xi \in [a,b]$ such that
\begin{equation}
  \int_a^b f(x)\,w(x)\,dx = f(\xi) \int_a^b w(x)\,dx .
\end{equation}
\end{theorem}
\begin{proof}
Put $m = \min f$ and $M = \max f$. From $m\,w \le f\,w \le M\,w$ it follows that the quotient
$q = \bigl(\int_a^b f w\bigr) / \bigl(\int_a^b w\bigr)$ lies in $[m, M]$; by the intermediate value theorem
$q = f(\xi)$. For $w \equiv 1$ this is $\frac{1}{b-a}\sum_{k=1}^{n} \int_{x_{k-1}}^{x_k} f(x)\,dx = f(\xi)$. \qedhere
\end{proof}
"""
SCIENCE = """\
Nitrogen-fixing bacteria of the genus Rhizobium live in nodules on the roots of legumes, where they reduce N2 to NH3 by
the enzyme nitrogenase. The reaction costs at least 16 molecules of ATP per molecule of nitrogen, because the triple
bond (945 kJ/mol) is among the strongest known. Oxygen inactivates the enzyme irreversibly; leghaemoglobin, which gives
the nodules their pink colour, buffers its concentration at about 10 nM while respiration goes on. In our samples the
rate of acetylene reduction rose between 12 and 26 degrees Celsius (r = 0.94, n = 38) and fell sharply above 31.
"""


def code() -> str:
    """The source of Python's own argparse, which every machine has."""
    return inspect.getsource(argparse)[:20_000]


def domains() -> dict[str, list[str]]:
    samples = {"news": NEWS, "Korean": KOREAN, "code": code(), "LaTeX": LATEX, "science": SCIENCE}
    return {name: [text] for name, text in samples.items()}


def first_chars(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    """The beginning of the texts, so many characters in all."""
    for text in texts:
        yield text[:max_chars]
        max_chars -= len(text)
        if max_chars <= 0:
            return


def bytes_per_token(encode: Callable[[str], list[int]], texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts)


def main(argv: list[str]) -> None:
    check_utf8(argv)
    parser = argparse.ArgumentParser(prog="core.data.tokenizer", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--compare", required=True, metavar="RUN_OR_CHECKPOINT", help="whose tokenizer to compare")
    folder = checkpoint.find(parser.parse_args(argv).compare)
    tokenizer, trained = Tokenizer.load(folder), from_dict(State.read(folder).config)
    texts = domains()
    try:
        sides = corpus.open_corpus(
            trained.data.path,
            seed=trained.seed,
            val_every=trained.data.val_every,
            cache_dir=expanded(trained.data.cache_dir),
            row_tokens=trained.model.seq_len,
        )
    except UserError as error:
        print(f"the run's own text is left out: {error}")
    else:
        texts |= {name: list(first_chars(side, SAMPLE_CHARS)) for name, side in zip(("training", "validation"), sides)}
    encoders: dict[str, tuple[int, Callable[[str], list[int]]]] = {"this run": (tokenizer.vocab_size, tokenizer.encode)}
    for name in PEERS:
        try:
            peer = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are such
            print(f"{name} is left out: tiktoken cannot fetch it ({type(error).__name__})")
        else:
            encoders[name] = (peer.n_vocab, peer.encode_ordinary)
    table = Table("bytes per token", box=None, padding=(0, 2, 0, 0))
    for name, (size, _) in encoders.items():
        table.add_column(f"{name} ({size:,})", justify="right")
    for domain, parts in texts.items():
        table.add_row(domain, *(f"{bytes_per_token(encode, parts):.3f}" for _, encode in encoders.values()))
    print(report.render(table))
