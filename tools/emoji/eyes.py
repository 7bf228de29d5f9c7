"""Define the vision networks: a ResNet that trains quickly, a CLIP ViT that learns from it, and their classifier.

Both towers are classes of transformers, so `AutoModel` loads a saved tower. Both turn a picture of 128 x 128 pixels
into an 8 x 8 map: the ResNet in its last stage, the ViT with patches of 16 pixels. Legend: B pictures, P = 64 places
of the map, V width.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, ResNetConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from minivlm.training.muon import Muon

SIZE = 128  # side of a picture, pixels
TAUGHT = 0.7  # share of a target that comes from a trained classifier, the rest from the labels


@contextmanager
def threads(number: int):
    """Compute with so many threads inside the block; programs that call each other share the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normalised(pixels) -> torch.Tensor:
    """Return pictures (B, 3, H, W) in [0, 1] as the processor gives them to the tower."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def build_tower(kind: str, width: int, depth: int = 6):
    """Return a tower with random weights.

    A `resnet` has basic blocks of 2, 4, 8 and 8 times `width` channels. A `clip` has `depth` blocks of width `width`.
    """
    if kind == "resnet":
        config = ResNetConfig(
            layer_type="basic", embedding_size=width, hidden_sizes=[2 * width, 4 * width, 8 * width],
            depths=[1, 1, 2], downsample_in_first_stage=False, image_size=SIZE,
        )  # fmt: skip
    elif kind == "clip":
        config = CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64,
            image_size=SIZE, patch_size=16, attn_implementation="eager",
        )  # fmt: skip
    else:
        raise ValueError(f"Unknown tower {kind!r}. Use resnet or clip.")
    return AutoModel.from_config(config)


class Eyes(nn.Module):
    """Classify pictures with a tower, the mean over its map, and a linear layer with one output per concept."""

    def __init__(self, tower, classes: int):
        super().__init__()
        self.tower = tower
        self.is_map = tower.config.model_type == "resnet"
        self.width = tower.config.hidden_sizes[-1] if self.is_map else tower.config.hidden_size
        self.norm = nn.Identity() if self.is_map else nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, classes)

    def look(self, pixels, places=None) -> torch.Tensor:
        """Return the feature of each place, (B, P, V); with `places` only of these, (B, n, V).

        Args:
            pixels: (B, 3, 128, 128) in [0, 1].
            places: (n,) indices of the patches that a ViT gets. Half of them take half the time, and the learned
                weights also work on all patches (arXiv 2212.00794). None: all patches.
        """
        x = normalised(pixels)
        if self.is_map:
            x = x.contiguous(memory_format=torch.channels_last)
            return self.tower(x).last_hidden_state.flatten(2).transpose(1, 2)
        x = self.tower.embeddings(x)  # (B, 1 + 64, V)
        if places is not None:
            x = torch.cat([x[:, :1], x[:, 1:][:, places]], 1)
        x = self.tower.encoder(inputs_embeds=self.tower.pre_layrnorm(x)).last_hidden_state
        return x[:, 1:]

    def name(self, features, weights=None) -> torch.Tensor:
        """Return the logits (B, classes) of features (B, P, V).

        It averages the patches instead of using the class token, because a decoder will read the patches.

        Args:
            weights: (B, n, P) how much each place belongs to each of n things; the result is then (B, n, classes).
                None: one thing, to which all places belong equally.
        """
        pooled = features.mean(1) if weights is None else weights.to(features.dtype) @ features
        return self.head(self.norm(pooled))

    def forward(self, pixels) -> torch.Tensor:
        """Return the logits (B, classes) of pictures (B, 3, 128, 128) in [0, 1]."""
        return self.name(self.look(pixels))


class Learner(nn.Module):
    """Hold eyes and what only their training needs: linear maps from the feature of a place to other targets.

    `trace` returns 16 logits: whether a thing covers each sixteenth of the place. `paint` returns red, green and blue
    of each quarter of it. Names alone would let the eyes forget where a thing ends and which colours there are,
    which a decoder is asked about. `translate` returns the `teacher_width` channels of a teacher's feature.
    """

    def __init__(self, eyes: Eyes, teacher_width: int):
        super().__init__()
        self.eyes = eyes
        self.trace, self.paint = nn.Linear(eyes.width, 16), nn.Linear(eyes.width, 12)
        self.translate = nn.Linear(eyes.width, teacher_width)


def cell_weights(grid: int) -> torch.Tensor:
    """Return how much of each cell lies in each place of the map, (grid * grid, 64); each row sums to 1."""
    edges = torch.arange(grid + 1) * (8 / grid)
    places = torch.arange(8)
    share = (torch.minimum(edges[1:, None], places + 1) - torch.maximum(edges[:-1, None], places)).clamp(min=0)
    share = share / share.sum(1, keepdim=True)  # (grid, 8)
    return torch.einsum("rh,cw->rchw", share, share).reshape(grid * grid, 64)


def means(x, parts: int) -> torch.Tensor:
    """Return the means of the `parts` x `parts` parts of each place, (B, 64, C * parts * parts), of (B, C, 128, 128).

    They are the targets of `Learner.trace` (4 x 4 parts of the coverage) and `Learner.paint` (2 x 2 of the picture).
    """
    B, C = x.shape[:2]
    small = F.avg_pool2d(x, SIZE // (8 * parts)).view(B, C, 8, parts, 8, parts)
    return small.permute(0, 2, 4, 1, 3, 5).reshape(B, 64, C * parts * parts)


def save(eyes: Eyes, concepts: list[str], folder: Path) -> None:
    """Write the tower in the format of transformers, and the classifier to head.pt for further training."""
    eyes.tower.save_pretrained(folder)
    head = {"head": eyes.head.state_dict(), "norm": eyes.norm.state_dict(), "concepts": concepts}
    torch.save(head, folder / "head.pt")


def load(folder: Path) -> tuple[Eyes, list[str]]:
    """Read a folder that `save` wrote; return the eyes and the concepts in the order of the classifier."""
    head = torch.load(folder / "head.pt", weights_only=True)
    eyes = Eyes(AutoModel.from_pretrained(folder), len(head["concepts"]))
    eyes.head.load_state_dict(head["head"])
    eyes.norm.load_state_dict(head["norm"])
    return eyes, head["concepts"]


def build_optimizers(model: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Return two optimizers for the parameters of `model`: AdamW and Muon.

    Muon gets the matrices and convolutions inside the tower. AdamW gets the stem, the head, norms and biases. Each
    group keeps its highest learning rate as `peak_lr`.
    """
    inner, rest = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim in (2, 4) and p.shape[1] > 3 and "tower." in name and "embedding." not in name
        (inner if matrix else rest).append(p)
    adamw = torch.optim.AdamW([{"params": rest, "peak_lr": lr}], lr=lr, weight_decay=0.01)
    return [adamw, Muon([{"params": inner, "peak_lr": muon_lr}], lr=muon_lr, match_adamw=False)]
