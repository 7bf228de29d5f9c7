"""The processor: every kind of picture as RGB, one run of image tokens per picture, refusals, the chat template."""

import inspect
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from helpers.models import ROOT, make_model, make_processor, same
from minivlm.data import pictures
from processing_minivlm import MiniVLMProcessor, to_rgb

IMAGE = "<|image_pad|>"
RED, WHITE = (255, 0, 0), (255, 255, 255)


def palette(transparent=False):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, 0, 255, 0])
    image.putpixel((1, 0), 1)
    if transparent:
        image.info["transparency"] = 1
    return image


def of(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def reopened(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


MODES = {
    "1": (of("1", 0, 1), [(0, 0, 0), WHITE]),
    "L": (of("L", 0, 128), [(0, 0, 0), (128, 128, 128)]),
    "LA over white": (of("LA", (100, 255), (100, 0)), [(100, 100, 100), WHITE]),
    "P": (palette(), [RED, (0, 255, 0)]),
    "P with a transparent entry": (palette(transparent=True), [RED, WHITE]),
    "P read from a PNG": (reopened(palette(), transparency=1), [RED, WHITE]),
    "PA": (palette().convert("PA"), [RED, (0, 255, 0)]),
    "RGB": (of("RGB", RED, (1, 2, 3)), [RED, (1, 2, 3)]),
    "RGBA over white": (of("RGBA", (*RED, 255), (0, 0, 0, 0)), [RED, WHITE]),
    "RGBA half": (of("RGBA", (*RED, 128)), [(255, 127, 127)]),
    "RGB with a transparent colour": (reopened(of("RGB", RED, (1, 2, 3)), transparency=(1, 2, 3)), [RED, WHITE]),
    "CMYK": (of("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), [RED, (0, 0, 0)]),
    "I;16": (of("I;16", 0, 65535, 128 * 256), [(0, 0, 0), WHITE, (128, 128, 128)]),
    "I;16B": (Image.frombytes("I;16B", (2, 1), b"\x00\x00\xff\xff"), [(0, 0, 0), WHITE]),
    "I of a 16-bit PNG": (reopened(of("I;16", 0, 65535, 128 * 256)), [(0, 0, 0), WHITE, (128, 128, 128)]),
    "I": (of("I", 0, 255), [(0, 0, 0), WHITE]),
    "F": (of("F", 0.0, 255.0), [(0, 0, 0), WHITE]),
}


@pytest.mark.parametrize("image, expected", MODES.values(), ids=MODES)
def test_pictures_of_every_mode_become_rgb_as_they_look(image, expected):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb, dtype=int)[0] - expected).max() <= 1


def test_pictures_are_decoded_by_the_processor_s_own_function():
    """It stands twice, since a file that the Hub loads imports none of ours, and its own imports take seconds."""
    assert inspect.getsource(pictures.to_rgb) == inspect.getsource(to_rgb)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    picture = reopened(of("RGB", RED, WHITE), exif=exif)
    assert picture.size == (2, 1)
    assert [to_rgb(picture).getpixel((0, y)) for y in range(2)] == [RED, WHITE]


def test_only_the_first_frame_of_an_animation_is_read():
    file = io.BytesIO()
    Image.new("RGB", (1, 1), RED).save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (1, 1), WHITE)])
    assert to_rgb(Image.open(file)).getpixel((0, 0)) == RED


def test_pixel_values_are_those_of_the_rgb_picture(processor, picture):
    """Through every nesting: alone, the image processor clips 16 bits to white and ignores the EXIF orientation."""
    deep = Image.frombytes("I;16", (40, 48), (np.arange(40 * 48, dtype="<u2") * 34).tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = reopened(picture(1), exif=exif)
    turned.load()
    for given in (deep, turned):
        expected = processor.image_processor([to_rgb(given)], return_tensors="pt").pixel_values
        for nested in (given, [given], [[given]]):
            same(processor(images=nested, text=IMAGE, return_tensors="pt").pixel_values, expected)
        assert (processor.image_processor([given], return_tensors="pt").pixel_values - expected).abs().max() > 0.1


def test_each_marker_becomes_the_image_tokens_of_its_picture(processor, picture):
    texts = ["no picture", f"{IMAGE}one", f"a{IMAGE}b{IMAGE}{IMAGE}c"]
    pictures = [picture(i) for i in range(4)]
    batch = processor(images=[[], pictures[:1], pictures[1:]], text=texts, padding=True, return_tensors="pt")
    ids = batch.input_ids
    assert (ids == processor.image_token_id).sum(-1).tolist() == [0, 4, 12] and processor.image_token_id == 12
    same(batch.pixel_values, processor.image_processor(pictures, return_tensors="pt").pixel_values)
    assert processor.decode(ids[2]).replace(IMAGE * 4, IMAGE) == texts[2]
    padding = [row[mask == 0] for row, mask in zip(ids, batch.attention_mask, strict=True)]
    assert batch.attention_mask[0, 0] == 0 and all((p == processor.tokenizer.pad_token_id).all() for p in padding)


@pytest.mark.parametrize("markers, pictures", [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_markers_and_pictures_that_differ_in_number_are_refused(processor, picture, markers, pictures):
    images, text = [picture(i) for i in range(pictures)], "a" + IMAGE * markers + "b"
    for given in (images, [images]):
        with pytest.raises(ValueError) as error:
            processor(images=given, text=text, return_tensors="pt")
        message = str(error.value)  # the library's own since 5.23, ours before
        assert IMAGE in message and all(re.search(rf"\b{count}\b", message) for count in (markers, pictures)), message


def test_markers_without_any_picture_are_refused(processor):
    if "no images were passed" not in inspect.getsource(ProcessorMixin.validate_inputs):
        pytest.skip("this version of transformers lets a text with markers pass, for engines that add pictures later")
    with pytest.raises(ValueError, match="1 .*no images were passed"):
        processor(text=f"a{IMAGE}b", return_tensors="pt")


def test_the_count_is_checked_row_by_row(processor, picture):
    """Two pictures and two markers in all, but both markers in one row: each row would see the wrong pictures."""
    with pytest.raises(ValueError, match=r"\[2, 0\].*\[1, 1\] pictures.*one token per picture"):
        processor(images=[[picture(0)], [picture(1)]], text=[IMAGE * 2, "none"], padding=True)


def test_truncation_inside_a_picture_is_refused(processor, picture):
    text = f"look{IMAGE}what"
    full = processor(images=picture(), text=text).input_ids[0]
    end = len(full) - full[::-1].index(12)
    with pytest.raises(ValueError, match="(?i)truncat|max_length"):
        processor(images=picture(), text=text, truncation=True, max_length=end - 1)
    assert processor(images=picture(), text=text, truncation=True, max_length=end).input_ids[0] == full[:end]


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(ValueError, match=r"no token '<picture>'.*add_special_tokens.*resize"):
        MiniVLMProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")


def test_serving_engines_are_told_the_true_number_of_tokens(processor, picture):
    """vLLM reserves this many places before it has seen the processed picture."""
    data = processor._get_num_multimodal_tokens(image_sizes=[(48, 40), (500, 10)])
    for size, tokens, patches in zip(
        [(48, 40), (500, 10)], data.num_image_tokens, data.num_image_patches, strict=True
    ):
        batch = processor(images=picture(0, size[::-1]), text=IMAGE, return_tensors="pt")
        assert (batch.input_ids == 12).sum() == tokens and len(batch.pixel_values) == patches
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def conversation(*pictures, question="What is this?", answer=None):
    parts = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": parts}]
    return turns + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


def test_chat_template_end_to_end(processor, picture):
    """A conversation as data goes in, an answer comes out that depends on its pictures and on their order."""
    model = make_model(text={"vocab_size": 6400})

    def answer(*pictures):
        inputs = processor.apply_chat_template(
            conversation(*pictures), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        text = processor.decode(inputs["input_ids"][0])
        marks = "\n".join([IMAGE * 4] * len(pictures)) + "\n" if pictures else ""
        assert text == f"<|im_start|>user\n{marks}What is this?<|im_end|>\n<|im_start|>assistant\n"
        return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()

    a, b = picture(0), picture(1)
    answers = [answer(), answer(a), answer(b), answer(a, b), answer(b, a)]
    assert len(set(map(tuple, answers))) == 5


def test_a_batch_of_conversations_is_left_padded_and_answers_as_alone(processor, picture):
    model = make_model(text={"vocab_size": 6400})
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    turns = [conversation(), conversation(picture(0), question="?"), conversation(picture(1), picture(2), picture(3))]
    batch = processor.apply_chat_template(turns, processor_kwargs={"padding": True}, **options)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for i, turn in enumerate(turns):
        inputs = processor.apply_chat_template(turn, **options)
        alone = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(together[i : i + 1], alone)


def test_the_assistant_mask_survives_the_expansion_of_pictures(processor, picture):
    turns = conversation(picture(0), picture(1), answer="A cat.") + conversation(picture(2), answer="Two dogs.")
    out = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    said = [token for token, assistant in zip(ids, mask, strict=True) if assistant]
    assert processor.decode(said) == "A cat.<|im_end|>Two dogs.<|im_end|>"


def test_save_and_load_round_trip(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_minivlm.MiniVLMProcessor"}
    assert (tmp_path / "processing_minivlm.py").read_text() == (ROOT / "processing_minivlm.py").read_text()
    again = MiniVLMProcessor.from_pretrained(tmp_path)
    assert (again.image_seq_length, again.image_token, again.image_token_id) == (4, IMAGE, 12)
    assert again.chat_template == processor.chat_template and again.tokenizer.padding_side == "left"
    for options in ({"text": f"a{IMAGE}中文\n", "images": picture()}, {"text": "plain text"}):
        before, after = processor(**options, return_tensors="pt"), again(**options, return_tensors="pt")
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    other = make_processor(image_tokens=9)
    other.save_pretrained(tmp_path / "other")
    assert MiniVLMProcessor.from_pretrained(tmp_path / "other").image_seq_length == 9


def test_the_tokenizer_alone_loads_from_the_processor_folder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "A red panda, 一只小熊猫。"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template == processor.chat_template
