"""Seeds and Hypothesis profiles: every run draws the same numbers, CI the same examples too."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
NARROW = "ci" if os.environ.get("CI") else "local"
settings.register_profile("wide", parent=settings.get_profile(NARROW), max_examples=200)
settings.load_profile(NARROW)


def pytest_addoption(parser):
    parser.addoption("--wide", action="store_true", help="sweeps of thousands of cases, as well")


def pytest_configure(config):
    """Draw more examples in the wide sweeps; test files are imported after this."""
    settings.load_profile("wide" if config.getoption("--wide") else NARROW)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


TALLY = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def tally(pytestconfig):
    """Return a dict whose numbers are printed at the end of the run."""
    return pytestconfig.stash.setdefault(TALLY, {})


# The longest files come first, so that no worker is left with one at the end.
FIRST = [
    *("training_ranks", "triton", "examples", "docs", "cli", "training_tuning", "kill", "avx2"),
    *("triton_aot", "devices", "loading_gguf_writing", "cli_foreign", "lora_widening"),
    *("example_humaneval", "packaging", "loading_hub"),
]


def pytest_collection_modifyitems(config, items):
    first = {f"test_{name}.py": i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))
    for item in items:
        if item.get_closest_marker("wide") and not config.getoption("--wide"):
            item.add_marker(pytest.mark.skip(reason="slow: only with --wide"))


def pytest_sessionfinish(session):
    """Hand a worker's counts to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = session.config.stash.get(TALLY, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Add up what the workers counted."""
    counts = node.config.stash.setdefault(TALLY, {})
    for name, count in getattr(node, "workeroutput", {}).get("tally", {}).items():
        counts[name] = counts.get(name, 0) + count


def pytest_terminal_summary(terminalreporter, config):
    """Say how many cases ran behind a test that stands for many."""
    for name, count in config.stash.get(TALLY, {}).items():
        terminalreporter.write_line(f"{count} {name}")


@pytest.fixture
def nan_memory():
    """Fill uninitialised memory with NaN, so that a kernel that skips an element shows it."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def sums_in_order(monkeypatch):
    """Let the interpreter add f32 products as a GPU does: one k after the other, from acc on.

    By itself it adds to acc what numpy's matmul returns, so an error that grows with K is not seen.
    """
    from triton_cases import INTERPRETED

    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, acc, *options):
        total = acc.data
        for x, y in zip(a.data.T.astype(float), b.data.astype(float), strict=True):
            total = (x[:, None] * y + total).astype(total.dtype)  # an FMA: rounded once
        return TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(scope="session")
def llama_config():
    """The shape of a Llama small enough for PEFT's round trips, as keyword arguments."""
    return {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }


class Block(nn.Module):
    """Attention-like names, so that endings and substrings can be told apart."""

    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width + 3)
        self.mlp = nn.Sequential(
            nn.Linear(width + 3, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return x + self.mlp(self.proj(torch.tanh(self.q_proj(x)) * self.v_proj(x)))


class Net(nn.Module):
    """Twelve blocks (so that layers.1 and layers.11 both exist), an embedding and a head."""

    def __init__(self, width=7, blocks=12, vocab=11):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture(scope="session")
def net():
    """Return a maker of small models; one seed gives one model."""

    def make(blocks=2, seed=0, dtype=torch.float32):
        torch.manual_seed(seed)
        return Net(blocks=blocks).to(dtype)

    return make


@pytest.fixture(scope="session")
def shake():
    """Give every zero-initialised lora_B of an adapter random values, so that it does something."""

    def fill(model, adapter="default", std=0.3, seed=1):
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            adapters = getattr(module, "adapters", None)
            if isinstance(adapters, nn.ModuleDict) and adapter in adapters:
                B = adapters[adapter].lora_B
                noise = torch.randn(B.shape, generator=generator) * std
                B.data.copy_(noise)
        return model

    return fill


@pytest.fixture(scope="session")
def snapshot():
    """Return a comparable picture of a model: module types, weights, flags and active adapters."""

    def take(model):
        return (
            [(name, type(m), m.training) for name, m in model.named_modules()],
            {name: value.detach().clone() for name, value in model.state_dict().items()},
            {name: p.requires_grad for name, p in model.named_parameters()},
            {n: (m.active, m.merged) for n, m in model.named_modules() if hasattr(m, "merged")},
        )

    return take


@pytest.fixture(scope="session")
def same():
    """Assert that two snapshots agree, weights bit for bit."""

    def check(before, after):
        assert before[0] == after[0]
        assert list(before[1]) == list(after[1])
        for name, value in before[1].items():
            assert value.dtype == after[1][name].dtype, name
            assert torch.equal(value, after[1][name]), name
        assert before[2:] == after[2:]

    return check
