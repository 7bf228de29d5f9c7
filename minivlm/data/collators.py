"""Join encoded rows to the tensors of a micro-batch: stage 7 of the data path.

Letters in shapes: B rows of a batch, T tokens of the longest row or of all packed rows, K tokens that carry loss.
"""

import torch

from minivlm.data.encoder import IGNORE


def _finish(batch: dict, labels: torch.Tensor, samples: list[dict]) -> dict:
    """Add what both collators share: labels and the positions that predict them, pictures, places, bad rows.

    `tokens` counts those of the rows, without padding and without the blank row.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, T): what each position predicts
    batch["logits_to_keep"] = targets != IGNORE
    batch["shift_labels"] = targets[batch["logits_to_keep"]][None]  # (1, K)
    pixels = [sample["pixel_values"] for sample in samples if len(sample["pixel_values"])]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    grounding = [(i, found) for i, sample in enumerate(samples) if (found := sample.get("grounding")) is not None]
    if grounding:
        batch["grounding"] = torch.cat([torch.cat([torch.full((len(f), 1), i), f], dim=1) for i, f in grounding])
    batch["tokens"] = sum(len(sample["input_ids"]) for sample in samples if sample["places"])
    batch["places"] = [place for sample in samples for place in sample["places"]]
    batch["bad_rows"] = [bad for sample in samples for bad in sample["bad_rows"]]
    batch["epoch"] = max(sample["epoch"] for sample in samples)
    return batch


def with_picture(samples: list[dict], blank: dict | None) -> list[dict]:
    """Return the rows of a batch, and the blank row behind them if none has a picture.

    The blank row gives the tower a gradient of zero. Without it a rank whose rows are all text would leave the tower
    out of the backward pass, and DDP would wait for its gradient or fail.
    """
    if blank is None or any(len(sample["pixel_values"]) for sample in samples):
        return samples
    return [*samples, blank]


def own_labels(sample: dict) -> torch.Tensor:
    """Return labels without those of each row's first token: the token before it belongs to another row."""
    branch = sample["branch"]
    starts = torch.cat([torch.ones(1, dtype=torch.bool), branch[1:] != branch[:-1]])
    return sample["labels"].masked_fill(starts, IGNORE)


class PaddingCollator:
    """Put rows side by side, padded on the right to the longest.

    Causal attention never looks at padding on the right, so plain rows need no attention mask. Rows that share a
    picture get a mask that hides each branch from the others.

    Args:
        blank: `Encoder.blank()`, added to a batch without pictures; None adds nothing.
    """

    def __init__(self, pad_token_id: int, blank: dict | None = None):
        self.pad_token_id, self.blank = pad_token_id, blank

    def __call__(self, samples: list[dict]) -> dict:
        """Return `input_ids`, `position_ids`, `logits_to_keep` (B, T), `shift_labels` (1, K), `pixel_values`.

        With phrases also `grounding` (n, 3 + I): the number of the row, then the columns of `phrases.locate`.
        With branches also `attention_mask` (B, 1, T, T), to be added to attention scores: 0 or the lowest float.
        """

        samples = with_picture(samples, self.blank)

        def pad(key: str, value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=value)

        batch, branch = {"input_ids": pad("input_ids", self.pad_token_id)}, pad("branch", -1)
        if branch.max() <= 1:  # positions that go on into the padding: a restart would look like a packed row
            batch["position_ids"] = torch.arange(branch.shape[1]).repeat(len(samples), 1)
        else:
            rows = [s["position_ids"] for s in samples]  # these go on into the padding, too
            rows = [torch.cat((row, row[-1] + 1 + torch.arange(branch.shape[1] - len(row)))) for row in rows]
            batch["position_ids"] = torch.stack(rows)
            query, key = branch[:, :, None], branch[:, None, :]
            seen = ((query == key) | (key == 0)).tril()  # (B, T, T)
            batch["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
        labels = torch.nn.utils.rnn.pad_sequence(
            [own_labels(s) for s in samples], batch_first=True, padding_value=IGNORE
        )
        return _finish(batch, labels, samples)


class PackingCollator:
    """Put rows one after another into a single row without padding; `position_ids` restart at 0 for each.

    transformers keeps packed rows apart by these restarts, but only without an attention mask and without a cache.

    Args:
        blank: `Encoder.blank()`, added to a batch without pictures; None adds nothing.
    """

    def __init__(self, blank: dict | None = None):
        self.blank = blank

    def __call__(self, packs: list[list[dict]]) -> dict:
        """Return `input_ids`, `position_ids`, `logits_to_keep` (1, T), `shift_labels` (1, K) and `pixel_values`."""
        samples = [sample for pack in packs for sample in pack]
        if any(sample["branch"].max() > 1 for sample in samples):
            raise ValueError("Rows that share a picture cannot be packed: position_ids cannot keep them apart.")
        samples = with_picture(samples, self.blank)
        batch = {key: torch.cat([s[key] for s in samples])[None] for key in ("input_ids", "position_ids")}
        return _finish(batch, torch.cat([own_labels(s) for s in samples])[None], samples)
