"""A model of transformers with our adapters under Hugging Face's Trainer: it trains unchanged."""

import copy
import gc
import weakref

import pytest
import torch
from training_models import examples

import minilora
from minilora.data.batches import as_examples, pad

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
        lr_scheduler_type="constant", report_to=[], use_cpu=True, seed=3, disable_tqdm=True,
        logging_steps=1, **{"save_strategy": "no", **options},
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


IDS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_what_trainer_saves_reads_back_as_what_was_trained(tmp_path, options):
    """By transformers with PEFT, by minilora.load on the base, and by Trainer when it resumes."""
    pytest.importorskip("peft")
    done = trainer(
        minilora.inject(hf_model(), r=4, alpha=6, **options), tmp_path,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    done.train()
    expected = logits(done.model)
    done.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "checkpoint-6"):
        read = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(read), expected)
        torch.testing.assert_close(logits(minilora.load(hf_model(), folder)), expected)
    again = trainer(minilora.inject(hf_model(), r=4, alpha=6, **options), tmp_path / "more")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(logits(again.model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("eject", [False, True])
def test_a_merged_model_saves_as_a_plain_one(shake, tmp_path, eject):
    model = shake(minilora.inject(hf_model(), r=4, alpha=6))
    expected = logits(model)
    minilora.merge(model)
    if eject:
        minilora.eject(model)
        assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    read, told = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not (tmp_path / "adapter_config.json").exists()
    torch.testing.assert_close(logits(read), expected)


def test_save_pretrained_of_a_copy_writes_the_copy(shake, tmp_path):
    model = minilora.inject(hf_model(), r=4, alpha=6)
    other = shake(copy.deepcopy(model))
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(minilora.load(hf_model(), tmp_path)), logits(other))


def test_an_injected_model_goes_with_its_last_name():
    model = minilora.inject(hf_model(), r=4, alpha=6)
    weight = weakref.ref(model.lm_head.weight)
    gc.collect()
    gc.disable()  # a cycle would keep its memory until some later collection
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_save_pretrained_refuses_what_it_can_not_write(tmp_path):
    model = minilora.inject(hf_model(), r=2)
    minilora.inject(model, r=2, adapter="second")
    minilora.activate(model, ["default", "second"])
    with pytest.raises(ValueError, match="writes one active adapter, found default, second"):
        model.save_pretrained(tmp_path / "new")
    small = minilora.inject(minilora.quantize(hf_model(), "int8"), r=2)
    with pytest.raises(ValueError, match=r"needs a base in floating point.*minilora\.save"):
        small.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_pretrained_says_that_transformers_does_not_read_dora(shake, tmp_path):
    peft = pytest.importorskip("peft")
    model = shake(minilora.inject(hf_model(), r=4, alpha=6, dora=True))
    with pytest.warns(UserWarning, match="from_pretrained leaves out what DoRA learned"):
        model.save_pretrained(tmp_path)
    for load in (minilora.load, peft.PeftModel.from_pretrained):
        torch.testing.assert_close(logits(load(hf_model(), tmp_path)), logits(model))


def test_a_plain_state_loads_into_an_injected_model(shake):
    plain = hf_model()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.9)
    model = minilora.inject(hf_model(), r=2)
    told = model.load_state_dict(plain.state_dict(), strict=False)
    assert not told.unexpected_keys and all(".adapters." in key for key in told.missing_keys)
    torch.testing.assert_close(logits(model), logits(plain))
