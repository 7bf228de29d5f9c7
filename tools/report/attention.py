"""Draw where the decoder looks while it writes the first word of an answer.

The map is the attention from the last token of the prompt to each image token, averaged over all layers and heads.
"""

import torch
from PIL import Image, ImageDraw

from minivlm.data.pictures import decode_image
from minivlm.evaluation.contact_sheet import font_for, wrap
from minivlm.evaluation.scoring import normalise
from minivlm.reading import answer

SIDE = 240  # pixels of the longer side of a drawn picture
STRONGEST = 0.8  # share of red where the attention is highest
RED = "#e3120b"


@torch.inference_mode()
def look(model, processor, item: dict) -> tuple[Image.Image, torch.Tensor, float]:
    """Return the picture of an item as the model sees it, the attention of each image token, and their sum.

    The map has a row and a column for each place of the grid: patches, or squares of them with pixel shuffle. Class
    and register tokens have no place; they count for the sum only.

    Raises:
        ValueError: the item does not have exactly one picture.
    """
    if len(item["images"]) != 1:
        raise ValueError(f"Row {item['row']} has {len(item['images'])} pictures; a map needs exactly one.")
    model.set_attn_implementation("eager")  # the other kinds do not return their weights
    pictures = [decode_image(image) for image in item["images"]]
    inputs = processor(text=item["text"], images=pictures, return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(model.device)
    layers = model(**inputs, output_attentions=True, use_cache=False).attentions  # each (1, heads, T, T)
    weights = torch.stack([layer[0, :, -1].float().mean(0) for layer in layers]).mean(0).cpu()  # (T,)
    values = weights[inputs["input_ids"][0].cpu() == model.config.image_token_id]  # (I,)
    rows, columns = (side // model.config.pixel_shuffle_factor for side in model.config.patch_grid)
    grid = values[len(values) - rows * columns :].view(rows, columns)
    return seen(processor, inputs["pixel_values"][0]), grid, values.sum().item()


def seen(processor, pixels: torch.Tensor) -> Image.Image:
    """Return normalised pixels (3, H, W) as a picture: what is left of it after resizing and cropping."""
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    colors = (pixels.float().cpu() * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    return Image.fromarray((colors * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def draw_map(picture: Image.Image, grid: torch.Tensor) -> Image.Image:
    """Draw the picture in grey with red over it, square by square: none where the attention is least."""
    spread = (grid - grid.min()) / (grid.max() - grid.min()).clamp(min=1e-9)
    mask = (spread * 255 * STRONGEST).round().to(torch.uint8).numpy()
    mask = Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, RED), picture.convert("L").convert("RGB"), mask)


def attention_sheet(model, processor, items: list[dict]) -> Image.Image:
    """Draw each item in a row: the picture, its map, and question, truth, answer and share of attention in words."""
    line, width, outputs = 22, 320, answer(model, processor, items)
    sheet = Image.new("RGB", (2 * SIDE + width + 40, len(items) * (SIDE + 10) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (item, output) in enumerate(zip(items, outputs)):
        picture, grid, share = look(model, processor, item)
        scale = SIDE / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
        y = 10 + number * (SIDE + 10)
        sheet.paste(picture, (10, y))
        sheet.paste(draw_map(picture, grid), (SIDE + 20, y))
        right = normalise(output) == normalise(item["answer"])
        words = f"Attention on the picture: {share:.0%}. On its strongest of {grid.numel()} places: {grid.max():.1%}."
        said = f"{'✓' if right else '×'} model: {output}"
        for text, color in (
            (item["question"], "black"),
            (f"truth: {item['answer']}", "black"),
            (said, "#0a7d20" if right else "#c01818"),
            (words, "#555555"),
        ):
            font = font_for(text, 15)
            for part in wrap(text, font, width, 3):
                draw.text((2 * SIDE + 30, y), part, fill=color, font=font)
                y += line
    return sheet
