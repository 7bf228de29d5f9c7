"""Score answers that are places: a point is right inside the true box, a box if it shares enough of its area.

Places are in per cent of the picture's width and height, from the top left corner: a point is "37,62", a box is
"12,40,55,88" (left, top, right, bottom).
"""

import re

IOU = 0.5  # smallest IoU of an answered box with the true box that counts as right
RULES = {"point": "point in box", "box": f"IoU of at least {IOU}"}  # task -> what counts as right
NUMBERS = {"point": 2, "box": 4}  # task -> numbers in an answer


def read_numbers(text: str, count: int) -> tuple[int, ...] | None:
    """Return `count` numbers from 0 to 100 that are separated by English or Chinese commas.

    Return None for any other text.
    """
    parts = re.split(r"\s*[,，]\s*", text.strip().rstrip(".。"))
    if len(parts) != count or not all(re.fullmatch(r"\d{1,3}", part) and int(part) <= 100 for part in parts):
        return None
    return tuple(map(int, parts))


def iou(a: tuple, b: tuple) -> float:
    """Return the area that two boxes share, divided by the area of their union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum(max(c[2] - c[0], 0) * max(c[3] - c[1], 0) for c in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def is_in_place(task: str, output: str, box) -> bool:
    """Return whether the answer to `point` lies in the true box, or that to `box` has an IoU of at least 0.5 with it.

    A point on the edge of the box is right. An answer that is not two or four numbers is wrong.
    """
    numbers = read_numbers(output, NUMBERS[task])
    if numbers is None:
        return False
    if task == "box":
        return iou(numbers, box) >= IOU
    left, top, right, bottom = box
    return left <= numbers[0] <= right and top <= numbers[1] <= bottom


def check_box(task: str, reference: str, box) -> None:
    """Raise ValueError if a row's box is none, or if the row's own answer is wrong by it."""
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 100 and 0 <= box[1] < box[3] <= 100):
        raise ValueError(
            f"the box {box} is not left, top, right and bottom in per cent of the picture, from 0 to 100. "
            "Divide pixels by the picture's width and height."
        )
    if not is_in_place(task, reference, box):
        raise ValueError(f"the answer {reference!r} is wrong by the row's own box {box}. Mend one of them.")
