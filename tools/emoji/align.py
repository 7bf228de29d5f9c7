"""Align the features of a trained tower with the words of the names, before the decoder trains.

    python -m tools.emoji.align --recipe emoji --vision_model runs/eyes --output runs/aligned
    accelerate launch train_accelerate.py --recipe emoji --model runs/aligned

The projected features of a thing, averaged over its places, predict the tokens of its name in both languages, in any
order. Only the projector and the token embeddings train. The decoder then starts from image tokens that resemble the
tokens of the answer, as in the first stage of LLaVA (arXiv 2304.08485, section 4.2): it learns to copy them into order
within minutes. Without this, it does not name anything after an hour.

The tower does not train, so its features are computed once and used in several passes. Where the folder of the tower
holds its classifier, the targets are in part the names that the classifier gives: they say what a thing resembles.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm, trange

from minivlm.cli import Parser, run_command
from minivlm.model.backbones import build
from minivlm.model.loading import save_model
from minivlm.training.optimizers import build_optimizers, schedule, step_all
from minivlm.training.options import parse_args as parse_train_args
from minivlm.training.precision import autocast
from tools.emoji.concepts import DEMO
from tools.emoji.drawings import Drawings, load_concept_table
from tools.emoji.eyes import TAUGHT, Eyes, load, normalised, threads
from tools.emoji.eyes_train import PictureSource, generator
from tools.emoji.sources import TRAIN_STYLES

WARMUP = 0.02  # share of the run in which the learning rate rises


def parse_args(argv=None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__, prog="python -m tools.emoji.align")
    add = parser.add_argument
    add("--recipe", default="emoji", help="recipe whose model_config is the architecture (default: emoji)")
    add("--model_config", help="config.json with another architecture than that of the recipe")
    add("--vision_model", required=True, help="output folder of tools.emoji.eyes_train")
    add("--drawings", type=Path, default=Path("data/drawings.parquet"), help="drawings.parquet or an .npz file of "
        "tools.emoji.drawings (default: data/drawings.parquet)")  # fmt: skip
    add("--concepts", type=Path, default=Path("data/concepts.json"), help="concepts.json of the data set")
    add("--demo", action="store_true", help="learn only the things of the demo, which needs a .parquet file")
    add("--output", type=Path, required=True, help="folder for the model")
    add("--pictures", type=int, default=38_400, help="pictures to compose; 32 KB of memory each (default: 38400)")
    add("--passes", type=int, default=8, help="how often each picture is used (default: 8)")
    add("--batch", type=int, default=128, help="pictures per step (default: 128)")
    add("--scenes", type=float, default=0.5, help="share of the pictures that show four drawings (default: 0.5)")
    add("--learning_rate", type=float, default=3e-3, help="highest learning rate (default: 3e-3)")
    add("--threads", type=int, default=1, help="threads of torch (default: 1)")
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    return parser.parse_args(argv)


def name_tokens(tokenizer, concepts: list, slugs: list[str], size: int) -> torch.Tensor:
    """Return, for each slug, how much each of `size` tokens belongs to its names, (slugs, size); rows sum to 1.

    A name counts as an answer and, in English, as a word behind another word, whose first token is a different one.
    """
    by_slug = {concept.slug: concept for concept in concepts}
    target = torch.zeros(len(slugs), size)
    for row, slug in zip(target, slugs):
        concept = by_slug[slug]
        for text in (concept.en, f" {concept.en}", concept.zh):
            row[tokenizer.encode(text, add_special_tokens=False)] = 1
    return target / target.sum(1, keepdim=True)


class Seen(NamedTuple):
    """Hold what the tower saw in B pictures of up to n things each."""

    features: torch.Tensor  # (B, P, V), bf16
    weights: torch.Tensor  # (B, n, 64), the places of each thing
    labels: torch.Tensor  # (B, n), numbers of the concepts; -100 where a picture shows fewer things
    taught: torch.Tensor | None  # (B, n, concepts) probabilities of the tower's classifier, bf16


class Aligner:
    """Hold a model whose projector and token embeddings train, and the targets of each drawing."""

    def __init__(self, args):
        self.args = args
        recipe = parse_train_args(["--recipe", args.recipe])
        config = parse_train_args(["--model_config", args.model_config]).model_config if args.model_config else None
        self.options = dataclasses.replace(  # the recipe names as its model what this makes
            recipe, model=None, model_config=config or recipe.model_config, vision_model=args.vision_model,
            optimizer="muon", learning_rate=args.learning_rate, seed=args.seed,
        )  # fmt: skip
        torch.manual_seed(args.seed)
        self.model, self.processor = build(self.options)
        drawings = Drawings.unpack(args.drawings, DEMO) if args.demo else Drawings.load(args.drawings)
        self.source = PictureSource(drawings.of(TRAIN_STYLES), args.batch, args.scenes, args.seed)
        self.classifier = self.load_classifier(Path(args.vision_model))
        concepts, _ = load_concept_table(args.concepts)
        vocabulary = self.model.config.text_config.vocab_size
        self.targets = name_tokens(self.processor.tokenizer, concepts, self.source.concepts, vocabulary)
        decoder = self.model.model.language_model
        self.model.requires_grad_(False)
        for module in (self.model.model.multi_modal_projector, decoder.embed_tokens, decoder.norm):
            module.requires_grad_(True)
        self.model.train()
        self.optimizers = build_optimizers(self.model, self.options)

    def load_classifier(self, folder: Path) -> Eyes | None:
        """Return the tower with its classifier, None if the folder has none for these concepts."""
        if not (folder / "head.pt").is_file():
            return None
        eyes, concepts = load(folder)
        return eyes.eval() if concepts == self.source.concepts else None

    @torch.no_grad()
    def see(self, number: int) -> Seen:
        """Compose batch `number` of the pictures and let the tower look at it."""
        batch = self.source.batch(number, 1.0, generator(self.args.seed, number, 3))
        model = self.model.model
        with autocast("cpu"):
            features = model.select_features(model.vision_tower(normalised(batch.pixels)).last_hidden_state)
            taught = self.classifier and self.classifier.name(features, batch.weights).float().softmax(-1).bfloat16()
        return Seen(features.bfloat16(), batch.weights, batch.labels, taught)

    def logits(self, seen: Seen) -> torch.Tensor:
        """Return the logits of the vocabulary for each thing of the pictures, (B, n, vocabulary)."""
        projected = self.model.model.multi_modal_projector(seen.features.float())  # (B, I, D)
        side = round(projected.shape[1] ** 0.5)
        weights = F.adaptive_avg_pool2d(seen.weights.unflatten(-1, (8, 8)), side).flatten(-2)  # (B, n, I)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        pooled = weights.to(projected.dtype) @ projected
        return self.model.lm_head(self.model.model.language_model.norm(pooled))

    def step(self, seen: Seen, progress: float) -> tuple[float, float]:
        """Train on one batch; return the loss and the share of things whose likeliest token is one of their names'."""
        with autocast("cpu"):
            logits = self.logits(seen).float()
        shown = seen.labels >= 0
        target = named = self.targets[seen.labels[shown]]  # (things, vocabulary)
        if seen.taught is not None:
            target = (1 - TAUGHT) * named + TAUGHT * (seen.taught[shown].float() @ self.targets)
        said = logits[shown]
        loss = -(target * said.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        step_all(self.optimizers, schedule(progress, WARMUP))
        right = named.gather(1, said.argmax(-1, keepdim=True)) > 0
        return loss.item(), right.float().mean().item()


def train(args) -> None:
    """Let the tower look at all pictures, train on what it saw, save the model."""
    aligner, right = Aligner(args), 0.0
    batches = [aligner.see(i) for i in trange(math.ceil(args.pictures / args.batch), desc="pictures", unit="batch")]
    steps = args.passes * len(batches)
    with tqdm(total=steps, desc="alignment") as bar:
        for turn in range(args.passes):
            for i in torch.randperm(len(batches), generator=generator(args.seed, turn, 4)):
                loss, hits = aligner.step(batches[i], bar.n / steps)
                right = 0.95 * right + 0.05 * hits
                bar.set_postfix(loss=f"{loss:.2f}", right=f"{right:.1%}", refresh=False)
                bar.update()
    print(f"alignment: {right:.1%} of the likeliest tokens belong to the right name", flush=True)
    aligner.model.requires_grad_(True)
    save_model(aligner.model, aligner.processor, args.output)


def main(argv=None) -> None:
    """Train on as many threads as --threads says."""
    args = parse_args(argv)
    with threads(args.threads):
        train(args)


if __name__ == "__main__":
    sys.exit(run_command(main))
