"""Talk with a model about pictures: answers appear word by word, and later questions know the earlier ones.

    minivlm chat
    minivlm chat photo.jpg
    minivlm chat photo.jpg --lang zh --temperature 0.7 --top_p 0.9
    minivlm chat photo.jpg --engine onnx --model runs/onnx

    /image FILE   show a picture; the next question is about it
    /reset        forget pictures, questions and answers
    /save FILE    write the conversation to a .json file, which train_accelerate.py --data reads
    /lang en|zh   language of these lines
    /help         list these lines
    /quit         end; so does the end of the input. Ctrl-C ends an answer.

Lines can be edited and pictures are shown where `pip install minivlm[chat]` was called and the terminal can do so.
"""

import base64
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

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
from minivlm.cli import Parser, describe
from minivlm.data.pictures import open_picture
from minivlm.decoding import Decoding
from minivlm.terminal import line_reader, show_picture

if TYPE_CHECKING:
    from minivlm.inference import Assistant
    from minivlm.onnx_engine.assistant import OnnxAssistant

SENTENCES = {
    "en": {
        "hello": "Ask a question; /image FILE shows a picture, /help lists the commands, /quit ends.",
        "help": "/image FILE   show a picture; the next question is about it\n"
        "/reset        forget pictures, questions and answers\n"
        "/save FILE    write the conversation to a .json file\n"
        "/lang en|zh   language of these lines\n"
        "/help         list these lines\n"
        "/quit         end",
        "reset": "Forgotten.",
        "saved": "Written: {}.",
        "lang": "Lines are in English.",
        "stats": "[{} tokens, {:.1f} tokens/s, first after {:.2f} s]",
        "unknown": "{}: no such command. /help lists them.",
        "no_file": "{} needs the name of a file.",
        "no_lang": "/lang {}: languages are en and zh.",
        "nothing": "There is no answer to save yet.",
        "exists": "{} exists. Choose another name.",
        "suffix": "{}: the name must end in .json.",
    },
    "zh": {
        "hello": "请提问；/image 文件 可以给出图片，/help 列出命令，/quit 结束。",
        "help": "/image 文件   给出一张图片，下一个问题就问它\n"
        "/reset        忘掉图片、问题和回答\n"
        "/save 文件    把对话写入 .json 文件\n"
        "/lang en|zh   这些提示的语言\n"
        "/help         列出这些命令\n"
        "/quit         结束",
        "reset": "已忘掉。",
        "saved": "已写入：{}。",
        "lang": "提示用中文。",
        "stats": "[{} 个词元，每秒 {:.1f} 个，{:.2f} 秒后出现第一个]",
        "unknown": "{}：没有这个命令。/help 列出所有命令。",
        "no_file": "{} 后面要写文件名。",
        "no_lang": "/lang {}：语言只有 en 和 zh。",
        "nothing": "还没有可以保存的回答。",
        "exists": "{} 已经存在，请换一个名称。",
        "suffix": "{}：文件名必须以 .json 结尾。",
    },
}


def read_file(name: str) -> bytes:
    """Return the bytes of a picture's file; raise ValueError for "-", since questions come from standard input."""
    if name == STDIN:
        raise ValueError("- is standard input, which has the questions. Name a file.")
    return read_picture(str(Path(name).expanduser()))


def data_url(picture: bytes) -> str:
    """Return the bytes of a picture as a data URL, which `--data` reads like a file."""
    with open_picture(picture) as opened:
        kind = Image.MIME.get(opened.format, "image/png")
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


class Chat:
    """Hold a conversation: its messages, the pictures that wait for a question, and the language of its lines."""

    def __init__(self, assistant: "Assistant | OnnxAssistant", decoding: Decoding, language: str):
        self.assistant, self.decoding, self.language = assistant, decoding, language
        self.messages: list[dict] = []
        self.waiting: list[bytes] = []
        self.written: set[Path] = set()  # files of this conversation, which may be replaced

    def say(self, sentence: str, *values) -> None:
        """Print a line of the interface."""
        print(SENTENCES[self.language][sentence].format(*values), flush=True)

    def answer_line(self, line: str) -> bool:
        """Run a command or answer a question; return False at the end. A mistake is one line, then it goes on."""
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        try:
            if word.startswith("/"):
                self.run(word, rest.strip())
            elif word:
                self.ask(line.strip())
        except (ValueError, OSError) as error:
            print(f"error: {describe(error)}", flush=True)
        return True

    def run(self, word: str, rest: str) -> None:
        """Run one of the commands."""
        if word in ("/image", "/save") and not rest:
            self.say("no_file", word)
        elif word == "/image":
            self.show(rest, read_file(rest))
        elif word == "/save":
            self.save(Path(rest).expanduser())
        elif word == "/reset":
            self.messages, self.waiting, self.written = [], [], set()
            self.say("reset")
        elif word == "/lang" and rest not in SENTENCES:
            self.say("no_lang", rest)
        elif word == "/lang":
            self.language = rest
            self.say("lang")
        else:
            self.say("help" if word == "/help" else "unknown", word)

    def show(self, name: str, data: bytes) -> None:
        """Show a picture, given as the bytes of its file, and keep it for the next question."""
        show_picture(name, decode_named(name, data))
        self.waiting.append(data)

    def ask(self, question: str) -> None:
        """Print the answer as it is computed; an answer that Ctrl-C ends is kept as far as it came."""
        asked = question_about(self.waiting, question)
        stream = self.assistant.stream(self.assistant.encode([*self.messages, asked]), self.decoding)
        pieces = []
        try:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.stop()
        print()
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces)}]}
        self.messages += [asked, answer]
        self.waiting = []
        self.say("stats", stream.tokens, stream.tokens / max(stream.seconds, 1e-9), stream.first or stream.seconds)

    def save(self, path: Path) -> None:
        """Write the conversation as a list of one row: `messages`, and `images` as data URLs."""
        if path.suffix != ".json":
            self.say("suffix", path)
        elif not self.messages:
            self.say("nothing")
        elif path.exists() and path not in self.written:
            self.say("exists", path)
        else:
            parts = [part for message in self.messages for part in message["content"]]
            images = [data_url(part["image"]) for part in parts if part["type"] == "image"]
            messages = [
                {**m, "content": [{k: v for k, v in part.items() if k != "image"} for part in m["content"]]}
                for m in self.messages
            ]
            row = {"messages": messages, "images": images}
            path.write_text(json.dumps([row], ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            self.written.add(path)
            self.say("saved", path)


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="minivlm chat")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="Files that the first question is about.")
    add_model_options(parser, max_new_tokens=256)
    add_sampling_options(parser)
    add_engine_option(parser)
    parser.add_argument("--lang", choices=SENTENCES, default="en", help="Language of the interface. Default: en.")
    return parser.parse_mixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read lines and answer them until /quit or the end of the input."""
    args = parse_args(argv)
    check_engine(args)
    decoding = decoding_of(args)
    pictures = [(name, read_file(name)) for name in args.pictures]
    for name, data in pictures:  # before the model: it loads longer
        decode_named(name, data)
    chat = Chat(open_engine(args), decoding, args.lang)
    for name, data in pictures:
        chat.show(name, data)
    read = line_reader()
    if sys.stdin.isatty():
        chat.say("hello")
    try:
        while chat.answer_line(read("> ")):
            pass
    except EOFError:
        return
