"""Hold what the page says, in English and Chinese."""

LANGUAGES = {"English": "en", "中文": "zh"}  # as the page shows them -> keys of SENTENCES
NAME_QUESTION = {"en": "What is this? Answer with the name.", "zh": "这是什么？只回答名称。"}
SENTENCES = {
    "en": {
        "intro": "Give one or more pictures and ask a question. Without a question, the model names what it sees. "
        "Later questions know the earlier ones.",
        "chat": "Conversation",
        "box": "Ask about the pictures.",
        "stop": "Stop",
        "reset": "New conversation",
        "names": "Likeliest names of the newest picture",
        "temperature": "Temperature",
        "temperature_info": "0: the likeliest answer; the higher, the more answers vary.",
        "length": "Longest answer, in tokens",
        "examples": "Examples",
        "empty": "Write a question, or give a picture.",
        "busy": "An answer is being written. Stop it, or wait for its end.",
        "error": "This did not work: {}",
    },
    "zh": {
        "intro": "给出一张或多张图片，然后提问。不写问题时，模型说出它看到的东西的名称。后面的问题知道前面的对话。",
        "chat": "对话",
        "box": "就图片提问。",
        "stop": "停止",
        "reset": "新对话",
        "names": "最新图片最可能的名称",
        "temperature": "温度",
        "temperature_info": "0：可能性最大的回答；越高，回答变化越多。",
        "length": "回答的最大长度（词元）",
        "examples": "例子",
        "empty": "请写一个问题，或者给出一张图片。",
        "busy": "正在写回答。请停止它，或者等它写完。",
        "error": "没有成功：{}",
    },
}
# Pictures of data/examples with a question in both languages.
EXAMPLES = [
    (["pig-face.png"], NAME_QUESTION),
    (["blue-square.png"], {"en": "What is its main color?", "zh": "它的主要颜色是什么？"}),
    (["purple-heart.png"], NAME_QUESTION),
    (["horse.png"], {"en": "What kind of thing is this?", "zh": "这属于哪一类？"}),
]


def preferred(header: str | None) -> str:
    """Return the key of the language that a browser's header Accept-Language names first: "zh" or "en"."""
    return "zh" if (header or "").strip().lower().startswith("zh") else "en"
