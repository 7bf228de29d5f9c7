"""Keep control tokens that somebody types plain text, and count the pictures of messages.

An encoder escapes messages, applies chat template and tokenizer, and leaves the separators out again. Standard library
only: the engine for ONNX graphs uses it, too.
"""

import re
from collections.abc import Iterable

SEPARATOR = "\ufdd0"  # a Unicode noncharacter, never part of text: written where two characters must not join


def control_pattern(tokens: Iterable[str]) -> re.Pattern:
    """Return a pattern that finds each of the tokens that a tokenizer takes as a whole, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def escape_control_tokens(messages: list[dict], control: re.Pattern) -> list[dict]:
    """Put a `SEPARATOR` into control tokens that somebody typed, so that they are tokenized as ordinary text.

    Also put one before an answer that starts with a line break. The template writes a line break in front of it, and
    the tokenizer would merge both line breaks into one token. Only the second one belongs to the answer.
    """

    def clean(text: str, role: str) -> str:
        text = control.sub(lambda match: match[0][0] + SEPARATOR + match[0][1:], text.replace(SEPARATOR, ""))
        return SEPARATOR + text if role == "assistant" and text.startswith("\n") else text

    def part(content, role: str):
        return {**content, "text": clean(content["text"], role)} if content["type"] == "text" else content

    def every(value):
        """Clean all texts inside of a value: a model can spell control tokens in the arguments of a call, too."""
        if isinstance(value, dict):
            return {key: every(item) for key, item in value.items()}
        if isinstance(value, list):
            return [every(item) for item in value]
        return clean(value, "") if isinstance(value, str) else value

    return [
        {
            **m,
            **{key: every(m[key]) for key in ("reasoning_content", "tool_calls") if key in m},
            "content": clean(m["content"], m["role"])
            if isinstance(m["content"], str)
            else [part(c, m["role"]) for c in m["content"]],
        }
        for m in messages
    ]


def count_markers(messages: list[dict]) -> int:
    """Count the picture markers in messages; content that is a string has none."""
    return sum(part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"])


def without_separators(ids: list[int], separator_ids: list[int]) -> list[int]:
    """Return the positions of tokens that stay when each `SEPARATOR`, which is several tokens, is left out."""
    kept, i, n = [], 0, len(separator_ids)
    while i < len(ids):
        if ids[i : i + n] == separator_ids:
            i += n
        else:
            kept.append(i)
            i += 1
    return kept


def widened(ids: list[int], image_token_id: int, image_seq_length: int) -> list[int]:
    """Return the positions of all tokens in order, that of an image token `image_seq_length` times."""
    return [i for i, token in enumerate(ids) for _ in range(image_seq_length if token == image_token_id else 1)]
