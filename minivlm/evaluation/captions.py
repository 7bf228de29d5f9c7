"""Compare captions by their content words, in English and Chinese.

Content words are the words of a text without punctuation and without the words below. Chinese has no blanks between
words, so there each pair of neighbouring characters counts as a word. The order does not count.
"""

import math
import re
import unicodedata
from collections import Counter

# Words that say nothing about the picture; the last ones stand in every caption of the embedded data.
SKIPPED = set("a an the of on in at to with and or is are it its this that there".split())
SKIPPED |= set("background category thing things".split())
CHINESE_SKIPPED = re.compile("背景上|背景|类别|个东西|东西|[的了是有在里和与]")
CHINESE = "\u3400-\u9fff"
WORD = re.compile(rf"[{CHINESE}]+|[^\W_{CHINESE}]+(?:['’][^\W_{CHINESE}]+)*")


def content_words(text: str) -> Counter:
    """Return how often each content word occurs in a text.

    Words are in lower case, and hyphens separate them. A run of Chinese characters, which ends at punctuation and at
    the words of `CHINESE_SKIPPED`, counts as its pairs of neighbours; a single character counts as itself:
    "红色背景上的上弦月" has 红色, 上弦 and 弦月.
    """
    found = Counter()
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    for word in WORD.findall(CHINESE_SKIPPED.sub(" ", text)):
        if re.match(f"[{CHINESE}]", word) and len(word) > 1:
            found.update(a + b for a, b in zip(word, word[1:]))
        elif word not in SKIPPED:
            found[word] += 1
    return found


def word_f1(output: str, reference: str) -> float:
    """Return twice the number of content words that both texts have, divided by the sum of their numbers.

    This is the F1 of the words of `output`: missing words lower it, and so do words too many. A word that is repeated
    counts as often as the other text has it. Without any content word in both texts it is 1.
    """
    said, wanted = content_words(output), content_words(reference)
    total = said.total() + wanted.total()
    return 2 * (said & wanted).total() / total if total else 1.0


def mean_cell(values: list[float]) -> dict:
    """Return mean, count and confidence interval (normal approximation, 95 %) of shares from 0 to 1."""
    count, mean = len(values), sum(values) / len(values)
    low, high = 0.0, 1.0
    if count > 1:
        half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return {"match": round(mean, 4), "count": count, "low": round(low, 4), "high": round(high, 4)}
