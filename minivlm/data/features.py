"""Compute a frozen tower's features of each picture once and keep them on disk; training then skips the tower.

    FOLDER/KEY/*.safetensors, where KEY is a digest of the tower's weights, its configuration and the preprocessing

Another tower or another preprocessing has another key, so features of one are never used for the other.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minivlm.data.bad_rows import BadRow
from minivlm.data.encoder import Encoder
from minivlm.data.pictures import decode_image
from minivlm.data.rows import Rows
from modeling_minivlm import MiniVLMForConditionalGeneration

SHARD = 4096  # pictures per file
BATCH = 64  # pictures that the tower sees at once


def digest(image: bytes | Path | Image.Image) -> bytes:
    """Return 16 bytes that identify a picture by its content, whatever row or file it is in."""
    data = image.read_bytes() if isinstance(image, Path) else image
    data = f"{data.mode}{data.size}".encode() + data.tobytes() if isinstance(data, Image.Image) else data
    return hashlib.sha256(data).digest()[:16]


class CachedTower(torch.nn.Module):
    """Replace the tower: the input already holds features (N, 1, P, V), and they are returned unchanged."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, features: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=features.squeeze(1))


class FeatureCache:
    """Give the features of pictures, found by their content.

    Args:
        folder: holds the caches, each in a folder named by its key.
        encoder: its image processor is the preprocessing.
        dtype: data type of the features, that of the training's computation.
    """

    def __init__(self, folder: str, model: MiniVLMForConditionalGeneration, encoder: Encoder, dtype: torch.dtype):
        config, self.tower = model.config, model.model.vision_tower
        self.select, self.dtype = model.model.select_features, dtype
        tokens = config.image_seq_length * config.pixel_shuffle_factor**2
        self.shape = torch.Size((tokens, config.vision_hidden_size))  # (P, V) of a picture
        settings = [self.tower.config.to_dict(), encoder.processor.image_processor.to_dict(), str(dtype)]
        settings.append(config.vision_feature_select_strategy)
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, weight in sorted(self.tower.state_dict().items()):
            key.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.folder = Path(folder) / key.hexdigest()[:16]
        self.places: dict[bytes, tuple[Path, int]] = {}  # digest -> file and row
        self.opened: dict[Path, object] = {}  # per process, since an open file cannot be sent to a worker
        self.load()

    def load(self) -> None:
        """Read which pictures have features on disk."""
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for row, name in enumerate(file.get_tensor("digests").numpy()):
                    self.places[name.tobytes()] = path, row

    def __getitem__(self, image: bytes | Path | Image.Image) -> torch.Tensor:
        """Return the features (1, P, V) of a picture.

        Raises:
            BadRow: the picture cannot be read.
        """
        try:
            path, row = self.places[digest(image)]
        except KeyError:
            decode_image(image)  # raises the reason why the picture has no features
            raise
        if path not in self.opened:
            self.opened[path] = safe_open(path, "pt").__enter__()
        return self.opened[path].get_slice("features")[row : row + 1]

    def __call__(self, images: list) -> torch.Tensor:
        """Return the features (N, 1, P, V) of pictures, which take the place of pixel values."""
        return torch.stack([self[image] for image in images])

    def blank(self) -> torch.Tensor:
        """Return features of zeros, for a row without a picture."""
        return torch.zeros(1, 1, *self.shape, dtype=self.dtype)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """Return the features (N, P, V) of pixel values (N, 3, H, W)."""
        with accelerator.autocast():
            features = self.select(self.tower(pixels.to(accelerator.device)).last_hidden_state)
        assert features.shape[1:] == self.shape, (features.shape, self.shape)
        return features.to(self.dtype).cpu()

    def fill(self, rows: Rows, encoder: Encoder, accelerator: Accelerator) -> None:
        """Compute the features that these rows need and the disk does not have, on the main process.

        Raises:
            OSError: the disk has not enough room.
        """
        self.tower.eval()
        if accelerator.is_main_process:
            self.compute(rows, encoder, accelerator)
        accelerator.wait_for_everyone()
        self.load()

    def compute(self, rows: Rows, encoder: Encoder, accelerator: Accelerator) -> None:
        """Print how much is missing, then compute and write it, `SHARD` pictures per file."""
        missing: dict[bytes, int] = {}  # digest -> a row with that picture
        for index, sample in enumerate(tqdm(rows.samples(), total=len(rows), desc="finding pictures", unit="row")):
            for image in [] if isinstance(sample, BadRow) else sample["images"]:
                if (name := digest(image)) not in self.places:
                    missing.setdefault(name, index)
        size = len(missing) * self.shape.numel() * self.dtype.itemsize
        print(f"{len(self.places):,} pictures are in {self.folder}, {len(missing):,} are missing: {size / 1e9:.2f} GB")
        self.folder.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(self.folder).free):
            raise OSError(
                f"The features need {size / 1e9:.2f} GB, but the disk of {self.folder} has {free / 1e9:.2f} GB free. "
                "Name a folder on another disk by --feature_cache, or leave it out."
            )
        names, features, first = [], [], len(list(self.folder.glob("*.safetensors")))
        bar = tqdm(total=len(missing), desc="computing features", unit="picture")
        for batch in self.batches(missing, rows):
            features.append(self.encode(encoder.pixels([picture for _, picture in batch]), accelerator))
            names += [name for name, _ in batch]
            bar.update(len(batch))
            if len(names) >= SHARD:
                first = self.write(first, names, features)
        if names:
            self.write(first, names, features)
        bar.close()

    def batches(self, missing: dict[bytes, int], rows: Rows) -> Iterable[list[tuple[bytes, Image.Image]]]:
        """Yield the missing pictures, decoded, in batches; one that cannot be decoded is reported when it is drawn."""
        batch, wanted = [], dict(missing)
        for index in sorted(set(missing.values())):
            for image in rows.sample(index)["images"]:
                name = digest(image)
                if wanted.pop(name, None) is None:
                    continue
                try:
                    batch.append((name, decode_image(image)))
                except BadRow:
                    continue
                if len(batch) == BATCH:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def write(self, number: int, names: list[bytes], features: list[torch.Tensor]) -> int:
        """Write a file as a whole or not at all, empty the lists, and return the number of the next file."""
        path = self.folder / f"{number:06d}.safetensors"
        digests = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8).view(-1, 16)
        save_file({"features": torch.cat(features), "digests": digests}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)  # `rename` onto a file fails on Windows
        names.clear()
        features.clear()
        return number + 1


def use_cached_features(folder: str, model, encoder: Encoder, rows: Rows, accelerator: Accelerator) -> Encoder:
    """Compute the features missing in `folder`, put them in the place of the tower, and return an encoder for them."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    cache = FeatureCache(folder, model, encoder, dtype)
    model.model.vision_tower.to(accelerator.device)
    cache.fill(rows, encoder, accelerator)
    model.model.vision_tower = CachedTower(dtype)
    return encoder.with_features(cache)
