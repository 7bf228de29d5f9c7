"""Train a small model from nothing and let it name pictures in a style that it was not trained on: `make demo`.

    python -m tools.demo
    python -m tools.demo --minutes 10 --seed 1

It trains for less than five minutes on two CPU cores, or on a GPU if there is one. First the tower learns to tell
96 things apart, then the decoder learns to answer questions about them. Each answer is shown beside the truth: in the
terminal, in runs/demo/contact_sheet.png and, for a browser, in contact_sheet.html beside it.
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
from minivlm.inference import answer
from minivlm.model.loading import load_trained
from minivlm.pages import write_page
from minivlm.training.options import parse_args as parse_train_args

RECIPE, TEST_DATA = "recipes/demo.yaml", "data/demo_test.parquet"
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
    rows = filter_rows(load_rows([TEST_DATA]), parse_train_args(["--recipe", RECIPE]).filter)
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


def main(argv: list[str] | None = None) -> None:
    """Train the tower, then the model, then show what it answers."""
    parser = Parser(__doc__, prog="python -m tools.demo")
    parser.add_argument("--minutes", type=float, default=4.6, help="Training time in all; half of it for the tower.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="Folder for model and contact sheet."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, order and augmentation.")
    args = parser.parse_args(argv)
    half = str(args.minutes / 2)
    seed = ["--seed", str(args.seed)]
    print("1/3  The vision tower learns to tell things apart.", flush=True)
    data = parse_train_args(["--recipe", RECIPE]).data
    tower = ["--recipe", RECIPE, "--data", *data, "--minutes", half, "--learning_rate", "3e-3", "--batch_size", "32"]
    train_tower.main([*tower, *seed, "--output_dir", str(args.output_dir / "tower")])
    print("2/3  The model learns to answer questions about them.", flush=True)
    options = ["--recipe", RECIPE, *seed, "--vision_model", str(args.output_dir / "tower"), "--max_minutes", half]
    final = train_accelerate.main([*options, "--output_dir", str(args.output_dir), "--resume", "never"])
    print("3/3  The same things as other artists draw them.", flush=True)
    show(final, args.output_dir)


if __name__ == "__main__":
    sys.exit(run_command(main))
