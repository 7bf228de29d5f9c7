"""Answer the requests of lmms-eval with MiniVLM; the harness finds this class by the entry point in setup.cfg.

    python -m lmms_eval --model minivlm --model_args pretrained=runs/train/final --tasks mmstar --batch_size 16

Only the harness and `minivlm evaluate --tasks` import this file: it needs the package lmms-eval.
"""

import logging
from collections import Counter
from itertools import groupby, islice
from pathlib import Path

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from minivlm.inference import Assistant, Decoding
from minivlm.model.loading import check_device, load_trained, place

logger = logging.getLogger(__name__)


class MiniVLM(lmms):
    """Answer greedily and in batches.

    Args:
        pretrained: folder or Hub id of a model.
        batch_size: conversations answered at once.
        device: where to compute. Default: cuda if there is one.

    Attributes:
        too_long: by task, the prompts that the model cannot read; their answer is empty.
        shortened: by task, the prompts that leave less room for the answer than the task allows.
    """

    is_simple = False  # takes conversations in which pictures may stand between words

    def __init__(
        self, pretrained: str = ".", batch_size: int = 16, device: str | None = None, max_batch_size: int | None = None
    ):
        super().__init__()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        model, processor = load_trained(pretrained)
        self.assistant, self.batch_size = Assistant(place(model, device), processor), int(batch_size)
        self.too_long, self.shortened = Counter(), Counter()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request, in their order."""
        answers = []
        with tqdm(total=len(requests), desc="answering", unit="question") as bar:
            # Neighbours are of one task and so of like length; they can share a batch if they ask for answers alike.
            for settings, group in groupby(requests, key=lambda request: (request.args[2], request.args[4])):
                while batch := list(islice(group, self.batch_size)):
                    answers += self.answer(batch, *settings)
                    bar.update(len(batch))
        for task, count in self.too_long.items():
            logger.warning(f"{task}: {count} prompts are longer than the model reads; their answers are empty.")
        for task, count in self.shortened.items():
            logger.warning(f"{task}: {count} prompts left less room for the answer than the task allows.")
        return answers

    def answer(self, batch: list[Instance], settings: dict, task: str) -> list[str]:
        """Return the answers to requests of one task that have the same settings of generation."""
        if settings.get("num_beams", 1) > 1 or (settings.get("do_sample") and settings.get("temperature")):
            raise ValueError(f"{task} asks for sampling or beams, {settings}; MiniVLM answers greedily here.")
        wanted = settings.get("max_new_tokens", Decoding().max_new_tokens)
        encoded = [self.assistant.encode(self.messages(request)) for request in batch]
        room = [self.assistant.room - len(chat["input_ids"]) for chat in encoded]
        answers = [""] * len(batch)
        # A long prompt is answered alone: in a batch it would shorten its neighbours' answers, too.
        groups = [[i for i, left in enumerate(room) if left >= wanted]]
        groups += [[i] for i, left in enumerate(room) if 0 < left < wanted]
        for chosen in filter(None, groups):
            decoding = Decoding(min(wanted, min(room[i] for i in chosen)))
            for i, answer in zip(chosen, self.assistant.answer([encoded[i] for i in chosen], decoding)):
                answers[i] = until(answer.text, settings.get("until") or [])
        if count := sum(left < 1 for left in room):
            self.too_long[task] += count
        if count := sum(0 < left < wanted for left in room):
            self.shortened[task] += count
        return answers

    def messages(self, request: Instance) -> list[dict]:
        """Return the conversation of a request in the chat format of transformers."""
        _, make, _, row, task, split = request.args
        return [
            {"role": turn["role"], "content": [part_of(part, task) for part in turn["content"]]}
            for turn in make(self.task_dict[task][split][row])
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: the harness asks models that take conversations for answers only."""
        raise ValueError(
            f"{requests[0].task_name} compares log-likelihoods; MiniVLM answers generate_until tasks only."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise ValueError(f"{requests[0].task_name} has several rounds; MiniVLM answers generate_until tasks only.")


def part_of(part: dict, task: str) -> dict:
    """Return a part of the harness's conversation as transformers writes it; a picture by name must be a file."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise ValueError(f"{task} has a part of type {part['type']!r}; MiniVLM reads text and pictures.")
    return {"type": "image", "image": Path(part["url"]) if isinstance(part["url"], str) else part["url"]}


def until(text: str, ends: list[str] | str) -> str:
    """Return the text before the first of `ends`."""
    for end in filter(None, [ends] if isinstance(ends, str) else ends):
        text = text.partition(end)[0]
    return text
