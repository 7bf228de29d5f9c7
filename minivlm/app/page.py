"""Build the page with gradio: pictures and a question in, a streamed answer and the likeliest names out.

Everything that belongs to one user is in that user's `Talk`, which gradio keeps per session.
"""

from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from minivlm.app.names import Namer
from minivlm.app.sentences import EXAMPLES, LANGUAGES, NAME_QUESTION, SENTENCES, preferred
from minivlm.app.talk import Talk
from minivlm.cli import describe
from minivlm.data.pictures import PICTURE_SUFFIXES
from minivlm.inference import Assistant, Decoding

ANSWERS_AT_ONCE = 2  # on a CPU more of them only take time from each other
QUEUE = 16  # users that may wait; the next one is told that the queue is full
UPLOAD = "20mb"  # of a file
KEPT = 24 * 3600  # seconds after which an uploaded picture is deleted
SYSTEM_FONTS = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "sans-serif"]
# Below the chat's pictures is a button that shares them on the Hub; what a user gives stays here.
CSS = "footer, #chat .message-buttons {display: none !important} #notice {color: var(--error-text-color)}"


class Page:
    """Hold the model and build the page around it; `blocks` is what gradio runs.

    Args:
        name: title of the page.
        examples: folder with the pictures of `EXAMPLES`; None shows no examples.
    """

    def __init__(self, assistant: Assistant, namer: Namer, name: str, examples: Path | None, max_new_tokens: int):
        self.assistant, self.namer, self.title = assistant, namer, f"# {name}"
        self.max_new_tokens = max_new_tokens
        with gr.Blocks(title="MiniVLM", analytics_enabled=False, delete_cache=(3600, KEPT)) as self.blocks:
            self.talk = gr.State(Talk(), time_to_live=KEPT, delete_callback=Talk.stop)
            self.draw(examples)
            self.connect()
        self.blocks.queue(max_size=QUEUE, default_concurrency_limit=ANSWERS_AT_ONCE, api_open=False)

    def draw(self, examples: Path | None) -> None:
        """Make the components; `say` writes their words."""
        with gr.Row():
            gr.Markdown(self.title)
            self.language = gr.Radio(list(LANGUAGES), value="English", show_label=False, container=False, min_width=80)
        self.intro = gr.Markdown()
        with gr.Row():
            with gr.Column(scale=3):
                self.chat = gr.Chatbot(
                    height=420, render_markdown=False, latex_delimiters=[], buttons=[], feedback_options=None,
                    elem_id="chat",
                )  # fmt: skip
                self.box = gr.MultimodalTextbox(
                    file_types=[f".{suffix}" for suffix in PICTURE_SUFFIXES], file_count="multiple",
                    sources=["upload"], show_label=False, max_lines=4, elem_id="box",
                )  # fmt: skip
                self.notice = gr.Markdown(elem_id="notice")
                with gr.Row():
                    self.stop = gr.Button(variant="stop", elem_id="stop")
                    self.reset = gr.Button(elem_id="reset")
            with gr.Column(scale=2):
                self.names = gr.Label(num_top_classes=5, show_heading=False, elem_id="names")
                self.temperature = gr.Slider(0, 2, value=0, step=0.1, elem_id="temperature")
                most = min(1024, self.assistant.room // 2)
                self.length = gr.Slider(1, most, value=min(self.max_new_tokens, most), step=1, elem_id="length")
        self.examples = {key: self.draw_examples(examples, key) for key in SENTENCES}

    def draw_examples(self, folder: Path | None, language: str) -> gr.Column:
        """Make the examples of one language, of which `say` shows those of the chosen one."""
        with gr.Column(visible=False) as column:
            if folder is not None:
                rows = [
                    [{"text": question[language], "files": [str(folder / name) for name in names]}]
                    for names, question in EXAMPLES
                ]
                gr.Examples(rows, self.box, label=SENTENCES[language]["examples"], api_visibility="private")
        return column

    def connect(self) -> None:
        """Say what happens at a click. What a user does while an answer is computed does not wait in its queue."""
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow = {"show_progress": "hidden", "api_visibility": "private"}
        words = [self.language, *self.worded()]
        self.blocks.load(self.greet, None, words, **quick)
        self.language.change(self.say, self.language, words, **quick)
        state = [self.talk, self.language]
        asked = self.box.submit(self.ask, [self.box, *state], [self.box, self.chat, self.notice], **quick)
        answered = asked.then(
            self.answer, [*state, self.temperature, self.length], [self.chat, self.notice], concurrency_id="model",
            **slow,
        )  # fmt: skip
        named = answered.then(self.name, state, self.names, concurrency_id="model", **slow)
        self.stop.click(self.end, self.talk, None, **quick)
        cleared = [self.talk, self.box, self.chat, self.notice, self.names]
        again = [self.reset.click, self.chat.clear]  # the chat has a small button of its own
        gr.on(again, self.forget, self.talk, cleared, cancels=[answered, named], **quick)

    def worded(self) -> list[gr.components.Component]:
        """Return what has words in the language of the page, in the order of `say`."""
        words = [self.intro, self.chat, self.box, self.stop, self.reset, self.names, self.temperature, self.length]
        return [*words, *self.examples.values()]

    def greet(self, request: gr.Request) -> list:
        """Show the page in the language of the browser."""
        key = preferred(request.headers.get("accept-language"))
        return self.say(next(name for name, other in LANGUAGES.items() if other == key))

    def say(self, language: str) -> list:
        """Return the words of the page in a language, for `language` and the components of `worded`."""
        key = LANGUAGES[language]
        say = SENTENCES[key]
        return [
            language,
            say["intro"],
            gr.update(label=say["chat"]),
            gr.update(placeholder=say["box"]),
            say["stop"],
            say["reset"],
            gr.update(label=say["names"]),
            gr.update(label=say["temperature"], info=say["temperature_info"]),
            gr.update(label=say["length"]),
            *[gr.update(visible=key == other) for other in self.examples],
        ]

    def ask(self, box: dict, talk: Talk, language: str) -> tuple:
        """Take a question out of the box; return box, chat and notice."""
        key = LANGUAGES[language]
        pictures, question = [Path(name) for name in box["files"]], box["text"].strip()
        if talk.stream is not None:
            return box, talk.shown(), SENTENCES[key]["busy"]
        if not pictures and not question:
            return box, talk.shown(), SENTENCES[key]["empty"]
        talk.ask(pictures, question or NAME_QUESTION[key])
        return None, talk.shown(""), ""

    def answer(self, talk: Talk, language: str, temperature: float, length: int) -> Iterator[tuple]:
        """Yield chat and notice while the answer grows; a mistake is a line, and the question leaves the chat."""
        try:
            for text in talk.answer(self.assistant, Decoding(int(length), temperature)):
                yield talk.shown(text), ""
            yield talk.shown(), ""
        except (ValueError, OSError) as error:
            yield talk.shown(), SENTENCES[LANGUAGES[language]]["error"].format(describe(error))

    def name(self, talk: Talk, language: str) -> dict | None:
        """Return the likeliest names of the newest picture, for the chart."""
        picture = talk.newest_picture()
        return None if picture is None else self.namer.likeliest(picture, LANGUAGES[language])

    def end(self, talk: Talk) -> None:
        """Stop the answer that is being computed."""
        talk.stop()

    def forget(self, talk: Talk) -> tuple:
        """Stop the answer and begin a new conversation."""
        talk.forget()
        return Talk(), None, [], "", None


def serve(page: Page, host: str, port: int | None) -> None:
    """Run the page until Ctrl-C. No file of this machine can be read through it, and it has no public link.

    Raises:
        OSError: the port is taken.
    """
    _, url, _ = page.blocks.launch(
        server_name=host, server_port=port, share=False, allowed_paths=[], max_file_size=UPLOAD, ssr_mode=False,
        enable_monitoring=False, run_history=False, mcp_server=False, footer_links=[], quiet=True,
        prevent_thread_lock=True, css=CSS, theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=SYSTEM_FONTS),
    )  # fmt: skip
    print(f"MiniVLM answers at {url} - Ctrl-C ends it.", flush=True)
    page.blocks.block_thread()
