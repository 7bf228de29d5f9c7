"""Define the fixtures that all tests share; `helpers/` makes the models and data in them."""

import os
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network tests the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: two files of tests run side by side

import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")  # a failing assertion there shows its values, too

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from PIL import Image  # noqa: E402

from helpers.browser import CHROMIUM  # noqa: E402
from helpers.data import row, write  # noqa: E402
from helpers.exports import export_once  # noqa: E402
from helpers.families import make_parts, publish  # noqa: E402
from helpers.models import make_config, make_model, make_processor, save  # noqa: E402
from helpers.release import client, hub, out, trained  # noqa: E402, F401  (fixtures of publishing)
from minivlm.commands.convert import main as convert  # noqa: E402
from minivlm.convert import onnx_graphs, to_onnx  # noqa: E402
from minivlm.inference import Assistant  # noqa: E402
from minivlm.model.loading import load_trained  # noqa: E402

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of a model that can be loaded by name."""
    save(folder := tmp_path_factory.mktemp("a model"))
    return str(folder)


@pytest.fixture(scope="module")
def assistant(tiny):
    return Assistant(*load_trained(tiny))


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory):
    """Let torch trace a model once, which takes ten seconds; who exports the same model gets the same graphs."""
    kept = tmp_path_factory.mktemp("graphs")
    with pytest.MonkeyPatch.context() as patch:
        once = partial(export_once, kept=kept, export=onnx_graphs.export)
        for module in (onnx_graphs, to_onnx):
            patch.setattr(module, "export", once)
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return a tiny model and the folder of its ONNX graphs; the model itself lies beside it, in `ours`."""
    folder = tmp_path_factory.mktemp("onnx")
    model = save(folder / "ours")
    convert(["to_onnx", str(folder / "ours"), "--out", str(folder / "out"), "--verify"])
    return model, folder / "out"


@pytest.fixture(scope="session")
def picture():
    """Return a function: `picture(seed)` draws an RGB picture that no other seed gives."""

    def draw(seed=0, size=(48, 40)) -> Image.Image:
        noise = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return Image.fromarray(noise.numpy()).resize(size)

    return draw


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Save the kinds of towers and tokenizers that MiniMind-V was trained with; see `make_parts`."""
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Return a function: `published(family)` is a folder with a tiny model of that family."""
    folder = tmp_path_factory.mktemp("published")

    def find(family):
        path = folder / family
        return path if path.exists() else publish(path, family)

    return find


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset Accelerate's state: a process trains once, but here several runs with different precision share one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def data(tmp_path):
    """Write 24 rows about 8 pictures, in both languages, to a file with MiniMind-V's columns."""
    answers = ["dog", "cat", "a red bus", "家", "yes", "no"]
    rows = [row(question=f"What is {i}?", answer=answers[i % 6], seed=i // 3) for i in range(24)]
    for i, r in enumerate(rows):
        r |= {"task": "name", "language": "en" if i % 2 else "zh"}
    return write(tmp_path / "rows.parquet", rows)


not_run = []  # slow tests; with pytest-xdist each worker counts those that it left out


# These take longest. They begin first, or one worker would be left with them at the end.
LONG = "readme training streaming to_web to_onnx publish_check uploads project".split()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_deselected(items):
    not_run.extend(item.nodeid for item in items if item.get_closest_marker("slow"))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = not_run


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    not_run.extend(getattr(node, "workeroutput", {}).get("not_run", []))


def pytest_terminal_summary(terminalreporter):
    if count := len(set(not_run)):  # each worker collects all tests
        terminalreporter.write_line(f"Not run: {count} slow tests. To run them: make test-slow (pytest -m slow)")


@pytest.fixture(scope="module")
def browser():
    """Return a Chromium of playwright's, which the tests of a module share."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()
