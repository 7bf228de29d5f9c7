"""Find the likeliest names of a picture."""

import json
from collections import defaultdict
from math import exp
from pathlib import Path

import torch
from transformers.utils import cached_file

from minivlm.app.sentences import NAME_QUESTION
from minivlm.asking import question_about
from minivlm.inference import Assistant, Decoding
from minivlm.reading import option_scores

BEAMS = 8
LONGEST = 24  # tokens of a name, the end token included


def beside(model: str, file: str) -> Path | None:
    """Return a file that lies in a model's folder or Hub repository; None if it has no such file."""
    try:
        return Path(cached_file(model, file))
    except OSError:
        return None


def read_names(path: Path | None) -> dict[str, list[str]]:
    """Return the names of a table like data/concepts.json by language; without a table there are none."""
    concepts = json.loads(path.read_text(encoding="utf-8")) if path else []
    return {language: sorted({concept[language] for concept in concepts}) for language in NAME_QUESTION}


class Namer:
    """Name pictures: `likeliest` returns names and their probabilities.

    Ranking all 1,358 names takes many seconds on a CPU. So a beam search finds candidates, and each of these is scored
    exactly. With `names` the search walks along the tokens of these names only; without, along all tokens.
    """

    def __init__(self, assistant: Assistant, names: dict[str, list[str]]):
        self.assistant, self.names = assistant, names
        self.end = assistant.tokenizer.eos_token_id
        self.follow = {language: self._tree(table) for language, table in names.items()}

    def _tree(self, table: list[str]) -> dict[tuple, list[int]]:
        """Return which tokens may follow each beginning of a name."""
        follow = defaultdict(set)
        for ids in self.assistant.tokenizer(table, add_special_tokens=False)["input_ids"] if table else []:
            for place, token in enumerate([*ids, self.end]):
                follow[tuple(ids[:place])].add(token)
        return {start: sorted(tokens) for start, tokens in follow.items()}

    @torch.inference_mode()
    def candidates(self, messages: list[dict], language: str) -> list[str]:
        """Return the distinct answers that a beam search finds, among the names if there are any."""
        inputs = self.assistant.batch([self.assistant.encode(messages)], Decoding(LONGEST))
        start, follow = inputs["input_ids"].shape[1], self.follow[language]

        def allowed(_, ids: torch.Tensor) -> list[int]:
            return follow.get(tuple(ids[start:].tolist()), [self.end])

        output = self.assistant.model.generate(
            **inputs, num_beams=BEAMS, num_return_sequences=BEAMS, length_penalty=0.0, eos_token_id=self.end,
            prefix_allowed_tokens_fn=allowed if follow else None,
        )  # fmt: skip
        texts = dict.fromkeys(self.assistant.decode(ids[start:].tolist()).strip() for ids in output)
        table = set(self.names[language])
        return [text for text in texts if text and (text in table or not table)]

    def likeliest(self, picture: Path, language: str, count: int = 5) -> dict[str, float]:
        """Return the likeliest names of a picture and their probabilities, the likeliest first.

        Raises:
            ValueError: the picture cannot be read.
        """
        messages = [question_about([picture], NAME_QUESTION[language])]
        options = self.candidates(messages, language)
        if not options:
            return {}
        processor = self.assistant.encoder.processor
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        item = {"text": text, "images": [picture], "options": options}
        [scores] = option_scores(self.assistant.model, processor, [item])
        ranked = sorted(zip(scores, options), reverse=True)[:count]
        return {name: exp(score) for score, name in ranked}
