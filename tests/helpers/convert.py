"""Check that a conversion is refused in one message, or that its result can be trained and asked."""

import io
from contextlib import redirect_stderr

import torch

import train_accelerate
from minivlm.cli import run_command
from minivlm.commands.convert import main
from minivlm.model.loading import load_trained


def fails(command, out):
    """Run a conversion that must fail without leaving files behind; return the message that the user sees."""
    errors = io.StringIO()
    with redirect_stderr(errors):
        assert run_command(main, command) == 2
    assert not out.exists() and not list(out.parent.glob("*.partial"))
    return errors.getvalue()


def train_and_ask(folder, data, picture, tmp_path):
    """Train a model for two steps and ask it about a picture; return the folder of the trained model."""
    train = ["--model", str(folder), "--data", data, "--batch_size", "4", "--max_steps", "2", "--device", "cpu"]
    final = train_accelerate.main([*train, "--workers", "0", "--output_dir", str(tmp_path / "run")])
    before, _ = load_trained(folder)
    model, processor = load_trained(final)
    assert not torch.equal(before.get_input_embeddings().weight, model.get_input_embeddings().weight)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 6 and model.config.image_token_id not in answer
    return final
