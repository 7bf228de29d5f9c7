"""Put the tables together into docs/scale/README.md, by the words in page.md."""

from pathlib import Path

from tools.scale import costs, pages
from tools.scale.communication import Cluster
from tools.scale.flops import Rows
from tools.scale.text import share

WORDS = Path(__file__).parent / "page.md"


def assumptions(cluster: Cluster, step: Rows, rows: int, price: float) -> dict[str, str]:
    """Return what is assumed, by its name in page.md."""
    giga = {
        "memory": cluster.memory,
        "nvlink": cluster.nvlink,
        "inside": cluster.nvlink / 2,
        "network": cluster.network,
    }
    return {name: f"{value / 1e9:g}" for name, value in giga.items()} | {
        "tokens": str(step.tokens), "step_rows": f"{step.count:,}", "peak": f"{cluster.peak / 1e12:g}",
        "mfu": share(cluster.mfu), "reserve": share(cluster.reserve), "cards": str(cluster.cards),
        "gradient": str(cluster.gradient), "price": f"{price:.2f}", "rows": f"{rows / 1e6:.1f}",
    }  # fmt: skip


def page(cluster: Cluster, step: Rows, rows: int, price: float) -> str:
    """Return the page with all tables.

    Args:
        step: rows of a step over all ranks, rows: those of the run, price: dollars for a GPU and hour.
    """
    row, micro = Rows(1, step.tokens, step.pictures), Rows(max(1, step.count // 64), step.tokens, step.pictures)
    models, lengths, pictures = pages.flops_tables(row)
    tenth, even = costs.muon_on_cpu()
    values = assumptions(cluster, step, rows, price) | {
        "models": pages.models_table(),
        "flops_models": models,
        "flops_lengths": lengths,
        "flops_pictures": pictures,
        "text": str(pages.TEXT),
        "held": pages.held_table(cluster),
        "states": pages.states_table(),
        "activations": pages.activations_table(row),
        "sent": pages.sent_table(cluster),
        "balances": pages.balance_table(cluster),
        "networks": " / ".join(pages.networks(cluster)),
        "hiding": pages.hiding_table(cluster, row),
        "micro_rows": str(micro.count),
        "micro_tokens": f"{micro.count * micro.tokens:,}",
        "winners": pages.winners_table(cluster, micro),
        "muon": pages.muon_table(row),
        "muon_seconds": str(costs.MUON_SECONDS),
        "muon_rate": str(costs.CPU_RATES[costs.FASTEST]),
        "muon_tenth": str(tenth),
        "muon_even": str(even),
        "plans": costs.plans_table(cluster, step),
        "cpu": costs.cpu_table(rows),
        "loader": f"{costs.LOADER:,}",
        "gpu": costs.gpu_table(cluster, step, rows, price),
    }
    return WORDS.read_text(encoding="utf-8").format_map(values)
