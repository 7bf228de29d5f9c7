"""Fixtures of the tests; what they are made of stands in `tiny.py`."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network tests the network

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import make_config, make_model, make_processor  # noqa: E402

torch.set_num_threads(1)  # a model this small only waits for further threads


@pytest.fixture
def config():
    return make_config()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def picture():
    """`picture(seed)`: an RGB picture that no other seed gives."""

    def draw(seed=0, size=(48, 40)) -> Image.Image:
        noise = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return Image.fromarray(noise.numpy()).resize(size)

    return draw


not_run = []


def pytest_deselected(items):
    not_run.extend(item for item in items if item.get_closest_marker("slow"))


def pytest_terminal_summary(terminalreporter):
    if not_run:
        terminalreporter.write_line(
            f"Not run: {len(not_run)} slow tests. To run them: make test-slow (pytest -m slow)"
        )
