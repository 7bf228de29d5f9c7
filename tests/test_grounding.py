"""Words that name a place of the picture: they are found in the tokens, and attention learns to look there."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.data import ENCODER
from helpers.emoji import CONCEPTS, make_drawings
from helpers.models import TEXT, make_config, make_model
from helpers.training import CONFIG, losses, run
from minivlm.data.collators import PaddingCollator
from minivlm.data.composed import ComposedRows
from minivlm.data.encoder import IGNORE
from minivlm.data.phrases import ANSWER, Phrase, cover
from minivlm.training.grounding import attention_of_first_head, check_grounding, grounding_loss, taught_blocks
from tools.emoji.composer import Composer

NAME = "compose:helpers.composer"
DEEP = ["--model_config", CONFIG.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')]
COMPOSER = Composer(make_drawings(), CONCEPTS, set(), seed=0)
SIDE = int(ENCODER.processor.image_seq_length**0.5)
shares = st.floats(0, 1)


def composed(number: int) -> list[dict]:
    """Return encoded pictures with their questions, several of each kind."""
    rows = ComposedRows(COMPOSER, ENCODER, 8, "emoji")
    return [rows[1, (index,)] for index in range(number)]


def make_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the tensors of a micro-batch."""
    return {k: v for k, v in PaddingCollator(0)(rows).items() if isinstance(v, torch.Tensor)}


def make_decoder(blocks: int = 4):
    """Return a tiny model for `ENCODER`."""
    return make_model(make_config(text={"vocab_size": 6400, "num_hidden_layers": blocks}))


def look(model, batch: dict, **options):
    """Return the outputs of a model for a batch, with the inputs of all blocks."""
    inputs = {key: value for key, value in batch.items() if key not in ("grounding", "shift_labels")}
    return model(**inputs, output_hidden_states=True, use_cache=False, **options)


def loss_of(model, rows: list[dict]) -> torch.Tensor:
    """Return the grounding loss of rows in one batch."""
    batch = make_batch(rows)
    return grounding_loss(model, look(model, batch).hidden_states, batch)


@given(st.lists(st.tuples(shares, shares, shares, shares), max_size=3), st.integers(1, 9))
def test_a_box_covers_the_cells_whose_centres_it_holds_and_at_least_one(corners, side):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    covered = cover(boxes, side).view(side, side).bool()
    assert not boxes or covered.any()
    for (left, top, right, bottom), row, column in itertools.product(boxes, range(side), range(side)):
        x, y = (column + 0.5) / side, (row + 0.5) / side
        if left + 1e-6 < x < right - 1e-6 and top + 1e-6 < y < bottom - 1e-6:
            assert covered[row, column]
    alone = [cover([box], side).view(side, side).bool() for box in boxes]
    assert torch.equal(covered, torch.stack(alone).any(0) if alone else torch.zeros_like(covered))
    for cells, (left, top, right, bottom) in zip(alone, boxes):
        rows, columns = cells.any(1).sum(), cells.any(0).sum()
        assert rows <= max(1, (bottom - top) * side + 1) and columns <= max(1, (right - left) * side + 1)


def test_a_phrase_is_found_at_its_last_token_and_read_where_its_answer_begins():
    decode = ENCODER.tokenizer.decode
    tasks = set()
    for index in range(60):
        for sample in COMPOSER.compose(1, index):
            encoded = ENCODER(sample)
            ids, first = encoded["input_ids"], (encoded["labels"] != IGNORE).nonzero()[0, 0]
            answer = sample["messages"][1]["content"][0]["text"]
            found = encoded.get("grounding", [])
            assert len(found) == len(sample["phrases"])
            for (last, reader, *_), (text, _, is_read) in zip(found, sample["phrases"]):
                if text is None:
                    assert (last, reader) == (first - 1, ANSWER)
                    continue
                before = ids[max(0, last - 15) : last + 1]
                assert text in decode(before) and text not in decode(before[:-1])
                assert (reader == first - 1) if is_read else (reader == 0)
            read = [text for text, _, is_read in sample["phrases"] if is_read]
            names = [text for text, _, _ in sample["phrases"] if text is not None]
            assert len(read) == min(1, len(names)) and (len(names) < 2 or read == [answer])
            tasks.add((len(names), len(found)))
    assert tasks == {(0, 0), (1, 1), (1, 2), (4, 4)}


def test_what_a_phrase_covers_is_where_the_picture_shows_it():
    shown = [f for row in composed(40) for f in row["grounding"][:, 2:].sum(1).tolist()]
    assert {0, SIDE**2} <= {*shown}  # not there, or the only thing in the picture
    sample = COMPOSER.compose(1, 0)[0] | {"phrases": [Phrase("?", [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], True)]}
    sample["messages"][0]["content"][1]["text"] = "What?"
    [(_, _, *covered)] = ENCODER(sample)["grounding"].tolist()
    assert covered == [1, 0, 0, 1]


def test_a_phrase_that_the_question_lacks_is_an_error():
    sample = COMPOSER.compose(1, 0)[0] | {"phrases": [Phrase("zebra", [], True)]}
    with pytest.raises(ValueError, match="'zebra' does not stand in the question"):
        ENCODER(sample)
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a zebra?"}]},
        {"role": "assistant", "content": "no"},
    ]
    with pytest.raises(ValueError, match="one question and one answer"):
        ENCODER(sample | {"messages": sample["messages"] + turns})


def test_the_attention_of_the_first_head_is_that_of_the_model():
    model, batch = make_decoder(), make_batch(composed(5))
    model.set_attn_implementation("eager")
    outputs = look(model, batch, output_attentions=True)
    row, token = batch["grounding"][:, 0], batch["grounding"][:, 1]
    for number in taught_blocks(4):
        found = attention_of_first_head(model.model.language_model, number, outputs.hidden_states, batch, row, token)
        torch.testing.assert_close(found.exp(), outputs.attentions[number][row, 0, token])


def test_the_loss_is_that_of_attention_on_the_named_place_and_on_the_name():
    model, batch = make_decoder(), make_batch(composed(5))
    model.set_attn_implementation("eager")
    outputs, expected = look(model, batch, output_attentions=True), 0.0
    image, (search, read, answer) = model.config.image_token_id, taught_blocks(4)
    assert {*batch["grounding"][:, 2].sign().tolist()} == {-1, 0, 1}
    for row, phrase, start, *covered in batch["grounding"].tolist():
        searched = outputs.attentions[answer if start == ANSWER else search][row, 0, phrase]
        at_picture = searched[batch["input_ids"][row] == image]
        right = at_picture[torch.tensor(covered).bool()].sum() if any(covered) else 1 - at_picture.sum()
        expected -= right.log()
        if start > 0:
            expected -= outputs.attentions[read][row, 0, start, phrase].log()
    torch.testing.assert_close(grounding_loss(model, outputs.hidden_states, batch), expected, rtol=1e-4, atol=1e-3)


def test_questions_that_share_a_picture_have_the_loss_that_they_have_alone():
    model, rows = make_decoder(), ComposedRows(COMPOSER, ENCODER, 8, "emoji")
    together = loss_of(model, [rows[1, (index,)] for index in range(4)])
    alone = torch.zeros(())
    for index in range(4):
        for sample in COMPOSER.compose(1, index)[:8]:
            if sample["phrases"]:  # a row of its own has neither branches nor a mask
                alone += loss_of(model, [ComposedRows(_One(sample), ENCODER, 1, "one")[0, (0,)]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


class _One:
    """Compose one sample."""

    def __init__(self, sample: dict):
        self.sample = sample

    def compose(self, epoch: int, index: int) -> list[dict]:
        return [self.sample]


def test_attention_learns_where_to_look_and_blocks_behind_it_learn_nothing_from_it():
    model, rows = make_decoder(), composed(6)
    first = loss_of(model, rows)
    first.backward()
    blocks = model.model.language_model.layers
    assert blocks[3].self_attn.q_proj.weight.grad.any() and blocks[3].self_attn.v_proj.weight.grad is None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
    assert loss < first / 3


@pytest.mark.parametrize("option", ("--micro_batch_size", "--share_pictures"))
def test_the_loss_does_not_depend_on_how_a_step_is_cut(tmp_path, option):
    options = [*DEEP, "--grounding_loss", "0.5", "--max_steps", "3", "--batch_size", "4"]
    cut = {"--micro_batch_size": ["4", "2"], "--share_pictures": ["3", "3"]}[option]
    for value, name in zip(cut, "ab"):
        options_of = {"--micro_batch_size": "4", "--share_pictures": "3"} | {option: value}
        run(NAME, tmp_path / name, *options, *itertools.chain(*options_of.items()), "--max_bad_rows", "1")
    assert losses(tmp_path / "a", "grounding") == pytest.approx(losses(tmp_path / "b", "grounding"), abs=1e-4)


def test_a_run_reports_the_loss_and_leaves_it_out_unless_asked(tmp_path):
    options = [*DEEP, "--max_steps", "4", "--max_bad_rows", "1"]
    run(NAME, tmp_path / "with", *options, "--grounding_loss", "0.5")
    run(NAME, tmp_path / "without", *options)
    assert min(losses(tmp_path / "with", "grounding")) > 0
    with pytest.raises(KeyError):
        losses(tmp_path / "without", "grounding")
    # The first step's loss is that of the answers alone, before the other one has changed anything.
    assert losses(tmp_path / "with")[0] == pytest.approx(losses(tmp_path / "without")[0])
    assert losses(tmp_path / "with")[3] != losses(tmp_path / "without")[3]


def test_what_cannot_be_grounded_is_refused(capsys, monkeypatch):
    with pytest.raises(ValueError, match="of type minivlm_text with 2"):
        check_grounding(make_decoder(blocks=2))
    with pytest.raises(ValueError, match="of type llama"):
        check_grounding(make_model(make_config(text=TEXT | {"model_type": "llama"})))
    model = make_decoder()
    monkeypatch.setattr(type(model.config), "image_seq_length", 6)
    with pytest.raises(ValueError, match="a square grid of image tokens, not 6"):
        check_grounding(model)
    with pytest.raises(SystemExit):
        run("data/dev.parquet", "unused", "--grounding_loss", "0.5")
    assert "--grounding_loss needs --data compose:MODULE" in capsys.readouterr().err
