"""TRL's trainers judge losses over pairs: the loss and the gradient of every factor.

TRL brings `datasets` and pandas along, so the `dev` extra does not: `pip install trl` to run these.
The trainers' own methods are called on rows that are tokenized already, on a model of transformers
under PEFT; ours are on the same weights. `python tests/test_running_preference_trl.py` prints the
table of docs/preference.md.
"""

import contextlib
import tempfile
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from preference_pairs import pair, pairs
from small_models import shake

import minilora
from minilora.data import pad
from minilora.lora.layer import lora_layers
from minilora.running import Preference

REASON = "TRL judges only where it is installed; pip install trl"
trl = pytest.importorskip("trl", reason=REASON)
with contextlib.suppress(Exception):
    import accelerate
    import peft
    import transformers

BETA = {"dpo": 0.3, "ipo": 0.2, "orpo": 0.4, "kto": 0.3, "simpo": 1.5}


def models(folder):
    """The same weights and adapter: a model of minilora, and transformers' under PEFT."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    base.lm_head.weight.data.mul_(20)
    base.save_pretrained(f"{folder}/base")
    ours = minilora.models.Llama(minilora.models.LlamaConfig.from_dict(config.to_dict()))
    ours.load_state_dict(base.state_dict())
    shake(minilora.inject(ours, r=4, alpha=6), scale=0.1)
    minilora.save(ours, f"{folder}/adapter", base_name="base")
    judge_of(base)
    theirs = peft.PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)
    return ours, theirs


def judge_of(base):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))


def made(trainer, model, **attributes):
    """A trainer without data set and tokenizer, whose methods compute losses."""
    one = trainer.__new__(trainer)
    shared = {
        "model": model, "ref_model": None, "accelerator": accelerate.Accelerator(cpu=True),
        "aux_loss_enabled": False, "is_encoder_decoder": False, "label_smoothing": 0.0,
        "precompute_ref_logps": False, "_metrics": defaultdict(lambda: defaultdict(list)),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None), "_total_train_tokens": 0,
        "_tp_size": 1, "padding_value": 0,
    }  # fmt: skip
    for name, value in {**shared, **attributes}.items():
        setattr(one, name, value)
    return one


def cut(one):
    prompt, first, _ = one.lengths
    ids = list(one.input_ids)
    return ids[:prompt], ids[prompt : prompt + first], ids[prompt + first :]


def dpo(model, data, kind):
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    loss_type = {"dpo": "sigmoid", "ipo": "ipo"}[kind]
    judge = made(
        DPOTrainer, model, beta=BETA[kind], ld_alpha=None, loss_types=[loss_type],
        f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False,
    )  # fmt: skip
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), cut(p), strict=True))
            for p in data]  # fmt: skip
    return judge._compute_loss(model, DataCollatorForPreference(0)(rows), False)


def kto(model, data, _):
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

    judge = made(KTOTrainer, model, beta=BETA["kto"], calculate_KL=True, loss_type="kto",
                 desirable_weight=1.5, undesirable_weight=0.5)  # fmt: skip
    names = ("prompt_ids", "completion_ids", "KL_completion_ids")
    rows = [{**dict(zip(names, cut(p), strict=True)), "label": p.wanted} for p in data]
    return judge._compute_loss(model, DataCollatorForUnpairedPreference(0)(rows), False)


def concatenated(one):
    prompt, *answers = cut(one)
    batch = {}
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        ids = torch.tensor([prompt + answer])
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": torch.ones_like(ids),
                  f"{name}_labels": torch.tensor([[-100] * len(prompt) + answer])}  # fmt: skip
    return batch


def orpo(model, data, _):
    """One pair at a time: TRL's likelihood term is a mean over all of a batch's tokens."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    judge = made(ORPOTrainer, model, beta=BETA["orpo"])
    losses = [judge.get_batch_loss_metrics(model, concatenated(one))[0] for one in data]
    return torch.stack(losses).mean()


def simpo(model, data, _):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    judge = made(CPOTrainer, model, beta=BETA["simpo"], loss_type="simpo", simpo_gamma=0.7,
                 alpha=0.0, cpo_alpha=0.0, pad_token_id=0)  # fmt: skip
    losses = [judge.get_batch_loss_metrics(model, concatenated(one))[0] for one in data]
    return torch.stack(losses).mean()


JUDGES = {"dpo": dpo, "ipo": dpo, "orpo": orpo, "kto": kto, "simpo": simpo}


def compare(kind, folder):
    """Return both losses and the largest difference of a gradient, relative to the largest one."""
    ours, theirs = models(folder)
    data = pairs(6, seed=3, kto=kind == "kto")
    if kind == "orpo":  # TRL's likelihood term counts prompts, ours answers: so prompts of a token
        data = [pair(prompt[:1], *answers) for prompt, *answers in map(cut, data)]
    theirs.train()
    judged = JUDGES[kind](theirs, data, kind)
    judged.backward()
    loss = Preference(kind, BETA[kind], gamma=0.7, kto_weights=(1.5, 0.5))
    loss.prepare(ours, [pad(data)])
    total, count = loss(ours, pad(data))
    (total / count).backward()
    their = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    worst = largest = 0.0
    for fqn, layer in lora_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            mine = getattr(layer.adapters["default"], factor).grad
            other = their[f"base_model.model.{fqn}.{factor}.default.weight"]
            worst = max(worst, float((mine - other).abs().max()))
            largest = max(largest, float(other.abs().max()))
    return float(total.detach() / count), float(judged.detach()), worst / largest


@pytest.mark.parametrize("kind", sorted(JUDGES))
def test_trl_agrees(kind, tmp_path):
    ours, theirs, gradient = compare(kind, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert gradient < 1e-4


if __name__ == "__main__":
    print(f"TRL {trl.__version__}\n| loss | ours | TRL | largest difference of a gradient |")
    print("|---|---|---|---|")
    for kind in JUDGES:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs, gradient = compare(kind, folder)
        print(f"| `{kind}` | {ours:.7f} | {theirs:.7f} | {gradient:.1e} |")
