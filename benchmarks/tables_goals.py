"""The table of goals: what was wanted, what the newest rows say, met or missed."""

import statistics

from csv_tables import MACHINES, Row, last_of, machine, measured_on, newest, read, table
from tables_gpu import H200
from tables_gpu import steps as gpu_steps
from tables_training import STEP, fastest, real_task_rows, steps


def goals() -> str:
    """Return the table: a line a goal and machine."""
    lines = [*_task(), *_steps(), *_tinyllama(), *_text(), *_quality(), *_gpu(), *_counted()]
    said = [[goal, where, wanted, found, "met" if met else "**missed**"]
            for goal, where, wanted, found, met in lines]  # fmt: skip
    met = sum(line[-1] for line in lines)
    return f"*{met} of {len(lines)} are met.*\n\n" + table("goal | where | wanted | found | ", said)


def _line(
    goal: str, where: str, bound: float, found: float, at_most: bool = False, digits: int = 3
) -> tuple:
    met = found <= bound if at_most else found >= bound
    wanted = f"{bound:.2f}" if bound < 1000 else f"{bound:,.0f}"
    return goal, where, f"{'≤' if at_most else '≥'} {wanted}", f"{found:,.{digits}g}", met


def _seconds(row: Row) -> float:
    return float(row["seconds"] or "inf")


def _task() -> list[tuple]:
    lines = []
    plain, grouped, ours = "PEFT + Trainer", "PEFT + Trainer, grouped by length", "minilora"
    for where in ("Xeon, AMX", "EPYC, AVX-512"):
        found = fastest(real_task_rows(where))
        seconds = {name: _middle(rows) for name, rows in found.items()}
        peak = {name: max(float(row["peak_mb"]) for row in rows) for name, rows in found.items()}
        lines += [
            _line(f"the real task: {plain} over minilora", where, 6.0,
                  seconds[plain] / seconds[ours]),
            _line(f"the real task: {grouped}, over minilora", where, 4.0,
                  seconds[grouped] / seconds[ours]),
            _line(f"the real task: largest peak over that of {plain}", where, 0.33,
                  peak[ours] / peak[plain], True),
        ]  # fmt: skip
        long = fastest(real_task_rows(where, "documents"))
        lines.append(_line(f"long rows learned whole: {plain} over minilora", where, 1.5,
                           _middle(long[plain]) / _middle(long[ours])))  # fmt: skip
    return lines


def _middle(rows: list[Row]) -> float:
    return statistics.median(map(_seconds, rows))


def _steps() -> list[tuple]:
    lines = []
    for where in MACHINES:
        found = last_of(steps(where), "provider")
        ever = last_of(measured_on(where, read("train_step", **STEP)), "provider")
        ours = [row for name, row in found.items() if name.startswith("minilora") and row["seconds"]
                and "alone" not in name]  # fmt: skip
        best = min(ours, key=_seconds)
        limit = min(_seconds(row) for name, row in found.items() if name.startswith("limit"))
        compiled = next(row for name, row in found.items()
                        if name in ("peft bf16 compiled", "peft f32 compiled"))  # fmt: skip
        alone = found.get("minilora bf16 compiled frozen base alone")
        small = min(float(row["peak_mb"]) for row in ours)
        name = f"fastest ({best['provider'].removeprefix('minilora ')})"
        speed = _seconds(ever["peft bf16"]) / _seconds(best)
        if best["to_peft_bf16"]:
            speed = float(best["to_peft_bf16"])  # in its own rounds
        lines += [
            _line(f"a step: PEFT bf16 over {name}", where, 2.6, speed),
            _line(f"a step: compiled PEFT over {name}", where, 2.0,
                  _seconds(compiled) / _seconds(best)),
            _line(f"a step: {name} over its products alone", where, 1.4,
                  _seconds(best) / limit, True),
            _line("peak memory: smallest over PEFT bf16", where, 0.6,
                  small / float(ever["peft bf16"]["peak_mb"]), True),
        ]  # fmt: skip
        if alone:
            lines.append(
                _line("a step: bf16 compiled over its frozen base alone", where, 1.10,
                      _seconds(found["minilora bf16 compiled"]) / _seconds(alone), True)
            )  # fmt: skip
    return lines


def _tinyllama() -> list[tuple]:
    rows = newest(read("train_step", model="tinyllama-1.1b", tokens="256"), "commit")
    found = {name: _seconds(row) for name, row in last_of(rows, "provider").items()}
    theirs, where = found["peft nf4 f32"], "EPYC, AVX2"
    small = min(float(row["peak_mb"]) for row in read("train_step", model="tinyllama-1.1b",
                tokens="512"))  # fmt: skip
    return [
        _line("TinyLlama's shape: bitsandbytes' NF4 over ours", where, 1.05,
              theirs / found["minilora nf4 f32 compiled"]),
        _line("TinyLlama's shape: bitsandbytes' NF4 over INT4", where, 2.0,
              theirs / found["minilora int4 f32 compiled"]),
        _line("TinyLlama's shape in NF4, 1 × 512: peak, GB", where, 1.6, small / 1000, True),
    ]  # fmt: skip


def _text() -> list[tuple]:
    rows = newest(read("deployment", what="decode"), "commit")
    found = last_of(rows, "provider")
    plain = float(found["minilora int8 compiled"]["tokens_per_s"])
    adapted = float(found["minilora int8 and adapter compiled"]["tokens_per_s"])
    loss = last_of(read("loss"), "provider")
    where, here = "EPYC, AVX2", machine(rows[-1]).removesuffix(" alone")
    return [
        _line("writing text: INT8 over transformers in float32", here, 3.0,
              float(found["minilora int8 compiled"]["to_transformers"])),
        _line("writing text: INT8 over INT8 with an adapter", here, 1.10, plain / adapted, True),
        _line("the loss over its two products", where, 1.15,
              float(loss["minilora"]["to_bare"]), True),
        _line("the loss, compiled, over its two products", where, 1.15,
              float(loss["minilora compiled"]["to_bare"]), True),
    ]  # fmt: skip


def _quality() -> list[tuple]:
    rows = last_of(read("quantized_bases"), "base")
    plain = float(rows["plain"]["perplexity_after"])

    def over(base: str) -> float:
        return float(rows[base]["perplexity_after"]) / plain

    return [
        _line("perplexity after training: INT8 over plain", "Xeon, AMX", 1.01,
              over("int8"), True, 4),
        _line("the same with 16 outlier channels", "Xeon, AMX", 1.01,
              over("int8, 16 outlier channels"), True, 4),
        _line("perplexity after training: NF4 over plain", "Xeon, AMX", 1.03, over("nf4"), True, 4),
    ]  # fmt: skip


def _gpu() -> list[tuple]:
    ours = [row for row in gpu_steps(H200) if "minilora" in row["what"] and row["ms"]]
    fast = {
        format: max(float(row["tokens_s"]) for row in ours
                    if row["format"] == format and row["what"].startswith("llama-3.1-8b"))
        for format in ("", "nf4", "int8")
    }  # fmt: skip
    errors = [abs(float(row["planned_gb"]) / float(row["peak_gb"]) - 1) for row in ours]
    return [
        _line("Llama-3.1-8B's shape, 2 × 4096: tokens/s", "H200", 15000, fast[""], digits=5),
        _line("the same shape: a step in NF4 over bf16's", "H200", 1.15,
              fast[""] / fast["nf4"], True, 4),
        _line("the same shape: INT8's tokens/s over bf16's, each at its fastest", "H200", 1.25,
              fast["int8"] / fast[""]),
        _line(f"plans: worst error of the peak in {len(errors)} programs", "H200", 0.10,
              max(errors), True),
    ]  # fmt: skip


def _counted() -> list[tuple]:
    plans = read("plan_accuracy", machine="Intel(R) Xeon(R) Processor, AMX")
    memory = max(abs(float(row["memory_error"])) for row in plans)
    time = max(abs(float(row["time_error"])) for row in plans)
    waited = max(float(row["data_wait_percent"]) for row in read("data_wait"))
    return [
        _line(f"plans: worst error of the peak in {len(plans)} runs", "Xeon, AMX", 0.10,
              memory, True),
        _line(f"plans: worst error of the time in {len(plans)} runs", "Xeon, AMX", 0.25,
              time, True),
        _line("% of the time spent waiting for data", "Xeon, AMX", 2.0, waited, True),
        _line("Triton kernels: bytes over separate torch ops'", "counted", 0.45,
              max(float(row["ratio"]) for row in read("traffic")), True),
    ]  # fmt: skip
