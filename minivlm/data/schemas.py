"""Turn rows of every known layout into one form: stage 2 of the data path.

    row -> schema -> {"images": [...], "messages": [{"role": "user", "content": [...]}, ...]}

`content` is typed: `{"type": "image"}` where a picture stands, `{"type": "text", "text": ...}` for words. A schema is
a function; it is chosen by the names of a row's columns. Pictures stay encoded, or names of files.
"""

import json
from collections.abc import Callable

from minivlm.data.bad_rows import LOW_RATING, BadRow
from minivlm.data.pictures import PICTURE_COLUMNS, open_picture

IMAGE_MARKER = "<image>"  # how MiniMind-V, LLaVA and others write a picture into text
CAPTION_REQUEST = "Describe this picture."  # what the user says in a row that has only a caption
CAPTION_COLUMNS = (("text",), ("caption",), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant", "tool")}


def minimind_v(row: dict) -> dict:
    """Read MiniMind-V's parquet: `conversations` (JSON or a list of {role, content}), `image_bytes` (one or a list).

    `<image>` in the text marks a picture. Text-only rows carry an 8 x 8 black picture, which is left out.
    """
    messages = [message(turn["role"], split_markers(turn["content"])) for turn in turns(row["conversations"])]
    images = as_list(row["image_bytes"])
    if not any(part["type"] == "image" for m in messages for part in m["content"]):
        images = [image for image in images if not is_placeholder(image)]
    return {"images": images, "messages": messages}


def llava(row: dict) -> dict:
    """Read LLaVA's JSON: `conversations` of {from: human | gpt | system, value}; `image` is one, a list or left out.

    MiniMind2-V writes {role, content} instead, and several pictures as "0.jpg, 1.jpg". Both mark them by `<image>`.
    """
    conversation, images = turns(row["conversations"]), pictures(row)
    speaker, text = ("role", "content") if "role" in conversation[0] else ("from", "value")
    if speaker == "role":
        images = [name for image in images for name in (image.split(",") if isinstance(image, str) else [image])]
        images = [image.strip() if isinstance(image, str) else image for image in images]
    return {"images": images, "messages": [message(turn[speaker], split_markers(turn[text])) for turn in conversation]}


def cauldron(row: dict) -> dict:
    """Read The Cauldron and FineVision: `images` and `texts`, a list of {user, assistant}. Pictures come first."""
    messages = [message(role, turn[role]) for turn in turns(row["texts"]) for role in ("user", "assistant")]
    return pictures_first(messages, pictures(row))


def trl(row: dict) -> dict:
    """Read TRL's `messages` of {role, content}: strings or typed content; pictures inside it, in `images` or `image`.

    Strings cannot mark a picture, so pictures come first. Typed content says where each stands.
    """
    conversation, images = turns(row["messages"]), pictures(row)
    if any(turn.get("tool_calls") for turn in conversation):
        raise BadRow("tool calls are not supported in messages")
    messages = [message(turn["role"], turn["content"]) for turn in conversation]
    if all(isinstance(turn["content"], str) for turn in conversation):
        return pictures_first(messages, images)
    parts = [part for turn in conversation if not isinstance(turn["content"], str) for part in turn["content"]]
    inline = [place for part in parts if (place := part.get("image") or part.get("url") or part.get("path"))]
    if inline and images:
        raise BadRow("pictures both inside the messages and beside them")
    return {"images": inline or images, "messages": messages}


def imagefolder(row: dict) -> dict:
    """Read a folder with `metadata.jsonl`: `file_name` (or `image`) and `text`, or `question` and `answer`."""
    images = pictures(row)
    if "question" in row:
        question, answer = row["question"], row["answer"]
    else:
        question, answer = CAPTION_REQUEST, row["text"] if "text" in row else row["caption"]
        if not images:
            raise BadRow("a caption without a picture")
    return pictures_first([message("user", question), message("assistant", answer)], images)


# Schema -> sets of columns; a row that has all columns of one set is in that schema. The first that fits is taken.
SCHEMAS = {
    minimind_v: [{"conversations", "image_bytes"}],
    llava: [{"conversations"}],
    cauldron: [{"texts"}],
    trl: [{"messages"}],
    imagefolder: [{picture, *words} for words in CAPTION_COLUMNS for picture in PICTURE_COLUMNS],
}


def find_schema(columns) -> Callable[[dict], dict]:
    """Return the first schema that these columns fit; raise `BadRow` if there is none."""
    for schema, known in SCHEMAS.items():
        if any(needed <= set(columns) for needed in known):
            return schema
    known = "; ".join(
        f"{s.__name__} ({' or '.join(' + '.join(sorted(c)) for c in sets)})" for s, sets in SCHEMAS.items()
    )
    raise BadRow(f"columns {', '.join(columns)} fit no known schema: known are {known}")


def schema_by_name(name: str) -> Callable[[dict], dict]:
    """Return the schema of that name."""
    named = {schema.__name__: schema for schema in SCHEMAS}
    if name not in named:
        raise ValueError(f"::{name}: no such schema. Schemas are {', '.join(named)}.")
    return named[name]


def turns(value) -> list[dict]:
    """Return a conversation as a list; some files hold it as a JSON string."""
    return json.loads(value) if isinstance(value, str) else value


def as_list(value) -> list:
    """Return one picture, a list of pictures, or nothing as a list."""
    return value if isinstance(value, list) else [value] if value else []


def pictures(row: dict) -> list:
    """Return the pictures of a row: those of the first column of `PICTURE_COLUMNS` that holds any."""
    return next((found for name in PICTURE_COLUMNS if (found := as_list(row.get(name)))), [])


def message(role: str, content: str | list[dict]) -> dict:
    """Return one turn with typed content; raise `BadRow` for a role or content that no chat template knows."""
    if role not in ROLES:
        raise BadRow(f"unknown role: {role!r}. Roles are {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": ROLES[role], "content": [typed_part(part) for part in parts]}


def typed_part(part: dict) -> dict:
    """Return a part of typed content with only the keys that we use."""
    if part["type"] == "image":
        return {"type": "image"}
    if part["type"] != "text":
        raise BadRow(f"unknown content: a part of type {part['type']!r}. Parts are text and image")
    if not isinstance(part["text"], str):
        raise BadRow(f"words that are not text: {type(part['text']).__name__}")
    try:
        part["text"].encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: JSON allows it, every tokenizer raises for it
        raise BadRow(f"words that are not text: {error}") from error
    return {"type": "text", "text": part["text"]}


def drop_low_rated(row: dict, min_rating: dict[str, float]) -> dict:
    """Return a FineVision row with only the turns that `good_turns` accepts; a row without these ratings as it is.

    Args:
        min_rating: lowest value by the name of a rating: for `relevance` the column `relevance_ratings` holds one
            value per turn (FineVision: Wiedmann et al. 2025, arXiv 2510.17269).

    Raises:
        BadRow: no turn is left.
    """
    good = good_turns(row, min_rating)
    if good is None:
        return row
    texts = turns(row["texts"])
    if len(good) != len(texts):
        raise BadRow(f"ratings and turns differ in number: {len(good)} and {len(texts)}")
    if not any(good):
        raise BadRow(f"{LOW_RATING}: none of {len(texts)} turns is good enough")
    return {**row, "texts": [turn for turn, keep in zip(texts, good) if keep]}


def good_turns(row: dict, min_rating: dict[str, float]) -> list[bool] | None:
    """Say for each turn whether every rating is there and high enough; return None for a row without these ratings."""
    columns = [(row[f"{name}_ratings"], limit) for name, limit in min_rating.items() if f"{name}_ratings" in row]
    each = [[value is not None and value >= limit for value in values or []] for values, limit in columns]
    return [all(turn) for turn in zip(*each)] if each else None


def pictures_first(messages: list[dict], images: list) -> dict:
    """Return a sample whose pictures stand before the words of the first user turn."""
    for i, turn in enumerate(messages):
        if turn["role"] == "user":
            turn = {**turn, "content": [{"type": "image"}] * len(images) + turn["content"]}
            return {"images": images, "messages": [*messages[:i], turn, *messages[i + 1 :]]}
    raise BadRow("no user turn: a conversation needs a question")


def split_markers(text: str) -> list[dict]:
    """Turn "<image>\\nWhat is it?" into typed content; the chat template writes the line break behind a marker."""
    parts = []
    for i, piece in enumerate(text.split(IMAGE_MARKER)):
        parts += [{"type": "image"}] * (i > 0)
        piece = piece.removeprefix("\n") if i else piece
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def is_placeholder(image: bytes | dict) -> bool:
    """Return whether a picture is the 8 x 8 black one that MiniMind-V puts into rows without a picture."""
    with open_picture(image["bytes"] if isinstance(image, dict) else image) as picture:
        return picture.size == (8, 8) and picture.convert("L").getextrema() == (0, 0)
