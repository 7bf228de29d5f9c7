"""The same numbers on every version of transformers: logits and answers of tiny models against stored ones.

The weights follow from a seed and from the parameters' names. To write the stored values anew, after a change that is
meant to change them: `PYTHONPATH=. python tests/test_versions.py`.
"""

import json

import pytest
import torch

from helpers.models import ROOT, make_model, make_pixels, make_prompt, same
from modeling_minivlm import MiniVLMForConditionalGeneration

IDS, PIXELS = make_prompt(3, "image", 5, "image", 2), make_pixels(2)
STORED = ROOT / "tests" / "expected_answers.json"
DECODERS = {"ours": {}, "qwen3": {"model_type": "qwen3"}, "llama": {"model_type": "llama"}}
SEARCHES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static"},
}


def build(decoder):
    """A model whose weights depend on no initialisation, which transformers may change."""
    model = make_model(text=DECODERS[decoder])
    generator = torch.Generator().manual_seed(11)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise
    return model


@torch.no_grad()
def last_logits(model):
    return model(input_ids=IDS, pixel_values=PIXELS).logits[0, -1]


def answer(model, **options):
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None) | options
    return model.generate(input_ids=IDS, pixel_values=PIXELS, **options)[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_and_answers_are_the_stored_ones_in_each_of_three_loads(decoder, tmp_path):
    """Three loads, since memory that is not initialised may hold the right numbers once."""
    stored = json.loads(STORED.read_text())[decoder]
    build(decoder).save_pretrained(tmp_path)
    for _ in range(3):
        model = MiniVLMForConditionalGeneration.from_pretrained(tmp_path)
        same(last_logits(model), torch.tensor(stored["logits"]))
        for name, options in SEARCHES.items():
            assert answer(model, **options) == stored[name.split(",")[0].replace("static cache", "greedy")], name


if __name__ == "__main__":
    values = {}
    for name in DECODERS:
        reference = build(name)
        logits = [round(value, 6) for value in last_logits(reference).tolist()]
        values[name] = {"logits": logits, "greedy": answer(reference), "beams": answer(reference, num_beams=3)}
    STORED.write_text(json.dumps(values) + "\n")
