"""A limit on memory: passes are split before they run, by a plan that hooks confirm."""

import pytest
import torch
from training_models import Tiny, examples, factors, fit, plain, same, tiny

import minilora
from minilora.data.batches import Batches, pad
from minilora.data.packing import pack
from minilora.data.streaming import Stream
from minilora.models import GPT2, GPT2Config
from minilora.running.loss import token_loss
from minilora.training import memory_limit
from minilora.training.config import TrainConfig
from minilora.training.memory_limit import MemoryLimit
from minilora.training.state import load_state

LENGTH = 16  # all rows alike: batches of 8 are planned alike
PROCESS = 10**8  # what the process is said to hold beside the model


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """The process itself counts the same in every test."""
    monkeypatch.setattr(memory_limit, "resident", lambda: PROCESS)


def rows(count=16):
    return [{"input_ids": [(7 * i + j) % 61 for j in range(LENGTH)]} for i in range(count)]


def peak(model, count, length=LENGTH, packed=False, **changed):
    """The planned peak of passes of so many rows, in GB."""
    limit = MemoryLimit(model, 1.0, None, False)
    return limit._planned(count, length, packed, **changed).peak / 1e9


class Counting:
    """The bytes that autograd keeps of each pass, and its rows."""

    def __init__(self, monkeypatch):
        self.rows, self.kept = [], []
        monkeypatch.setattr("minilora.training.loss.token_loss", self.loss)

    def loss(self, model, batch):
        if not torch.is_grad_enabled():
            return token_loss(model, batch)
        given = [batch.input_ids, batch.labels, batch.documents]
        given = [tensor for tensor in given if tensor is not None]
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *given]}
        seen = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = token_loss(model, batch)
        self.rows.append(len(batch))
        self.kept.append(sum(storage.nbytes() for storage in seen.values()))
        return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_are_split_before_they_run_and_keep_what_was_planned(
    monkeypatch, capsys, checkpointing
):
    model, whole = tiny(), tiny()
    limit = peak(model, 2, checkpointing=checkpointing) + 1e-9
    options = {"batch_size": 8, "max_steps": 3, "checkpointing": checkpointing}
    expected = fit(whole, rows(), **options)
    counting = Counting(monkeypatch)
    got = fit(model, rows(), max_memory=limit, quiet=False, **options)
    assert counting.rows == [2] * 12  # nothing larger was tried
    planned = MemoryLimit(model, limit, None, checkpointing)._planned(2, LENGTH, False)
    assert set(counting.kept) == {planned.activations}
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    said = capsys.readouterr().err
    assert f"a micro-batch of 8 rows would take more than {limit:g} GB: from here on in pas" in said
    assert said.count("from here on in passes of") == 2  # of 4, of 2


def test_what_fits_is_not_split(monkeypatch):
    model = tiny()
    counting = Counting(monkeypatch)
    fit(model, rows(), batch_size=8, max_steps=2, max_memory=peak(model, 8) + 1e-9)
    assert counting.rows == [8, 8]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_are_planned_with_their_masks(monkeypatch, checkpointing):
    documents = [row for row in examples(40) if len(row["input_ids"]) <= LENGTH]
    packed = pack(documents, 2 * LENGTH)
    model = tiny()
    counting = Counting(monkeypatch)
    fit(model, packed, batch_size=2, max_steps=4, max_memory=9.0, checkpointing=checkpointing)
    batch = pad(packed[:2], 0)
    limit = MemoryLimit(model, 9.0, None, checkpointing)
    planned = limit._planned(2, batch.input_ids.shape[1], True).activations
    assert 0.6 * planned < max(counting.kept) <= planned


def test_resumed_run_splits_as_the_run_before_did(tmp_path, monkeypatch):
    """Bit for bit, though the process that goes on holds another amount of memory."""
    whole, half, again = (tiny(dropout=0.2) for _ in range(3))
    options = {"batch_size": 8, "schedule": "constant", "max_memory": peak(whole, 4) + 1e-9}
    ragged = examples(40)
    fit(whole, ragged, max_steps=8, **options)
    fit(half, ragged, max_steps=4, out=tmp_path, **options)
    assert load_state(tmp_path)[1]["process"] == [PROCESS - sum(
        p.nbytes for p in half.parameters())]  # fmt: skip
    monkeypatch.setattr(memory_limit, "resident", lambda: 3 * PROCESS)
    with pytest.raises(ValueError, match="one row of 16 tokens must fit in --max-memory"):
        fit(tiny(dropout=0.2), ragged, max_steps=8, **options)
    monkeypatch.setattr(memory_limit, "resident", lambda: PROCESS // 2)
    fit(again, ragged, max_steps=8, out=tmp_path, resume=True, **options)
    assert same(factors(whole), factors(again))


def deep():
    """Many blocks: running them again saves memory."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=64, n_embd=64, n_layer=16, n_head=4)
    return minilora.inject(GPT2(config), r=4, alpha=6)


def test_a_row_that_does_not_fit_is_refused_before_the_first_step(tmp_path):
    """The error says what would fit, and each of it does."""
    model = deep()
    again = peak(model, 1, checkpointing=True) + 1e-9
    assert again < peak(model, 1)
    message = (
        rf"one row of 16 tokens must fit in --max-memory {again:g} GB \(in Python: max_memory\), "
        rf"but .* what would fit: --checkpointing \(in Python: checkpointing=True\), {again:.2f} "
        rf"GB; rows of at most (\d+) tokens \(--max-length \d+\); an NF4 base "
        r"\(--quantize nf4\) and checkpointing, 0\.\d"
    )
    options = {"max_memory": again, "max_steps": 1, "batch_size": 4}
    with pytest.raises(ValueError, match=message) as error:
        fit(model, rows(), out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    fit(deep(), rows(), checkpointing=True, **options)
    shorter = int(str(error.value).split("rows of at most ")[1].split()[0])
    fit(deep(), [{"input_ids": row["input_ids"][:shorter]} for row in rows()], **options)
    longer = [{"input_ids": row["input_ids"][: shorter + 1]} for row in rows()]
    with pytest.raises(ValueError, match=f"one row of {shorter + 1} tokens must fit"):
        fit(deep(), longer, **options)


def test_a_limit_below_the_process_says_so():
    with pytest.raises(ValueError, match=r"nothing less does, so raise it to 0\.\d+$"):
        fit(tiny(), rows(), max_memory=0.01)


def test_a_streams_row_is_held_against_the_limit_as_it_comes():
    """Rows are seen as they are read; the error comes with the first that is too long."""
    short = [{"input_ids": [1, 2, 3, 4]}] * 8
    stream = Stream([*short, *rows(8)], window=8)
    limit = peak(tiny(), 1, length=8)
    with pytest.raises(ValueError, match="one row of 16 tokens must fit in --max-memory"):
        fit(tiny(), stream, max_memory=limit, max_steps=20, shuffle=False)


def test_max_memory_refuses_what_it_can_not_plan():
    with pytest.raises(ValueError, match="max_memory must be a finite number above 0, or None"):
        TrainConfig(max_memory=0)
    with pytest.raises(ValueError, match="under parallel='fsdp' all compute in step, found max_me"):
        TrainConfig(max_memory=1.0, parallel="fsdp")
    with pytest.raises(ValueError, match="plans what the model's own loss takes, found a loss of"):
        fit(tiny(), max_memory=9.0, loss=token_loss)
    other = minilora.inject(Tiny(), r=2, alpha=3, exclude=["lm_head"])
    with pytest.raises(ValueError, match="a model of minilora.models, found Tiny; leave"):
        MemoryLimit(other, 9.0, None, False)
    with pytest.raises(ValueError, match="max_memory plans for a CPU, found a model on meta"):
        MemoryLimit(plain().to("meta"), 9.0, None, False)


def test_a_batch_is_held_against_the_limit_at_its_own_length():
    model = tiny()
    limit = MemoryLimit(model, peak(model, 4, length=8) + 1e-9, None, False)
    for length, fits in ((8, True), (9, False)):
        batch = next(iter(Batches([{"input_ids": [1] * length}] * 4, batch_size=4)))
        assert limit.fits(batch) == fits
