"""Whole models on a CUDA device: training steps beside PEFT, and a real model through the command.

Stages of `gpu.py`. The large models have random weights: time and memory don't depend on them.
`smollm2` needs the file that `minilora fetch` gets, or MODEL=FILE.

    python benchmarks/gpu_models.py ROWS.json     # the real model's examples, to carry elsewhere
"""

import contextlib
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

SMOKE = os.environ.get("SMOKE") == "1"
DEVICE = "cpu" if SMOKE else "cuda"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj")
STEPS, SECONDS = 5, 40  # of one contender, at most
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def config_of(name):
    from minilora.models import LlamaConfig
    from minilora.planning import PRESETS

    if not SMOKE:
        return PRESETS[name].config
    return LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=8192,
    )  # fmt: skip


def our_model(name, format, backend, r, targets, p):
    import minilora
    from minilora.models import Llama

    model = Llama(config_of(name), dtype=torch.bfloat16, device=DEVICE).requires_grad_(False)
    if format:
        minilora.quantize(model, format, targets=list(targets))
    minilora.inject(model, r=r, alpha=2 * r, targets=list(targets), dropout=p, backend=backend)
    return model.train()


def their_model(name, format, r, targets, p):
    """Return transformers' model with PEFT's adapters as it makes them."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    c = config_of(name)
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, use_cache=False,
        intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim, max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    model.requires_grad_(False)
    if format:
        _in_four_bits(model, targets)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=list(targets))
    return peft.get_peft_model(model, config).train()


def _in_four_bits(model, targets):
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in targets:
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False,
                compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
            )  # fmt: skip
            small.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4",
                compress_statistics=True, module=small,
            ).to(DEVICE)  # fmt: skip
            setattr(model.get_submodule(parent), last, small)


def work_of(name, targets, tokens, length):
    """Return the FLOPs of a step that no LoRA can do without: products forward and to the input."""
    c = config_of(name)
    wide, narrow = (h * c.head_dim for h in (c.num_attention_heads, c.num_key_value_heads))
    block = c.hidden_size * (2 * wide + 2 * narrow + 3 * c.intermediate_size)
    products = 4 * (block * c.num_hidden_layers + c.vocab_size * c.hidden_size)
    attention = 7 * c.num_hidden_layers * wide * length  # 2 products forward, 5 backward, half seen
    return tokens * (products + attention)


def train(net, loss_of, ids):
    """Run steps; return seconds of each, losses, and milliseconds until all was enqueued."""
    trained = [t for t in net.parameters() if t.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=not SMOKE)
    times, losses, host, begin = [], [], [], time.perf_counter()
    for _ in range(STEPS):
        _wait()
        start = time.perf_counter()
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        host.append(time.perf_counter() - start)
        _wait()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        if time.perf_counter() - begin > SECONDS and len(times) > 2:
            break
    return times, losses, 1e6 * min(host[1:])


def _wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _emptied():
    """Let go of what is left of others; return the bytes that stay."""
    torch._dynamo.reset()  # a compilation that failed holds on to its model
    gc.collect()
    if DEVICE != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure(rows, code, name, format=None, backend="torch", r=16, targets=LINEARS, p=0.1,
            batch=2, length=4096, compile=False,
            profile=False):  # fmt: skip
    """Add a row for one contender; one that fails does not end the others."""
    from minilora.planning import Settings, count_memory, read_shape
    from minilora.running.compiling import compiled

    if SMOKE:
        length, compile = 16, False
    left = _emptied()
    torch.manual_seed(0)
    what = f"{name}, {code}{' triton' if backend == 'triton' else ''}"
    row = {"format": format, "r": r, "p": p, "rows": batch, "length": length, "compiled": compile}
    try:
        if code == "minilora":
            net = our_model(name, format, backend, r, targets, p)
            loss_of = lambda ids: net.loss(ids, ids)  # noqa: E731
        else:
            net = their_model(name, format, r, targets, p)
            loss_of = lambda ids: net(input_ids=ids, labels=ids).loss  # noqa: E731
            for layer in net.base_model.model.model.layers if compile else ():
                layer.compile()
        ids = torch.randint(config_of(name).vocab_size, (batch, length), device=DEVICE)
        with compiled(net, True) if compile and code == "minilora" else contextlib.nullcontext():
            times, losses, host = train(net, loss_of, ids)
            if profile and DEVICE == "cuda":
                _profile(rows, what, lambda: loss_of(ids).backward(), **row)
        best = min(times[1:])
        tokens = batch * length
        row |= {
            "ms": 1e3 * best, "host_us": host, "tokens_s": tokens / best,
            "tflops": work_of(name, targets, tokens, length) / best / 1e12,
            "losses": " ".join(f"{v:.4f}" for v in losses), "value": f"first {times[0]:.1f} s",
        }  # fmt: skip
        if DEVICE == "cuda":
            row["peak_gb"] = (torch.cuda.max_memory_allocated() - left) / 1e9
        if code == "minilora" and not SMOKE and not compile:  # counting those takes 10 s
            settings = Settings(format=format, r=r, targets=list(targets), batch_size=batch,
                                length=length, dropout=p)  # fmt: skip
            planned = count_memory(read_shape(name), settings, gpu=True, process=0)
            row["planned_gb"] = planned.peak / 1e9
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error!s:.200}"
    rows.add(what, **row)


def fitted(rows, name, batch=2, length=4096, compile=True, deterministic=True):
    """Add a row for `fit`, which bare steps leave out: its masks, its checks and its one order."""
    import minilora

    if SMOKE:
        length, compile = 16, False
    left, marks, steps = _emptied(), [], 4 + STEPS  # layers are looked at in the first six
    row = {"r": 16, "p": 0.1, "rows": batch, "length": length, "compiled": compile}
    what = f"{name}, fit{'' if deterministic else ' in any order'}"

    class Marks:
        def on_step(self, _):
            marks.append(time.perf_counter())

    try:
        net = our_model(name, None, "torch", 16, LINEARS, 0.1)
        few = [n % 97 for n in range(length)]
        config = minilora.TrainConfig(batch_size=batch, max_steps=steps, compile=compile,
                                      deterministic=deterministic)  # fmt: skip
        data = [{"input_ids": few, "labels": few}] * (batch * steps)
        minilora.fit(net, data, config=config, callbacks=[Marks()], quiet=True)
        best = min(b - a for a, b in itertools.pairwise(marks[-STEPS:]))
        row |= {"ms": 1e3 * best, "tokens_s": batch * length / best}
        if DEVICE == "cuda":
            row["peak_gb"] = (torch.cuda.max_memory_allocated() - left) / 1e9
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error!s:.200}"
    rows.add(what, **row)


def _profile(out, what, step, **row):
    """Add what the kernels of a step take, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        _wait()
    times = [(e.self_device_time_total / 1e3, e.count, e.key) for e in found.key_averages()]
    row["value"] = "; ".join(
        f"{ms:.2f} ms {count} x {name[:70]}" for ms, count, name in sorted(times, reverse=True)[:40]
    )
    out.add(f"profile: {what}", ms=sum(ms for ms, _, _ in times), **row)


def models(rows):
    """Steps of Llama-3.1-8B as NVIDIA publishes them, and of Llama-3.2-3B as PEFT does."""
    big, small = "llama-3.1-8b", "llama-3.2-3b"
    few = {"r": 32, "targets": ATTENTION, "p": 0.0, "batch": 4, "length": 768}
    measure(rows, "minilora", big, "int8", "triton", compile=True)
    measure(rows, "minilora", big, compile=True, profile=True)
    fitted(rows, big)
    fitted(rows, big, deterministic=False)
    measure(rows, "minilora", big, "nf4", "triton", compile=True)
    measure(rows, "peft", big, compile=True)
    measure(rows, "minilora", big, profile=True)
    measure(rows, "minilora", big, "int8", "triton")
    measure(rows, "minilora", big, backend="triton")
    measure(rows, "minilora", big, backend="triton", compile=True)
    measure(rows, "minilora", small, compile=True, **few)
    measure(rows, "peft", small, compile=True, **few)
    measure(rows, "peft", big)
    measure(rows, "minilora", big, "nf4", compile=True)
    measure(rows, "minilora", big, "int8")
    measure(rows, "minilora", big, "nf4")
    measure(rows, "minilora", small, **few)
    measure(rows, "peft", small, **few)
    if _installed("bitsandbytes") and not SMOKE:
        measure(rows, "peft", big, "nf4")
    measure(rows, "peft", big, batch=1)


def _installed(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


# --- a real model


def write_examples(target):
    """Write the examples of examples/demo.py: another Python's library has other functions."""
    sys.path.insert(0, str(EXAMPLES))
    import demo

    from minilora.data import docstring_pairs, split

    tokenizer = demo.base(None, torch.float32)[1]
    (train, _), _ = demo.rows(split(docstring_pairs())["train"], tokenizer)
    test, _ = demo.test_set(tokenizer)
    found = {
        part: [{key: list(map(int, getattr(example, key))) for key in ("input_ids", "labels")}
               for example in examples]
        for part, examples in (("train", train), ("test", test))
    }  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found), encoding="utf-8")


def smollm2(rows):
    """Train the demo's task; resume, generate, merge, explain, and load the adapter on the CPU."""
    import minilora
    from minilora.loading.fetching import fetch
    from minilora.loading.model import load_model

    file = os.environ.get("MODEL") or fetch("smollm2-135m")
    given = Path(os.environ.get("ROWS", "out/gpu/rows.json"))
    if not given.exists():
        write_examples(given)
    examples = json.loads(given.read_text(encoding="utf-8"))
    train, test = examples["train"], examples["test"][: 2 if SMOKE else None]
    steps = 2 if SMOKE else 51
    folder = Path(os.environ.get("HOME", "."), f"gpu-{time.time():.0f}")

    def fresh(dtype=torch.bfloat16, device=DEVICE):
        model, tokenizer = load_model(file, dtype=dtype, device=device)
        return model, tokenizer

    for compile in (False,) if SMOKE else (True, False):
        model, tokenizer = fresh()
        torch.manual_seed(0)
        minilora.inject(model)
        _emptied()
        config = minilora.TrainConfig(
            batch_size=16, max_steps=steps, eval_every=10, eval_batch_size=64, compile=compile
        )
        out = folder / f"compiled-{compile}"
        result = minilora.fit(model, train, test, config=config, out=out, plan=True)
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0
        text = (out / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        evaluations = [line for line in lines if "eval_loss" in line]
        rows.add(
            "smollm2-135m, docstrings", compiled=compile, rows=16, ms=6e4 * result.minutes / steps,
            peak_gb=peak, losses=f"{result.before.loss:.4f} -> {result.best.loss:.4f}",
            value=f"{steps} steps in {60 * result.minutes:.1f} s, evaluating "
            f"{60 * result.evaluating:.1f} s, compiling {60 * result.compiling:.1f} s; "
            f"{json.dumps(evaluations)[:1500]}",
        )  # fmt: skip
        if compile or SMOKE:
            _command(rows, file, folder)
            _resume(rows, train, fresh, folder)
    _use(rows, model, tokenizer, test, out, fresh)


def _use(rows, model, tokenizer, test, out, fresh):
    """Add rows on what follows a run: text, merging, the same adapter on the CPU, a report."""
    import minilora

    for count in (1, 16):
        new = 4 if SMOKE else 64
        for _ in range(2):
            begin = time.perf_counter()
            minilora.generate(model, [[1, 2, 3, 4]] * count, max_new_tokens=new, stop=())
            seconds = time.perf_counter() - begin
        rows.add("smollm2-135m, generate", rows=count, tokens_s=count * new / seconds)
    del model
    found = {}
    for device in dict.fromkeys((DEVICE, "cpu")):
        model, _ = fresh(torch.float32, device)
        minilora.load(model, out)
        found[device] = minilora.evaluate(model, test[:16], batch_size=16).loss
        if device == DEVICE:
            ids = torch.tensor([test[0]["input_ids"]], device=device)
            with torch.no_grad():
                before = model.eval()(ids)
                minilora.merge(model)
                merged = model(ids)
                minilora.unmerge(model)
                same = torch.equal(model(ids), before)
            error = ((merged - before).abs().max() / before.abs().max()).item()
            rows.add("smollm2-135m, merged in f32", ok=same and error < 1e-4, y=error)
    rows.add("smollm2-135m, adapter's loss on both devices", value=json.dumps(found),
             ok=math.isclose(found[DEVICE], found["cpu"], rel_tol=1e-4))  # fmt: skip


def _resume(rows, train, fresh, folder):
    """Add whether 12 steps equal 6, saved, and 6 more in a fresh model, to the bit."""
    import minilora

    found = []
    for stops in ((2,), (1, 2)) if SMOKE else ((12,), (6, 12)):
        out = folder / f"resume-{len(stops)}"
        for until in stops:
            model, _ = fresh()
            torch.manual_seed(0)
            minilora.inject(model, dropout=0.1)
            config = minilora.TrainConfig(batch_size=16, max_steps=12 if not SMOKE else 2)
            minilora.fit(model, train, config=config, out=out, quiet=True, until=until,
                         resume=until != stops[0])  # fmt: skip
        found.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    rows.add("smollm2-135m, resumed", ok=same)


def _command(rows, file, folder):
    """Add what the command takes from its start to its end."""
    data, out = folder / "few.jsonl", folder / "command"
    data.write_text('{"prompt": "What is LoRA?", "completion": " A low-rank adapter."}\n' * 32)
    commands = {
        "train": ["train", file, "--data", data, "--out", out, "--max-steps", "5",
                  "--device", DEVICE],
        "generate": ["generate", out, "What is LoRA?", "--max-new-tokens", "8"],
        "explain": ["explain", out, "--html", folder / "page.html"],
    }  # fmt: skip
    for name, arguments in commands.items():
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "minilora", *map(str, arguments)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(done.stdout[-1500:], done.stderr[-1500:])
        seconds = time.perf_counter() - begin
        rows.add(f"minilora {name}", ok=done.returncode == 0, ms=1e3 * seconds,
                 value=(done.stderr or done.stdout).strip().splitlines()[-1][:200])  # fmt: skip


def ranks(rows):
    """One process under torchrun, over NCCL on a GPU: does it start, train and save."""
    folder = Path(os.environ.get("HOME", "."), f"ranks-{time.time():.0f}")
    folder.mkdir(parents=True)
    script = folder / "train.py"
    script.write_text(
        "import sys, torch, minilora\n"
        "from minilora.models import Llama\n"
        "from minilora.planning import PRESETS\n"
        f"m = Llama(PRESETS['smollm2-135m'].config, dtype=torch.bfloat16, device='{DEVICE}')\n"
        "m.requires_grad_(False)\n"
        "minilora.inject(m, r=8, alpha=16)\n"
        "d = [{'input_ids': list(range(i, i + 200)), 'labels': list(range(i, i + 200))}"
        " for i in range(8)]\n"
        "r = minilora.fit(m, d, config=minilora.TrainConfig(max_steps=3, parallel=sys.argv[1]),"
        " out=sys.argv[2])\n"
        "print('losses', r.losses)\n"
    )
    for kind in ("ddp", "fsdp"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", script,
                   kind, folder / kind]  # fmt: skip
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, timeout=50
        )
        print(done.stdout[-1500:], done.stderr[-1500:])
        saved = (folder / kind / "adapter_model.safetensors").exists()
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1][:200]
        rows.add(f"torchrun, {kind}", ok=done.returncode == 0 and saved, value=last)


if __name__ == "__main__":
    write_examples(sys.argv[1])
