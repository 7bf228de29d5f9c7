"""Describe all pictures of a folder: one line per picture in a file.

    minivlm caption photos --out captions.jsonl
    minivlm caption photos --out answers.csv --format csv --question "What is this? Answer with the name."
    minivlm caption photos --format metadata

Pictures in folders inside the folder are described, too. Each line has file_name, question and answer; a name counts
from the folder. With --format metadata the lines go to metadata.jsonl in the folder, and train_accelerate.py --data
FOLDER reads them; a caption stands there as text.

A call that was stopped, even by kill -9, is continued by the same call: what is in the file is not asked again. A
picture that cannot be read is left out and named at the end; the next call tries it again.
"""

import csv
import io
import json
from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from minivlm.asking import (
    add_engine_option,
    add_model_options,
    check_engine,
    decode_named,
    open_engine,
    question_about,
)
from minivlm.cli import Parser, positive
from minivlm.data.pictures import PICTURE_SUFFIXES
from minivlm.data.schemas import CAPTION_REQUEST
from minivlm.decoding import Decoding

if TYPE_CHECKING:
    from minivlm.inference import Assistant
    from minivlm.onnx_engine.assistant import OnnxAssistant

COLUMNS = ("file_name", "question", "answer")
CAPTION = ("file_name", "text")  # of metadata.jsonl with the usual question, as `datasets` reads it, too
OUTPUTS = {"jsonl": "captions.jsonl", "csv": "captions.csv", "metadata": "metadata.jsonl"}  # format -> usual name


class CaptionFile:
    """Write a line per picture, and know after a stop which pictures are written.

    Args:
        columns: names of the values of a line. Without `question` a line has no question.
        question: what is asked about each picture; a file with another question is not continued.

    Raises:
        ValueError: there is a file of that name that holds something else.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], question: str, is_csv: bool):
        self.path, self.columns, self.question, self.is_csv = path, columns, question, is_csv
        self.head = self.csv_line(columns) if is_csv else b""
        content = path.read_bytes() if path.exists() else b""
        whole = self.whole_lines(content)
        start = self.head or b'{"file_name": '
        try:
            rows = self.read(content[:whole])
            if not whole and not content.startswith(start[: len(content)]):
                raise ValueError(f"it does not begin with {start.decode().strip()}")
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{path}: not a file that this call can continue ({error}). Move it away, or choose another --out."
            ) from error
        self.done = {row["file_name"] for row in rows}
        self.file = open(path, "ab")
        self.file.truncate(whole)
        if not whole:
            self.append(self.head)

    def whole_lines(self, content: bytes) -> int:
        """Return the length of a file without an incomplete last line; a line of CSV may contain line breaks."""
        end = place = quotes = 0
        for line in io.BytesIO(content):
            place, quotes = place + len(line), quotes + line.count(b'"') * self.is_csv
            if line.endswith(b"\n") and quotes % 2 == 0:
                end = place
        return end

    def read(self, content: bytes) -> list[dict]:
        """Return the rows of whole lines; raise ValueError for one that this call would not write."""
        text = content.decode()
        if self.is_csv:
            head, *lines = list(csv.reader(io.StringIO(text, newline=""))) or [list(self.columns)]
            if head != list(self.columns) or any(len(line) != len(head) for line in lines):
                raise ValueError(f"its columns are not {', '.join(self.columns)}")
            rows = [dict(zip(head, line)) for line in lines]
        else:
            rows = [json.loads(line) for line in text.split("\n") if line]
            if any(not isinstance(row, dict) or tuple(row) != self.columns for row in rows):
                raise ValueError(f"its lines do not have {', '.join(self.columns)}")
        if other := [row["question"] for row in rows if row.get("question", self.question) != self.question]:
            raise ValueError(f"it has answers to another question, {other[0]!r}")
        return rows

    def csv_line(self, values) -> bytes:
        """Return values as a line of a CSV file."""
        csv.writer(out := io.StringIO(newline=""), lineterminator="\n").writerow(values)
        return out.getvalue().encode()

    def line(self, row: dict) -> bytes:
        """Return a row as a line of the file."""
        if self.is_csv:
            return self.csv_line(row[name] for name in self.columns)
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()

    def append(self, line: bytes) -> None:
        """Write a line at once: what was appended survives when the process is killed."""
        self.file.write(line)
        self.file.flush()

    def add(self, name: str, answer: str) -> None:
        """Append the answer about a picture."""
        values = {"file_name": name, "question": self.question, "answer": answer, "text": answer}
        self.append(self.line({column: values[column] for column in self.columns}))


def find_pictures(folder: Path) -> list[str]:
    """Return the names of all pictures in a folder, sorted, counted from the folder.

    Raises:
        ValueError: there is none, or no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Name the folder of the pictures.")
    suffixes = {f".{suffix}" for suffix in PICTURE_SUFFIXES}
    files = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if names := sorted(path.relative_to(folder).as_posix() for path in files):
        return names
    raise ValueError(f"{folder}: no pictures in it. Their names end in {', '.join(sorted(suffixes))}.")


def encode_pictures(
    assistant: "Assistant | OnnxAssistant", args: Namespace, names: list[str], bad: list[str]
) -> Iterator[tuple]:
    """Yield name and encoded question of each picture that can be read; append a line to `bad` for each other one."""
    for name in names:
        try:
            if name != name.encode(errors="replace").decode():
                raise ValueError(f"{ascii(name)}: the name is not UTF-8. Rename the file.")
            picture = decode_named(name, args.folder / name)
        except ValueError as error:
            bad.append(str(error))
        else:
            yield name, assistant.encode([question_about([picture], args.question)])


def open_output(args: Namespace) -> CaptionFile:
    """Return the file for the answers.

    Raises:
        ValueError: it cannot be used, see `CaptionFile`; or training would not find the pictures from it.
    """
    metadata = args.format == "metadata"
    path = args.out or Path(args.folder if metadata else ".") / OUTPUTS[args.format]
    if metadata and (path.name != OUTPUTS["metadata"] or path.parent.resolve() != args.folder.resolve()):
        raise ValueError(
            f"--out {path}: metadata.jsonl stands beside the pictures, in {args.folder}. Leave --out away."
        )
    columns = CAPTION if metadata and args.question == CAPTION_REQUEST else COLUMNS
    path.parent.mkdir(parents=True, exist_ok=True)
    return CaptionFile(path, columns, args.question, args.format == "csv")


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="minivlm caption")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Folder of the pictures.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="File to write. Default: captions.jsonl or .csv.")
    parser.add_argument("--format", choices=OUTPUTS, default="jsonl", help="Form of the file. Default: jsonl.")
    parser.add_argument("--question", default=CAPTION_REQUEST, help=f"What to ask. Default: {CAPTION_REQUEST}")
    parser.add_argument("--batch_size", type=positive, default=16, help="Pictures answered at once. Default: 16.")
    add_model_options(parser, max_new_tokens=128)
    add_engine_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Describe the pictures that the file lacks; print how many there are, and which could not be read."""
    args = parse_args(argv)
    check_engine(args)
    names, decoding = find_pictures(args.folder), Decoding(args.max_new_tokens)
    out = open_output(args)
    waiting, bad, answered = [name for name in names if name not in out.done], [], 0
    if waiting:
        assistant = open_engine(args)
        encoded = encode_pictures(assistant, args, waiting, bad)
        with tqdm(total=len(names), initial=len(names) - len(waiting), unit="picture") as bar:
            while batch := list(islice(encoded, args.batch_size)):
                for (name, _), answer in zip(batch, assistant.answer([chat for _, chat in batch], decoding)):
                    out.add(name, answer.text)
                answered += len(batch)
                bar.update(len(names) - len(waiting) + answered + len(bad) - bar.n)
    print(f"{out.path}: {len(out.done) + answered} pictures, {answered} of them from this call")
    if bad:
        print(f"{len(bad)} pictures could not be read and were left out:")
        print("\n".join(f"  {line}" for line in bad))
