"""Ask a question about pictures and print the answer.

    minivlm ask photo.jpg "What is this?"
    minivlm ask before.png after.png "Which picture shows a cat?" --json
    minivlm ask - "这是什么？" < photo.jpg
    minivlm ask "Which animal says moo?" --temperature 0.7
    minivlm ask photo.jpg "What is this?" --schema schema.json
    minivlm ask photo.jpg "What is this?" --engine onnx --model runs/onnx

The last argument is the question, those before it are pictures; - is a picture on standard input. Only the answer goes
to standard output. With --json it is one object: pictures, question, answer, seconds from question to answer, and the
tokens of the answer.

With --schema the answer is JSON that fits a JSON Schema: each token that would break it is left out. That says how the
answer looks, not that it is right. It needs a package: pip install minivlm[schema].
"""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from minivlm.asking import (
    STDIN,
    add_engine_option,
    add_model_options,
    add_sampling_options,
    check_engine,
    decode_named,
    decoding_of,
    open_engine,
    question_about,
    read_picture,
)
from minivlm.cli import Parser
from minivlm.json_schema import check_package, compile_schema, read_schema


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options, with `pictures` and `question` apart.

    Raises:
        ValueError: the question is missing, or standard input is named twice.
    """
    parser = Parser(__doc__, prog="minivlm ask", usage="minivlm ask [PICTURE ...] QUESTION [OPTION ...]")
    parser.add_argument("words", nargs="+", metavar="PICTURE ... QUESTION", help="Files, then what to ask.")
    add_model_options(parser, max_new_tokens=256)
    add_sampling_options(parser)
    parser.add_argument("--schema", metavar="FILE", help="Answer in JSON that fits the JSON Schema in this file.")
    parser.add_argument("--json", action="store_true", help="Print a JSON object instead of the answer alone.")
    add_engine_option(parser)
    args = parser.parse_mixed_args(argv)
    *args.pictures, args.question = args.words
    if args.question == STDIN or (len(args.question) < 256 and Path(args.question).is_file()):
        raise ValueError(f"{args.question} is a picture, and the last argument is the question. Write one behind it.")
    if args.pictures.count(STDIN) > 1:
        raise ValueError("- stands twice, but standard input has one picture. Give the others as files.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the answer.

    Raises:
        ValueError: an argument is wrong, or the answer does not fit a schema because the limit of tokens cut it.
    """
    args = parse_args(argv)
    check_engine(args)
    decoding = decoding_of(args)
    if args.schema:
        check_package("--schema")
        decoding = replace(decoding, grammar=compile_schema(read_schema(args.schema), args.schema))
    pictures = [decode_named(name, read_picture(name)) for name in args.pictures]  # before the model: it loads longer
    assistant = open_engine(args)
    start = perf_counter()
    [answer] = assistant.answer([assistant.encode([question_about(pictures, args.question)])], decoding)
    if args.schema and not answer.ended:
        raise ValueError(
            f"The answer was cut after {answer.tokens} tokens, before its JSON ended. Raise --max_new_tokens "
            f"{args.max_new_tokens}, or set maxLength and maxItems in {args.schema}."
        )
    if not args.json:
        print(answer.text)
        return
    said = json.loads(answer.text) if args.schema else answer.text
    result = {"pictures": args.pictures, "question": args.question, "answer": said}
    result |= {"seconds": round(perf_counter() - start, 3), "tokens": answer.tokens}
    print(json.dumps(result, ensure_ascii=False))
