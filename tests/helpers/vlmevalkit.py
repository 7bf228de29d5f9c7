"""Run VLMEvalKit: python tests/helpers/vlmevalkit.py FOLDER OPTIONS.

FOLDER is a checkout of it, and OPTIONS are those of its run.py. At its start it imports all its models and benchmarks,
and with them the packages of each. Our test uses none of those in `UNUSED`, and some are large: in their place
VLMEvalKit gets classes without content. All of its own code is as it is.
"""

import builtins
import runpy
import sys

UNUSED = (
    "Levenshtein", "av", "boto3", "botocore", "cv2", "decord", "imageio", "jieba", "joblib", "json_repair",
    "math_verify", "pylatexenc", "qwen_vl_utils", "rouge", "scipy", "sklearn", "torchvision",
)  # fmt: skip


class Anything(type):
    """Give a class every attribute that is asked for: each is again a class without content."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


def replace_unused() -> None:
    """Give modules of VLMEvalKit, and no others, a class without content for each package in `UNUSED`."""
    plain = builtins.__import__

    def replacing(name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {}).get("__name__", "").partition(".")[0]
        if importer == "vlmeval" and level == 0 and name.partition(".")[0] in UNUSED:
            return Anything(name, (), {})
        return plain(name, globals, locals, fromlist, level)

    builtins.__import__ = replacing


if __name__ == "__main__":
    folder = sys.argv.pop(1)
    sys.path[0] = folder
    replace_unused()
    runpy.run_path(f"{folder}/run.py", run_name="__main__")
