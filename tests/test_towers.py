"""A convolutional tower: its last feature map is read place by place, and a frozen one does not change."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configuration_minivlm import MiniVLMConfig
from helpers.models import TEXT, make_model, make_pixels, make_prompt, same
from minivlm.convert.llava import llava_config
from minivlm.model.parts import freeze
from minivlm.training.flops import FlopCounter
from modeling_minivlm import MiniVLMForConditionalGeneration

STAGES = {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 2], "image_size": 32}
RESNET = STAGES | {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8}
TOWERS = {
    "resnet": RESNET,  # strides 4, 2 and 2
    "resnet, first stage halved": RESNET | {"downsample_in_first_stage": True, "image_size": 64},
    "convnextv2": STAGES | {"model_type": "convnextv2", "num_stages": 3},
}


def make_config(vision=RESNET, **options) -> MiniVLMConfig:
    return MiniVLMConfig(vision_config=vision, text_config=TEXT, **{"vision_feature_layer": None, **options})


@pytest.mark.parametrize("name", TOWERS)
def test_the_grid_is_that_of_the_last_map(name):
    model = make_model(make_config(TOWERS[name]))
    pixels = make_pixels(2, size=model.config.vision_config.image_size)
    feature_map = model.model.vision_tower(pixels).last_hidden_state
    assert feature_map.shape == (2, model.config.vision_hidden_size, *model.config.patch_grid)
    read = model.model.select_features(feature_map)
    rows, columns = model.config.patch_grid
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(read[:, row * columns + column], feature_map[:, :, row, column])
    assert model.config.image_seq_length == rows * columns == 4


@pytest.mark.parametrize("name", TOWERS)
def test_every_weight_gets_a_gradient_and_survives_saving(name, tmp_path):
    model = make_model(make_config(TOWERS[name])).train()
    ids, pixels = make_prompt("image", 5), make_pixels(1, size=model.config.vision_config.image_size)
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.eval().save_pretrained(tmp_path)
    again = MiniVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.patch_grid == model.config.patch_grid
    with torch.no_grad():
        first, second = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, again))
    assert torch.equal(first, second)


def test_a_batch_of_pictures_gives_what_each_gives_alone():
    model, pixels = make_model(make_config(pixel_shuffle_factor=2)), make_pixels(3)
    together = model.get_image_features(pixels, return_dict=True).pooler_output
    alone = [model.get_image_features(p[None], return_dict=True).pooler_output for p in pixels]
    same(together, torch.cat(alone))


def test_a_frozen_tower_does_not_change_while_the_rest_trains():
    model = make_model(make_config())
    freeze(model, ["projector", "text"])
    model.train()
    before = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    ids = make_prompt("image", 5)
    model(input_ids=ids, pixel_values=make_pixels(1), labels=ids).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.model.vision_tower.state_dict().items())
    freeze(model, ["vision"])
    assert model.train().model.vision_tower.training


def test_a_tower_that_trains_sees_a_picture_alike_in_every_company():
    """Batch norms keep their statistics: rows of a step, or ranks, would depend on one another through them."""
    model, pixels = make_model(make_config()).train(), make_pixels(3)
    before = {name: value.clone() for name, value in model.model.vision_tower.named_buffers()}
    together = model.get_image_features(pixels, return_dict=True).pooler_output
    same(together[:1], model.get_image_features(pixels[:1], return_dict=True).pooler_output)
    assert before and all(torch.equal(value, before[name]) for name, value in model.model.vision_tower.named_buffers())


def test_what_cannot_work_is_refused():
    with pytest.raises(Exception, match="`vision_feature_layer`=-2 names a block"):
        make_config(vision_feature_layer=-2)
    with pytest.raises(Exception, match="'resnet' has no image_size"):
        make_config({key: value for key, value in RESNET.items() if key != "image_size"})
    with pytest.raises(ValueError, match="a tower of type 'resnet'"):
        llava_config(make_config())


def test_flops_are_those_that_torch_counts():
    model = make_model(make_config())
    freeze(model, ["text"])
    with FlopCounterMode(display=False) as counter:
        model.model.vision_tower(make_pixels(1))
    projector = model.model.multi_modal_projector
    expected = counter.get_total_flops() + 2 * 4 * sum(p.numel() for p in projector.parameters() if p.ndim == 2)
    assert FlopCounter(model).cost["picture"] == expected
