"""The training script end to end on a handful of rows: what learns, what is saved, what a resumed run does."""

import json
import re
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

import train_accelerate
from helpers.data import row, write
from helpers.models import ROOT, VISION, make_model, make_pixels, make_processor, make_prompt
from helpers.processes import finish
from helpers.training import CONFIG, TINY, losses, run
from minivlm.data.pictures import decode_image
from minivlm.evaluation.scoring import evaluate, normalise, prompts, wilson
from minivlm.model.backbones import build
from minivlm.model.loading import load_trained
from minivlm.model.parts import check_gradients, freeze
from minivlm.reading import option_scores
from minivlm.training.checkpoints import newest_checkpoint
from minivlm.training.optimizers import build_optimizers, schedule
from minivlm.training.options import parse_args
from minivlm.training.reporting import minutes_left
from minivlm.training.state import State
from tools import demo


def test_training_learns_saves_and_evaluates(data, tmp_path, capsys):
    options = ("--max_steps", "60", "--learning_rate", "2e-2", "--optimizer", "muon", "--eval_data", data)
    final = run(data, tmp_path / "run", *options)
    seen = losses(tmp_path / "run")
    assert len(seen) == 60 and seen[0] > 8 and seen[-1] < 2.0  # from ln(6400) = 8.8
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        report["steps"] == 60
        and report["options"]["optimizer"] == "muon"
        and report["metrics"]["overall"]["count"] == 24
    )
    out = capsys.readouterr().out
    assert "[Train Epoch 1] step: 1, loss: " in out and "projector" in out and "exact match" in out
    auto_map = json.loads((final / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
    }
    assert all((final / f"{reference.split('.')[0]}.py").is_file() for reference in auto_map.values())
    assert "AutoProcessor" in json.loads((final / "processor_config.json").read_text())["auto_map"]


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path):
    options = ("--augment", "strong", "--epochs", "2", "--save_every", "2", "--share_pictures", "3")
    options += ("--batch_size", "4")
    run(data, tmp_path / "whole", *options)
    whole = losses(tmp_path / "whole")
    assert len(whole) == 4
    (tmp_path / "whole" / "log.jsonl").unlink()
    assert (tmp_path / "whole" / "checkpoint-0000002" / "COMPLETE").is_file()
    run(data, tmp_path / "whole", *options)
    assert losses(tmp_path / "whole") == whole[2:]


def test_an_incomplete_checkpoint_is_not_resumed(tmp_path):
    for name in ("checkpoint-0000002", "checkpoint-0000004", "checkpoint-0000006.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-0000002" / "COMPLETE").touch()
    assert newest_checkpoint(str(tmp_path)).name == "checkpoint-0000002"


@pytest.mark.parametrize(
    "train", [["vision"], ["projector"], ["text"], ["projector", "text"], ["vision", "projector", "text"]]
)
def test_only_the_named_parts_learn(train):
    model = make_model(text={"vocab_size": 6400})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze(model, train)
    args = parse_args([*TINY, "--learning_rate", "1e-2"])
    ids = make_prompt(2, "image", 6)
    model(input_ids=ids, pixel_values=make_pixels(1), labels=ids).loss.backward()
    check_gradients(model)
    for optimizer in build_optimizers(model, args):
        optimizer.step()
    prefixes = {"vision": "model.vision_tower.", "projector": "model.multi_modal_projector."}
    for name, parameter in model.named_parameters():
        part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), "text")
        changed = not torch.equal(parameter, before[name])
        # A key bias shifts all scores of a query alike, so its gradient is zero up to rounding.
        assert changed == (part in train) or name.endswith("k_proj.bias"), name


def test_a_part_without_gradient_stops_training():
    model = make_model()
    freeze(model, ["vision", "projector", "text"])
    ids = torch.arange(20, 30)[None]
    model(input_ids=ids, labels=ids).loss.backward()  # no picture: the tower gets nothing
    with pytest.raises(RuntimeError, match=r"should train have no gradient \(model.vision_tower"):
        check_gradients(model)


def test_a_trained_tower_is_taken_over(data, tmp_path):
    """As from the Hub: more blocks than are used, and a final norm that nothing reads."""
    torch.manual_seed(1)
    tower = AutoModel.from_config(AutoConfig.for_model(**VISION))
    tower.save_pretrained(tmp_path / "tower")
    options = ["--vision_model", str(tmp_path / "tower"), "--data", data]
    model, _ = build(parse_args([*TINY, *options, "--model_config", CONFIG.replace("-1", "-2")]))
    assert len(model.model.vision_tower.encoder.layers) == VISION["num_hidden_layers"] - 1
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, tower.state_dict()[name]), name


@pytest.mark.parametrize("length", [("--max_steps", "3"), ("--max_minutes", "0.05")])
def test_time_left_is_told_once_it_is_known(length, data, tmp_path, capsys):
    run(data, tmp_path / "run", *length)
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "GiB" in line]
    left = [float(found[1]) if (found := re.search(r"([\d.]+) min left", line)) else None for line in lines]
    assert len(left) > 2 and left[-1] == 0.0 and all(minutes is None or minutes < 3 for minutes in left), left
    assert minutes_left(State(step=1, seconds=40), 100, None) is None
    assert minutes_left(State(step=50, seconds=60), 100, None) == 1.0
    assert minutes_left(State(step=1, seconds=60), sys.maxsize, 5) == 4.0


@pytest.mark.parametrize("start", [[], ["--from_scratch"]])
def test_demo_runs_to_a_contact_sheet(start, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "ALIGNMENT", ["--batch", "64", "--pictures", "256", "--passes", "2"])
    monkeypatch.setattr(demo, "evaluate", lambda model, processor, rows: evaluate(model, processor, rows, limit=20))
    with torch._dynamo.config.patch(disable=True):  # compiling takes longer than this whole test
        demo.main(["--minutes", "0.1", "--output_dir", str(tmp_path), *start])
    out = capsys.readouterr().out
    assert out.count("truth: ") == sum(demo.SHOWN.values()) and "exact match" in out
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert len(sheet.getcolors(1 << 24)) > 100
    page = (tmp_path / "contact_sheet.html").read_text(encoding="utf-8")
    assert page.count("<article") == sum(demo.SHOWN.values()) and page.count("✓") == out.count("  right  ")
    code = out.split("Load the model that you just trained:")[1]
    assert f'model="{(tmp_path / "final").as_posix()}", trust_remote_code=True' in code


def test_a_machine_without_a_compiler_trains_all_the_same(data, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    run(data, tmp_path / "run", "--max_steps", "1", "--compile", "true")
    assert "Not compiled, training will be slower: No working C++ compiler" in capsys.readouterr().out


def test_every_matrix_is_optimised_once():
    model = make_model()
    for name in ("adamw", "muon"):
        optimizers = build_optimizers(model, parse_args([*TINY, "--optimizer", name]))
        optimised = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        assert len(optimised) == len({id(p) for p in optimised}) == len(list(model.parameters()))


def test_schedule_rises_and_falls():
    assert [schedule(d, 0.1) for d in (0, 0.05, 0.1, 1)] == [0, 0.5 * 0.95, 0.9, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("warmup_step: 3", "unknown key 'warmup_step'"), ("learning_rat: 1", "did you mean 'learning_rate'?")],
)
def test_a_misspelt_recipe_key_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_args(["--recipe", str(tmp_path / "x.yaml")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "decoder"], "--train decoder: no such part. Parts are vision, projector, lm_head, text"),
        (["--optimizer", "sgd"], "Use adamw or muon"),
        (["--recipe", "recipes/absent.yaml"], "no such file or recipe"),
        (["--packing", "true", "--share_pictures", "4"], "exclude each other"),
        (["--batch_size", "0"], "must be 1 or more, --micro"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(capsys, options, message):
    with pytest.raises(SystemExit):
        parse_args(options)
    assert message in capsys.readouterr().err


def test_command_line_beats_recipe_beats_default(tmp_path):
    (tmp_path / "x.yaml").write_text("learning_rate: 3e-4\nbatch_size: 5")
    args = parse_args(["--recipe", str(tmp_path / "x.yaml"), "--batch_size", "7"])
    assert (args.learning_rate, args.batch_size, args.seed) == (3e-4, 7, 0)


def test_too_many_bad_rows_stop_training(tmp_path):
    path = write(
        tmp_path / "bad.parquet",
        [{**row(seed=i), "image_bytes": [b"x"]} if i == 3 else row(seed=i) for i in range(12)],
    )
    with pytest.raises(
        ValueError, match="bad rows of 12, more than max_bad_rows=0.10%.*\n.*\nmost of them:\n  1 in .*bad.pa"
    ):
        run(path, tmp_path / "run", "--max_steps", "3", "--batch_size", "4")
    run(path, tmp_path / "run2", "--max_steps", "3", "--batch_size", "4", "--max_bad_rows", "0.5")
    assert json.loads((tmp_path / "run2" / "run.json").read_text())["bad_rows"] == {"unreadable picture": 1}


def test_ranks_and_micro_batches_give_the_losses_of_one_process(data, tmp_path):
    """Two ranks, accumulation, and one process: the same rows, the same losses and gradient norms."""
    options = ("--max_steps", "3", "--batch_size", "8", "--eval_data", data, "--eval_every", "3")
    run(data, tmp_path / "one", *options)
    run(data, tmp_path / "accumulated", *options, "--micro_batch_size", "3")
    arguments = [*TINY, "--data", data, "--output_dir", str(tmp_path / "two"), *options]
    finish(ROOT / "train_accelerate.py", arguments, tmp_path / "out.txt", ranks=2)
    for figure in ("loss", "grad_norm"):  # AdamW forgives a gradient of the wrong length, the losses show nothing
        one = losses(tmp_path / "one", figure)
        assert losses(tmp_path / "accumulated", figure) == pytest.approx(one, rel=1e-5, abs=1e-5)
        assert losses(tmp_path / "two", figure) == pytest.approx(one, rel=1e-5, abs=1e-5)
    alone, shared = (json.loads((tmp_path / name / "eval.jsonl").read_text()) for name in ("one", "two"))
    assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-3) and shared["tasks"] == alone["tasks"]


def test_evaluation_counts_what_a_person_would_count(data, tmp_path):
    final = run(data, tmp_path / "run", "--max_steps", "1")
    model, processor = load_trained(final)
    rows = train_accelerate.load_rows([data])
    one_by_one, together = (evaluate(model, processor, rows, batch_size=size) for size in (1, 24))
    assert one_by_one["scores"].pop("loss") == pytest.approx(together["scores"].pop("loss"), abs=1e-3)
    assert one_by_one == together
    assert together["tasks"]["name"]["en"]["count"] == together["tasks"]["name"]["zh"]["count"] == 12
    assert normalise(" Red.") == normalise("red") and normalise("红色。") == normalise("红色")
    low, high = wilson(5, 10)
    assert (round(low, 3), round(high, 3)) == (0.237, 0.763)  # Wilson's interval for one half of ten


def test_the_score_of_an_option_is_its_likelihood_when_read_alone(tmp_path):
    choices = [["dog", "cat", "a red bus"], ["家", "狗与猫", "红色的车"], ["yes", "no"]]
    listed = [choices[i % 3] for i in range(6)]
    rows = [row(f"Which, {i}?", c[0], i % 3, seed=3 * i) | {"options": c} for i, c in enumerate(listed)]
    rows.append(row(question="No options?", answer="dog") | {"options": None})
    data = train_accelerate.load_rows([write(tmp_path / "rows.parquet", rows)])
    processor, model = make_processor(), make_model(text={"vocab_size": 6400})
    items = prompts(data, processor)

    def likelihood(item, option):
        image = [decode_image(image) for image in item["images"]]
        inputs = processor(text=f"{item['text']}{option}<|im_end|>", images=image or None, return_tensors="pt")
        start = len(processor(text=item["text"], images=image or None)["input_ids"][0])
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            scores = model(**inputs).logits[0].log_softmax(-1)
        return sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids)))

    alone = [[likelihood(item, option) for option in item["options"]] for item in items[:6]]
    together = option_scores(model, processor, items[:6])
    for values, expected in zip(together, alone):
        assert values == pytest.approx(expected, abs=1e-3)
    best = [max(zip(values, item["options"]))[1] for values, item in zip(alone, items)]
    metrics = evaluate(model, processor, data)
    assert [entry.get("ranked") for entry in metrics["answers"]] == [*best, None]
    right = sum(option == item["answer"] for option, item in zip(best, items))
    found = metrics["ranked"]["all"]["all"]
    assert (found["hits"], found["count"]) == (right, 6)


def test_an_answer_that_is_none_of_its_options_is_refused(tmp_path):
    rows = [row(answer="dog") | {"options": ["cat", "bus"]}]
    with pytest.raises(ValueError, match="'dog' is none of its options .'cat', 'bus'."):
        prompts(train_accelerate.load_rows([write(tmp_path / "rows.parquet", rows)]), make_processor())
