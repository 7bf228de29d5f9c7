"""Write the examples of a preview as one HTML page that needs no other file."""

import html
from itertools import groupby

from minivlm.data.encoder import IGNORE, Encoder
from minivlm.data.preview import Example
from minivlm.pages import figure, page


def render_page(title: str, table: str, examples: list[Example], encoder: Encoder) -> str:
    """Return the page: the table, then each example with its pictures and text."""
    intro = f"<pre>{html.escape(table)}</pre><p>The model learns to say what is <mark>marked</mark>.</p>"
    return page(title, intro + "\n".join(render_example(example, encoder) for example in examples))


def render_example(example: Example, encoder: Encoder) -> str:
    """Return one row: its pictures and its text, or the reason why it is left out."""
    if example.reason:
        body = f'<div class="words bad">left out: {html.escape(example.reason)}</div>'
    else:
        figures = "".join(figure(thumbnail, size=size) for size, thumbnail in example.pictures)
        body = figures + render_text(encoder, example.ids, example.labels)
    return f"<article><h2>{html.escape(example.place)}</h2>{body}</article>"


def render_text(encoder: Encoder, ids: list[int], labels: list[int]) -> str:
    """Return the text that the model reads: tokens that carry loss are marked, image tokens are counted."""
    pieces, image_id = [], encoder.processor.image_token_id
    for (is_picture, carries_loss), run in groupby(
        zip(ids, labels), key=lambda pair: (pair[0] == image_id, pair[1] != IGNORE)
    ):
        tokens = [token for token, _ in run]
        if is_picture:
            pieces.append(f'<span class="picture">[{len(tokens)} image tokens]</span>')
        else:
            text = html.escape(encoder.tokenizer.decode(tokens))
            pieces.append(f"<mark>{text}</mark>" if carries_loss else text)
    return f'<div class="words">{"".join(pieces)}</div>'
