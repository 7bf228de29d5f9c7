"""Hold the conversation of one user, and answer in it."""

from collections.abc import Iterator
from pathlib import Path

from minivlm.asking import question_about
from minivlm.inference import AnswerStream, Assistant, Decoding


class Talk:
    """Hold one user's messages, the question that waits, and the answer that is being computed.

    A new `Talk` holds no thread or model, so that gradio can copy it for each user.
    """

    def __init__(self):
        self.messages: list[dict] = []
        self.waiting: dict | None = None  # the question that `answer` takes
        self.stream: AnswerStream | None = None  # while an answer is computed
        self.stopped = self.forgotten = False

    def ask(self, pictures: list[Path], question: str) -> None:
        """Put a question; `answer` computes the answer."""
        self.waiting, self.stopped = question_about(pictures, question), False

    def answer(self, assistant: Assistant, decoding: Decoding) -> Iterator[str]:
        """Yield the answer to the question that waits, as far as it is computed; then keep question and answer.

        An answer that is stopped is kept as far as it came. One that nobody reads any more is stopped.

        Raises:
            ValueError: a picture cannot be read, or the conversation is too long. The question is forgotten.
        """
        asked, text = self.waiting, ""
        if asked is None or self.stream is not None:
            return
        try:
            if not self.stopped:  # it may have waited in the queue
                stream = self.stream = assistant.stream(assistant.encode([*self.messages, asked]), decoding)
                if self.stopped:
                    stream.stop()
                for piece in stream:
                    text += piece
                    yield text
            self.messages += [asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        finally:
            if self.stream is not None:
                self.stream.stop()
            if self.waiting is asked:
                self.waiting = None
            self.stream = None

    def stop(self) -> None:
        """End the answer that is being computed, or the one that waits."""
        self.stopped, stream = True, self.stream
        if stream is not None:
            stream.stop()

    def forget(self) -> None:
        """Stop, and show nothing any more: what an answer that just ends still sends must not come back."""
        self.forgotten = True
        self.stop()

    def shown(self, text: str | None = None) -> list[dict]:
        """Return the conversation as gradio's chat shows it; `text` is the answer to the question that waits."""
        if self.forgotten:
            return []
        messages = [*self.messages, *([self.waiting] if self.waiting else [])]
        rows = [
            {"role": m["role"], "content": {"path": str(part["image"])} if part["type"] == "image" else part["text"]}
            for m in messages
            for part in m["content"]
        ]
        return rows if text is None else [*rows, {"role": "assistant", "content": text}]

    def newest_picture(self) -> Path | None:
        """Return the last picture of the conversation; None if there is none."""
        parts = [part for message in self.messages for part in message["content"] if part["type"] == "image"]
        return parts[-1]["image"] if parts and not self.forgotten else None
