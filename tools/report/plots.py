"""Plot what a model confuses, and how often it is right by drawing style and by category."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure  # no pyplot: it would ask for a display

from minivlm.evaluation.scoring import cell, normalise
from tools.emoji.concepts import CATEGORIES
from tools.report.tables import SCENES

OTHER = "none of them"
ROLES = {"test": "test", "dev": "dev", "test_compositions": "trained style", "test_photos": "photographs"}
NAMES = {normalise(name): en for en, zh in CATEGORIES.values() for name in (en, zh)}  # in both languages -> English


def count_confusions(answers: list[dict]) -> dict[str, Counter]:
    """Return for each true category how often each category was answered to `category`, in both languages."""
    found = {en: Counter() for en, _ in CATEGORIES.values()}
    for entry in answers:
        if (entry["file"], entry["task"]) == ("test", "category"):
            found[NAMES[normalise(entry["answer"])]][NAMES.get(normalise(entry["output"]), OTHER)] += 1
    return found


def plot_confusions(answers: list[dict], output: Path) -> bool:
    """Draw the confusions between categories as a heat map; return False if no category was asked for."""
    found = {truth: counts for truth, counts in count_confusions(answers).items() if counts}
    if not found:
        return False
    columns = [en for en, _ in CATEGORIES.values()] + [OTHER]
    shares = [[counts[said] / counts.total() for said in columns] for counts in found.values()]
    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            color = "white" if share > 0.6 else "black" if share >= 0.005 else "#aaaaaa"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=10)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(found)), [f"{truth} ({counts.total()})" for truth, counts in found.items()])
    axes.set(xlabel="answer", ylabel="truth (questions)", title="Category: answers to each true category, in per cent")
    figure.savefig(output, dpi=90)
    return True


def share_by(answers: list[dict], key: Callable[[dict], str | None]) -> dict[str, dict]:
    """Return the cell of right answers for each value of `key`; answers without a value are left out."""
    groups = defaultdict(list)
    for entry in answers:
        if (value := key(entry)) is not None:
            groups[value].append(entry["right"])
    return {value: cell(matches) for value, matches in groups.items()}


def style_of(entry: dict) -> str | None:
    """Return the style of an answer's picture and what the style was for; None for files without such a role."""
    role = ROLES.get(entry["file"])
    return None if role is None else role if entry["file"] == "test_photos" else f"{entry['style']} ({role})"


def plot_styles(answers: list[dict], output: Path) -> bool:
    """Draw bars for each style: names of single things, and questions about scenes; return False without answers."""
    panels = {
        "Name of the thing": share_by([a for a in answers if a["task"] == "name"], style_of),
        "Questions about scenes": share_by([a for a in answers if a["task"] in SCENES], style_of),
    }
    return plot_bars(panels, output)


def plot_categories(answers: list[dict], output: Path) -> bool:
    """Draw bars for each category of the things of the test: name and written choice; return False without answers."""
    single = [entry for entry in answers if entry["file"] == "test" and "category" in entry]
    tasks = {"name": "Name of the thing", "choice": "Which of four names"}
    panels = {
        title: share_by([a for a in single if a["task"] == task], lambda a: a["category"])
        for task, title in tasks.items()
    }
    return plot_bars(panels, output)


def plot_bars(panels: dict[str, dict[str, dict]], output: Path) -> bool:
    """Draw a panel of horizontal bars with 95 % intervals for each entry; return False if none has a bar."""
    panels = {title: cells for title, cells in panels.items() if cells}
    if not panels:
        return False
    most = max(len(cells) for cells in panels.values())
    figure = Figure(figsize=(5.2 * len(panels), 1.3 + 0.42 * most), layout="constrained")
    for axes, (title, cells) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        ordered = sorted(cells.items(), key=lambda pair: pair[1]["match"])
        shares = [100 * c["match"] for _, c in ordered]
        ends = [
            [100 * (c["match"] - c["low"]) for _, c in ordered],
            [100 * (c["high"] - c["match"]) for _, c in ordered],
        ]
        ends = [[max(0, value) for value in side] for side in ends]
        axes.barh(range(len(ordered)), shares, xerr=ends, color="#4c83c3", ecolor="#333333", capsize=3, height=0.7)
        axes.set_yticks(range(len(ordered)), [f"{name}, {c['count']}" for name, c in ordered])
        axes.set(xlim=(0, 100), xlabel="right answers, per cent", title=title)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(output, dpi=90)
    return True
