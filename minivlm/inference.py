"""Answer questions about pictures: greedy answers in batches, and the likelihood of given answers.

An item is a dict with `text`, the prompt from the chat template, `images`, its pictures, and where they are scored
`answer` or `options`; `evaluation/scoring.py` makes items of rows.
"""

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minivlm.data.pictures import decode_image


def encode(processor: ProcessorMixin, items: list[dict], texts: list[str], side: str, device) -> dict:
    """Return the model inputs of `texts` with the pictures of `items`, padded on `side`."""
    images = [decode_image(image) for item in items for image in item["images"]]
    return processor(
        text=texts, images=images or None, return_tensors="pt", padding=True, padding_side=side,
        add_special_tokens=False,
    ).to(device)  # fmt: skip


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, items: list[dict], max_new_tokens: int = 64
) -> list[str]:
    """Return the greedy answer to each item of a batch."""
    inputs = encode(processor, items, [item["text"] for item in items], "left", model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def shared_features(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> dict | None:
    """Return the features of the items' pictures, repeated for each of an item's `options`; None without pictures."""
    inputs = encode(processor, items, [item["text"] for item in items], "right", model.device)
    if "pixel_values" not in inputs:
        return None
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output  # (N, I, D)
    parts = features.split([len(item["images"]) for item in items])
    repeated = torch.cat([part for part, item in zip(parts, items) for _ in item["options"]])
    return {"image": BaseModelOutputWithPooling(pooler_output=repeated)}


@torch.inference_mode()
def option_scores(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[list[float]]:
    """Return the log-probability of each of an item's `options` as the whole answer, the end token included.

    The tower sees each picture once, however many options there are.
    """
    pairs = [(item, option + processor.tokenizer.eos_token) for item in items for option in item["options"]]
    marker, expanded = processor.image_token, processor.image_token * processor.image_seq_length
    inputs = processor.tokenizer(
        [item["text"].replace(marker, expanded) + option for item, option in pairs],
        return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False,
    ).to(model.device)  # fmt: skip
    ids, ends = inputs["input_ids"], inputs["attention_mask"].sum(1)
    lengths = ends.new_tensor([len(processor.tokenizer(option)["input_ids"]) for _, option in pairs])
    place = torch.arange(ids.shape[1], device=ids.device)
    spoken = (place >= (ends - lengths)[:, None]) & (place < ends[:, None])  # (B, T): the option's own tokens
    asked = torch.nn.functional.pad(spoken[:, 1:], (0, 1))  # the positions that predict them
    logits = model(
        input_ids=ids, attention_mask=inputs["attention_mask"], logits_to_keep=asked,
        mm_encoder_outputs=shared_features(model, processor, items),
    ).logits[0].float()  # (K, V)  # fmt: skip
    scores = logits.log_softmax(-1).gather(1, ids[spoken][:, None])[:, 0]
    sums = iter(part.sum().item() for part in scores.split(lengths.tolist()))
    return [[next(sums) for _ in item["options"]] for item in items]


def rank(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[str]:
    """Return the likeliest of each item's `options`."""
    scores = option_scores(model, processor, items)
    return [max(zip(values, item["options"]))[1] for values, item in zip(scores, items)]


def answer_loss(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[tuple[float, int]]:
    """Return negative log-likelihood (nats) and number of tokens of each item's `answer`, the end token included."""
    # A reference that spells the image token means no picture; the model could not write it, either.
    answers = [item["answer"].replace(processor.image_token, "") for item in items]
    scores = option_scores(model, processor, [item | {"options": [a]} for item, a in zip(items, answers)])
    end = processor.tokenizer.eos_token
    return [(-s[0], len(processor.tokenizer(a + end)["input_ids"])) for s, a in zip(scores, answers)]
