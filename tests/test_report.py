"""`minilora.explain` as a whole: what it returns, prints and writes, and what it refuses."""

import json
import math
import re
import statistics

import pytest
import torch
from report_models import ALL, Letters, causal, filled, kinds, sentences

import minilora
from minilora.data.batches import Batches
from minilora.lora.layer import lora_layers
from minilora.report.explanation import Explanation, median_energy, percent
from minilora.report.subspace import truncate
from minilora.running.evaluation import evaluate


@pytest.fixture(scope="module")
def model():
    made = causal()
    minilora.inject(made, r=2, alpha=3, adapter="v2", targets=["q_proj"], dtype=torch.float64)
    return filled(made, "v2", seed=2)


@pytest.fixture(scope="module")
def found(model):
    """Everything at once."""
    return minilora.explain(
        model, "default", data=sentences(6), train=sentences(4, seed=1), words=["b"],
        outside=sentences(3, seed=2), against="v2", tokenizer=Letters(), keep=0.8, batch_size=4,
        top=3, ablate_examples=4,
    )  # fmt: skip


def test_explain_without_data_reads_the_weights(snapshot, same):
    model = kinds()
    minilora.activate(model, None)
    before = snapshot(model)
    found = minilora.explain(model)
    same(before, snapshot(model))
    assert isinstance(found, Explanation) and found.adapter == "default"
    assert [(v.name, v.block, v.kind) for v in found.layers] == [(n, None, n) for n in ALL]
    assert found.behaviour is found.gap is found.forgetting is found.comparison is None
    assert found.copies == ()
    ranks = {v.name: v.suggested_r for v in found.layers}
    minilora.delete(model, "default")
    r, pattern = found.suggestion
    minilora.inject(model, r=r, rank_pattern=pattern, targets=ALL)
    assert {n: layer.adapters["default"].r for n, layer in lora_layers(model).items()} == ranks


def test_explain_with_data_measures_the_adapter_alone(model, found):
    minilora.activate(model, "default")
    on = evaluate(model, sentences(6))
    with minilora.disabled(model):
        off = evaluate(model, sentences(6))
        outside = evaluate(model, sentences(3, seed=2))
        train = evaluate(model, sentences(4, seed=1))
    loss = found.behaviour.loss
    assert (loss.before, loss.after) == pytest.approx((off.loss, on.loss), rel=1e-6)
    assert (loss.tokens, loss.examples) == (on.tokens, 6)
    assert found.forgetting.before == pytest.approx(outside.loss, rel=1e-6)
    assert found.gap.train.before == pytest.approx(train.loss, rel=1e-6)
    assert found.gap.valid == loss
    changes = torch.cat(found.behaviour.token_losses[1]) - torch.cat(
        found.behaviour.token_losses[0]
    )
    assert found.behaviour.better == pytest.approx(float((changes < 0).double().mean()))
    assert 1 <= len(found.behaviour.helped) <= 3 and 1 <= len(found.behaviour.hurt) <= 3
    assert len(found.behaviour.examples) == 3
    whole = found.behaviour.ablations[0]
    some = [sentences(6)[i] for i in (0, 1, 3, 4)]
    assert whole.alone == pytest.approx(evaluate(model, some).loss, rel=1e-6)
    assert found.behaviour.ablated == (4, evaluate(model, some).tokens)
    assert [v.name for v in found.comparison.layers] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert len(found.behaviour.attention.before) == 2
    assert found.behaviour.attention.words == ("b",)


def test_explain_measures_the_truncated_adapter(model, found):
    ranks = {v.name: v.suggested_r for v in found.layers}
    truncate(model, "default", "small", ranks=ranks)
    minilora.activate(model, "small")
    assert found.behaviour.truncated == pytest.approx(evaluate(model, sentences(6)).loss, rel=1e-6)
    minilora.delete(model, "small")
    assert found.truncation.error == pytest.approx(found.predicted_error, abs=1e-9)


def test_explain_with_data_leaves_the_model_as_it_was(snapshot, same):
    model = causal()
    minilora.inject(model, r=2, alpha=3, adapter="v2", targets=["q_proj"], dtype=torch.float64)
    minilora.activate(model, ["v2", "default"])
    model.train()
    before = snapshot(model)
    minilora.explain(model, "default", data=sentences(2), words="b", tokenizer=Letters())
    same(before, snapshot(model))


@pytest.mark.parametrize("options", [{"dora": True}, {"bias": "all"}, {"lora_bias": True}])
def test_explain_of_more_than_a_product_has_no_truncation(options):
    model = causal(**options)
    for layer in lora_layers(model).values():
        if layer.adapters["default"].lora_bias is not None:
            layer.adapters["default"].lora_bias.data += 1
    copies = minilora.lora.Survey(model).copies_of("default")
    for value in copies.values():
        value.data += 2
    found = minilora.explain(model, data=sentences(2), ablate_examples=0)
    assert found.truncation is found.behaviour.truncated is None
    assert found.behaviour.ablations == () and found.behaviour.ablated == (0, 0)
    assert [copy.name for copy in found.copies] == list(copies)
    for copy in found.copies:
        assert copy.norm == pytest.approx(2 * math.sqrt(copies[copy.name].numel()))
    assert json.loads(json.dumps(found.to_dict()))["truncation_error"] is None


def test_explanation_prints_tables(found):
    text = str(found)
    for line in (
        "adapter default", "module ", "helped most", "hurt most", "whole adapter", "block 1",
        "mlp.2", "default / v2", "held-out data: loss ", "held-out loss at the suggested ranks",
        "outside the task", "over-fitted", "attention on b:", "intruder dimensions:",
        "% of every layer's energy", "energy that the median layer keeps at rank 1, 2, …: ",
        "suggested: r=",
    ):  # fmt: skip
        assert line in text, line
    assert re.search(r"^layers\.\d\.\S+ +3 ", text, re.M)
    r, pattern = found.suggestion
    assert len(pattern) == 1
    assert text.endswith(
        f"suggested: r={r}, and another rank for 1 layer (--html and --json list them; --truncate "
        "FOLDER writes the adapter so)"
    )


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "–"), (0.00512, "0.512 %"), (1.0, "100 %"), (14.26, "1,426 %"), (math.inf, "inf %")],
)
def test_percent_writes_no_exponents(share, text):
    assert percent(share) == text


def test_one_rank_for_every_layer_is_said_without_a_pattern():
    model = minilora.inject(torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(3)]), r=1)
    assert str(minilora.explain(filled(model))).endswith("suggested: r=1 on every layer")


def test_median_energy_is_over_layers_of_any_rank(found):
    shares = median_energy(found.layers)
    assert len(shares) == max(len(layer.singular_values) for layer in found.layers)
    for k, share in enumerate(shares):
        kept = []
        for layer in found.layers:
            squares = [s * s for s in layer.singular_values]
            kept.append(sum(squares[: k + 1]) / sum(squares))
        assert share == pytest.approx(statistics.median(kept))
    assert shares[-1] == pytest.approx(1)


def test_explanation_prints_the_most_changed_of_many_layers():
    model = minilora.inject(torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(14)]), r=1)
    text = str(minilora.explain(filled(model)))
    assert "… the 12 most changed of 14 layers" in text


def test_explanation_writes_json_that_holds_everything(found, tmp_path):
    file = found.to_json(tmp_path / "report.json")
    read = json.loads(file.read_text(encoding="utf-8"))
    assert read == found.to_dict()
    assert read["layers"][0]["energy"][-1] == 1.0
    assert read["layers"][0]["suggested_r"] == found.layers[0].suggested_r
    assert read["suggestion"]["r"] == found.suggestion[0]
    assert read["behaviour"]["ablations"][0]["part"] == "whole adapter"
    assert read["behaviour"]["helped"][0]["token"] == found.behaviour.helped[0].token
    assert read["gap"]["overfitted"] == found.gap.overfitted
    assert "token_losses" not in read["behaviour"]


@pytest.mark.parametrize("number", [1, 2])
def test_explain_is_sure_of_nothing_on_a_few_examples(number, model, tmp_path):
    some = sentences(3 * number)
    found = minilora.explain(
        model, "default", data=some[:number], train=some[number : 2 * number],
        outside=some[2 * number :],
    )  # fmt: skip
    whole = minilora.explain(model, "default", data=sentences(10), ablate_examples=10)
    assert found.forgetting.change != 0 and not found.forgetting.clear
    assert not found.gap.overfitted
    text = str(found)
    assert "outside the task (can't tell): loss" in text
    assert "over-fitted or not, can't tell: the gap" in text
    assert "can&#x27;t tell" in found.to_html(tmp_path / "a.html").read_text()
    page = found.to_html(tmp_path / "b.html").read_text()
    few = "fewer than 10 examples are too few to tell"
    assert f"tokens; {few}\nheld-out loss at" in text and text.count(few) == 3
    assert f"likelier; {few}</span>" in page and f"tokens): {few}. Left" in page
    assert "±" not in text and "±" not in page and few not in str(whole)
    assert "±" in str(whole) and "±" in whole.to_html(tmp_path / "c.html").read_text()
    read = json.loads(found.to_json(tmp_path / "a.json").read_text())
    assert read["forgetting"]["clear"] is False
    assert (read["forgetting"]["error"] is None) == (number == 1)


def test_explanation_writes_null_for_what_is_infinite():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model[0].weight.data.zero_()
    found = minilora.explain(filled(minilora.inject(model, r=1)))
    assert found.layers[0].relative == math.inf
    assert found.to_dict()["layers"][0]["relative"] is None
    assert "–" in str(found)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapter": "v9"}, ValueError, "there is no adapter 'v9'; this model has: default, v2"),
        ({"against": "v9"}, ValueError, "there is no adapter 'v9'; this model has: default, v2"),
        ({"against": "default"}, ValueError, "against must name another adapter than 'default'"),
        ({"keep": 1.1}, ValueError, "keep must lie in (0, 1]"),
        ({"top": -1}, ValueError, "top must be a whole number of at least 0, found -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1"),
        ({"ablate_examples": 2.5}, ValueError, "ablate_examples must be a whole number"),
        ({"largest": True}, ValueError, "largest must be a whole number"),
        ({"words": ["b"]}, ValueError, "words needs data, the held-out examples to measure on"),
        ({"train": sentences()}, ValueError, "train needs data, the held-out examples"),
        ({"data": []}, ValueError, "data must hold at least one example, found none"),
        ({"data": "text"}, TypeError, "data must be a sequence of examples, found str"),
        ({"data": [[1]]}, TypeError, "example 0 must have input_ids"),
        ({"data": sentences(), "words": ["b"]}, ValueError, "words need a tokenizer"),
        (
            {"data": sentences(), "words": ["bbbbbbbbb"], "tokenizer": Letters()},
            ValueError,
            "words must occur in the data",
        ),
    ],
)
def test_explain_says_what_is_wrong_and_changes_nothing(
    model, arguments, error, message, snapshot, same
):
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(message)):
        minilora.explain(model, **({"adapter": "default"} | arguments))
    same(before, snapshot(model))


def test_explain_needs_finite_unmerged_adapters():
    with pytest.raises(ValueError, match=r"explain\(\) needs a model with adapters"):
        minilora.explain(torch.nn.Linear(2, 2))
    model = causal()
    minilora.merge(model)
    with pytest.raises(RuntimeError, match=r"explain\(\) needs unmerged weights"):
        minilora.explain(model)
    minilora.unmerge(model)
    lora_layers(model)["layers.1.q_proj"].adapters["default"].lora_A.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="must be finite, found NaN or Inf on layers.1.q_proj"):
        minilora.explain(model)


def test_explain_says_on_stderr_what_it_does(capsys):
    minilora.explain(causal(), data=sentences(2), progress=True)
    said = capsys.readouterr().err
    for line in (
        r"reading layers.1.q_proj, layer \d+ of \d+\n",
        r"held-out data without the adapter; about \d",
        r"ablation 3 of 7; about \d+ s left\n", "the adapter at the suggested ranks\n",
        r"ablation 7 of 7; about 0 s left\n",
    ):  # fmt: skip
        assert re.search(line, said), line
    minilora.explain(causal(), data=Batches(sentences(2), batch_size=1))
    assert capsys.readouterr().err == ""


@pytest.mark.peers
def test_explain_reads_transformers_models():
    """A GPT-2 of theirs: Conv1D layers, a tied head, attention through SDPA."""
    from transformers import GPT2Config, GPT2LMHeadModel  # seconds to import

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    minilora.inject(model, r=2, alpha=3)
    filled(model, scale=0.2)
    found = minilora.explain(model, data=sentences(5), words="b", tokenizer=Letters())
    on = evaluate(model, sentences(5))
    assert found.behaviour.loss.after == pytest.approx(on.loss, rel=1e-5)
    assert {v.kind for v in found.layers} == {
        "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"
    }  # fmt: skip
    assert [v.shape for v in found.layers[:2]] == [(24, 8), (8, 8)]
    assert len(found.behaviour.attention.after) == 2


def test_a_log_gets_a_line_in_so_many_seconds_at_most(capsys, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    minilora.explain(causal(), data=sentences(2), progress=5.0)
    seconds = next(now)
    few = [line for line in capsys.readouterr().err.splitlines() if line]
    minilora.explain(causal(), data=sentences(2), progress=True)
    whole = [line for line in capsys.readouterr().err.splitlines() if line]
    assert 0 < len(few) <= seconds // 5 and len(few) < len(whole) // 3
    told, all_told = ({line.split(";")[0] for line in lines} for lines in (few, whole))
    assert told < all_told
