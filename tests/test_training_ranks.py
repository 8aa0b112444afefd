"""Several processes: torch's DDP and FSDP2 on gloo give the single process's numbers."""

import functools
import json
import os
import pathlib
import signal
import time

import pytest
import torch
from fork_train import Forks
from safetensors.torch import load_file
from sweeps import wide
from test_cli import tiny_folder
from torch import nn
from training_models import examples, fit, plain, tiny

import minilora
from minilora.cli.command import main
from minilora.loading.model import load_model
from minilora.loading.saving import save_pretrained
from minilora.models import LlamaConfig
from minilora.planning.machines import forget_peak, peak_bytes
from minilora.running.loss import token_loss
from minilora.training.ranks import Ranks, start
from minilora.training.sharding import is_sharded, shard, sharded
from minilora.training.state import load_state

OPTIONS = {"batch_size": 5, "accumulate": 2, "max_steps": 6, "lr": 1e-2, "schedule": "constant",
           "warmup": 0.0, "eval_every": 2, "log_every": 2}  # fmt: skip


def model_of(base, dropout=0.0):
    model = tiny(dropout=dropout)
    if base == "nf4":
        minilora.quantize(model, "nf4", block_size=32)
    if base == "int8":
        minilora.quantize(model, "int8", compute="dequantize")
    if base == "bfloat16":
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()
    return model


def train(out, kind, base="float32", dropout=0.2, steps=6, resume=False, sleep=0.0, **more):
    """What every process does; the first one writes down what it saw."""
    torch.set_num_threads(1)
    model = model_of(base, dropout)
    dtype = "auto" if base == "bfloat16" else "float32"
    options = {**OPTIONS, "max_steps": steps, "dtype": dtype, **more}

    class Wait:
        def on_step(self, row):
            time.sleep(sleep)

    result = fit(model, examples(23), valid=examples(7, seed=1), out=out, resume=resume,
                 parallel=kind, callbacks=[Wait()], **options)  # fmt: skip
    told = {"losses": result.losses, "before": result.before.loss, "best": result.best.loss,
            "tokens": result.tokens, "stopped": result.stopped}  # fmt: skip
    if kind == "fsdp":
        assert is_sharded(model)
        told["bytes"] = sum(p.to_local().nbytes for p in model.parameters())
    if os.environ.get("RANK", "0") == "0":
        (pathlib.Path(out) / "told.json").write_text(json.dumps(told))


def adapters(out):
    return {where: load_file(out / where / "adapter_model.safetensors") for where in (".", "last")}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    made = Forks(place / "log.txt", command_in(place)(place / "warm"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def go(forks, tmp_path_factory):
    """Run `train` in so many processes and return what the first one told, and its folder."""

    def run(ranks, out=None, **options):
        out = out or tmp_path_factory.mktemp("out") / "run"
        forks.start_ranks("test_training_ranks:train", ranks, out=str(out), **options)
        codes = forks.codes()
        assert set(codes) == {0}, forks.said()
        return json.loads((out / "told.json").read_text()), out

    return run


@pytest.fixture(scope="module")
def alone(go):
    """The same run in one process without torch.distributed, by base."""
    known = {}

    def get(base):
        if base not in known:
            known[base] = go(1, kind=None, base=base)
        return known[base]

    return get


def close(told, expected, tolerance):
    assert told["tokens"] == expected["tokens"] and len(told["losses"]) == len(expected["losses"])
    assert told["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    for key in ("before", "best"):
        assert told[key] == pytest.approx(expected[key], rel=tolerance)


@pytest.mark.parametrize(
    ("kind", "ranks", "base"),
    [("ddp", 2, "float32"), ("fsdp", 2, "float32"), ("fsdp", 4, "float32"), ("ddp", 2, "nf4"),
     ("fsdp", 2, "nf4"), ("fsdp", 2, "int8"),
     wide("ddp", 4, "int8"), wide("fsdp", 4, "nf4")],
)  # fmt: skip
def test_ranks_give_the_single_processs_losses(go, alone, kind, ranks, base):
    """Ragged rows, unequal tokens, batches with fewer rows than ranks, dropout, evaluations.

    Four processes take turns on two cores: some 6 s.
    """
    expected, whole = alone(base)
    told, out = go(ranks, kind=kind, base=base)
    close(told, expected, 1e-5)
    for where, tensors in adapters(whole).items():
        for key, value in adapters(out)[where].items():
            torch.testing.assert_close(value, tensors[key], rtol=1e-3, atol=2e-5)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    alone_rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for row, other in zip(rows, alone_rows, strict=True):
        assert row.keys() == other.keys()
        if "loss" in row:
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        if "b_norm" in row:
            assert row["b_norm"] == pytest.approx(other["b_norm"], rel=1e-3)


def test_ranks_compute_a_bfloat16_base_to_its_rounding(go, alone):
    """Factors stay in float32 beside frozen bfloat16 weights in one block."""
    told, _ = go(2, kind="fsdp", base="bfloat16", dropout=0.0)
    expected, _ = go(1, kind=None, base="bfloat16", dropout=0.0)
    close(told, expected, 1e-2)


def compiled_train(out, kind, compile=True):
    """Without Inductor, whose C++ compiler takes its time: traced alike, run as it is."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="eager")
    model = minilora.inject(plain(depth=1), r=2, alpha=3, targets=["q_proj", "down_proj"])
    options = {"max_steps": 2, "batch_size": 5, "shuffle": False, "compile": compile}
    result = fit(model, examples(10), out=out, parallel=kind, **options)
    if os.environ.get("RANK", "0") == "0":
        saved = load_state(pathlib.Path(out))[1]["identity"]["config"]
        assert saved["compile"] is compile
        (pathlib.Path(out) / "told.json").write_text(json.dumps(result.losses))


@pytest.mark.parametrize("kind", [wide("ddp"), "fsdp"])
def test_ranks_compile_their_blocks(forks, tmp_path, kind):
    """FSDP2's hooks gather a block's weights before its compiled part.

    Some 10 s: each of the processes imports and traces for itself.
    """
    for ranks, options in ((1, {"kind": None, "compile": False}), (2, {"kind": kind})):
        out = str(tmp_path / str(ranks))
        forks.start_ranks("test_training_ranks:compiled_train", ranks, out=out, **options)
        assert set(forks.codes()) == {0}, forks.said()
    told = [json.loads((tmp_path / f"{n}" / "told.json").read_text()) for n in (1, 2)]
    assert told[1] == pytest.approx(told[0], rel=1e-5)


def drawing(out, kind, what):
    """Every rank draws factors of its own, as a script that seeds by rank does."""
    torch.set_num_threads(1)
    model = plain()
    torch.manual_seed(5 + int(os.environ.get("RANK", "0")))
    init = "pissa_niter_1" if what == "offset" else "kaiming"
    minilora.inject(model, r=4, alpha=6, init=init)
    for name, parameter in model.named_parameters():
        if what == "frozen" and name.endswith("lora_A"):
            parameter.requires_grad = False
    result = fit(model, examples(23), out=out, parallel=kind, **OPTIONS | {"eval_every": None})
    if os.environ.get("RANK", "0") == "0":
        (pathlib.Path(out) / "told.json").write_text(json.dumps(result.losses))


@pytest.mark.parametrize(
    ("kind", "what"),
    [("ddp", "frozen"), wide("ddp", "offset"), wide("fsdp", "frozen"), ("fsdp", "offset")],
)
def test_ranks_train_on_what_the_first_one_drew(forks, tmp_path, kind, what):
    for one, ranks in ((None, 1), (kind, 2)):
        out = str(tmp_path / str(one))
        forks.start_ranks("test_training_ranks:drawing", ranks, out=out, kind=one, what=what)
        assert set(forks.codes()) == {0}, forks.said()
    told = [json.loads((tmp_path / f"{k}" / "told.json").read_text()) for k in (None, kind)]
    assert told[1] == pytest.approx(told[0], rel=1e-5)


class Resting(nn.Module):
    """`never` is not called at all, `early` in the first two steps alone, then it comes back."""

    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(61, 8), nn.Linear(8, 61)
        self.never, self.early, self.always = (nn.Linear(8, 8) for _ in range(3))
        self.calls = 0

    def forward(self, input_ids):
        x = self.always(self.embed(input_ids))
        self.calls += 1
        return self.lm_head(x if 2 < self.calls < 7 else x + self.early(x))


def rest(out, kind):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = minilora.inject(Resting(), r=2, alpha=3)
    result = fit(
        model,
        examples(23),
        out=out,
        parallel=kind,
        **OPTIONS | {"batch_size": 4, "accumulate": 1, "max_steps": 9, "eval_every": None},
    )
    if os.environ.get("RANK", "0") == "0":
        (pathlib.Path(out) / "told.json").write_text(json.dumps(result.losses))


def test_a_layer_that_rests_on_all_ranks_stays_as_it_is(forks, tmp_path):
    """Without a gradient AdamW leaves it alone; zeros would move it by its moments."""
    for kind, ranks in ((None, 1), ("ddp", 2)):
        out = tmp_path / str(kind)
        forks.start_ranks("test_training_ranks:rest", ranks, out=str(out), kind=kind)
        assert set(forks.codes()) == {0}, forks.said()
    told = [json.loads((tmp_path / f"{k}" / "told.json").read_text()) for k in (None, "ddp")]
    assert told[1] == pytest.approx(told[0], rel=1e-6)


def test_fsdp_recomputes_activations_with_the_same_masks(go, alone):
    """Checkpointing gathers each block once more, and dropout draws what it drew."""
    told, _ = go(2, kind="fsdp", checkpointing=True)
    close(told, alone("float32")[0], 1e-5)


@pytest.mark.parametrize("ranks", [2, wide(4)])
def test_fsdp_gives_each_rank_its_part_of_the_bytes(go, ranks):
    whole = sum(p.nbytes for p in model_of("int8").parameters())
    told, _ = go(ranks, kind="fsdp", base="int8", steps=1)
    assert whole / ranks <= told["bytes"] < 1.2 * whole / ranks  # shards are padded


def test_a_run_goes_on_from_four_to_two_to_one(go, alone, tmp_path):
    expected, whole = alone("float32")
    out = tmp_path / "run"
    parts = [go(4, out=out, kind="fsdp", steps=2), go(2, out=out, kind="ddp", steps=4, resume=True),
             go(1, out=out, kind=None, steps=6, resume=True)]  # fmt: skip
    losses = [loss for told, _ in parts for loss in told["losses"]]
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    saved, same = load_state(out)[0], load_state(whole)[0]
    assert saved.keys() == same.keys()
    for key, value in saved.items():
        torch.testing.assert_close(value, same[key], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_same_number_of_ranks_resumes_bit_equal(go, tmp_path, kind):
    _, whole = go(2, kind=kind)
    out = tmp_path / "run"
    go(2, out=out, kind=kind, steps=3)
    go(2, out=out, kind=kind, steps=6, resume=True)
    for where, tensors in adapters(whole).items():
        for key, value in adapters(out)[where].items():
            assert torch.equal(value, tensors[key]), key


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_run_with_a_state_to_go_on_from(forks, go, alone, tmp_path, kind):
    out = tmp_path / "run"
    forks.log.write_text("")
    call = {"out": str(out), "kind": kind, "sleep": 0.1, "save_every": 1}
    pids = forks.start_ranks("test_training_ranks:train", 2, **call)
    deadline = time.monotonic() + 60
    while not (out / "state.previous.safetensors").exists():
        assert time.monotonic() < deadline, forks.log.read_text()
        time.sleep(0.005)
    os.kill(pids[1], signal.SIGKILL)
    assert forks.codes() == [3, -signal.SIGKILL]
    said = forks.log.read_text()
    assert "all 2 processes must go on together, but process 0 lost another one after step" in said
    assert (
        "is whole: start all again with --resume (in Python: resume=True), on any number of" in said
    )
    go(1, out=out, kind=None, resume=True)
    expected = adapters(alone("float32")[1])["last"]
    for key, value in adapters(out)["last"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-5)


def interrupted(out):
    """One process is asked to stop: all stop after the same step."""

    class Ask:
        def on_step(self, row):
            if row["step"] == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    result = fit(tiny(), examples(23), out=out, parallel="ddp", callbacks=[Ask()],
                 **{**OPTIONS, "eval_every": None, "max_steps": 9})  # fmt: skip
    assert (result.stopped, result.steps) == ("interrupted", 3)


def test_a_signal_to_one_rank_stops_all(forks, tmp_path):
    forks.start_ranks("test_training_ranks:interrupted", 2, out=str(tmp_path / "run"))
    assert forks.codes() == [0, 0], forks.said()
    assert load_state(tmp_path / "run")[1]["step"] == 3


def splitting(out):
    """Only rank 1 runs out of memory; the gradient is everyone's."""

    def loss(model, batch):
        if os.environ.get("RANK") == "1" and len(batch) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return token_loss(model, batch)

    kind = "ddp" if "RANK" in os.environ else None
    options = {**OPTIONS, "eval_every": None}
    result = fit(tiny(dropout=0.2), examples(23), out=out, parallel=kind, loss=loss, **options)
    if os.environ.get("RANK", "0") == "0":
        (pathlib.Path(out) / "told.json").write_text(json.dumps(result.losses))


def test_a_rank_alone_may_split_its_passes(forks, tmp_path):
    forks.start_ranks("test_training_ranks:splitting", 2, out=str(tmp_path / "run"))
    assert forks.codes() == [0, 0], forks.said()
    assert load_state(tmp_path / "run")[1]["rows"] == [0, 1]  # each rank's, to go on with
    splitting(tmp_path / "alone")
    told, expected = (
        json.loads((tmp_path / name / "told.json").read_text()) for name in ("run", "alone")
    )
    assert told == pytest.approx(expected, rel=1e-5)


def not_shared(out):
    """Each process resumes from a folder of its own; the first one's alone holds a state."""
    own = pathlib.Path(out) / os.environ["RANK"]
    with pytest.raises(RuntimeError, match=r"resume from one folder, .* an out that all machines"):
        fit(tiny(), out=own, resume=True, parallel="ddp", **{**OPTIONS, "eval_every": None})


def test_ranks_that_see_different_folders_do_not_wait_for_each_other(forks, tmp_path):
    fit(tiny(), out=tmp_path / "0", max_steps=2)
    forks.start_ranks("test_training_ranks:not_shared", 2, out=str(tmp_path))
    assert forks.codes() == [0, 0], forks.said()
    assert load_state(tmp_path / "0")[1]["step"] == 2


def refusals():
    model = minilora.inject(tiny(), r=2, alpha=3, adapter="b")
    model = minilora.inject(
        nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), r=2, alpha=3, bias="all"
    )
    start("fsdp", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"shards factors only, but .* has trained copies"):
        shard(model, torch.device("cpu"))
    model = tiny()
    next(p for p in model.parameters() if p.requires_grad).data = torch.zeros(4, 24).double()
    with pytest.raises(ValueError, match="trained parameters of one dtype, found torch.float32, t"):
        shard(model, torch.device("cpu"))
    assert not is_sharded(model)


def test_shard_refuses_what_it_would_not_train(forks):
    forks.start_ranks("test_training_ranks:refusals", 1)
    assert forks.codes() == [0], forks.said()


def test_parallel_needs_torchrun_and_torchrun_needs_parallel(monkeypatch):
    with pytest.raises(RuntimeError, match=r"parallel='ddp' needs processes started by torchrun"):
        fit(tiny(), parallel="ddp", max_steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="found 2 processes without it, which would all write"):
        fit(tiny(), max_steps=1)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="parallel must be 'ddp', 'fsdp' or None"):
        fit(tiny(), parallel="both", max_steps=1)


def test_one_process_communicates_nothing():
    ranks = Ranks()
    assert ranks.all_reduce(1.5, True) == [1.5, True] and ranks.broadcast(3.0) == 3.0
    assert ranks.all_gather(4) == [4]
    assert not ranks.has_lost_peer(RuntimeError("Connection closed by peer"))


# --- the command, and loading in parts


def command_in(place):
    """Return what makes the arguments of `minilora train` on a tiny model."""
    tiny_folder(place / "model")
    lines = [
        json.dumps({"text": " ".join("abcdefgh"[i % 5 : i % 5 + 2 + i % 3])}) for i in range(15)
    ]
    (place / "train.jsonl").write_text("\n".join(lines))

    def arguments(out, *more, steps="5"):
        options = ["--max-steps", steps, "--batch-size", "3", "--lr", "0.01", "--dropout", "0.1"]
        given = ["train", place / "model", "--data", place / "train.jsonl", "--out", out]
        return [str(x) for x in (*given, *options, "--dtype", "float32", "--rank", "4", *more)]

    return arguments


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Arguments of `minilora train`, and the adapter that one process makes."""
    place = tmp_path_factory.mktemp("command")
    arguments = command_in(place)
    assert main(arguments(place / "alone")) == 0
    return arguments, adapters(place / "alone")["last"]


def cli(arguments):
    """The command in a process that torchrun's variables are set in."""
    torch.set_num_threads(1)
    assert main(arguments) == 0


def test_train_reads_the_base_in_parts_and_gives_the_single_processs_adapter(
    forks, command, tmp_path
):
    """The same with `--parallel fsdp`; docs/many-gpus.md has ddp, under torchrun itself."""
    arguments, expected = command
    out, valid = tmp_path / "run", arguments("")[3]
    more = [
        "--parallel",
        "fsdp",
        "--valid",
        valid,
        "--allow-shared",
        "--eval-every",
        "2",
        "--sample",
        "a b",
    ]
    forks.log.write_text("")
    forks.start_ranks("test_training_ranks:cli", 2, arguments=arguments(out, *more))
    assert forks.codes() == [0, 0], forks.said()
    said = forks.log.read_text()
    assert "2 processes (fsdp)" in said and said.count("sample: a b") == 4
    assert said.count("documents kept") == 2 and said.count("adapter in") == 1
    for key, value in adapters(out)["last"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-5)
    again = ["--resume", "--valid", valid, "--allow-shared"]
    assert main(arguments(out, *again, steps="6")) == 0


def test_fsdp_refuses_a_start_from_weights_it_never_holds(forks, command, tmp_path):
    arguments, _ = command
    forks.log.write_text("")
    options = ["--parallel", "fsdp", "--dora"]
    forks.start_ranks("test_training_ranks:cli", 1, arguments=arguments(tmp_path / "run", *options))
    assert forks.codes() == [3]
    assert "can't start from its weights, found init='kaiming' and dora on" in forks.log.read_text()


def quantized_folder(place, source):
    model, tokenizer = load_model(source, "int8", dtype=torch.float32)
    save_pretrained(model, place, tokenizer)
    return place


@pytest.mark.parametrize("how", ["while reading", "folder"])
def test_train_reads_a_quantized_base_in_parts(forks, command, tmp_path, how):
    """Quantized as it is read, or stored so: the losses and the adapter of a process alone."""
    arguments, _ = command
    options = ["--quantize", "nf4", "--block-size", "32"] if how == "while reading" else []
    if how == "folder":
        place = str(quantized_folder(tmp_path / "int8", arguments("")[1]))
    else:
        place = arguments("")[1]

    def train(out, *more, steps="5"):
        given = arguments(out, *options, *more, steps=steps)
        return [given[0], place, *given[2:]]

    assert main(train(tmp_path / "alone")) == 0
    forks.log.write_text("")
    out = tmp_path / "run"
    forks.start_ranks("test_training_ranks:cli", 2, arguments=train(out, "--parallel", "fsdp"))
    assert forks.codes() == [0, 0], forks.said()
    expected = adapters(tmp_path / "alone")["last"]
    for key, value in adapters(out)["last"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-5)
    same = [load_state(tmp_path / name)[1]["identity"]["base"] for name in ("run", "alone")]
    assert same[0] == same[1]  # so that either may go on from the other's state
    assert main(train(out, "--resume", steps="6")) == 0


def peak(place, kind, out, format=None):
    """Load, train a step, and write down by how much the process grew at most, in bytes."""
    torch.set_num_threads(1)

    def status(key):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def inject(model):
        minilora.inject(model, r=2, alpha=3)

    seen = []
    prepare = sharded(Ranks(kind), inject)

    def watched(model):
        put = prepare(model)

        def putting(fqn, value):
            put(fqn, value)
            seen.append(status("RssAnon"))  # the mapped file's pages are the system's to drop

        return putting

    before = status("RssAnon")
    if format is None:
        model = load_model(place, dtype=torch.float32, prepare=watched)[0]
    else:
        model = load_model(place, format, dtype=torch.float32, prepare=watched)[0]
    loaded = max(seen) - before
    ready = forget_peak()
    rows = [{"input_ids": list(range(2, 22))}] * 4
    fit(model, rows, parallel=kind, max_steps=1, batch_size=4, checkpointing=True)
    file = status("RssFile")
    told = {"loaded": loaded, "trained": peak_bytes() - file - before if ready else None}
    told["held"] = sum(p.to_local().nbytes for p in model.parameters())
    name = os.environ.get("RANK", "0")
    (pathlib.Path(out) / f"{name}.json").write_text(json.dumps(told))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_no_rank_ever_holds_the_whole_model(forks, tmp_path):
    """Loading and training: the more ranks, the less each of them holds at its peak.

    Some 15 s: the model must be large beside what gloo and torch themselves take.
    """
    config = LlamaConfig(vocab_size=28, hidden_size=1024, intermediate_size=2048,
                         num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                         head_dim=128, max_position_embeddings=32, eos_token_id=1)  # fmt: skip
    tiny_folder(tmp_path / "model", config=config)
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert whole > 2**27

    def peaks(ranks, format=None):
        options = {"place": str(tmp_path / "model"), "kind": "fsdp", "out": str(tmp_path)}
        forks.start_ranks("test_training_ranks:peak", ranks, format=format, **options)
        assert set(forks.codes()) == {0}, forks.said()
        told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
        found = {key: max(row[key] or 0 for row in told) for key in told[0]}
        print(ranks, format, {key: f"{n / 1e6:.0f} of {whole / 1e6:.0f} MB" for key, n in
                              found.items()})  # fmt: skip
        return found

    two, four, small = peaks(2), peaks(4), peaks(2, "int8")
    for ranks, found in ((2, two), (4, four)):
        assert whole / ranks < found["loaded"] < whole / ranks + 2**26  # gloo, code, few tensors
    assert four["loaded"] < two["loaded"] < whole
    assert small["held"] < two["held"] / 3
    assert small["loaded"] < two["loaded"]  # in full precision one tensor at a time
    if two["trained"]:  # two blocks are whole at a time
        assert four["trained"] < two["trained"]
