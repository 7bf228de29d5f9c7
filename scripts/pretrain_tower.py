"""Teach a vision tower to tell concepts apart, so that a model built on it starts with eyes that see.

    python -m scripts.pretrain_tower --recipe recipes/emoji.yaml --minutes 15 --output_dir runs/tower

A tower learns from a classifier's gradient many times faster than through a decoder that cannot speak yet; this is
why published vision-language models start from a pretrained tower (LLaVA, arXiv 2304.08485, section 4.1). The result
is a folder for `train_accelerate.py --vision_model`.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from backbones_minivlm import build_processor, model_from_scratch
from data_minivlm import augment, decode_image
from modeling_minivlm import build_vision_tower
from optimization_minivlm import build_optimizers, schedule
from options_minivlm import parse_args
from sources_minivlm import BadRow, Rows, keep_rows, load_rows
from train_accelerate import compile_blocks, supports_bf16


class Pictures(Dataset):
    """Each picture of the data once, with the number of its concept; `epoch, index` decides the augmentation."""

    def __init__(self, rows: Rows, image_processor, seed: int):
        self.image_processor, self.seed = image_processor, seed
        found = {}
        for index, (sample, concept) in enumerate(zip(rows.samples(), rows["concept"])):
            if isinstance(sample, BadRow):
                raise ValueError(f"{rows.where(index)}: {sample}. The tower learns from every row, so mend it.")
            if (count := len(sample["images"])) != 1:
                raise ValueError(f"{rows.where(index)}: {count} pictures, but a concept names one. Leave the row out.")
            found[sample["images"][0]] = concept
        self.concepts = sorted(set(found.values()))
        number = {concept: i for i, concept in enumerate(self.concepts)}
        self.pictures = [(decode_image(image), number[concept]) for image, concept in found.items()]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        image, label = self.pictures[index]
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        return self.image_processor([augment(image, rng, strong=True)], return_tensors="pt")["pixel_values"][0], label


class Classifier(nn.Module):
    """Tower, mean over patches, linear layer. The patches, not the class token, are what a decoder will read."""

    def __init__(self, tower, classes: int):
        super().__init__()
        self.tower = tower
        self.norm = nn.LayerNorm(tower.config.hidden_size)
        self.head = nn.Linear(tower.config.hidden_size, classes)

    def get_input_embeddings(self):
        return self.tower.get_input_embeddings()

    def forward(self, pixel_values):
        return self.head(self.norm(self.tower(pixel_values).last_hidden_state[:, 1:].mean(1)))


def batches(count: int, size: int, seed: int):
    """Shuffled batches of (epoch, index), without end."""
    epoch = 0
    while True:
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for i in range(0, count - size + 1, size):
            yield [(epoch, index) for index in order[i : i + size]]
        epoch += 1


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m scripts.pretrain_tower", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", required=True, help="Recipe whose model_config describes the tower.")
    parser.add_argument(
        "--data", nargs="+", default=["data/train.parquet"], help="Files, folders or globs, with a concept column."
    )
    parser.add_argument("--minutes", type=float, default=15, help="Training time.")
    parser.add_argument("--batch_size", type=int, default=64, help="Pictures per step.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Learning rate after warm-up, of Muon.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tower"), help="Folder for the tower.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, order and augmentation.")
    args = parser.parse_args(argv)
    recipe = parse_args(["--recipe", args.recipe])
    recipe.optimizer, recipe.learning_rate = "muon", args.learning_rate
    recipe.vision_model = None  # of which this is to be the making
    rows = keep_rows(load_rows(args.data), recipe.keep or {})
    if "concept" not in rows.column_names:
        parser.error(f"{' '.join(args.data)}: no column 'concept' to learn from. Has: {', '.join(rows.column_names)}.")
    torch.manual_seed(args.seed)
    config, tokenizer = model_from_scratch(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Pictures(rows, build_processor(config, tokenizer).image_processor, args.seed)
    config.vision_config._attn_implementation = recipe.attn_implementation
    model = Classifier(build_vision_tower(config), len(data.concepts)).to(device).train()
    if recipe.compile:
        compile_blocks(model, device)
    optimizers = build_optimizers(model, recipe)
    loader = DataLoader(data, batch_sampler=batches(len(data), args.batch_size, args.seed), num_workers=1)
    precision, start, seen, hits = supports_bf16(device), time.perf_counter(), 0, 0.0
    bar = tqdm(desc=f"{len(data)} pictures of {len(data.concepts)} concepts", unit="picture")
    for pixels, labels in loader:
        done = (time.perf_counter() - start) / (60 * args.minutes)
        if done >= 1:
            break
        labels = labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision):
            logits = model(pixels.to(device))
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * schedule(done, recipe.warmup)
            optimizer.step()
            optimizer.zero_grad()
        seen += len(labels)
        hits = 0.98 * hits + 0.02 * (logits.argmax(-1) == labels).float().mean().item()
        bar.update(len(labels))
        bar.set_postfix_str(f"loss {loss.item():.3f}, right {hits:.1%}, {args.minutes * (1 - done):.1f} min left")
    bar.close()
    model.tower.save_pretrained(args.output_dir)
    print(f"{seen:,} pictures seen in {args.minutes:g} min, {hits:.1%} of the last right; tower in {args.output_dir}")
    return args.output_dir


if __name__ == "__main__":
    sys.exit(main() is None)
