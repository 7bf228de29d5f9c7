"""Let a model write nothing but answers that follow a grammar: a mask over the vocabulary at each token.

The mask comes from llguidance (MIT), which follows the grammar in microseconds per token. Each answer of a batch has
its own place in the grammar, so a batch gives the answers of each alone.
"""

from functools import lru_cache

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from minivlm.json_schema import first_line

MOST_DIGITS = 24  # in a row; a model that was not trained on JSON can go on with a number for ever


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, ends: list[int]):
    """Return the tokens of a tokenizer as llguidance reads them; it takes a moment, so keep them.

    Args:
        size: of the model's logits; tokens that the tokenizer does not know are never allowed.
        ends: tokens that end an answer.

    Raises:
        ValueError: the model has no end token, so an answer that fits would go on.
    """
    from llguidance.hf import from_tokenizer

    if not ends:
        raise ValueError(
            "The model names no end token, so no answer would end. Set eos_token_id in its generation config."
        )
    return from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)


@lru_cache(maxsize=8)
def digits_of(words) -> list[int]:
    """Return for each token of `vocabulary` how many digits it is; 0 if it is something else, too."""
    texts = [words.decode_bytes([token]) for token in range(words.vocab_size)]
    return [len(text) if text.isdigit() else 0 for text in texts]


class FollowGrammar(LogitsProcessor):
    """Give the value -inf to every token that a grammar does not allow; for one call of `generate`.

    Inside of a string the end token is not allowed. A model that was not trained on JSON wants to end its answer there
    and goes on without sense, so a quotation mark gets the value of the end token if that is higher. After
    `MOST_DIGITS` digits in a row no further one is allowed where the grammar lets something else follow.

    Args:
        grammar: of `compile_schema` or `compile_tools`.
        words: of `vocabulary`.
    """

    def __init__(self, grammar: str, words):
        self.grammar, self.words, self.matchers = grammar, words, None
        self.digits, self.in_a_row = digits_of(words), []
        [self.quote] = words.tokenize_str('"')

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.matchers is None:
            from llguidance import LLMatcher

            self.matchers = [LLMatcher(self.words, self.grammar, log_level=0) for _ in input_ids]
            self.in_a_row = [0] * len(input_ids)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                self.advance(row, token)
        rows = [self.refused(matcher, count) for matcher, count in zip(self.matchers, self.in_a_row, strict=True)]
        refused = torch.stack(rows).to(scores.device)  # (B, V)
        ends = self.words.eos_tokens
        wish = scores[:, ends].amax(1).where(refused[:, ends].all(1), -torch.inf)  # (B,): to end where it must not
        scores = scores.clone()
        scores[:, self.quote] = torch.maximum(scores[:, self.quote], wish)
        return scores.masked_fill(refused, -torch.inf)

    def advance(self, row: int, token: int) -> None:
        """Follow a token that was chosen; behind its end token an answer is padded, and nothing is refused."""
        if self.matchers[row] is None:
            return
        if token in self.words.eos_tokens:
            self.matchers[row] = None
        elif not self.matchers[row].consume_token(token):
            raise_too_costly(self.matchers[row])
        self.in_a_row[row] = self.in_a_row[row] + self.digits[token] if self.digits[token] else 0

    def refused(self, matcher, digits: int) -> torch.Tensor:
        """Return (V,): which tokens would break the grammar, or go on with a number after `digits` digits."""
        if matcher is None:
            return torch.zeros(self.words.vocab_size, dtype=torch.bool)
        allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
        if matcher.is_error():
            raise_too_costly(matcher)
        if digits >= MOST_DIGITS:
            others = allowed.bool() & (torch.tensor(self.digits) == 0)
            allowed = others if others.any() else allowed
        return allowed == 0


def raise_too_costly(matcher) -> None:
    """Raise ValueError with the reason why llguidance gave up."""
    reason = first_line(matcher.get_error())
    raise ValueError(f"The schema is too costly to follow: {reason}. Use simpler patterns or fewer properties.")
