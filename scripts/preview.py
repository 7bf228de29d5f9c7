"""What training would see of a data set: a table of what is in it, and a page of rows with the words that carry loss.

    python -m scripts.preview data/dev.parquet

A row that training would leave out is counted here with its reason. The page, `runs/preview.html`, is one file.
"""

import argparse
import html
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from batching_minivlm import pack
from data_minivlm import CUT, IGNORE, Encoder, count_markers, decode_image, describe_bad_rows
from processing_minivlm import MiniVLMProcessor
from scripts.evaluate import register_config
from scripts.pages import figure, page, write_page
from sources_minivlm import BadRow, Rows, keep_rated, load_rows


@dataclass
class Findings:
    """What a scan of rows found; a number per good row, picture or answer."""

    tokens: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height in pixels
    answers: list[int] = field(default_factory=list)  # tokens, the end token included
    scripts: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    bad_rows: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # kind of bad row -> the first one


def script(text: str) -> str:
    """The script that most letters of a text are in."""
    han = sum("\u3400" <= c <= "\u9fff" for c in text)
    latin = sum(c.isalpha() and c < "\u0250" for c in text)
    other = sum(map(str.isalpha, text)) - han - latin
    return max((han, "Chinese"), (latin, "Latin"), (other, "another script"), (0.5, "no letters"))[1]


def scan(rows: Rows, encoder: Encoder, indices: list[int], shown: int) -> tuple[Findings, list[str]]:
    """Encode the rows as training would; return what was found, and the first `shown` as HTML."""
    found, articles = Findings(), []
    for index in tqdm(indices, desc="rows", unit="row"):
        place = rows.where(index)
        try:
            sample = rows.adapt(index)
            ids, labels, kept = encoder.words(sample)
            pictures = [decode_image(image) for image in sample["images"][: count_markers(sample["messages"][:kept])]]
        except BadRow as error:
            kind = str(error).split(":")[0]
            found.bad_rows[kind] += 1
            found.examples.setdefault(kind, f"{place}: {error}")
            body = f'<div class="words bad">left out: {html.escape(str(error))}</div>'
        else:
            found.tokens.append(len(ids))
            found.pictures.append(len(pictures))
            found.sizes += [picture.size for picture in pictures]
            found.notes[CUT] += kept < len(sample["messages"])
            for said, run in groupby(labels, key=lambda label: label != IGNORE):
                found.answers += [sum(1 for _ in run)] * said
            found.scripts.update(
                script(part["text"])
                for message in sample["messages"][:kept]
                for part in message["content"]
                if message["role"] == "assistant"
            )
            body = "".join(map(figure, pictures)) + words(encoder, ids, labels)
        if len(articles) < shown:
            articles.append(f"<article><h2>{html.escape(place)}</h2>{body}</article>")
    return found, articles


def words(encoder: Encoder, ids: list[int], labels: list[int]) -> str:
    """The text that the model reads, what it learns to say marked, pictures named instead of their tokens."""
    pieces, image_id = [], encoder.processor.image_token_id
    kinds = [
        "picture" if token == image_id else "said" if label != IGNORE else "given" for token, label in zip(ids, labels)
    ]
    for kind, run in groupby(zip(kinds, ids), key=lambda pair: pair[0]):
        run = [token for _, token in run]
        text = html.escape(encoder.tokenizer.decode(run))
        pieces.append(
            f'<span class="picture">[{len(run)} image tokens]</span>'
            if kind == "picture"
            else f"<mark>{text}</mark>"
            if kind == "said"
            else text
        )
    return f'<div class="words">{"".join(pieces)}</div>'


def spread(values: list[int]) -> str:
    """Smallest, median, 95th percentile and largest of some numbers."""
    if not values:
        return "none"
    low, middle, high, top = np.percentile(values, (0, 50, 95, 100))
    return f"{low:,.0f} to {top:,.0f}, median {middle:,.0f}, 95 % up to {high:,.0f}"


def describe(found: Findings, total: int, budget: tuple[int, int]) -> str:
    """The table of what was found."""
    good, bad = len(found.tokens), found.bad_rows.total()
    lines = [
        f"rows               {good + bad:,} of {total:,}",
        f"left out           {bad:,} ({bad / (good + bad):.2%})",
    ]
    if found.bad_rows:
        lines += [describe_bad_rows(found.bad_rows), *(f"    {example[:200]}" for example in found.examples.values())]
    if found.notes.total():
        lines.append(f"cut at a turn      {found.notes.total():,}")
    lines += [
        f"tokens per row     {spread(found.tokens)}",
        f"tokens per answer  {spread(found.answers)}",
        f"pictures per row   {spread(found.pictures)}",
        f"picture widths     {spread([width for width, _ in found.sizes])}",
        f"picture heights    {spread([height for _, height in found.sizes])}",
    ]
    count = max(1, found.scripts.total())
    lines.append(
        "answers are in     " + ", ".join(f"{kind} {n / count:.1%}" for kind, n in found.scripts.most_common())
    )
    fitting = [
        (i, t, p) for i, (t, p) in enumerate(zip(found.tokens, found.pictures)) if t <= budget[0] and p <= budget[1]
    ]
    packs = list(pack(fitting, *budget))
    if packs:
        share = sum(tokens for _, tokens, _ in fitting) / (budget[0] * len(packs))
        lines.append(f"packing            {len(packs):,} packs of {budget[0]:,} tokens, {share:.1%} of them real")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.preview", description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="+", metavar="SOURCE", help="Named as for train_accelerate.py --data.")
    parser.add_argument("--model", default=".", help="Folder or Hub id of the processor that encodes the rows.")
    parser.add_argument("--rows", type=int, default=1000, help="Rows to look at, drawn at random; 0: all.")
    parser.add_argument("--shown", type=int, default=50, help="Rows on the page.")
    parser.add_argument("--output", type=Path, default=Path("runs/preview.html"), help="File of the page.")
    parser.add_argument("--max_length", type=int, default=1024, help="Longest row in tokens.")
    parser.add_argument("--too_long", choices=("drop", "cut"), default="drop", help="What becomes of a longer row.")
    parser.add_argument("--min_rating", nargs="*", default=[], metavar="NAME=N", help="Lowest rating of a turn.")
    parser.add_argument("--pack_tokens", type=int, default=4096, help="Most tokens in a pack.")
    parser.add_argument("--pack_pictures", type=int, default=64, help="Most pictures in a pack.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draw.")
    args = parser.parse_args(argv)
    try:
        args.min_rating = {name: float(value) for name, value in (text.split("=") for text in args.min_rating)}
    except ValueError:
        parser.error(f"--min_rating {' '.join(args.min_rating)}: write a name and a number, as relevance=3.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = load_rows(args.data)
    if args.min_rating:
        rows = keep_rated(rows, args.min_rating)
    register_config()
    encoder = Encoder(MiniVLMProcessor.from_pretrained(args.model), args.max_length, args.too_long)
    indices = list(range(len(rows)))
    if 0 < args.rows < len(rows):
        indices = random.Random(args.seed).sample(indices, args.rows)
    found, articles = scan(rows, encoder, indices, args.shown)
    table = describe(found, len(rows), (args.pack_tokens, args.pack_pictures))
    print(table)
    body = f"<pre>{html.escape(table)}</pre><p>The model learns to say what is <mark>marked</mark>.</p>"
    write_page(args.output, page(", ".join(args.data), body + "\n".join(articles)))
    print(f"\n{len(articles):,} rows as a page: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
