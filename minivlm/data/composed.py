"""Train on rows that a program composes during training: stages 3 and 5 of the data path for `compose:MODULE`.

    compose:MODULE -> MODULE.open_composer(seed) -> composer.compose(epoch, index) -> samples about one picture

The user names the module, which is imported and run. A picture depends on (seed, epoch, index) alone, so the order of
a resumed run, and of any number of ranks and workers, is that of an uninterrupted one.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch

from minivlm.data.bad_rows import BadRow
from minivlm.data.encoder import Encoder, join
from minivlm.data.options import COMPOSE


class Composer(Protocol):
    """Compose the samples of a picture."""

    def __len__(self) -> int:
        """Return how many pictures an epoch has."""

    def compose(self, epoch: int, index: int) -> list[dict]:
        """Return samples `{"images": [picture], "messages"}` that begin with the same picture, in random order.

        A sample may also have `phrases`, a list of `minivlm.data.phrases.Phrase`, for `--grounding_loss`.
        """


def load_composer(source: str, seed: int) -> Composer:
    """Import the module of `compose:MODULE` and return its composer.

    Raises:
        ValueError: there is no such module, or it has no function `open_composer`.
    """
    name = source.removeprefix(COMPOSE)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--data {source}: {error}. Start training in the folder that holds it.") from error
    if not hasattr(module, "open_composer"):
        raise ValueError(f"--data {source}: {name} has no function open_composer(seed). Name a module that has it.")
    return module.open_composer(seed)


@dataclass
class ComposedRows(torch.utils.data.Dataset):
    """Give encoded rows by (epoch, (index,)): the first `most` samples about a picture, joined by `share_prefix`.

    `bad_rows` of the result holds (place, reason) of each sample that cannot be encoded, and of each that was cut.
    """

    composer: Composer
    encoder: Encoder
    most: int
    name: str

    def __len__(self) -> int:
        return len(self.composer)

    def __getitem__(self, key: tuple[int, tuple[int]]) -> dict:
        epoch, (index,) = key
        bad, samples = [], []
        for number, sample in enumerate(self.composer.compose(epoch, index)[: self.most]):
            place = f"{self.name}, row {number} of picture {index} in epoch {epoch}"
            try:
                samples.append({**self.encoder(sample, pictures=not samples), "place": place})
                bad += [(place, note) for note in samples[-1]["notes"]]
            except BadRow as error:
                bad.append((place, str(error)))
        if not samples:
            raise ValueError(f"{self.name}: no question about picture {index} of epoch {epoch} can be used: {bad}.")
        return join(samples, self.encoder.processor.image_token_id, bad, epoch)
