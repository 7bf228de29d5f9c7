"""Processor of MiniVLM: pictures and text in, `pixel_values` and `input_ids` with image placeholders out."""

from PIL import Image, ImageOps
from transformers import ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as a person sees it: EXIF orientation applied, first frame, transparency over white, RGB.

    16-bit greyscale keeps its high byte; Pillow's own conversion would clip it to white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")  # big-endian has no `point`
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class MiniVLMProcessor(ProcessorMixin):
    """CLIP image processor and tokenizer in one: each `image_token` of the text becomes `image_seq_length` of them.

    The base class counts pictures against markers, expands, tokenizes and refuses a prompt that was truncated inside
    a picture; this class adds how many tokens a picture takes and how a picture becomes RGB.

    Args:
        image_seq_length: image tokens per picture, `MiniVLMConfig.image_seq_length`.

    Raises:
        ValueError: the tokenizer does not know `image_token`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token: str = "<|image_pad|>",
        image_seq_length: int = 64,
        **kwargs,
    ):
        self.image_token, self.image_seq_length = image_token, image_seq_length
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if tokenizer.convert_ids_to_tokens(self.image_token_id) != image_token:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}. Add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})` and resize the "
                "model's embeddings, or name the token that it has by `image_token`."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prepare_inputs_layout(self, images=None, **kwargs):
        images, *rest = super().prepare_inputs_layout(images=images, **kwargs)
        return _map_pictures(images, to_rgb), *rest

    def validate_inputs(self, images=None, text=None, **kwargs):
        """Compare pictures and markers row by row; the base class compares totals, that of 5.19 nothing."""
        super().validate_inputs(images=images, text=text, **kwargs)
        if images is None or text is None:
            return
        rows = isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in images)
        rows = rows and len(images) == len(text)  # a flat list belongs to the markers in reading order
        markers = [row.count(self.image_token) for row in text]
        pictures = [len(row) for row in images] if rows else [len(make_flat_list_of_images(images))]
        if pictures != (markers if rows else [sum(markers)]):
            raise ValueError(
                f"The texts hold {markers} {self.image_token} tokens, row by row, but {pictures} pictures were "
                "passed. Write one token per picture into the text that the picture belongs to."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens of each picture before it is processed; serving engines reserve room with it."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)


def _map_pictures(images, function):
    """Apply `function` to each PIL picture of a picture, a list, or a list of lists; leave arrays alone."""
    if isinstance(images, (list, tuple)):
        return [_map_pictures(image, function) for image in images]
    return function(images) if isinstance(images, Image.Image) else images


MiniVLMProcessor.register_for_auto_class()

__all__ = ["MiniVLMProcessor"]
