"""Reads files and command lines that were damaged on purpose; `test_mutants.py` runs it apart.

Each line of stdin is "SUBJECT SEED"; each line of stdout is the outcome of one, as JSON.
"""

import contextlib
import io
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
from dataclasses import fields
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import minilora
from minilora.cli.command import main
from minilora.data import read_data
from minilora.files import flags_of
from minilora.loading.model import load_model
from minilora.loading.saving import save_pretrained
from minilora.lora.config import AdapterConfig
from minilora.models import GPT2, GPT2Config, Llama, LlamaConfig
from minilora.text.tokenizer import Tokenizer
from minilora.training.config import TrainConfig
from minilora.training.monitor import draw_curve

MEMORY = 2**32  # bytes of address space beyond what the imports took
LONGEST = 600

WORDS = ["", "a", "x\ny", "\x1b[2J\x1b]0;owned\x07", "\u202egnp", "é" * 3, "\ud800", "A" * 100_000,
         "(a|[a-z_.0-9]+)+!", ".*.*.*.*.*.*!", "a{99999999999}", "(", r"(a)\1*\1*", "q_proj",
         "../../etc/passwd", "/dev/zero", "\0", "all-linear", "<unk>", "{{ 1/0 }}", "{% for", "²3",
         "{{ range(10**9)|list }}"]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 7, 300, 10**7, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.5, 1e-320,
           -0.0, 3.0, 1e308, float("nan"), float("inf"), -float("inf")]  # fmt: skip


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = [value] if wrap is list else {"a": value}
    return value


def odd_value(r):
    """Return a value that nobody expects."""
    pick = r.randrange(8)
    if pick < 2:
        return r.choice(NUMBERS)
    if pick < 4:
        return r.choice(WORDS)
    if pick == 4:
        return r.choice([None, True, False, [], {}, [None], [[]], [{}], {"": 0}])
    if pick == 5:
        return [r.choice(WORDS + NUMBERS) for _ in range(r.choice([1, 3, 2000]))]
    if pick == 6:
        return {f"{r.choice(WORDS)[:20]}{i}": r.choice(NUMBERS) for i in range(r.choice([1, 5000]))}
    return nested(r.choice([5, 60, 900]), r.choice([list, dict]))


def places(value, found=None):
    """Return every container of a JSON value."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)) and len(found) < 3000:
        found.append(value)
        for inner in value.values() if isinstance(value, dict) else value:
            places(inner, found)
    return found


def mutate(value, r):
    """Change one to three things in a JSON value, mostly near its top."""
    value = json.loads(json.dumps(value))
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        holders = places(value)
        holder = value if r.random() < 0.5 else r.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key, action = r.choice(keys), r.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[r.choice(WORDS)[:200] + str(r.randrange(9))] = odd_value(r)
        elif action == 2 and isinstance(holder[key], (int, float)):
            holder[key] = r.choice(NUMBERS)
        elif action == 3 and isinstance(holder, list):
            holder.append(odd_value(r))
        else:
            holder[key] = odd_value(r)
    return value


def damaged_text(value, r):
    """Return JSON text of a mutated value, sometimes damaged as text too."""
    text = json.dumps(mutate(value, r), ensure_ascii=r.random() < 0.7)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if r.random() < 0.2 and content:
        for _ in range(r.choice([1, 3])):
            content[r.randrange(len(content))] ^= 1 << r.randrange(8)
    if r.random() < 0.05:
        content = content[: r.randrange(len(content) + 1)]
    return bytes(content)


def damaged_header(file, r):
    """Mutate the JSON header of a safetensors file, its length or a bit of it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if r.random() < 0.7:
        text = json.dumps(mutate(header, r)).encode()
        data = struct.pack("<Q", len(text)) + text + rest
    else:
        data = bytearray(data)
        for _ in range(r.choice([1, 2])):
            data[r.randrange(8 + length)] ^= 1 << r.randrange(8)
    file.write_bytes(data)


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(letters)}
    vocabulary |= {"th": 258, "the": 259}
    backend = Backend(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    return Tokenizer(backend, bos="<s>", eos="</s>", chat_template=template)


LLAMA = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
             "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
PARTS = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
         "attn_output": (32, 32), "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32),
         "ffn_down": (32, 64)}  # fmt: skip


def write_gguf(file, change=lambda values: values):
    values = {"context_length": 64, "embedding_length": 32, "block_count": 1,
              "feed_forward_length": 64, "attention.head_count": 2, "attention.head_count_kv": 1,
              "attention.key_length": 16, "attention.layer_norm_rms_epsilon": 1e-5,
              "rope.freq_base": 1e4, "rope.dimension_count": 16, "vocab_size": 260}  # fmt: skip
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in change(values).items():
        name = f"llama.{key.encode('ascii', 'replace').decode()}"
        if isinstance(value, bool) or value is None:
            writer.add_bool(name, bool(value))
        elif isinstance(value, int):
            writer.add_uint64(name, value % 2**64)
        elif isinstance(value, float):
            writer.add_float32(name, value if abs(value) < 3e38 else float("inf"))
        else:
            writer.add_string(name, json.dumps(value)[:5000])
    vocabulary = Backend.from_str(tokenizer()._backend.to_str()).get_vocab(True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h", "th e"])
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (260, 32), "output_norm": (32,), "output": (260, 32)}
    shapes |= {f"blk.0.{part}": shape for part, shape in PARTS.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Mutants:
    """The undamaged files, and for each subject what damages them and reads them."""

    def __init__(self, home):
        self.home = home
        torch.manual_seed(0)
        save_pretrained(Llama(LlamaConfig(**LLAMA)), home / "llama", tokenizer())
        small = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=1, n_head=2)
        save_pretrained(GPT2(small), home / "gpt2", tokenizer())
        model, words = load_model(home / "llama", dtype=torch.float32)
        minilora.inject(model, r=2, rank_pattern={r"layers\.0\..*q_proj": 3})
        minilora.save(model, home / "adapter")
        small, _ = load_model(home / "llama", "int8", dtype=torch.float32)
        save_pretrained(small, home / "int8", words)
        small, _ = load_model(home / "llama", "nf4", dtype=torch.float32)
        save_pretrained(small, home / "nf4", words)
        self.model = minilora.eject(model)
        self.words = words
        write_gguf(home / "model.gguf")
        minilora.plan(home / "llama", 10, length=16, timed=False)  # measures the machine, once

    def copy(self, name, folder):
        shutil.copytree(self.home / name, folder / name)
        return folder / name

    def config(self, r, folder):
        place = self.copy(r.choice(["llama", "llama", "gpt2"]), folder)
        file = place / "config.json"
        file.write_bytes(damaged_text(json.loads(file.read_text()), r))
        if r.random() < 0.3:
            minilora.plan(place, 10, length=16, timed=False)
        load_model(place, dtype=torch.float32)

    def adapter(self, r, folder):
        place = self.copy("adapter", folder)
        file = place / "adapter_config.json"
        if r.random() < 0.7:
            file.write_bytes(damaged_text(json.loads(file.read_text()), r))
        else:
            damaged_header(place / "adapter_model.safetensors", r)
        with contextlib.suppress(ValueError):
            minilora.load(self.model, place, verify=r.random() < 0.3)
            minilora.eject(self.model)
            return
        minilora.check(place)
        minilora.load(self.model, place, verify=False)
        minilora.eject(self.model)

    def weights(self, r, folder):
        place = self.copy("llama", folder)
        damaged_header(place / "model.safetensors", r)
        load_model(place, dtype=torch.float32)

    def quantized(self, r, folder):
        place = self.copy(r.choice(["int8", "nf4"]), folder)
        if r.random() < 0.5:
            damaged_header(place / "quantized.safetensors", r)
        else:
            file = place / r.choice(["quantization.json", "config.json"])
            file.write_bytes(damaged_text(json.loads(file.read_text()), r))
        load_model(place, dtype=torch.float32)

    def tokenizer(self, r, folder):
        place = self.copy("llama", folder)
        file = place / r.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
        file.write_bytes(damaged_text(json.loads(file.read_text()), r))
        words = Tokenizer.from_pretrained(place)
        words.decode(words.encode("the other the\n</s>"))
        if words.chat_template is not None:
            words.encode_chat([{"role": "user", "content": "the"}])

    def pieces(self, r, folder):
        """A SentencePiece model: three pieces, what trained them, and rules without a name."""
        data = bytearray(b"".join(
            b"\x0a" + bytes([len(piece)]) + piece
            for piece in (b"\x0a\x05<unk>\x18\x02", b"\x0a\x03<s>\x18\x03", b"\x0a\x04</s>\x18\x03",
                          b"\x0a\x01t\x15\0\0\x80\xbf", b"\x0a\x02th\x15\0\0\0\xc0")
        ))  # fmt: skip
        data += b"\x12\x0b\x18\x02\x98\x02\x01\xc0\x02\0\xc8\x02\x01\x1a\x02\x18\x01"
        for _ in range(r.choice([1, 1, 2, 5])):
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        (folder / "tokenizer.model").write_bytes(data)
        words = Tokenizer.from_pretrained(folder)
        words.decode(words.encode("the other the\n</s>"))

    def gguf(self, r, folder):
        file = folder / "model.gguf"
        if r.random() < 0.5:
            write_gguf(file, lambda values: mutate(values, r))
        else:
            data = bytearray((self.home / "model.gguf").read_bytes())
            for _ in range(r.choice([1, 1, 2, 5])):
                data[r.randrange(9000)] ^= 1 << r.randrange(8)
            file.write_bytes(data[: r.randrange(len(data))] if r.random() < 0.1 else data)
        load_model(file, dtype=torch.float32)

    def rows(self, r, folder):
        some = [{"text": "the end"}, {"prompt": "the", "completion": " end"},
                {"messages": [{"role": "user", "content": "the"},
                              {"role": "assistant", "content": "end", "weight": 1}]}]  # fmt: skip
        lines = [json.dumps(r.choice(some)).encode() for _ in range(r.choice([0, 1, 5]))]
        lines += [damaged_text(r.choice(some), r) for _ in range(r.choice([1, 2, 30]))]
        file = folder / "rows.jsonl"
        file.write_bytes(b"\n".join(lines))
        read_data(file, self.words, max_length=32)

    def metrics(self, r, folder):
        row = {"step": 3, "loss": 1.5, "eval_loss": 2.5}
        lines = [damaged_text(row, r) for _ in range(4)]
        (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
        draw_curve(folder)

    def command(self, r, folder):
        value = r.choice([str(odd_value(r))[:4000], str(r.choice(NUMBERS[:11])), r.choice(WORDS)])
        llama = self.home / "llama"
        (folder / "rows.jsonl").write_text('{"text": "the end"}\n' * 3)
        train = ["train", llama, "--data", folder / "rows.jsonl", "--out", folder / "out",
                 "--max-steps", "1"]  # fmt: skip
        kind = r.choice([TrainConfig, AdapterConfig])
        field = r.choice([one for one in fields(kind) if flags_of(one)])
        flags = [*flags_of(field), "--max-length", "--data"]
        table = "train" if kind is TrainConfig else "adapter"
        (folder / "run.toml").write_text(f"[{table}]\n{field.name} = {value}\n", errors="replace")
        plan = ["--examples", "--max-length", "--epochs", "--r", "--batch-size", "--accumulate",
                "--ranks", "--device", "--memory", "--price", "--years"]  # fmt: skip
        command = r.choice([
            [*train, r.choice(flags), value],
            [*train, "--config", folder / "run.toml"],
            ["plan", llama, "--untimed", r.choice(plan), value],
            ["targets", llama, r.choice(["--r", "--targets", "--exclude", "--dtype"]), value],
            ["generate", llama, "the", "--max-new-tokens", "2",
             r.choice(["--seed", "--top-k", "--top-p", "--temperature", "--adapter"]), value],
            ["eval", llama, "--data", folder / "rows.jsonl",
             r.choice(["--batch-size", "--max-length", "--quantize", "--block-size"]), value],
            [r.choice(["check", "targets", "eval", "plan", "fetch", "nothing"]), value],
        ])  # fmt: skip
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = main([str(word) for word in command])
            except SystemExit as stop:
                code = stop.code
        last = said.getvalue().rstrip("\n").rpartition("\n")[2]
        assert code in (0, 1, 2), code
        if code == 2:
            assert "Traceback" not in said.getvalue()
            raise ValueError(last)


def check_text(text):
    assert 0 < len(text) <= LONGEST, f"{len(text)} characters: {text[:300]!r}"
    assert text.isprintable() and "\n" not in text, f"no plain line: {text[:300]!r}"


def outcome(read, seed, home):
    """Return what became of one mutant: "read", "refused", or what is wrong."""
    with tempfile.TemporaryDirectory(dir=home) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(random.Random(seed), Path(name))
        except (ValueError, TypeError, RuntimeError) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            try:
                check_text(str(error).replace(name, "").replace(str(home), ""))
                ours = "/minilora/" in frame.filename or read.__name__ == "command"
                assert ours, f"not ours: {error!r:.300}"
            except AssertionError as wrong:
                return f"{wrong} ({Path(frame.filename).name}:{frame.lineno})"
            return "refused"
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{error!r:.300} ({Path(frame.filename).name}:{frame.lineno})"
        return "read"


if __name__ == "__main__":
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        mutants = Mutants(Path(folder))
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            subject, seed = line.split()
            result = outcome(getattr(mutants, subject), int(seed), Path(folder))
            print(json.dumps(result), flush=True)
