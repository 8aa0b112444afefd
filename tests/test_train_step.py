"""The yardstick's own arithmetic, and that its providers are the same model."""

from contextlib import ExitStack

import pytest
import torch
from train_providers import Provider, build, providers
from train_step import COLUMNS, ratios, table, verdict


def test_a_loss_off_by_more_than_two_percent_is_wrong():
    reference = [2.0] * 10
    assert verdict([2.039] * 10, reference) == "right"
    assert verdict([2.0] * 9 + [2.041], reference) == "wrong"
    assert verdict([1.959] + [2.0] * 9, reference) == "wrong"
    assert verdict([2.0], reference) == ""  # the frozen base alone learns nothing


def test_ratios_are_of_pefts_seconds_and_a_wrong_row_has_none():
    rows = [
        {"provider": "peft f32", "seconds": "3.0"},
        {"provider": "minilora f32", "seconds": "1.5"},
        {"provider": "minilora int8 f32", "verdict": "wrong"},
    ]
    ratios(rows)
    assert rows[1]["to_peft_f32"] == "2.00"
    assert "to_peft_bf16" not in rows[1]
    assert "to_peft_f32" not in rows[2]
    assert "| minilora f32 | 1.5 |  |  | 2.00 |" in table(rows)
    assert set(rows[1]) <= set(COLUMNS)
    later = [
        {"provider": "peft f32", "seconds": "3.0", "anchor": 3.0},
        {"provider": "minilora f32", "seconds": "1.5", "anchor": 6.0},  # in a slow hour
        {"provider": "limit f32", "seconds": "1.0"},
    ]
    ratios(later)
    assert [found["to_peft_f32"] for found in later] == ["1.00", "4.00", "3.00"]
    assert set(later[1]) <= set(COLUMNS)


def test_every_provider_has_one_name():
    every = providers()
    assert len(every) == len({tuple(vars(p).items()) for p in every.values()})
    assert {"peft bf16", "peft nf4 f32", "minilora int8 f32 compiled checkpointing"} <= set(every)


@pytest.mark.peers
def test_ours_and_pefts_start_from_one_loss(monkeypatch):
    pytest.importorskip("peft")
    import train_providers

    from minilora.models import LlamaConfig
    from minilora.planning.shapes import Shape

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    monkeypatch.setattr(train_providers, "read_shape", lambda _: Shape("tiny", config, "here"))
    ids = torch.randint(0, 50, (2, 9))
    with ExitStack() as stack:
        mine, my_loss = build("tiny", Provider("minilora", "f32"), stack)
        theirs, their_loss = build("tiny", Provider("peft", "f32"), stack)
        with torch.no_grad():
            assert abs(float(my_loss(ids)) - float(their_loss(ids))) < 1e-5
    sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (mine, theirs)]
    assert sizes[0] == sizes[1]
