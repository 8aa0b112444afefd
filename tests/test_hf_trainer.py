"""A model of transformers with our adapters under Hugging Face's Trainer: it trains unchanged."""

import pytest
import torch
from test_training import examples

import minilora
from minilora.data import as_examples, pad

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.peers


def hf_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def collate(rows):
    batch = pad(as_examples(rows))
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else (
        batch.attention_mask.long()
    )  # fmt: skip
    return {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": mask}


def trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no", seed=3,
        disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(24), data_collator=collate
    )


def test_trainer_trains_an_injected_model(tmp_path):
    model = hf_model()
    plain = {name: p.clone() for name, p in model.named_parameters()}
    minilora.inject(model, r=4, alpha=6)
    done = trainer(model, tmp_path)
    done.train()
    losses = [row["loss"] for row in done.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert ".adapters." in name and parameter.any(), name
        else:
            assert torch.equal(parameter, plain[name.replace(".base.", ".")]), name


def test_trainer_computes_what_peft_computes(tmp_path):
    """The same factors under PEFT and the same Trainer end the same."""
    peft = pytest.importorskip("peft")
    ours, theirs = hf_model(), hf_model()
    minilora.inject(ours, r=4, alpha=6, targets=["q_proj", "up_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(theirs, config)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                layer, _, which = name.removeprefix("base_model.model.").partition(".lora_")
                parameter.copy_(mine[f"{layer}.adapters.default.lora_{which[0]}"])
    first, second = trainer(ours, tmp_path / "a"), trainer(theirs, tmp_path / "b")
    first.train()
    second.train()
    a, b = (
        [row["loss"] for row in each.state.log_history if "loss" in row] for each in (first, second)
    )
    assert a == pytest.approx(b, rel=1e-4)


def test_trainer_with_checkpointing_and_accumulation(tmp_path):
    """The options that change how the model is called."""
    losses = []
    for options in ({}, {"gradient_checkpointing": True}):
        model = minilora.inject(hf_model(), r=4, alpha=6)
        done = trainer(model, tmp_path, gradient_accumulation_steps=2, **options)
        done.train()
        losses.append([row["loss"] for row in done.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
