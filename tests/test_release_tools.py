"""The commands that make a release: what they write is what was measured, and a step can be repeated."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from helpers.data import row, write
from helpers.models import make_config, make_model, make_processor, same, save
from minivlm.evaluation.remeasure import remeasure
from minivlm.evaluation.scoring import prompts
from minivlm.hub.check import read_header
from minivlm.model.loading import load_trained
from tools import docs, release
from tools.report import attention, measure, plots
from tools.report.answers import contact_sheets, read_rows
from tools.report.tables import BEGIN, END, SCENES, full_page, put_table, short_table

CARD = "---\nlicense: apache-2.0\n---\n\n# Results\n\n{}\nold\n{}\n\nMore words.\n"
FILES = {
    "test": ["name", "category", "choice", "yes_no", *SCENES],
    "test_grounding": ["count_colour"],
    "test_compositions": ["count"],
    "test_photos": ["name"],
    "dev": ["name", "count"],
}


def evaluation_rows(name: str) -> list[dict]:
    """Return two rows, in two languages, of each task of an evaluation file."""
    found = []
    for number, task in enumerate(FILES[name]):
        for language, answer in (("en", "animals and nature"), ("zh", "动物与自然")):
            options = [answer, "b", "c", "d"] if task == "choice" else None
            values = {"task": task, "language": language, "style": "drawn", "options": options}
            values |= {"concept": "cat" if task not in SCENES else "cat,dog"}
            found.append(row(f"What is {task}?", answer, seed=number) | values)
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a folder like this repository, with few rows, and a run in it."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "data").mkdir()
    for name in FILES:
        write(root / "data" / f"{name}.parquet", evaluation_rows(name))
    (root / "data/concepts.json").write_text('[{"slug": "cat", "group": 3}]')
    for name in ("README.md", "README_zh.md"):
        (root / name).write_text(CARD.format(BEGIN, END))
    make_processor().save_pretrained(root)
    save(root / "runs/x/final")
    (root / "runs/x/log.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    release.main([str(root / "runs/x"), "--root", str(root)])
    return root


def test_a_release_is_the_run_in_half_the_bytes_and_its_own_record(checkout):
    final, results = checkout / "runs/x/final", json.loads((checkout / "data/results.json").read_text())
    assert {tensor["dtype"] for tensor in read_header(checkout / "model.safetensors").values()} == {"BF16"}
    assert results["weights_sha256"] == measure.digest(checkout / "model.safetensors")
    config = json.loads((checkout / "config.json").read_text())
    assert config["dtype"] == "float32" and "AutoModelForImageTextToText" in config["auto_map"]
    before, after = load_trained(final)[0].state_dict(), load_trained(checkout)[0].state_dict()
    for name, weight in before.items():
        same(after[name].float(), weight.float(), atol=5e-3)
    assert remeasure(checkout / "runs/x/release", 100, ours=True).state == "right"


def test_every_figure_is_written_where_it_is_read(checkout):
    results = json.loads((checkout / "data/results.json").read_text())
    for name, chinese in (("README.md", False), ("README_zh.md", True)):
        text = (checkout / name).read_text()
        assert short_table(results, chinese) in text and "old" not in text and text.endswith("More words.\n")
    assert "model-index" in (checkout / "README.md").read_text()
    assert "name-en" in (checkout / ".eval_results/minivlm.yaml").read_text()
    page = full_page(results)
    for name, tasks in FILES.items():
        chapter = page.split(f"## data/{name}.parquet")[1].split("\n## ")[0]
        for task in tasks:
            for language in ("en", "zh"):
                assert f"| {task} | {language} | exact match | 0.0% | 0.0% - 79.3% | 0 of 1 |" in chapter


def test_what_was_measured_is_not_measured_again(checkout, monkeypatch):
    run, asked = checkout / "runs/x", []
    monkeypatch.setattr(measure.evaluate, "main", lambda options: asked.append(options))
    release.main([str(run), "--root", str(checkout), "--evaluate"])
    assert not asked
    weights = run / "release/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept + b"\0")
    results = shutil.copytree(run / "results", checkout / "other results")
    measure.measure(run / "release", results, checkout, ["test", "dev"], None)
    weights.write_bytes(kept)
    assert [options[2].rpartition("/")[2] for options in asked] == ["test.parquet", "dev.parquet"]


def change(key, value):
    def edit(results):
        path = results / "dev.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return edit


REFUSED = {
    "dev not measured yet": lambda results: (results / "dev.json").unlink(),
    "only the first rows of dev": change("limit", 10),
    "with 2 models": change("weights_sha256", "0" * 64),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_results_that_do_not_belong_together_are_not_written(reason, checkout, tmp_path):
    results = shutil.copytree(checkout / "runs/x/results", tmp_path / "results")
    REFUSED[reason](results)
    before = (checkout / "data/results.json").read_bytes()
    with pytest.raises(ValueError, match=reason):
        release.write_results(results, checkout)
    assert (checkout / "data/results.json").read_bytes() == before


def test_results_of_other_weights_than_those_at_the_root_are_not_written(checkout, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="--copy first"):
        release.write_results(checkout / "runs/x/results", root)


def test_a_model_with_another_chat_template_is_not_copied(checkout, tmp_path):
    other = shutil.copytree(checkout / "runs/x/release", tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    before = (checkout / "config.json").read_bytes()
    with pytest.raises(ValueError, match="chat template"):
        release.copy_model(other, checkout)
    assert (checkout / "config.json").read_bytes() == before


def test_a_weight_that_float16_cannot_hold_stops_the_cast(tmp_path):
    model = make_model(make_config(text={"vocab_size": 6400}))
    model.lm_head.weight.data[5, 3] = 1e6
    model.save_pretrained(tmp_path / "final")
    make_processor().save_pretrained(tmp_path / "final")
    with pytest.raises(ValueError, match="not finite as float16"):
        release.cast(tmp_path, "float16")
    assert release.cast(tmp_path, "bfloat16").is_dir()


def test_a_table_needs_its_two_markers():
    assert put_table(f"a\n{BEGIN}\nx\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    for text in ("no marker", BEGIN, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2):
        with pytest.raises(ValueError, match="markers"):
            put_table(text, "new")


def test_the_short_table_pools_scenes_and_takes_the_first_six_that_were_measured():
    right, wrong = ({"hits": hits, "count": 30, "match": hits / 30, "low": 0, "high": 1} for hits in (30, 0))
    both = {"en": right, "zh": wrong}
    results = {"tasks": {task: both for task in ("name", "choice", "yes_no", *SCENES, "category")}}
    table = short_table(results | {"ranked": {"choice": both}})
    titles = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert len(titles) == 6 and titles[-1] == "| which of four names, the likeliest"
    [scenes] = [line for line in table.splitlines() if "scenes" in line]
    assert "100.0%" in scenes and "| 0.0%" in scenes and "| 180 + 180 |" in scenes
    table = short_table(results | {"files": {"test_photos": {"ranked": {"name": both}}}})
    assert "photograph" in table and table.splitlines()[-1].startswith("| category")


# What is drawn


@pytest.fixture(params=["square", "oblong", "oblong, shuffled", "class token kept"])
def looking(request):
    """Return a model, its processor, and the grid of its image tokens."""
    vit = {"model_type": "vit", "image_size": [32, 64], "patch_size": 8}
    options, grid = {
        "square": ({}, (2, 2)),
        "oblong": ({"vision": vit}, (4, 8)),
        "oblong, shuffled": ({"vision": vit, "pixel_shuffle_factor": 2}, (2, 4)),
        "class token kept": ({"vision_feature_select_strategy": "full"}, (2, 2)),
    }[request.param]
    model = make_model(make_config(text={"vocab_size": 6400}, **options))
    processor = make_processor(image_tokens=model.config.image_seq_length)
    if "vision" in options:
        size = {"height": 32, "width": 64}
        processor.image_processor = CLIPImageProcessorPil(size=size, do_center_crop=False)
    return model, processor, grid


def item_of(processor, picture):
    text = f"{processor.image_token}What is this?"
    return {"row": 0, "text": text, "images": [picture], "question": "What is this?", "answer": "a cat"}


def test_the_map_of_attention_has_the_grid_of_the_image_tokens(looking):
    model, processor, grid = looking
    picture, values, share = attention.look(
        model, processor, item_of(processor, Image.new("RGB", (50, 50), "#206090"))
    )
    assert values.shape == grid and 0 < share <= 1 and (values > 0).all()
    full = model.config.vision_feature_select_strategy == "full"
    assert (values.sum().item() < share - 1e-4) == full, "the class token's attention has no place in the picture"
    height, width = picture.size[::-1]
    assert width / height == grid[1] / grid[0]
    assert np.abs(np.asarray(picture).astype(int) - (0x20, 0x60, 0x90)).max() <= 1, "the picture as the model sees it"


def test_the_reddest_square_is_the_token_that_is_looked_at(looking, monkeypatch):
    model, processor, (rows, columns) = looking
    kept = model.config.image_seq_length - rows * columns

    def forward(self, input_ids, **kwargs):
        layer = torch.zeros(1, 2, *[input_ids.shape[1]] * 2)
        places = (input_ids[0] == self.config.image_token_id).nonzero()[:, 0]
        layer[0, :, -1, places[kept + (rows - 1) * columns + 1]] = 0.5  # second square of the last row
        layer[0, :, :-1] = 0.9  # of other tokens, which do not count
        return SimpleNamespace(attentions=(layer, layer))

    monkeypatch.setattr(type(model), "forward", forward)
    picture, grid, share = attention.look(model, processor, item_of(processor, Image.new("RGB", (50, 50), "white")))
    assert share == pytest.approx(0.5) and grid.argmax().item() == (rows - 1) * columns + 1
    red = np.asarray(attention.draw_map(picture, grid)).astype(int)
    height, width = red.shape[0] // rows, red.shape[1] // columns
    inside = red[-height:, width : 2 * width]
    assert (inside[..., 0] - inside[..., 2] > 100).all()
    assert np.count_nonzero(red[..., 0] - red[..., 2] > 100) == height * width, "no other square is red"


def test_a_map_of_two_pictures_is_refused(looking):
    model, processor, _ = looking
    item = item_of(processor, Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="2 pictures"):
        attention.look(model, processor, item | {"images": item["images"] * 2})


def test_confusions_count_both_languages_and_what_is_no_category():
    said = [
        ("animals and nature", "Food and drink."),
        ("动物与自然", "食物与饮料"),
        ("objects", "a cat"),
        ("物品", "物品"),
    ]
    answers = [{"file": "test", "task": "category", "answer": truth, "output": output} for truth, output in said]
    answers.append({"file": "dev", "task": "category", "answer": "objects", "output": "objects"})
    found = {truth: dict(counts) for truth, counts in plots.count_confusions(answers).items() if counts}
    assert found == {"animals and nature": {"food and drink": 2}, "objects": {plots.OTHER: 1, "objects": 1}}


def test_docs_are_written_from_the_answers_and_hold_no_other_model(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(measure.evaluate, "main", lambda options: pytest.fail("measured before, with these weights"))
    output = tmp_path / "docs"
    output.mkdir()
    (output / "contact_sheet_old.png").touch()
    took = {"seconds": 90.0, "steps": 1200, "rows": 4500, "tokens": 90_000, "processes": 1}
    record = took | {"options": {"model": None}, "commit": "abc", "device": "cpu", "precision": "bf16"}
    (checkout / "runs/x/run.json").write_text(json.dumps(record))
    docs.main([str(checkout / "runs/x"), "--root", str(checkout), "--output", str(output)])
    sheets = {f"contact_sheet_{task}.png" for task in [*FILES["test"], "count_colour", "photo_name"]}
    others = {"confusions.png", "by_style.png", "by_category.png", "loss.png", "attention.png", "results.md"}
    assert {path.name for path in output.iterdir()} == sheets | others
    page = (output / "results.md").read_text()
    assert all(f"]({name})" in page for name in (sheets | others) - {"results.md"})
    assert "| optimizer steps | 1,200 |" in page and "| time | 1.5 min |" in page and "4,500 (50.0 per second)" in page
    for path in output.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.convert("L").getextrema()[0] < 128, f"{path.name} is empty"
    monkeypatch.setattr(docs, "MOST", 1000)
    with pytest.raises(ValueError, match="at most"):
        docs.write(checkout / "runs/x", checkout, output, None)


def test_the_attention_sheet_shows_right_and_wrong_names(looking):
    model, processor, _ = looking
    items = [item_of(processor, Image.new("RGB", (50, 50), color)) for color in ("red", "blue", "white")]
    sheet = attention.attention_sheet(model, processor, items)
    assert sheet.height >= 3 * attention.SIDE and len(sheet.getcolors(10**6)) > 10


def test_the_sheet_of_a_task_draws_its_first_answers(checkout):
    tables, answers = read_rows(checkout / "runs/x/results", checkout, ["test"])
    processor = load_trained(checkout / "runs/x/final")[1]
    few, many = (contact_sheets(tables, answers, processor, count)["name"] for count in (1, 8))
    assert few.size == many.size and few.tobytes() != many.tobytes(), "one picture, and two"
    items = prompts(tables["test"], processor)
    assert [(e["answer"], e["language"]) for e in answers] == [(i["answer"], i["language"]) for i in items]
