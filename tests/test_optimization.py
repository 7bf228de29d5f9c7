"""Parts by name, their learning rates, schedules, averaged weights, and what stops a run before it spoils anything."""

import json
import math

import pytest
import torch
from accelerate.utils import memory
from safetensors.torch import load_file

import train_accelerate
from helpers.models import TEXT, VISION, make_model, make_pixels, make_processor, make_prompt
from helpers.training import TINY, losses, run
from minivlm.commands.plot import main as plot_main
from minivlm.data.collators import PaddingCollator
from minivlm.data.encoder import Encoder
from minivlm.model.parts import freeze, part_of
from minivlm.training.flops import FlopCounter
from minivlm.training.losses import load_balance
from minivlm.training.optimizers import WeightAverage, build_optimizers, schedule
from minivlm.training.options import parse_args


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_blocks_of_a_part_learn_by_name():
    model = make_model(text={"num_hidden_layers": 4})
    freeze(model, ["text:first_last"])
    assert {name.split(".layers.")[1][0] for name in learning(model)} == {"0", "3"}
    freeze(model, ["text:last_2", "projector"])
    names = learning(model)
    assert {name.split(".layers.")[1][0] for name in names if ".layers." in name} == {"2", "3"}
    assert {part_of(name) for name in names} == {"text", "projector"}
    freeze(model, ["vision:last_1"])
    assert (
        len({name.split(".layers.")[1][0] for name in learning(model)})
        == 1
        == len({part_of(name) for name in learning(model)})
    )
    with pytest.raises(ValueError, match="text:last_9: text has 4 blocks"):
        freeze(model, ["text:last_9"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_lm_head_learns_alone(tied):
    model = make_model(tie_word_embeddings=tied)
    freeze(model, ["lm_head"])
    assert learning(model) == {"model.language_model.embed_tokens.weight" if tied else "lm_head.weight"}


def test_parts_have_their_own_learning_rates():
    model = make_model()
    args = parse_args([*TINY, "--learning_rates", "vision=1e-5", "projector=2e-3"])
    rates = {id(p): g["peak_lr"] for o in build_optimizers(model, args) for g in o.param_groups for p in g["params"]}
    wanted = {"vision": 1e-5, "projector": 2e-3, "text": args.learning_rate}
    assert all(rates[id(p)] == wanted[part_of(name)] for name, p in model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_are_decayed(optimizer):
    model = make_model()
    args = parse_args(["--optimizer", optimizer, "--weight_decay", "0.3"])
    groups = [group for o in build_optimizers(model, args) for group in o.param_groups]
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        expected = 0.3 if parameter.ndim >= 2 and parameter is not embedding else 0.0
        assert decayed[id(parameter)] == expected, name


def test_schedules():
    assert schedule(0.5, 0, "constant") == schedule(0.79, 0, "wsd") == 1
    assert schedule(0.9, 0, "wsd") == pytest.approx(0.5) and schedule(1, 0, "wsd") == 0
    assert schedule(1, 0, "cosine", 0.1) == pytest.approx(0.1)  # MiniMind's: cosine to a tenth
    assert schedule(0.5, 0, "cosine", 0.1) == pytest.approx(0.1 + 0.9 * math.cos(math.pi / 4) ** 2)
    assert schedule(0.05, 0.1, "constant") == pytest.approx(0.5)


def test_averaged_weights_follow_and_swap():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update()  # (1 + 1) / (10 + 1) of the old one stays
    expected = start * (2 / 11) + (start + 1) * (9 / 11)
    torch.testing.assert_close(average.average["weight"], expected)
    average.swap()
    torch.testing.assert_close(model.weight, expected)
    average.swap()
    assert torch.equal(model.weight, start + 1)


def test_the_average_is_what_is_saved(data, tmp_path, monkeypatch):
    run(data, tmp_path / "plain", "--max_steps", "4")
    expected, update = {}, WeightAverage.update

    def note(self):
        update(self)
        for name, parameter in self.live.items():
            t, live = self.steps, parameter.detach().clone()
            decay = min(0.3, (1 + t) / (10 + t))  # 2/11, 3/12, 4/13 and then 0.3
            expected[name] = decay * expected.get(name, start[name]) + (1 - decay) * live

    monkeypatch.setattr(WeightAverage, "update", note)
    build = train_accelerate.build

    def with_start(args):
        model, processor = build(args)
        start.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return model, processor

    start: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(train_accelerate, "build", with_start)
    final = run(data, tmp_path / "ema", "--max_steps", "4", "--ema", "0.3")
    assert losses(tmp_path / "plain") == losses(tmp_path / "ema")  # training does not notice it
    saved = load_file(final / "model.safetensors")
    assert expected and expected.keys() <= saved.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, msg=name)


def test_z_loss_pulls_the_log_partition_to_zero(data, tmp_path):
    run(data, tmp_path / "plain", "--max_steps", "8")
    run(data, tmp_path / "z", "--max_steps", "8", "--z_loss", "0.1")
    assert losses(tmp_path / "plain")[0] == losses(tmp_path / "z")[0]  # the reported loss is without it
    assert losses(tmp_path / "plain")[-1] != losses(tmp_path / "z")[-1]


def test_a_part_without_gradient_stops_the_run_at_its_first_step(data, tmp_path, monkeypatch):
    build = train_accelerate.build

    def with_idle_weights(args):
        model, processor = build(args)
        model.model.multi_modal_projector.idle = torch.nn.Linear(2, 2)
        return model, processor

    monkeypatch.setattr(train_accelerate, "build", with_idle_weights)
    with pytest.raises(RuntimeError, match=r"2 parameters .* no gradient \(model.multi_modal_projector.idle.weight"):
        run(data, tmp_path / "run", "--max_steps", "2")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_experts_are_used_alike(data, tmp_path):
    """Without the balancing term a mixture forgets experts; with it, it learns and is spread more evenly."""
    logs = {}
    for coefficient in (0.0, 1.0):
        text = TEXT | {"model_type": "qwen3_moe", "vocab_size": 6400, "num_experts": 4, "num_experts_per_tok": 1}
        text |= {"moe_intermediate_size": 32, "norm_topk_prob": True, "router_aux_loss_coef": coefficient}
        config = json.dumps({"vision_config": VISION, "text_config": text})
        options = [*TINY[2:], "--model_config", config, "--data", data, "--batch_size", "8", "--max_steps", "25"]
        train_accelerate.main([*options, "--output_dir", str(tmp_path / str(coefficient))])
        lines = (tmp_path / str(coefficient) / "log.jsonl").read_text().splitlines()
        logs[coefficient] = [json.loads(line) for line in lines]
    free, balanced = logs[0.0], logs[1.0]
    assert free[0]["loss"] == balanced[0]["loss"]  # the reported loss is without the term
    assert 1 <= balanced[-1]["imbalance"] < free[-1]["imbalance"] <= 4
    assert balanced[-1]["loss"] < balanced[0]["loss"]


def test_balance_is_that_of_the_paper():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    for top_k in (1, 2):
        expected = sum(load_balancing_loss_func((block,), 4, top_k) for block in logits)  # theirs pools the blocks
        torch.testing.assert_close(load_balance(tuple(logits), top_k), expected)
    even = torch.eye(4).repeat(5, 1) * 50
    assert load_balance((even,), 1).item() == pytest.approx(1)
    assert load_balance((torch.tensor([[50.0, 0, 0, 0]]),), 1).item() == pytest.approx(4)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(data, tmp_path, monkeypatch):
    build = train_accelerate.build

    def broken(args):
        model, processor = build(args)
        model.model.multi_modal_projector.linear_1.weight.data[0, 0] = math.inf
        return model, processor

    monkeypatch.setattr(train_accelerate, "build", broken)
    with pytest.raises(FloatingPointError, match="at step 1; its rows are listed in .*nonfinite-step1-rank0.json"):
        run(data, tmp_path / "run", "--max_steps", "2")
    rows = json.loads((tmp_path / "run" / "nonfinite-step1-rank0.json").read_text())["rows"]
    assert len(rows) == 8 and all("rows.parquet, row " in place for place in rows)


def test_evaluation_while_training_keeps_the_best_and_stops_early(data, tmp_path):
    options = ("--eval_data", data, "--eval_every", "2", "--keep_best", "loss", "--max_steps", "40", "--patience", "2")
    final = run(data, tmp_path / "run", *options, "--learning_rate", "3", "--max_grad_norm", "1000")  # it diverges
    entries = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    best = min(entry["loss"] for entry in entries)
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["best"] == best and report["steps"] == entries[-1]["step"] < 40
    assert [entry["loss"] for entry in entries][-3:][0] == best  # two worse ones came after it
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file() and final.is_dir()
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == len(entries)
    model, processor = train_accelerate.load_trained(tmp_path / "run" / "best")
    again = train_accelerate.evaluate(model, processor, train_accelerate.load_rows([data]))
    assert again["scores"]["loss"] == pytest.approx(best, abs=1e-3)
    assert plot_main([str(tmp_path / "run")]).stat().st_size > 10_000


def test_trackers_get_figures_and_pictures(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--eval_data", data, "--eval_every", "2", "--max_steps", "2", "--trackers", "tensorboard")
    run(data, tmp_path / "run", *options)
    events = EventAccumulator(str(tmp_path / "run" / "minivlm")).Reload()
    assert {"train/loss", "train/tokens_per_second", "eval/match"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]


def test_lora_trains_an_adapter_that_merges(data, tmp_path):
    peft = pytest.importorskip("peft")
    base = run(data, tmp_path / "base", "--max_steps", "1")
    options = ("--model", str(base), "--lora", "r=4,alpha=8", "--max_steps", "10", "--learning_rate", "1e-2")
    final = run(data, tmp_path / "lora", *options, "--train", "text")
    assert losses(tmp_path / "lora")[-1] < losses(tmp_path / "lora")[0]
    merged, processor = train_accelerate.load_trained(final)
    adapted = peft.PeftModel.from_pretrained(train_accelerate.load_trained(base)[0], tmp_path / "lora" / "adapter")
    ids = make_prompt(2, "image", 6)
    inputs = {"input_ids": ids, "pixel_values": make_pixels(1)}
    with torch.no_grad():
        expected, found = adapted.eval()(**inputs).logits, merged.eval()(**inputs).logits
        plain = train_accelerate.load_trained(base)[0].eval()(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_the_largest_micro_batch_is_found_by_trying(monkeypatch, data, tmp_path):
    """Memory for five rows is played by an error at six; the real one is only met on a GPU."""
    model = make_model(text={"vocab_size": 6400})
    args = parse_args([*TINY, "--batch_size", "16", "--max_length", "32"])
    forward = type(model).forward

    def limited(self, input_ids=None, **inputs):
        if len(input_ids) > 5:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(type(model), "forward", limited)
    assert memory.should_reduce_batch_size(RuntimeError("CUDA out of memory."))
    encoder = Encoder(make_processor(), 32)
    accelerator = train_accelerate.make_accelerator(args)
    found = train_accelerate.largest_micro_batch(model, encoder, PaddingCollator(0), args, accelerator)
    assert found == 5 and all(p.grad is None for p in model.parameters())


def test_flops_are_those_that_the_products_take():
    """Against PyTorch's own counter, on a model whose attention scores are left out of both."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model()
    freeze(model, ["projector", "text"])
    ids = make_prompt(2, "image", 6)
    with FlopCounterMode(display=False) as counter:
        labels = ids.clone()
        model(input_ids=ids, pixel_values=make_pixels(1), labels=labels).loss.backward()
    attention = 0
    for per_module in counter.get_flop_counts().get("Global", {}).items():
        kind, flops = per_module
        attention += flops if any(word in str(kind) for word in ("attention", "bmm")) else 0
    counted = counter.get_total_flops() - attention
    assert FlopCounter(model)(ids.numel(), 1, ids.numel()) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedule", "cosin"], "Did you mean cosine?"),
        (["--train", "text:last_0"], "no such part"),
        (["--train", "projector:last_1"], "no such part"),
        (["--learning_rates", "decoder=1"], "--learning_rates decoder: no such part"),
        (["--learning_rates", "vision"], "write a name and a number, as vision=1e-5"),
        (["--trackers", "tensorbord"], "not known. Use tensorboard"),
        (["--keep_best", "loss"], "--keep_best needs --eval_data"),
        (["--push_to_hub", "a/b/c"], "--push_to_hub a/b/c"),
        (["--ema", "1"], "less than 1"),
        (["--warmup", "5", "--max_minutes", "3"], "give a share of the run"),
        (["--mixed_precision", "fp16", "--optimizer", "muon"], "goes with one optimizer"),
        (["--lora", "rank=3"], "'rank=3' is not understood"),
    ],
)
def test_wrong_options_name_value_limit_and_remedy(capsys, options, message):
    with pytest.raises(SystemExit):
        parse_args(options)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--device", "cuda"])
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_a_model_that_does_not_exist_is_said_before_the_data_is_read(tmp_path):
    with pytest.raises(ValueError, match="--vision_model nobody/nothing: no folder with a model.* HF_ENDPOINT"):
        train_accelerate.main([*TINY, "--vision_model", "nobody/nothing", "--output_dir", str(tmp_path)])
