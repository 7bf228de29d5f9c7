"""The costs that tools/scale computes are those that PyTorch counts and that the papers state; the page is theirs."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.models import ROOT
from minivlm.benchmark.memory import peak_bytes
from minivlm.benchmark.shapes import IMAGE, TINY, Shape, make_ours
from minivlm.training.flops import FlopCounter
from minivlm.training.muon import Muon
from tools.scale import costs
from tools.scale.__main__ import cluster_of, main, parse_args, text_of
from tools.scale.communication import (
    Cluster,
    hiding_balance,
    hiding_rows,
    pass_flops,
    step_bytes,
    step_time,
    transfers,
)
from tools.scale.flops import Rows, forward_flops, newton_schulz_flops, rows_for_share, step_flops
from tools.scale.memory import HELD, LOGITS, activation_bytes, block_bytes, largest_micro_batch, state_bytes
from tools.scale.planning import best_plan, plan, plans, winners
from tools.scale.report import page
from tools.scale.shapes import MODELS, Sizes, Tower, shape_of, sizes

# No two sizes are equal, so that no formula can take one for another.
ODD = Shape(
    TINY["vision"] | {"hidden_size": 24, "intermediate_size": 56, "image_size": 48},
    TINY["text"] | {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 6, "vocab_size": 320},
    TINY["options"],
)
SMALL = MODELS["64 M"]


def inputs(model: Sizes, rows: Rows) -> dict[str, torch.Tensor]:
    """Return a batch of rows as `Rows` describes them, in the form in which the collators give it."""
    ids = torch.full((rows.count, rows.tokens), 20)
    ids[:, : rows.pictures * model.image_tokens] = IMAGE
    asked = torch.arange(rows.tokens).expand_as(ids) >= rows.tokens - rows.answers(model)
    labels = torch.full((1, int(asked.sum())), 20)
    pixels = torch.randn(rows.count * rows.pictures, 3, 48, 48)
    answers = {"logits_to_keep": asked, "labels": labels, "shift_labels": labels}
    return answers | {"input_ids": ids, "pixel_values": pixels, "use_cache": False}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name):
    with torch.device("meta"):
        model = make_ours(shape_of(name))
    assert MODELS[name].trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert MODELS[name].tower.parameters == sum(p.numel() for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("rows", [Rows(1, 30, 1), Rows(2, 41, 3)], ids=str)
def test_flops_are_those_that_torch_counts(rows):
    shape = sizes("odd", ODD.config())
    model = make_ours(ODD)
    model.set_attn_implementation("eager")  # its products are counted one by one; a fused kernel's backward has more
    with FlopCounterMode(display=False, depth=3) as counter:
        model(**inputs(shape, rows)).loss.backward()
    expected = step_flops(shape, rows)
    assert counter.get_total_flops() == sum(expected.values())
    found = {name.rpartition(".")[2]: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    assert found["vision_tower"] == expected["tower"] and found["lm_head"] == expected["head"]
    assert found["multi_modal_projector"] == expected["projector"]
    tower = shape.tower
    scores = rows.count * rows.pictures * tower.layers * 4 * tower.patches**2 * tower.width
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] == expected["attention"] + scores


def test_flops_are_those_that_the_trainer_logs():
    """The trainer leaves out all scores and the tower's embedding of patches."""
    shape, rows = sizes("odd", ODD.config()), Rows(3, 41, 2)
    tower, parts = shape.tower, step_flops(shape, rows)
    left_out = 6 * (4 * tower.layers * tower.patches**2 * tower.width + 2 * tower.patches * tower.inputs * tower.width)
    logged = FlopCounter(make_ours(ODD))(tokens=3 * 41, pictures=6, answers=3 * rows.answers(shape))
    assert logged == sum(parts.values()) - parts["attention"] - left_out


def test_flops_are_those_of_the_paper():
    """With recomputation a GPT takes 96 B s l h^2 (1 + s / 6h + V / 16lh) FLOPs (arXiv 2104.04473, appendix)."""
    h, layers, s, vocabulary, batch = 96, 5, 70, 1000, 3
    gpt = Sizes("gpt", Tower(8, 8, 1, 1, 1), vocabulary, h, 8 * h // 3, layers, 4, 4, h // 4, image_tokens=0)
    rows = Rows(batch, s, pictures=0)
    parts = step_flops(gpt, rows, recompute=True)
    parts["head"] *= s / rows.answers(gpt)  # the paper computes the head for all tokens
    expected = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
    assert sum(parts.values()) == pytest.approx(expected, rel=1e-12)
    assert sum(pass_flops(gpt, rows)[one] for one in ("forward", "backward")) == sum(step_flops(gpt, rows).values())


def test_newton_schulz_is_what_muon_takes():
    shape = sizes("odd", ODD.config())
    parameters = [torch.nn.Parameter(torch.randn(size)) for _ in range(shape.layers) for size in shape.block]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        Muon(parameters).step()
    assert counter.get_total_flops() == newton_schulz_flops(shape)
    assert newton_schulz_flops(SMALL) == pytest.approx(1.06e12, rel=0.001)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_rows_for_a_share_are_the_fewest(share):
    for model in MODELS.values():
        extra, row = newton_schulz_flops(model), sum(step_flops(model, Rows()).values())
        count = rows_for_share(model, Rows(), share)
        assert extra / (extra + count * row) <= share < extra / (extra + (count - 1) * row)


def saved_bytes(layers: int, tokens: int) -> Counter:
    """Return the bytes that autograd keeps under autocast: copies of weights in bf16, and activations."""
    model = make_ours(replace(ODD, text=ODD.text | {"num_hidden_layers": layers}))
    model.set_attn_implementation("sdpa")
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(**inputs(sizes("odd", ODD.config()), Rows(1, tokens, 1)))
    found = Counter()
    for tensor in kept.values():
        is_weight = tuple(tensor.shape) in weights or tuple(tensor.shape[::-1]) in weights
        found["weights" if is_weight else "activations"] += tensor.untyped_storage().nbytes()
    return found


def test_activations_are_those_that_autograd_keeps():
    shape, tokens = sizes("odd", ODD.config()), 37  # no width
    block = saved_bytes(3, tokens) - saved_bytes(2, tokens)
    assert block["activations"] == tokens * block_bytes(shape)
    assert block["weights"] == 2 * shape.matrices // shape.layers  # the copies under DDP: 6 bytes a weight, not 4
    more, less = (activation_bytes(replace(shape, layers=n), Rows(1, tokens)) for n in (3, 2))
    assert more - less == tokens * block_bytes(shape)
    again = [activation_bytes(replace(shape, layers=n), Rows(1, tokens), recompute=True) for n in (3, 2)]
    assert again[0] - again[1] == tokens * 4 * shape.width and again[0] < more


def test_logits_take_at_their_peak_what_is_counted():
    vocabulary, width, tokens = 3000, 2, 64
    head = torch.nn.Parameter(torch.randn(vocabulary, width))
    hidden, labels = torch.randn(tokens, width, requires_grad=True), torch.randint(0, vocabulary, (tokens,))

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = torch.nn.functional.linear(hidden, head)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / tokens
        loss.backward()
        return logits  # a model returns them beside the loss, so they stay

    step()
    assert peak_bytes(step) / (vocabulary * tokens) == pytest.approx(LOGITS, rel=0.02)


# Communication


def ring(ranks: int, size: int, rounds: int) -> tuple[list[list[int]], int]:
    """Send chunks of ones around a ring; return the chunks of each rank, and the bytes that one rank sent."""
    chunk = size // ranks
    values, sent = [[1] * ranks for _ in range(ranks)], 0  # a number stands for a chunk
    for turn in range(rounds):
        moved = [(rank, (rank - turn) % ranks, values[rank][(rank - turn) % ranks]) for rank in range(ranks)]
        for rank, place, value in moved:
            target = values[(rank + 1) % ranks]
            target[place] = target[place] + value if turn < ranks - 1 else value
        sent += chunk
    return values, sent


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_bytes_are_those_of_a_ring(ranks):
    """Simulated: after the all-reduce each rank has the sum; the bytes that one rank sent are those computed."""
    model = replace(SMALL, vocabulary=6400)
    size = model.trained * ranks
    values, both = ring(ranks, size, 2 * (ranks - 1))
    assert values == [[ranks] * ranks] * ranks
    scattered, once = ring(ranks, size, ranks - 1)
    assert all(scattered[rank][(rank + 1) % ranks] == ranks for rank in range(ranks))
    assert step_bytes(model, "DDP", ranks) == pytest.approx(4 * both / ranks)
    assert step_bytes(model, "ZeRO 1", ranks) == pytest.approx(2 * both / ranks)
    frozen = 2 * model.tower.parameters * (ranks - 1) / ranks
    assert step_bytes(model, "FSDP 2", ranks) == pytest.approx(2 * 3 * once / ranks + frozen)


def test_volumes_and_memory_are_those_of_the_zero_paper():
    """Section 7: stages 1 and 2 send what DDP sends, stage 3 half as much again. Figure 1: 7.5 B on 64 ranks."""
    model = replace(MODELS["6.8 B"], tower=Tower(0, 0, 0, 0, 0))
    plain = step_bytes(model, "DDP", 64, gradient=2)
    assert step_bytes(model, "ZeRO 1", 64) == step_bytes(model, "ZeRO 2", 64) == plain
    assert step_bytes(model, "FSDP 2", 64) == pytest.approx(1.5 * plain)
    held = {name: sum(state_bytes(model, name, 64).values()) / model.trained * 7.5 for name in ("ZeRO 1", "ZeRO 2")}
    assert held == pytest.approx({"ZeRO 1": 31.4, "ZeRO 2": 16.6}, abs=0.05)
    shard = state_bytes(model, "FSDP 2", 64)
    assert (sum(shard.values()) - shard["gathered"]) / model.trained * 7.5 == pytest.approx(1.9, abs=0.05)


def test_micro_batches_repeat_the_transfers_of_zero_2_and_fsdp_alone():
    more = {name: step_bytes(SMALL, name, 8, 5) / step_bytes(SMALL, name, 8) for name in HELD}
    assert more == pytest.approx({"DDP": 1, "ZeRO 1": 1, "ZeRO 2": 3, "FSDP 2": 5})


@pytest.mark.parametrize("strategy", HELD)
def test_transfers_hide_up_to_the_balance_and_not_above(strategy):
    micro, after = Rows(12), sum(t.trained for t in transfers(strategy) if not t.behind)
    limit, cluster = hiding_balance(SMALL, strategy, 64, micro), Cluster()
    for factor, hidden in ((0.99, True), (1.01, False)):
        speed = cluster.peak * cluster.mfu / (limit * factor)
        network = replace(cluster, nvlink=2 * speed, network=speed)
        assert network.balance(64) == pytest.approx(limit * factor)
        time = step_time(SMALL, strategy, network, 64, micro)
        rest = time.waiting - after * SMALL.trained * 63 / 64 / speed
        assert (rest < 1e-9) == hidden and time.waiting <= time.sending
    count = hiding_rows(SMALL, strategy, 64, replace(cluster, cards=1), Rows())
    slow = replace(cluster, cards=1).balance(64)
    assert (
        hiding_balance(SMALL, strategy, 64, Rows(count)) >= slow > hiding_balance(SMALL, strategy, 64, Rows(count - 1))
    )


def test_one_rank_sends_nothing_and_nodes_share_their_cards():
    assert step_time(SMALL, "FSDP 2", Cluster(), 1, Rows(4)).sending == 0
    assert [Cluster(cards=n).bandwidth(64) for n in (1, 4, 8, 80)] == [50e9, 200e9, 400e9, 450e9]
    assert Cluster(cards=1).bandwidth(8) == 450e9


# Plans


def test_a_plan_fits_and_a_larger_micro_batch_does_not():
    cluster, step = Cluster(), Rows(768)
    for model in MODELS.values():
        for ranks in (1, 8, 64):
            for found in plans(model, ranks, cluster, step):
                states = sum(state_bytes(model, found.strategy, ranks).values())
                rows = [replace(step, count=found.largest + n) for n in (0, 1)]
                used = [states + activation_bytes(model, count, found.recompute) for count in rows]
                assert used[0] <= 0.9 * 80e9 < used[1]
                assert found.micro <= found.largest and found.rows >= 768
                assert found.ranks * (found.micro - 1) * found.accumulation < 768


def test_the_best_plan_is_the_fastest_or_a_simpler_one_within_a_per_cent():
    for model in MODELS.values():
        for cluster in (Cluster(), Cluster(cards=1)):
            best, others = best_plan(model, 64, cluster, Rows(768)), plans(model, 64, cluster, Rows(768))
            assert best.rate >= 0.99 * max(one.rate for one in others)
            assert all(one.rate < 0.99 * max(o.rate for o in others) for one in others[: others.index(best)])
    assert best_plan(MODELS["6.8 B"], 1, Cluster(), Rows(768)) is None
    assert plan(MODELS["6.8 B"], "DDP", 64, Cluster(), Rows(768)) is None
    assert largest_micro_batch(MODELS["6.8 B"], "DDP", 64, 80e9, Rows(), True) == 0
    order = [name for name, _ in winners(SMALL, 64, Cluster(), Rows(12))]
    assert order[0] == "DDP" and order[-1] == "ZeRO 1"  # the simplest, and the one that sends least


def test_rows_too_short_for_their_pictures_are_an_error():
    with pytest.raises(ValueError, match="2 pictures take 128 tokens, but a row has 100"):
        forward_flops(SMALL, Rows(1, 100, 2))


# The page


def tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", text, re.M)


def test_the_page_is_what_the_command_computes():
    written = (ROOT / "docs/scale/README.md").read_text(encoding="utf-8")
    assert written == text_of(parse_args([])), "python -m tools.scale --out docs/scale"
    for name in re.findall(r"\]\((\w+\.png)\)", written):
        assert (ROOT / "docs/scale" / name).is_file()


def test_performance_shows_tables_of_the_page():
    performance = (ROOT / "PERFORMANCE.md").read_text(encoding="utf-8")
    section = performance.partition("\n## Scale, computed\n")[2].partition("\n## ")[0]
    computed = tables(page(Cluster(), Rows(768), 2_900_000, 3.0))
    assert len(tables(section)) >= 4 and not [table for table in tables(section) if table not in computed]


def test_measured_rates_stand_in_performance():
    text = (ROOT / "PERFORMANCE.md").read_text(encoding="utf-8").replace("*", "")
    measured = text.partition("| side | rows/s, 4 rows | ratio | rows/s, 11 rows |")[2].partition("\n## ")[0]
    for name, rate in costs.CPU_RATES.items():
        lines = [line for line in measured.splitlines() if line.startswith(f"| {name} |")]
        assert [line.split("|")[4].strip() for line in lines] == [str(rate)]  # rows/s, 11 rows
    assert f"| {costs.LOADER:,} (" in text


def test_options_change_the_page():
    def page_of(*options):
        return text_of(parse_args(list(options)))

    plain = page_of()
    for options in ("--mfu 0.4", "--price 2", "--nvlink 600 --cards 4", "--ddp_bytes 2 --tokens 512"):
        assert tables(page_of(*options.split())) != tables(plain)
    assert cluster_of(parse_args([])) == Cluster()


def test_mistakes_are_one_line(capsys):
    for options, words in ((["--mfu", "1.5"], "--mfu 1.5: must be above 0"), (["--price", "0"], "--price 0")):
        with pytest.raises(SystemExit):
            parse_args(options)
        assert words in capsys.readouterr().err


def test_the_command_writes_page_and_plots(tmp_path):
    main(["--out", str(tmp_path)])
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == sorted(path.name for path in (ROOT / "docs/scale").glob("*.png"))
    assert all(path.stat().st_size < 50_000 for path in tmp_path.glob("*.png"))
