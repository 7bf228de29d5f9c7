"""Write the tables of docs/scale/README.md: models, FLOPs, memory, communication, Muon."""

from dataclasses import replace

from tools.scale.communication import Cluster, hiding_rows, step_bytes, transfers
from tools.scale.flops import Rows, newton_schulz_flops, rows_for_share, step_flops
from tools.scale.memory import HELD, LOGITS, activation_bytes, state_bytes
from tools.scale.planning import winners
from tools.scale.shapes import MODELS, Sizes
from tools.scale.text import short, table

RANKS = (1, 8, 64)
LENGTHS = (128, 256, 364, 512, 1024, 2048, 4096)
PICTURES = (1, 2, 4, 8, 16)
TEXT = 300  # tokens of text beside the pictures
PARTS = ("tower", "projector", "decoder", "attention", "head")


def networks(cluster: Cluster) -> dict[str, tuple[int, Cluster]]:
    """Return the networks that the tables compare: the number of GPUs, and the cluster."""
    many = "1 card" if cluster.cards == 1 else f"{cluster.cards} cards"
    found = {"8 GPUs": (8, cluster), f"64 GPUs, {many} a node": (64, cluster)}
    return found | {"64 GPUs, 1 card a node": (64, replace(cluster, cards=1))}


def models_table() -> str:
    """Return the sizes of the models."""
    head = ["model", "width", "blocks", "heads / key-value", "inner", "vocabulary", "trained", "tower, frozen"]
    return table(head, [
        [name, str(m.width), str(m.layers), f"{m.heads} / {m.key_value_heads} x {m.head_dim}", str(m.inner),
         f"{m.vocabulary:,}", f"{m.trained / 1e6:,.1f} M", f"{m.tower.parameters / 1e6:.1f} M"]
        for name, m in MODELS.items()
    ])  # fmt: skip


def flops_row(name: str, model: Sizes, row: Rows) -> list[str]:
    """Return a line of a table of FLOPs: the sum and the parts, in GFLOP a row."""
    parts = step_flops(model, row)
    return [name, *(short(value / 1e9) for value in (sum(parts.values()), *(parts[part] for part in PARTS)))]


def flops_tables(row: Rows) -> list[str]:
    """Return the FLOPs of a row by part: over models, over the length, over the number of pictures."""
    first = MODELS["64 M"]
    tables = [
        ("model", [flops_row(name, model, row) for name, model in MODELS.items()]),
        ("tokens", [flops_row(f"{n:,}", first, replace(row, tokens=n)) for n in LENGTHS]),
        ("pictures", [flops_row(str(n), first, Rows(1, TEXT + n * first.image_tokens, n)) for n in PICTURES]),
    ]
    return [table([name, "GFLOP", *PARTS], lines) for name, lines in tables]


def held_table(cluster: Cluster) -> str:
    """Return the bytes a parameter by strategy; N is the number of ranks."""

    def cell(share) -> str:
        return f"{share.size} / N" if share.divided else str(share.size)

    head = ["strategy", "weights", "gradients", "moments, fp32 copy", "sent: forward", "backward", "after it"]
    lines = []
    for name, held in HELD.items():
        sent = {"forward": 0, "backward": 0, "": 0}
        for transfer in transfers(name, cluster.gradient):
            sent[transfer.behind] += transfer.trained
        cells = [cell(share) for share in (held.weights, held.gradients, held.states)]
        lines.append([name, *cells, *(str(value) for value in sent.values())])
    return table(head, lines)


def states_table() -> str:
    """Return GB of weights, gradients and moments on a rank, of 1, 8 and 64 ranks."""
    lines = []
    for name, model in MODELS.items():
        cells = [[sum(state_bytes(model, one, ranks).values()) / 1e9 for ranks in RANKS] for one in HELD]
        lines.append([name, *(" / ".join(f"{value:.1f}" for value in cell) for cell in cells)])
    return table(["model", *HELD], lines)


def activations_table(row: Rows) -> str:
    """Return MB of activations of a row, with and without recomputation."""
    lines = []
    for name, model in MODELS.items():
        kept, again = (activation_bytes(model, row, recompute) for recompute in (False, True))
        logits = LOGITS * model.vocabulary * row.answers(model)
        lines.append([name, *(short(value / 1e6) for value in (kept, again, logits))])
    return table(["model", "all kept", "recomputed", "of which logits"], lines)


def sent_table(cluster: Cluster) -> str:
    """Return GB that a rank sends in a step of one micro-batch, of 8 and 64 ranks."""
    lines = []
    for name, model in MODELS.items():
        cells = [[step_bytes(model, one, n, 1, cluster.gradient) / 1e9 for n in RANKS[1:]] for one in HELD]
        lines.append([name, *(" / ".join(f"{value:.2f}" for value in cell) for cell in cells)])
    return table(["model", *HELD], lines)


def hiding_table(cluster: Cluster, row: Rows) -> str:
    """Return the tokens of a micro-batch on each rank from which the transfers during a pass are hidden."""
    lines = []
    for name, model in MODELS.items():
        cells = []
        for strategy in HELD:
            found = [hiding_rows(model, strategy, n, one, row) * row.tokens for n, one in networks(cluster).values()]
            cells.append(" / ".join(f"{value:,}" for value in found))
        lines.append([name, *cells])
    return table(["model", *HELD], lines)


def balance_table(cluster: Cluster) -> str:
    """Return the machine balance of each network."""
    return table(["network", "GB/s a rank sends", "FLOP per byte"], [
        [name, short(one.bandwidth(ranks) / 1e9), short(one.balance(ranks))]
        for name, (ranks, one) in networks(cluster).items()
    ])  # fmt: skip


def winners_table(cluster: Cluster, micro: Rows) -> str:
    """Return which strategy is fastest from which machine balance on, on 64 ranks, if all fit."""
    lines = []
    for name, model in MODELS.items():
        found = winners(model, 64, cluster, micro)
        ends = [*(short(start) for _, start in found[1:]), ""]
        cells = {one: f"{short(start)} to {end}" if end else f"above {short(start)}"
                 for (one, start), end in zip(found, ends)}  # fmt: skip
        cells[found[0][0]] = f"below {ends[0]}"
        lines.append([name, *(cells.get(one, "never") for one in HELD)])
    return table(["model", *HELD], lines)


def muon_table(row: Rows) -> str:
    """Return what Newton-Schulz costs, and from how many tokens a rank and step on it is a tenth or pays."""
    lines = []
    for name, model in MODELS.items():
        step, work = newton_schulz_flops(model), sum(step_flops(model, row).values())
        rows = [rows_for_share(model, row, share) for share in (0.1, 0.5)]
        cells = [f"{count} ({count * row.tokens:,})" for count in rows]
        lines.append([name, short(step / 1e12), short(work / 1e12), *cells])
    head = ["model", "Newton-Schulz, TFLOP a step", "one row, TFLOP", "under 10 % of the step from, rows (tokens)",
            "pays with half the steps from, rows (tokens)"]  # fmt: skip
    return table(head, lines)
