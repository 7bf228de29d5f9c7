"""Load the model of a folder as a stranger does, with the code saved in it, and print as JSON what was loaded.

This file runs as a program of its own, outside of the checkout, so it imports nothing of this package.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

QUESTION = "What is this? Answer with the name."


def load(folder: str) -> dict:
    """Return type, parameters, weights that did not fit, and the answer to a question about a drawn picture."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    content = [
        {"type": "image", "image": Image.radial_gradient("L").convert("RGB")},
        {"type": "text", "text": QUESTION},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.inference_mode():
        finite = bool(torch.isfinite(model(**inputs).logits).all())
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return {
        "code": [type(part).__module__ for part in (model, processor)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "misfits": sorted(str(key) for name, keys in report.items() if name != "error_msgs" for key in keys),
        "finite": finite,
        "answer": processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
    }


if __name__ == "__main__":
    print(json.dumps(load(sys.argv[1]), ensure_ascii=True))
