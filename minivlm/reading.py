"""Read a batch of prompts once, then answer them and score continuations from the same cache.

An evaluation wants three things of a row: an answer, the likelihood of the right answer, and that of each option. All
of them begin with the same prompt, which is most of the work: the picture, its tokens, the question.

An item is a dict with `text`, the prompt from the chat template, `images`, its pictures, and where options are scored
`options`; `evaluation/scoring.py` makes items of rows. Letters in shapes: B items, P tokens of the longest prompt
without its last one, n continuations, L tokens of the longest of them.
"""

import copy

import torch
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minivlm.data.pictures import decode_image

ANSWER_TOKENS = 64  # longest answer


class Reading:
    """Hold what a model keeps of a batch of prompts, all tokens but the last of each.

    Equal pictures of a batch are seen once, and so are equal beginnings: where a picture stands first, and the prompts
    of a batch begin with the same number of tokens up to its end, these are read once for all questions about it. The
    padding then stands between this beginning and the question.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]):
        self.model, self.tokenizer, self.marker = model, processor.tokenizer, processor.image_token
        expanded = processor.image_token * processor.image_seq_length
        texts = [item["text"].replace(self.marker, expanded) for item in items]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        begun, firsts, places = self.beginnings(prompts, items)
        self.ids, self.mask = self.pad(prompts, begun)  # (B, P + 1)
        self.cache = DynamicCache(config=model.config.text_config)
        seen = self.look(processor, [image for i in firsts for image in items[i]["images"]])
        if begun:
            self.read(self.ids[firsts, :begun], self.mask[firsts, :begun], seen)
            self.cache.batch_select_indices(torch.tensor(places, device=model.device))
            self.read(self.ids[:, begun:-1], self.mask[:, :-1], None)
        else:
            self.read(self.ids[:, :-1], self.mask[:, :-1], seen)

    def beginnings(self, prompts: list[list[int]], items: list[dict]) -> tuple[int, list[int], list[int]]:
        """Return how many tokens are read once for equal beginnings, an item of each, and the number of each item's.

        If no two are equal, they differ in length, or nothing follows, that is 0, all items, and their own numbers.
        """
        marker = self.tokenizer.convert_tokens_to_ids(self.marker)
        ends = {len(ids) - ids[::-1].index(marker) if marker in ids else 0 for ids in prompts}
        begun, pictures = max(ends), [tuple(same_picture(image) for image in item["images"]) for item in items]
        firsts, places = distinct([(tuple(ids[:begun]), seen) for ids, seen in zip(prompts, pictures)])
        follows = min(len(ids) for ids in prompts) - begun > 1  # the last token is read with the answers
        if len(ends) > 1 or len(firsts) == len(items) or not follows:
            begun, firsts, places = 0, list(range(len(items))), list(range(len(items)))
        return begun, firsts, places

    def pad(self, prompts: list[list[int]], begun: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of prompts and their mask, (B, P + 1), with padding behind the first `begun` tokens."""
        longest = max(len(ids) for ids in prompts)
        blanks = [longest - len(ids) for ids in prompts]
        fill = self.tokenizer.pad_token_id
        ids = [ids[:begun] + [fill] * blank + ids[begun:] for ids, blank in zip(prompts, blanks)]
        mask = [[1] * begun + [0] * blank + [1] * (longest - begun - blank) for blank in blanks]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def read(self, ids: torch.Tensor, mask: torch.Tensor, seen: dict | None) -> None:
        """Read tokens (b, t) behind those in the cache.

        Args:
            mask: of the tokens in the cache and these, (b, T).
            seen: features of their pictures.
        """
        self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)[:, -ids.shape[1] :],
            mm_encoder_outputs=seen, past_key_values=self.cache, use_cache=True,
        )  # fmt: skip

    @property
    def positions(self) -> torch.Tensor:
        """Return the position of each token of the prompts, (B, P + 1); 0 for padding."""
        return positions_of(self.mask)

    def look(self, processor: ProcessorMixin, images: list) -> dict | None:
        """Return the features of the pictures in their order; None if there are none."""
        if not images:
            return None
        firsts, places = distinct([same_picture(image) for image in images])
        pixels = processor.image_processor([decode_image(images[i]) for i in firsts], return_tensors="pt")
        features = self.model.get_image_features(pixels["pixel_values"].to(self.model.device), return_dict=True)
        return {"image": BaseModelOutputWithPooling(pooler_output=features.pooler_output[torch.tensor(places)])}

    @torch.inference_mode()
    def scores(self, continuations: list[list[str]]) -> list[list[float]]:
        """Return the log-probability of each of an item's continuations as the whole answer, the end token included.

        As many continuations as there are items are read at once.
        """
        pairs = [(row, text) for row, texts in enumerate(continuations) for text in texts]
        found = []
        for start in range(0, len(pairs), len(self.ids)):
            found += self.score(pairs[start : start + len(self.ids)])
        values = iter(found)
        return [[next(values) for _ in texts] for texts in continuations]

    def score(self, pairs: list[tuple[int, str]]) -> list[float]:
        """Return the log-probability of each (row, continuation)."""
        rows = torch.tensor([row for row, _ in pairs], device=self.ids.device)
        tokens = [self.spoken(text) for _, text in pairs]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.ids.device)  # (n, L)
        lengths = torch.tensor([len(part) for part in tokens], device=self.ids.device)
        ids = torch.cat([self.ids[rows, -1:], padded[:, :-1]], dim=1)
        steps = torch.arange(ids.shape[1], device=self.ids.device)
        asked = steps < lengths[:, None]  # (n, L)
        cache = copy.deepcopy(self.cache)
        cache.batch_select_indices(rows)
        logits = self.model(
            input_ids=ids, attention_mask=torch.cat([self.mask[rows, :-1], torch.ones_like(ids)], dim=1),
            position_ids=self.positions[rows, -1:] + steps, past_key_values=cache, use_cache=True,
            logits_to_keep=asked,
        ).logits[0].float()  # (K, V)  # fmt: skip
        chances = logits.log_softmax(-1).gather(1, padded[asked][:, None])[:, 0]
        return [part.sum().item() for part in chances.split(lengths.tolist())]

    def spoken(self, text: str) -> torch.Tensor:
        """Return the tokens of a whole answer, (L,), with the end token; a picture's marker in it means no picture."""
        whole = text.replace(self.marker, "") + self.tokenizer.eos_token
        ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids)

    @torch.inference_mode()
    def answers(self, max_new_tokens: int = ANSWER_TOKENS) -> list[str]:
        """Return the greedy answer to each prompt. This uses the cache up: call it last."""
        output = self.model.generate(
            input_ids=self.ids, attention_mask=self.mask, past_key_values=self.cache, max_new_tokens=max_new_tokens,
            do_sample=False,
        )  # fmt: skip
        return self.tokenizer.batch_decode(output[:, self.ids.shape[1] :], skip_special_tokens=True)


def distinct(keys: list) -> tuple[list[int], list[int]]:
    """Return where each distinct key stands first, and for each key which of these is its own."""
    numbers = {}
    places = [numbers.setdefault(key, len(numbers)) for key in keys]
    return [places.index(number) for number in numbers.values()], places


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token (B, T) of a mask; that of padding does not matter."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def same_picture(image) -> object:
    """Return what equal pictures share: encoded bytes are compared, other pictures are told apart by identity."""
    return image if isinstance(image, bytes) else id(image)


def option_scores(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[list[float]]:
    """Return the log-probability of each of an item's `options` as the whole answer, the end token included."""
    return Reading(model, processor, items).scores([item["options"] for item in items])


def answer(
    model: PreTrainedModel, processor: ProcessorMixin, items: list[dict], max_new_tokens: int = ANSWER_TOKENS
) -> list[str]:
    """Return the greedy answer to each item of a batch."""
    return Reading(model, processor, items).answers(max_new_tokens)
