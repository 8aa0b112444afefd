"""Adapters on a model: the layers that carry them, and the verbs inject, activate, merge, serve."""

from minilora.lora.adapter import FROM_WEIGHT, LoRAAdapter
from minilora.lora.base import Base, base_of, is_linear, view
from minilora.lora.combination import (
    ApproximatedLayer,
    Approximation,
    add_frozen,
    approximated,
    check_source,
    combine,
    finite_factors,
    plain_adapter,
    product_norm,
    stored_dtype,
)
from minilora.lora.config import (
    AdapterConfig,
    as_dtype,
    check_adapter_name,
    check_alpha,
    check_dropout,
    check_rank,
)
from minilora.lora.copies import TrainedCopies, is_copy
from minilora.lora.figures import Sizes, sizes, summary
from minilora.lora.injection import attach, check_way, inject, write_pretrained_by
from minilora.lora.layer import LoRALayer, lora_layers
from minilora.lora.merging import merge, unmerge
from minilora.lora.modes import as_found, inference
from minilora.lora.patterns import compiled_pattern
from minilora.lora.quantizing import check_quantizable, quantize
from minilora.lora.samples import (
    are_floats,
    describe,
    difference,
    drawn_modules,
    equal_but_for_rounding,
    frozen_values,
    weight_sample,
)
from minilora.lora.selection import select_targets, taken_for_experts, targets
from minilora.lora.survey import Survey, parents, split_block
from minilora.lora.switching import (
    activate,
    delete,
    disabled,
    eject,
    end_switching,
    mixed,
    prepare_switching,
    rename,
    say_untied,
)
from minilora.lora.widening import widened
from minilora.lora.wrappers import (
    MARKS,
    check_open,
    check_whole,
    named_parameters,
    true_name,
    unwrapped,
)

__all__ = [
    "FROM_WEIGHT",
    "MARKS",
    "AdapterConfig",
    "ApproximatedLayer",
    "Approximation",
    "Base",
    "LoRAAdapter",
    "LoRALayer",
    "Sizes",
    "Survey",
    "TrainedCopies",
    "activate",
    "add_frozen",
    "approximated",
    "are_floats",
    "as_dtype",
    "as_found",
    "attach",
    "base_of",
    "check_adapter_name",
    "check_alpha",
    "check_dropout",
    "check_open",
    "check_quantizable",
    "check_rank",
    "check_source",
    "check_way",
    "check_whole",
    "combine",
    "compiled_pattern",
    "delete",
    "describe",
    "difference",
    "disabled",
    "drawn_modules",
    "eject",
    "end_switching",
    "equal_but_for_rounding",
    "finite_factors",
    "frozen_values",
    "inference",
    "inject",
    "is_copy",
    "is_linear",
    "lora_layers",
    "merge",
    "mixed",
    "named_parameters",
    "parents",
    "plain_adapter",
    "prepare_switching",
    "product_norm",
    "quantize",
    "rename",
    "say_untied",
    "select_targets",
    "sizes",
    "split_block",
    "stored_dtype",
    "summary",
    "taken_for_experts",
    "targets",
    "true_name",
    "unmerge",
    "unwrapped",
    "view",
    "weight_sample",
    "widened",
    "write_pretrained_by",
]
