"""Train a small model and let it name pictures in a style that it was not trained on: `make demo`.

    python -m tools.demo
    python -m tools.demo --minutes 10 --seed 1
    python -m tools.demo --from_scratch

It trains for less than five minutes on two CPU cores, or on a GPU if there is one. It starts from the vision tower of
the released model, as published models start from a pretrained one. Projector and decoder start from random weights:
the projector learns the names of 96 things, then both learn to answer questions about them. Each answer is shown
beside the truth: in the terminal, in runs/demo/contact_sheet.png and, for a browser, in contact_sheet.html beside it.
"""

import sys
from pathlib import Path

import torch

import train_accelerate
from minivlm.cli import Parser, run_command
from minivlm.commands import train_tower
from minivlm.data.rows import filter_rows, load_rows
from minivlm.evaluation.contact_sheet import answers_page, contact_sheet
from minivlm.evaluation.scoring import evaluate, is_right, print_table, prompts
from minivlm.model.loading import load_trained
from minivlm.pages import write_page
from minivlm.reading import answer
from minivlm.training.options import parse_args as parse_train_args
from tools.emoji import align

RECIPE, FROM_SCRATCH, TEST_DATA = "recipes/demo.yaml", "recipes/demo_from_scratch.yaml", "data/demo_test.parquet"
ALIGN_SHARE = 0.2  # of the time
ALIGNMENT = ["--batch", "64", "--pictures", "3840", "--passes", "8"]
SHOWN = {"choice": 8, "name": 6, "yes_no": 4, "category": 2}  # questions of each task on the sheet


def pick(rows, shown: dict[str, int]):
    """Return the first rows of each task; the file is shuffled, so they are a fair sample."""
    left, chosen = dict(shown), []
    for index, task in enumerate(rows["task"]):
        if left.get(task, 0):
            left[task] -= 1
            chosen.append(index)
    return rows.select(sorted(chosen, key=lambda i: list(shown).index(rows[i]["task"])))


def show(model_path: Path, output_dir: Path) -> None:
    """Print and draw answers about pictures of the held-out style, then print the scores of all its rows."""
    model, processor = load_trained(model_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = filter_rows(load_rows([TEST_DATA]), {"task": list(SHOWN)})
    sample = pick(rows, SHOWN)
    items = prompts(sample, processor)
    outputs = answer(model, processor, items)
    print("\nPictures of a style that it was not trained on:\n")
    for item, output in zip(items, outputs):
        mark = "right" if is_right(item, output) else "wrong"
        print(f"  {mark}  {item['question']}\n         truth: {item['answer']}    model: {output}")
    sheet = output_dir / "contact_sheet.png"
    contact_sheet(items, outputs).save(sheet)
    write_page(
        sheet.with_suffix(".html"),
        answers_page("Pictures of a style that the model was not trained on", items, outputs),
    )
    print_table(evaluate(model, processor, rows))
    print(
        f"""
Right and wrong answers as pictures: {sheet}, for a browser: {sheet.with_suffix(".html")}
A blind guess gets 25 % of the options and 50 % of the yes/no questions right. In the first table the model must write
the answer itself; in the second it says which of the four options it finds the likeliest.

Load the model that you just trained:

  from transformers import pipeline
  pipe = pipeline("image-text-to-text", model="{model_path.as_posix()}", trust_remote_code=True)
  messages = [{{"role": "user", "content": [
      {{"type": "image", "image": "picture.png"}},
      {{"type": "text", "text": "What is this? Answer with the name."}}]}}]
  print(pipe(text=messages, max_new_tokens=16, return_full_text=False)[0]["generated_text"])
"""
    )


def align_to_the_released_tower(folder: Path, config: str, options: list[str]) -> Path:
    """Give new weights to all but the released tower and align the projector; return the folder of the model.

    Args:
        folder: for tower/ and the result, aligned/.
        config: file of the architecture.
        options: further options of tools.emoji.align.
    """
    tower, aligned = folder / "tower", folder / "aligned"
    load_trained(".")[0].model.vision_tower.float().save_pretrained(tower)
    files = ["--vision_model", str(tower), "--model_config", config, "--output", str(aligned)]
    threads = str(torch.get_num_threads())
    align.main([*files, "--demo", "--scenes", "0", "--threads", threads, *ALIGNMENT, *options])
    return aligned


def start_from_the_released_tower(output_dir: Path, minutes: float, seed: list[str]) -> Path:
    """Align a projector to the released tower, train; return the folder of the model."""
    print("1/3  The projector learns the words of the names that the released tower can tell apart.", flush=True)
    aligned = align_to_the_released_tower(output_dir, "config.json", seed)
    print("2/3  The decoder learns to answer questions about them.", flush=True)
    options = ["--recipe", RECIPE, *seed, "--model", str(aligned), "--max_minutes", str(minutes * (1 - ALIGN_SHARE))]
    return train_accelerate.main([*options, "--output_dir", str(output_dir), "--resume", "never"])


def start_from_nothing(output_dir: Path, minutes: float, seed: list[str]) -> Path:
    """Train a tower, then the model, from random weights; return the folder of the model."""
    print("1/3  The vision tower learns to tell things apart.", flush=True)
    data, half = parse_train_args(["--recipe", FROM_SCRATCH]).data, str(minutes / 2)
    tower = ["--recipe", FROM_SCRATCH, "--data", *data, "--minutes", half, "--learning_rate", "3e-3"]
    train_tower.main([*tower, "--batch_size", "32", *seed, "--output_dir", str(output_dir / "tower")])
    print("2/3  The model learns to answer questions about them.", flush=True)
    options = ["--recipe", FROM_SCRATCH, *seed, "--vision_model", str(output_dir / "tower"), "--max_minutes", half]
    return train_accelerate.main([*options, "--output_dir", str(output_dir), "--resume", "never"])


def main(argv: list[str] | None = None) -> None:
    """Train a model, then show what it answers."""
    parser = Parser(__doc__, prog="python -m tools.demo")
    add = parser.add_argument
    add("--minutes", type=float, default=4.6, help="Training time in all.")
    add("--from_scratch", action="store_true", help="Also train the tower, instead of that of the released model.")
    add("--output_dir", type=Path, default=Path("runs/demo"), help="Folder for model and contact sheet.")
    add("--seed", type=int, default=0, help="Seed of weights, order and augmentation.")
    args = parser.parse_args(argv)
    start = start_from_nothing if args.from_scratch else start_from_the_released_tower
    final = start(args.output_dir, args.minutes, ["--seed", str(args.seed)])
    print("3/3  The same things as other artists draw them.", flush=True)
    show(final, args.output_dir)


if __name__ == "__main__":
    sys.exit(run_command(main))
