"""Name the parts of a model, freeze those that do not train, and check that the others get gradients."""

import re

from torch import nn

PARTS = {  # a parameter belongs to the first part whose prefix it has
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "lm_head": "lm_head.",  # of a model that does not share it with the token embeddings
    "text": "",
}
BLOCK = re.compile(r"\.(?:layers|layer|blocks|h)\.(\d+)\.")
SELECTOR = re.compile(r"(vision|projector|text|lm_head)(?::(first_last|(last)_(\d+)))?")


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to."""
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


def check_selector(selector: str) -> str | None:
    """Return what is wrong with an entry of `--train`, or None."""
    match = SELECTOR.fullmatch(selector)
    if match is None or (match[2] and match[1] not in ("vision", "text")) or match[4] == "0":
        return (
            f"--train {selector}: no such part. Parts are {', '.join(PARTS)}; of vision and text also the "
            "last N blocks, text:last_2, or the first and the last, text:first_last."
        )
    return None


def freeze(model: nn.Module, train: list[str]) -> dict[str, list[nn.Parameter]]:
    """Let only the named parts train; return the trainable parameters of each part.

    Args:
        train: parts, each whole (`text`, `lm_head`) or some of its blocks (`text:first_last`, `vision:last_2`).
            `lm_head` of a model that shares it with the token embeddings is the shared matrix.

    Raises:
        ValueError: a part has fewer blocks than are asked for.
    """
    chosen = choose_blocks(model, train)
    shared = getattr(model.get_output_embeddings(), "weight", None) if "lm_head" in chosen else None
    trainable: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = part in chosen
        if trains and chosen[part] is not None:
            match = BLOCK.search(name)
            trains = match is not None and int(match[1]) in chosen[part]
        parameter.requires_grad_(trains or parameter is shared)
        if parameter.requires_grad:
            trainable[part].append(parameter)
    return trainable


def choose_blocks(model: nn.Module, train: list[str]) -> dict[str, set[int] | None]:
    """Return the block numbers that train of each named part; None stands for the whole part."""
    blocks = {part: set() for part in PARTS}
    for name, _ in model.named_parameters():
        if match := BLOCK.search(name):
            blocks[part_of(name)].add(int(match[1]))
    chosen: dict[str, set[int] | None] = {}
    for selector in train:
        part, rule, _, count = SELECTOR.fullmatch(selector).groups()
        indices = sorted(blocks[part])
        if rule is None:
            chosen[part] = None
        elif chosen.get(part, set()) is not None:
            if len(indices) < int(count or 1):
                raise ValueError(f"--train {selector}: {part} has {len(indices)} blocks. Ask for fewer.")
            wanted = {indices[0], indices[-1]} if rule == "first_last" else set(indices[-int(count) :])
            chosen[part] = chosen.get(part, set()) | wanted
    return chosen


def check_gradients(model: nn.Module) -> None:
    """Raise RuntimeError if a trainable parameter got no gradient, or a frozen one got one."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    extra = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if missing or extra:
        raise RuntimeError(
            f"After the first backward pass {len(missing)} parameters that should train have no gradient "
            f"({', '.join(missing[:5])}) and {len(extra)} frozen ones have one ({', '.join(extra[:5])})."
        )
