"""Planned bytes against real modules, sums done by hand, and what must not be planned."""

import pytest
import torch

import minilora
from minilora.kernels import cpu
from minilora.lora import sizes
from minilora.lora.layer import lora_layers
from minilora.models import GPT2Config, Llama, LlamaConfig
from minilora.planning import memory as constants
from minilora.planning.memory import Memory, count_memory
from minilora.planning.shapes import PRESETS, Settings, Shape, read_shape

SMALL = Shape("small", LlamaConfig(97, 64, 128, 3, 4, 2, 16, 64), "here")


def plan(shape=SMALL, gpu=True, **settings):
    settings = {"batch_size": 2, "length": 16, "dtype": torch.bfloat16, "r": 4} | settings
    return count_memory(shape, Settings(**settings), gpu=gpu, process=0)


@pytest.mark.skipif(not cpu.has_blocks(), reason="no AVX2, or no C compiler")
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_products_in_blocks_take_the_memory_that_is_planned(format, targets):
    """Of codes in another order and rounded rows; every stored layer's, adapted or not."""
    config = SMALL.config
    settings = {"batch_size": 2, "length": 32, "r": 4, "format": format, "targets": targets}
    plans = [
        count_memory(SMALL, Settings(**settings), integer=way, process=0).workspace
        for way in ("blocks", "int8")
    ]
    held = [
        cpu.native().minilora_blocks_bytes(64, *sizes, format == "int4")
        for sizes in ((config.hidden_size, config.intermediate_size),
                      (config.intermediate_size, config.hidden_size))
    ]  # fmt: skip
    codes = config.hidden_size * config.intermediate_size if format == "int4" else 0
    assert max(held) <= (plans[0] - plans[1] + codes) * 1.02 <= max(held) * 1.05


@pytest.mark.parametrize("format", [None, "int8", "nf4", "int4"])
def test_base_and_trained_bytes_are_those_of_a_real_run(format):
    model = Llama(SMALL.config, dtype=torch.bfloat16)
    if format:
        minilora.quantize(model, format)
    minilora.inject(model, 4, alpha=6)
    real, planned = sizes(model), plan(format=format)
    assert planned.base == real.linears + real.embeddings + real.other
    assert (planned.codes, planned.scales) == (real.codes, real.scales)
    assert planned.adapters == planned.gradients == real.adapters
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert planned.optimizer == sum(t.nbytes for t in moments)
    assert len(lora_layers(model)) == 21


def test_targets_that_are_no_linears_count_too():
    options = {"targets": ["embed_tokens", "q_proj"]}
    model = minilora.inject(Llama(SMALL.config, dtype=torch.bfloat16), 4, alpha=6, **options)
    assert plan(**options).adapters == plan(**options).gradients == sizes(model).adapters


def test_components_sum_to_the_peak():
    for checkpointing in (False, True):
        for length in (2, 64):
            found = plan(checkpointing=checkpointing, length=length, gpu=False)
            assert sum(found.components().values()) == found.peak > 0


def test_checkpointing_keeps_less_and_more_rows_keep_more():
    whole, again = plan(), plan(checkpointing=True)
    assert again.activations < whole.activations / 2
    assert again.recomputed and not whole.recomputed
    assert again.peak < plan(checkpointing=True, batch_size=4).peak


def test_the_loss_never_holds_all_logits():
    shape = read_shape("llama-3-8b")
    some, more = (plan(shape, length=n, batch_size=1) for n in (512, 2048))
    chunk = 523 * 128256  # rows at a time: 2^26 logits
    assert some.loss == 511 * 128256 * 2 + 511 * 4096 * 2
    assert more.loss == chunk * 2 + 2047 * 4096 * 2 < 2047 * 128256 * 2
    cpu = plan(shape, length=2048, batch_size=1, gpu=False)
    assert cpu.loss == 2047 * 4096 * 2
    assert cpu.workspace == 98 * 128256 * 2, "on a CPU they have a buffer that stays"


def test_logits_and_decoded_matrices_share_a_buffer_on_a_cpu():
    cpu = {"gpu": False, "dtype": torch.float32, "batch_size": 2, "length": 16}
    logits = 2 * 15 * 97 * 4
    assert plan(**cpu).workspace == logits
    scales = 64 * 128 // 64 * 12
    assert plan(format="nf4", **cpu).workspace == max(logits, 64 * 128 * 4) + scales
    longer = cpu | {"length": 64, "batch_size": 8}
    assert plan(format="nf4", **longer).workspace == 8 * 63 * 97 * 4 + scales


def test_ranks_share_what_their_kind_shares():
    one, ddp = plan(batch_size=4), plan(batch_size=4, ranks=2, parallel="ddp")
    fsdp = plan(batch_size=4, ranks=2, parallel="fsdp")
    assert ddp.base == one.base
    assert ddp.gradients == 2 * one.gradients
    half = plan(batch_size=2).activations
    assert ddp.activations == fsdp.activations == half
    assert fsdp.base == one.base // 2
    assert fsdp.optimizer == one.optimizer // 2
    assert fsdp.gathered > 0 == ddp.gathered
    uneven = plan(batch_size=3, ranks=2, parallel="ddp")
    assert uneven.activations == half, "the rank with more rows counts"


def test_a_process_and_its_heap_count_on_a_cpu_only():
    settings = Settings(batch_size=2, length=16)
    cpu, gpu = count_memory(SMALL, settings), count_memory(SMALL, settings, gpu=True)
    assert cpu.process == constants.PROCESS
    assert gpu.process == constants.CUDA_CONTEXT
    assert cpu.heap >= constants.HEAP_FIXED > gpu.heap == 0
    assert count_memory(SMALL, settings, process=7).process == 7


def test_an_optimizer_in_8_bits_and_narrow_factors():
    wide, narrow = plan(), plan(adapter_dtype=torch.bfloat16)
    assert narrow.adapters == wide.adapters // 2
    assert narrow.optimizer == 3 * wide.optimizer // 2  # a copy in float32, too
    assert plan(adapter_dtype=torch.bfloat16, moment_bytes=1).optimizer == wide.optimizer // 4


def test_autocast_casts_one_matrix_at_a_time():
    assert plan(dtype=torch.bfloat16, autocast=True).base == plan(dtype=torch.float32).base
    cublas = constants.CUBLAS
    assert plan(autocast=True).workspace == 64 * 128 * 2 + cublas
    assert plan().workspace == cublas
    assert plan(format="nf4").workspace == 64 * 128 * 2 + 64 * 128 // 64 * 12 + cublas
    cpu = {"gpu": False}
    logits = plan(**cpu).workspace
    assert plan(format="int8", **cpu).workspace == logits
    assert plan(format="int4", **cpu).workspace == logits + 64 * 128


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2", 0.1244), ("gpt2-xl", 1.5576), ("smollm2-135m", 0.1345), ("smollm2-360m", 0.3618),
        ("smollm2-1.7b", 1.7114), ("tinyllama-1.1b", 1.1000), ("llama-2-7b", 6.7384),
        ("llama-2-13b", 13.0159), ("llama-2-70b", 68.9766), ("llama-3-8b", 8.0303),
        ("llama-3-70b", 70.5537),
    ],
)  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, billions):
    assert read_shape(name).parameters == pytest.approx(billions * 1e9, rel=5e-4)
    assert PRESETS[name].source.startswith("huggingface.co/")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b-v0.1", 7_241_732_096), ("mistral-7b-v0.3", 7_248_023_552),
        ("mistral-nemo-12b", 12_247_782_400), ("mistral-small-24b", 23_572_403_200),
        ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512), ("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096), ("qwen3-8b", 8_190_735_360), ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264), ("smollm3-3b", 3_075_098_624),
        ("phi-3-mini", 3_821_079_552), ("phi-4-mini", 3_836_021_760), ("phi-4", 14_659_507_200),
        ("gemma-2-2b", 2_614_341_888), ("gemma-3-1b", 999_885_952),
    ],
)  # fmt: skip
def test_presets_of_other_families_have_the_published_number_to_the_last(name, published):
    """What the model's page on the hub says of its safetensors files."""
    assert read_shape(name).parameters == published


def test_seventy_billion_frozen_weights_stay():
    """ "70B with LoRA needs 14 GB" counts what is trained; the base's 140 GB are there too."""
    found = plan(read_shape("llama-2-70b"), batch_size=1, length=512, r=16)
    assert found.base == pytest.approx(138e9, rel=0.01)
    assert found.adapters + found.gradients + found.optimizer < 14e9 < found.peak / 9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of .*, found 0"),
        ({"length": -3}, "length must be a whole number of .*, found -3"),
        ({"ranks": True}, "ranks must be a whole number of .*, found True"),
        ({"accumulate": 1.5}, "accumulate must be a whole number of .*, found 1.5"),
        ({"parallel": "tp"}, "parallel must be None, 'ddp' or 'fsdp', found 'tp'"),
        ({"parallel": "ddp"}, "several ranks need parallel"),
        ({"ranks": 2}, "several ranks need parallel.*found ranks=2 and parallel=None"),
        ({"dtype": torch.int8}, "dtype must be float32, bfloat16 or float16, found torch.int8"),
        ({"length": 65}, "length must fit the context of small, 64 tokens, found 65"),
        ({"r": 0}, "r must be a whole number of at least 1, found 0"),
        ({"r": 33}, r"r=33 is above what model.layers.0.self_attn.k_proj can use: its shape is "
         r"\[32, 64\], so no change of it has a rank above 32; lower r, or exclude"),
        ({"format": "int3"}, "format must be one of int8, nf4, int4, found 'int3'"),
        ({"targets": ["nowhere"]}, "every entry of targets must match a module"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(settings, match):
    with pytest.raises(ValueError, match=match):
        plan(**settings)


def test_impossible_shapes():
    with pytest.raises(ValueError, match="n_head must divide n_embd, found 5 and 64"):
        read_shape(GPT2Config(n_embd=64, n_head=5))
    shape = Shape("odd", LlamaConfig(97, 96, 128, 2, 4, 2, 24, 64), "here")
    with pytest.raises(ValueError, match="96 inputs, which groups of 64 do not divide"):
        plan(shape, format="int4")


def test_memory_knows_what_it_sums():
    found = Memory(process=1, base=2, loss=5, recomputed=2, backward=4)
    assert found.peak == 1 + 2 + 6
    assert found.components() == {"process": 1, "base": 2, "recomputed": 2, "backward": 4}
    assert found.weights == 2
    assert found.plus(3).heap == 3
    assert found.plus(-3).heap == 0


def test_the_heap_grows_with_every_block_of_a_llama_in_f32():
    shape = read_shape("tinyllama-1.1b")
    options = {"gpu": False, "checkpointing": True, "r": 8}
    wide, narrow = plan(shape, dtype=torch.float32, **options), plan(shape, **options)
    grown = constants.HEAP_EACH_F32 * wide.recomputed * 22
    usual = constants.HEAP_FIXED + constants.HEAP_SHARE * wide.activations
    assert wide.heap == int(usual + constants.HEAP_RECOMPUTED * wide.recomputed + grown)
    assert narrow.heap < wide.heap
