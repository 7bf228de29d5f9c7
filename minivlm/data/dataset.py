"""Encode the rows that a plan names: stage 5 of the data path.

(epoch, row numbers) -> TrainingRows -> a dictionary of tensors, or a list of them for a pack
"""

import random
from dataclasses import dataclass
from functools import partial

import torch

from minivlm.data.bad_rows import BadRow
from minivlm.data.encoder import Encoder, join
from minivlm.data.pictures import augment
from minivlm.data.rows import Rows


@dataclass
class TrainingRows(torch.utils.data.Dataset):
    """Give encoded rows by (epoch, indices): of one row, of several about the same picture, or of a pack.

    A bad row is left out. If no row is left, the next good row of the data takes the place of all. The result names
    the file and number of each row in `places`; `bad_rows` holds (place, reason) of each bad row and each cut one.

    Args:
        augment: none, mild or strong, as in `minivlm.data.pictures.augment`.
        packed: return a list of encoded rows, for `PackingCollator`; else one that `share_prefix` has joined.
    """

    rows: Rows
    encoder: Encoder
    seed: int = 0
    augment: str = "none"
    packed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> dict | list[dict]:
        epoch, indices = key
        bad, samples, image_token_id = [], [], self.encoder.processor.image_token_id
        spare = ((indices[-1] + i) % len(self.rows) for i in range(1, 100))
        for index in indices:
            first = index if self.packed else indices[0]
            samples += self._encode(index, f"{self.seed}/{epoch}/{first}", bad, pictures=self.packed or not samples)
        while not samples:
            if (index := next(spare, None)) is None:
                raise ValueError(f"{len(bad)} bad rows in a row, from {bad[0][0]} ({bad[0][1]}) to {bad[-1][0]}.")
            samples += self._encode(index, f"{self.seed}/{epoch}/{index}", bad)
        if self.packed:
            return [join([s], image_token_id, [] if i else bad, epoch) for i, s in enumerate(samples)]
        return join(samples, image_token_id, bad, epoch)

    def _encode(self, index: int, seed: str, bad: list, pictures: bool = True) -> list[dict]:
        """Return the encoded row in a list, which is empty for a bad row; append what is wrong to `bad`."""
        change = None
        if self.augment != "none":
            change = partial(augment, rng=random.Random(seed), strong=self.augment == "strong")
        try:
            sample = self.encoder(self.rows.sample(index), change, pictures)
            bad += [(self.rows.where(index), note) for note in sample["notes"]]
            return [{**sample, "place": self.rows.where(index)}]
        except BadRow as error:
            bad.append((self.rows.where(index), str(error)))
            return []
