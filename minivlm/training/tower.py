"""Train a vision tower as a classifier of pictures by their column `concept`."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from minivlm.data.bad_rows import BadRow
from minivlm.data.pictures import augment, decode_image
from minivlm.data.rows import Rows
from minivlm.model.backbones import build_processor, model_from_scratch
from minivlm.training.device import compile_blocks
from minivlm.training.optimizers import build_optimizers, schedule, step_all
from minivlm.training.options import TrainArgs
from minivlm.training.precision import autocast
from modeling_minivlm import build_vision_tower


class Pictures(Dataset):
    """Hold each picture of the data once, with the number of its concept; (epoch, index) decides its augmentation.

    Raises:
        ValueError: a row cannot be read, or has not exactly one picture.
    """

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


def batches(count: int, size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Yield shuffled batches of (epoch, index), without end."""
    epoch = 0
    while True:
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for i in range(0, count - size + 1, size):
            yield [(epoch, index) for index in order[i : i + size]]
        epoch += 1


def train_tower(args: TrainArgs, rows: Rows, folder: Path) -> None:
    """Train the tower of `args.model_config` for `args.max_minutes` and save it in `folder`."""
    torch.manual_seed(args.seed)
    config, tokenizer = model_from_scratch(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Pictures(rows, build_processor(config, tokenizer).image_processor, args.seed)
    config.vision_config._attn_implementation = args.attn_implementation
    model = Classifier(build_vision_tower(config), len(data.concepts)).to(device).train()
    if args.compile:
        compile_blocks(model, device)
    optimizers = build_optimizers(model, args)
    loader = DataLoader(data, batch_sampler=batches(len(data), args.batch_size, args.seed), num_workers=1)
    start, seen, hits = time.perf_counter(), 0, 0.0
    bar = tqdm(desc=f"{len(data)} pictures of {len(data.concepts)} concepts", unit="picture")
    for pixels, labels in loader:
        progress = (time.perf_counter() - start) / (60 * args.max_minutes)
        if progress >= 1:
            break
        loss, right = step(model, optimizers, (pixels.to(device), labels.to(device)), args, progress)
        seen += len(labels)
        hits = 0.98 * hits + 0.02 * right
        bar.update(len(labels))
        left = args.max_minutes * (1 - progress)
        bar.set_postfix_str(f"loss {loss:.3f}, right {hits:.1%}, {left:.1f} min left")
    bar.close()
    model.tower.save_pretrained(folder)
    print(f"{seen:,} pictures seen in {args.max_minutes:g} min, {hits:.1%} of the last right; tower in {folder}")


def step(model: Classifier, optimizers: list, batch: tuple, args: TrainArgs, progress: float) -> tuple[float, float]:
    """Take one optimizer step; return the loss and the share of right answers."""
    pixels, labels = batch
    with autocast(pixels.device):
        logits = model(pixels)
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    step_all(optimizers, schedule(progress, args.warmup))
    return loss.item(), (logits.argmax(-1) == labels).float().mean().item()
