"""Draw the plots of docs/scale."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure  # no pyplot: it would ask for a display
from PIL import Image

from tools.scale.communication import Cluster, step_time
from tools.scale.flops import Rows, newton_schulz_flops, step_flops
from tools.scale.memory import HELD, activation_bytes, state_bytes
from tools.scale.pages import PARTS, TEXT, networks
from tools.scale.planning import best_plan
from tools.scale.shapes import MODELS

COLORS = {"tower": "#8c6bb1", "projector": "#e3120b", "decoder": "#4c83c3", "attention": "#f0a030", "head": "#5aa469"}
STYLES = dict(zip(HELD, ("-", "--", ":", "-.")))
DPI = 80
WAITING = "waiting, per cent of a step"


def panels(title_left: str, title_right: str):
    """Return a figure with two panels."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title(title_left, fontsize=11)
    right.set_title(title_right, fontsize=11)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure, left, right


def save(figure: Figure, path: Path) -> None:
    """Write a figure with a palette, which takes a third of the bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_flops(path: Path, cluster: Cluster, step: Rows) -> None:
    """Draw the FLOPs of a row by part: over the tokens of a row, and over its pictures; above 64 M, below 6.8 B."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    for line, name in zip(figure.subplots(2, 2), ("64 M", "6.8 B")):
        model = MODELS[name]
        tokens = range(128, 4097, 64)
        counts = range(1, 17)
        rows = [[Rows(1, n) for n in tokens], [Rows(1, TEXT + n * model.image_tokens, n) for n in counts]]
        labels = ("tokens of a row with one picture", f"pictures of a row with {TEXT} tokens of text")
        for axes, x, cases, label in zip(line, (tokens, counts), rows, labels):
            costs = [step_flops(model, case) for case in cases]
            stacks = [[cost[part] / 1e12 for cost in costs] for part in PARTS]
            axes.stackplot(list(x), stacks, labels=PARTS, colors=[COLORS[part] for part in PARTS])
            axes.set(xlabel=label, ylabel="TFLOP a row", title=f"{name} model", xlim=(min(x), max(x)))
            axes.set_xticks([1, 4, 8, 12, 16] if x == counts else [128, 1024, 2048, 3072, 4096])
            axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    line[0].legend(handles[::-1], names[::-1], loc="upper left", fontsize=9)
    save(figure, path)


def draw_memory(path: Path, cluster: Cluster, step: Rows) -> None:
    """Draw the memory of a rank: over the rows of a micro-batch with FSDP 2, and over ranks by strategy."""
    figure, left, right = panels("FSDP 2 on 8 ranks (dashed: recomputed)", "6.8 B, weights + gradients + moments")
    counts = [2**n for n in range(11)]
    for number, (name, model) in enumerate(MODELS.items()):
        states = sum(state_bytes(model, "FSDP 2", 8).values())
        for recompute, style in ((False, "-"), (True, "--")):
            held = [states + activation_bytes(model, replace(step, count=n), recompute) for n in counts]
            label = "" if recompute else name
            left.plot(counts, [value / 1e9 for value in held], style, color=f"C{number}", label=label)
    left.set(
        xscale="log",
        yscale="log",
        xlabel=f"rows of {step.tokens} tokens in a micro-batch",
        ylabel="GB",
        ylim=(0.1, 500),
    )
    ranks = [2**n for n in range(7)]
    for strategy, style in STYLES.items():
        values = [sum(state_bytes(MODELS["6.8 B"], strategy, n).values()) / 1e9 for n in ranks]
        right.plot(ranks, values, style, label=strategy)
    right.set(xscale="log", xlabel="ranks", ylabel="GB", ylim=(0, None))
    right.set_xticks(ranks, [str(n) for n in ranks])
    right.minorticks_off()
    limit = cluster.memory * (1 - cluster.reserve) / 1e9
    for axes, x in ((left, 1), (right, 64)):
        axes.axhline(limit, color="#888888", linewidth=1)
        axes.text(x, 1.03 * limit, f"{limit:g} GB", fontsize=9, ha="left" if x == 1 else "right")
    left.legend(fontsize=9)
    right.legend(fontsize=9)
    save(figure, path)


def draw_communication(path: Path, cluster: Cluster, step: Rows) -> None:
    """Draw the share of waiting over the machine balance, by strategy, with the three networks as vertical lines."""
    micro = replace(step, count=max(1, step.count // 64))
    title = f"64 ranks, {micro.count} rows each"
    figure, *both = panels(f"64 M, {title}", f"6.8 B, {title}")
    balances = [100 * 1.05**n for n in range(110)]
    for axes, name in zip(both, ("64 M", "6.8 B")):
        for strategy, style in STYLES.items():
            shares = []
            for balance in balances:
                speed = cluster.peak * cluster.mfu / balance
                network = replace(cluster, nvlink=2 * speed, network=speed)
                time = step_time(MODELS[name], strategy, network, 64, micro)
                shares.append(100 * time.waiting / time.total)
            axes.plot(balances, shares, style, label=strategy)
        for label, (ranks, one) in networks(cluster).items():
            axes.axvline(one.balance(ranks), color="#888888", linewidth=1)
            inside, name_of_line = ranks == 8, label.removeprefix("64 GPUs, ")
            axes.text(one.balance(ranks), 98, f"{name_of_line} " if inside else f" {name_of_line}", rotation=90,
                      fontsize=9, va="top", ha="right" if inside else "left")  # fmt: skip
        axes.set(xscale="log", xlabel="machine balance, FLOP per byte", ylabel=WAITING, ylim=(0, 100))
    both[0].legend(loc="center left", fontsize=9)
    save(figure, path)


def draw_ranks(path: Path, cluster: Cluster, step: Rows) -> None:
    """Draw rows per second over ranks, and the share of waiting over the rows of a step."""
    slow = replace(cluster, cards=1)
    figure, left, right = panels(f"steps of {step.count} rows (dashed: 1 card a node)", "64 ranks, 1 card a node")
    ranks = [2**n for n in range(8)]
    batches = [64 * 2**n for n in range(9)]
    for number, (name, model) in enumerate(MODELS.items()):
        for network, style in ((slow, "--"), (cluster, "-")):
            found = {n: best_plan(model, n, network, step) for n in ranks}
            points = [(n, one.rate) for n, one in found.items() if one]
            left.plot(*zip(*points), style, color=f"C{number}", label=name if style == "-" else "")
        found = [best_plan(model, 64, slow, replace(step, count=n)) for n in batches]
        right.plot(batches, [100 * one.waiting for one in found], "o-", color=f"C{number}", markersize=4, label=name)
    left.set(xscale="log", yscale="log", xlabel="ranks", ylabel="rows per second")
    left.set_xticks(ranks, [str(n) for n in ranks])
    right.set(xscale="log", xlabel="rows of a step, over all ranks", ylabel=WAITING, ylim=(0, 100))
    right.set_xticks(batches, [f"{n:,}" for n in batches], rotation=35)
    for axes in (left, right):
        axes.minorticks_off()
        axes.legend(fontsize=9)
    save(figure, path)


def draw_muon(path: Path, cluster: Cluster, step: Rows) -> None:
    """Draw the share of Newton-Schulz in a step over the tokens that a rank computes."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    counts = [2**n for n in range(13)]
    for name, model in MODELS.items():
        row, extra = sum(step_flops(model, replace(step, count=1)).values()), newton_schulz_flops(model)
        axes.plot([n * step.tokens for n in counts], [100 * extra / (extra + n * row) for n in counts], label=name)
    for share, label in ((50, "pays with half the steps"), (10, "10 %")):
        axes.axhline(share, color="#888888", linewidth=1)
        axes.text(counts[-1] * step.tokens, share + 1, label, ha="right", fontsize=9)
    axes.set(
        xscale="log",
        xlabel="tokens of a step on each rank",
        ylabel="Newton-Schulz, per cent of a step's FLOPs",
        ylim=(0, 100),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save(figure, path)


DRAWN = {
    "flops.png": draw_flops,
    "memory.png": draw_memory,
    "communication.png": draw_communication,
    "ranks.png": draw_ranks,
    "muon.png": draw_muon,
}
