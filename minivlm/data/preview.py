"""Count what training would see of a data set, and keep some rows as examples for a page.

    rows -> scan -> Findings -> describe -> a table as text
                 -> Example  -> preview_page -> a page with the tokens that carry loss marked

A row that training would leave out is counted by its reason.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from minivlm.data.bad_rows import CUT, BadRow, describe_bad_rows, kind_of
from minivlm.data.control_tokens import count_markers
from minivlm.data.encoder import IGNORE, Encoder
from minivlm.data.pictures import decode_image
from minivlm.data.plans import PackBudget, pack
from minivlm.data.rows import Rows

THUMBNAIL = (320, 320)  # pixels that a picture of an example has at most


@dataclass
class Example:
    """Hold a row as the page shows it."""

    place: str  # file and row number
    reason: str = ""  # why training would leave the row out; empty for a good row
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pictures: list[tuple[tuple[int, int], Image.Image]] = field(default_factory=list)  # size, thumbnail


@dataclass
class Findings:
    """Collect what a scan of rows finds; lists have a number per good row, picture or answer."""

    tokens: list[int] = field(default_factory=list)  # per row
    pictures: list[int] = field(default_factory=list)  # per row
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height of each picture in pixels
    answers: list[int] = field(default_factory=list)  # tokens of each answer, the end token included
    writing: Counter = field(default_factory=Counter)  # answers by script
    cut: int = 0  # rows that were shortened
    bad_rows: Counter = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)  # kind of bad row -> place and reason of the first

    def add_bad(self, place: str, error: BadRow) -> None:
        """Count a row that training would leave out."""
        self.bad_rows[kind_of(error)] += 1
        self.first_bad.setdefault(kind_of(error), f"{place}: {error}")

    def add_good(self, messages: list[dict], example: Example) -> None:
        """Count a row that training would use, of which these messages fit."""
        self.tokens.append(len(example.ids))
        self.pictures.append(len(example.pictures))
        self.sizes += [size for size, _ in example.pictures]
        for carries_loss, run in groupby(example.labels, key=lambda label: label != IGNORE):
            self.answers += [sum(1 for _ in run)] * carries_loss
        answers = (m for m in messages if m["role"] == "assistant")
        self.writing.update(script(part["text"]) for m in answers for part in m["content"])


def script(text: str) -> str:
    """Return the script that most letters of a text are in."""
    han = sum("\u3400" <= c <= "\u9fff" for c in text)
    latin = sum(c.isalpha() and c < "\u0250" for c in text)
    other = sum(map(str.isalpha, text)) - han - latin
    return max((han, "Chinese"), (latin, "Latin"), (other, "another script"), (0.5, "no letters"))[1]


def scan(rows: Rows, encoder: Encoder, indices: Iterable[int], shown: int) -> tuple[Findings, list[Example]]:
    """Encode rows as training would; return what was found, and the first `shown` rows as examples."""
    found, examples = Findings(), []
    for index in tqdm(indices, desc="rows", unit="row"):
        example = Example(rows.where(index))
        try:
            sample = rows.sample(index)
            example.ids, example.labels, kept = encoder.tokenize(sample)
            messages = sample["messages"][:kept]
            pictures = [decode_image(image) for image in sample["images"][: count_markers(messages)]]
        except BadRow as error:
            example.reason = str(error)
            found.add_bad(example.place, error)
        else:
            for picture in pictures:
                size = picture.size
                picture.thumbnail(THUMBNAIL)
                example.pictures.append((size, picture))
            found.cut += kept < len(sample["messages"])
            found.add_good(messages, example)
        if len(examples) < shown:
            examples.append(example)
    return found, examples


def spread(values: list[int]) -> str:
    """Return smallest, median, 95th percentile and largest of some numbers as text."""
    if not values:
        return "none"
    low, middle, high, top = np.percentile(values, (0, 50, 95, 100))
    return f"{low:,.0f} to {top:,.0f}, median {middle:,.0f}, 95 % up to {high:,.0f}"


def describe(found: Findings, total: int, budget: PackBudget) -> str:
    """Return the table of what was found in some of `total` rows, and how well they fill packs."""
    good, bad = len(found.tokens), found.bad_rows.total()
    lines = [
        f"rows               {good + bad:,} of {total:,}",
        f"left out           {bad:,} ({bad / (good + bad):.2%})",
    ]
    if found.bad_rows:
        lines += [describe_bad_rows(found.bad_rows), *(f"    {first[:200]}" for first in found.first_bad.values())]
    if found.cut:
        lines.append(f"{CUT:<19}{found.cut:,}")
    count = max(1, found.writing.total())
    lines += [
        f"tokens per row     {spread(found.tokens)}",
        f"tokens per answer  {spread(found.answers)}",
        f"pictures per row   {spread(found.pictures)}",
        f"picture widths     {spread([width for width, _ in found.sizes])}",
        f"picture heights    {spread([height for _, height in found.sizes])}",
        "answers are in     " + ", ".join(f"{kind} {n / count:.1%}" for kind, n in found.writing.most_common()),
    ]
    sizes = enumerate(zip(found.tokens, found.pictures))
    fitting = [(i, t, p) for i, (t, p) in sizes if t <= budget.tokens and p <= budget.pictures]
    if packs := list(pack(fitting, budget)):
        share = sum(tokens for _, tokens, _ in fitting) / (budget.tokens * len(packs))
        lines.append(f"packing            {len(packs):,} packs of {budget.tokens:,} tokens, {share:.1%} of them real")
    return "\n".join(lines)
