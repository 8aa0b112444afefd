"""Tables of training: the real task, the demo, single steps and what they are made of."""

import statistics

from csv_tables import MACHINES, Row, caption, last_of, machine, measured_on, newest, read, table

CHARTED = "Xeon, AMX"  # the machine of docs/real_task.png


def real_task() -> str:
    return _real_task(real_task_rows("Xeon, AMX"))


def real_task_avx512() -> str:
    return _real_task(real_task_rows("EPYC, AVX-512"))


def documents() -> str:
    return _real_task(real_task_rows("Xeon, AMX", "documents"))


def documents_avx512() -> str:
    return _real_task(real_task_rows("EPYC, AVX-512", "documents"))


def _real_task(rows: list[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["contender"], row["lr"]), []).append(row)
    lines = []
    for (name, lr), some in groups.items():
        seconds = [float(row["seconds"]) for row in some if row["seconds"]]
        peak = max(float(row["peak_mb"]) for row in some)
        missed = len(some) - len(seconds)
        reached = spread(seconds, "{:.0f}") if seconds else "–"
        if missed:
            reached += f", {missed} of {len(some)} did not reach it"
        step = statistics.median(float(row["s_a_step"]) for row in some)
        lines.append([name, lr, len(some), reached, f"{step:.2f}", f"{peak / 1000:.1f}"])
    target = rows[-1]["target"]
    text = f"SmolLM2-135M until the held-out loss is {target}; median, fastest to slowest seed"
    head = "contender | learning rate | seeds | seconds | seconds a step | largest peak, GB"
    return caption(text, rows) + table(head, lines)


def real_task_rows(where: str, task: str = "docstrings") -> list[Row]:
    """Return the newest group of a task on one of `MACHINES`: one processor, one commit."""
    return newest(measured_on(where, read("real_task", task=task)), "processor", "commit")


def equal_steps() -> str:
    """Return what `fit` computes by default beside plain float32, at equal steps."""
    rows = newest(read("equal_steps"), "processor", "commit")
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["seed"]), {})[row["way"]] = row
    lines = []
    for (task, seed), ways in groups.items():
        plain, fast = ways["float32"], ways["fast"]
        more = float(fast["second_half"]) / float(plain["second_half"]) - 1
        lines.append([
            f"{task}, {fast['rows']} a step", seed, plain["second_half"], fast["second_half"],
            f"{100 * more:+.2f} %", f"{100 * float(fast['distance']):.2f} %",
            plain["held_out"], fast["held_out"],
        ])  # fmt: skip
    text = (
        f"SmolLM2-135M, {rows[0]['steps']} steps at a rate of {rows[0]['lr']}, the same batches in "
        "the same order; mean loss of the last half of the steps, and loss on 48 rows held out; "
        f"documents cut at {rows[-1]['length']} tokens"
    )
    head = (
        "task | seed | float32 | default | apart | apart in each step | held out, float32 | "
        "held out, default"
    )
    return caption(text, rows) + table(head, lines)


def shared_prefix() -> str:
    """Return steps in which what all rows begin with is computed once, beside those where not."""
    rows = newest(read("shared_prefix"), "processor", "commit")
    lines = [
        [row["words"] if row["words"] != "0" else "the model's own", row["shared"], row["tokens"],
         f"{100 * float(row['computed']):.0f} %", row["apart_s"], row["once_s"],
         f"{float(row['times']):.2f} ({float(row['low']):.2f}–{float(row['high']):.2f})"]
        for row in rows
    ]  # fmt: skip
    text = (
        f"SmolLM2-135M in {rows[0]['dtype']}, r = 8, {rows[0]['rows']} docstrings a step; forward "
        "and backward pass, medians of six batches and five rounds, the middle half of the ratios"
    )
    head = (
        "words of system prompt | shared tokens | tokens a row | computed | seconds apart | once | "
        "times as fast"
    )
    return caption(text, rows) + table(head, lines)


def fastest(rows: list[Row]) -> dict[str, list[Row]]:
    """Return each contender's rows at its fastest learning rate, slowest contender first.

    The first seed runs at every rate, the others at the one that was fastest then.
    """
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["contender"], {}).setdefault(row["lr"], []).append(row)

    def middle(some: list[Row]) -> float:
        return statistics.median(float(row["seconds"] or "inf") for row in some)

    found = {
        name: min(rates.values(), key=lambda some: (-len(some), middle(some)))
        for name, rates in groups.items()
    }
    return dict(sorted(found.items(), key=lambda item: -middle(item[1])))


def real_task_caption() -> str:
    """Return the caption of docs/real_task.png, with its conditions."""
    rows = real_task_rows(CHARTED)
    found = fastest(rows)
    last, seeds = next(iter(found.values()))[-1], {len(some) for some in found.values()}
    many = (
        f"median of {max(seeds)} seeds, lines from the best to the worst"
        if max(seeds) > 1
        else ("one seed")
    )
    rates = {row["lr"] for row in rows}
    rate = "each program at its fastest learning rate"
    if len(rates) == 1:
        rate = f"learning rate {rates.pop()}"
    return (
        "*SmolLM2-135M learns to write docstrings: seconds of training until the held-out loss is "
        f"{last['target']}, compiling included, and the peak memory. r = 8 on all linears, "
        f"{rate}, {many}. {machine(last)}, {last['threads']} threads.*\n"
    )


def spread(values: list[float], form: str) -> str:
    """Return the median of some values, with the least and the largest where they differ."""
    said = [form.format(f(values)) for f in (statistics.median, min, max)]
    return said[0] if len(values) == 1 else f"{said[0]} ({said[1]}–{said[2]})"


def demo() -> str:
    head = (
        "processor | base | steps of 16 rows | held-out tokens | perplexity before | after | "
        "minutes in all"
    )

    def name(row: Row) -> str:
        if not row["processor"].startswith("Intel"):  # the one with AVX2 alone has no fast bfloat16
            return "EPYC, AVX2 alone" if row["dtype"] == "float32" else "EPYC, AVX-512"
        return "Xeon, limited to AVX2" if row["processor"].endswith("limit") else "Xeon, AMX"

    rows = [
        [
            name(row),
            (row["dtype"] if row["base"] == "plain" else f"{row['base']} in {row['dtype']}")
            + (", compiled" if row["compiled"] == "True" else ""),
            *(row[k] for k in ("steps", "test_tokens")),
            *(f"{float(row[k]):.4g}" for k in ("perplexity_before", "perplexity_after")),
            f"{float(row['total_minutes']):.3g}",
        ]
        for row in read("demo")
    ]
    return (
        "*`make demo`: three minutes of training; 2 threads, torch 2.13.0. Rows over 1,906 tokens "
        "began with empty caches and a quiet machine, but for other work in INT8's first minute; "
        "beside the rows over 9,413 went other work. The row of 43 steps ran under "
        "`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`, with filled caches.*\n\n"
        + table(head, rows)
    )


STEP: Row = {"model": "smollm2-135m", "rows": "4", "tokens": "256", "r": "8", "targets": "all"}


def steps(where: str) -> list[Row]:
    """Return the newest rows of a training step on one of `MACHINES`."""
    return newest(measured_on(where, read("train_step", **STEP)), "commit", "flags")


def _step(where: str, base: str) -> str:
    rows = steps(where)
    lines = []
    for name, row in sorted(
        last_of(rows, "provider").items(), key=lambda item: float(item[1]["seconds"] or 1e9)
    ):
        if row["seconds"]:
            times = f"{float(row['seconds']):.2f}"
            if row["fastest"]:
                times += f" ({float(row['fastest']):.2f}–{float(row['slowest']):.2f})"
        else:
            times = "not timed: its loss is off"
        shown = name.replace("limit", "limit: the products alone,")
        lines.append([shown, times, row[f"to_{base}"], row["peak_mb"], row["loss_10"]])
    rounds = max(int(row["rounds"] or 0) for row in rows)
    text = (
        f"4 × 256 tokens, r = 8 on all linears; median of up to {rounds} interleaved rounds "
        "(fastest–slowest)"
    )
    head = (
        f"program | seconds a step | times {base.replace('_', ' ')} | peak, MB | "
        "loss after ten steps"
    )
    return caption(text, rows) + table(head, lines)


def cpu() -> str:
    lines = []
    for where in MACHINES:
        rows = steps(where)
        found = {name: row for name, row in last_of(rows, "provider").items()
                 if row["seconds"] and "alone" not in name}  # fmt: skip
        ours, theirs = (
            min((row for name, row in found.items() if name.startswith(who)),
                key=lambda row: float(row["seconds"]))
            for who in ("minilora", "peft")
        )  # fmt: skip
        for row in (ours, theirs):
            lines.append([machine(row), row["provider"], f"{float(row['seconds']):.1f}",
                          f"{float(row['peak_mb']) / 1000:.1f}"])  # fmt: skip
    return (
        "*4 × 256 tokens, r = 8 on all linears, 2 threads; the fastest settings of each "
        "program.*\n\n"
    ) + table("processor | program | seconds a step | peak, GB", lines)


def step_amx() -> str:
    return _step("Xeon, AMX", "peft_bf16")


def step_avx512() -> str:
    return _step("EPYC, AVX-512", "peft_bf16")


def step_avx2() -> str:
    return _step("EPYC, AVX2", "peft_f32")


def step_models() -> str:
    lines, used = [], []
    for model, tokens in (("gpt2", "256"), ("tinyllama-1.1b", "256"), ("tinyllama-1.1b", "512")):
        rows = newest(read("train_step", model=model, tokens=tokens), "commit")
        used += rows
        for row in rows:
            name = row["provider"].replace("limit", "its products alone,")
            lines.append([model, f"{row['rows']} × {tokens}", name, row["seconds"] or "not timed",
                          row["peak_mb"], row["loss_10"]])  # fmt: skip
    head = "shape | rows × tokens | program | seconds a step | peak, MB | loss after ten steps"
    text = "random weights, r = 8 on all linears, median of 3 rounds; losses over 16 tokens a step"
    return caption(text, used) + table(head, lines)


def curves() -> str:
    lines = []
    wanted = ("peft f32", "minilora f32 compiled")
    rows = [row for row in read("train_step", model=STEP["model"], rows="1", commit="d48580f")
            if row["provider"] in wanted]  # fmt: skip
    pairs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row["tokens"], row["r"], row["targets"]), {})[row["provider"]] = row
    for setting, found in sorted(pairs.items(), key=lambda item: [int(n) for n in item[0][:2]]):
        if len(found) < 2:
            continue
        theirs, ours = found["peft f32"], found["minilora f32 compiled"]
        ratio = float(theirs["seconds"]) / float(ours["seconds"])
        lines.append([*setting, theirs["seconds"], ours["seconds"], f"{ratio:.2f}",
                      theirs["peak_mb"], ours["peak_mb"]])  # fmt: skip
    head = "tokens | r | linears | PEFT, s | minilora compiled, s | times | PEFT, MB | minilora, MB"
    return caption("SmolLM2-135M in float32, one row, median of 3 rounds", rows) + table(
        head, lines
    )


def breakdown() -> str:
    lines = []
    rows = read("breakdown")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["what"], row["model"], row["name"] + machine(row)), []).append(row)
    for (what, model, _), some in groups.items():
        parts = sorted(some, key=lambda row: -float(row["share"]))[:4]
        said = ", ".join(f"{row['kind']} {100 * float(row['share']):.0f} %" for row in parts)
        total = sum(float(row["seconds"]) for row in some)
        lines.append(
            [f"{what}: {model}, {some[0]['name']}", machine(some[0]), f"{total:.3g}", said]
        )
    head = "what | processor | seconds | where they go"
    return (
        "*Under torch's profiler, which slows what it watches; a training step, or one token "
        "written.*\n\n" + table(head, lines)
    )


def loss() -> str:
    rows = read("loss")
    lines = [[r["provider"], r["seconds"], f"{r['fastest']}–{r['slowest']}", r["to_bare"]]
             for r in rows]  # fmt: skip
    text = "loss and its gradient of 1024 rows of 576 over 49152 words, float32"
    head = "program | seconds | fastest–slowest | times the two products"
    return caption(text, rows) + table(head, lines)


def waiting() -> str:
    rows = read("data_wait")
    lines = [[r["data"], r["seconds"], r["tokens"], r["data_wait_percent"]] for r in rows]
    text = (
        "SmolLM2-135M in bfloat16, 16 rows a step, 6 steps, on a machine with other work: "
        "the shares compare, the seconds do not"
    )
    head = "data | seconds | learned tokens | % spent waiting for data"
    return caption(text, rows) + table(head, lines)


def defaults() -> str:
    """Return a line a task and length, a column a rate: held-out loss and learned answers."""
    rows = [row for row in read("defaults") if not _changed(row)]
    runs: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        run = runs.setdefault((row["task"], row["rows"], row["steps"]), {})
        run.setdefault(row["lr"], []).append(row)
    columns = sorted({name for run in runs.values() for name in run}, key=float)
    lines = [
        [name[0], f"{name[1]} / {name[2]}", f"{float(next(iter(run.values()))[0]['before']):.2f}"]
        + [_seeds(run.get(c, [])) for c in columns]
        for name, run in sorted(runs.items(), key=lambda item: (item[0][0], int(item[0][2])))
    ]
    head = " | ".join(["task", "rows / steps", "before", *columns])
    text = "held-out loss by learning rate, and the learned answers that are written whole; r = 8, "
    text += "8 rows a step, SmolLM2-135M in bf16, scaling 1; a range is of two or three seeds"
    return f"*{text[:1].upper()}{text[1:]}; {_machines(rows)}, 1 thread.*\n\n" + table(head, lines)


# What a run has by default; another part of the benchmark changes one of them.
_USUAL = {"base": "bf16", "r": "8", "batch_size": "8", "warmup": "0.05", "scaling": "1"}
_NAMES = {"base": "base", "r": "rank", "batch_size": "rows a step"}


def _changed(row: Row) -> list[str]:
    return [name for name, usual in _USUAL.items() if row[name] != usual]


def _machines(rows: list[Row]) -> str:
    return " and ".join(dict.fromkeys(map(machine, rows)))


def defaults_beside() -> str:
    """Return a line a change of one other setting, beside the run that has the usual one."""
    every = read("defaults")
    same = ("task", "rows", "epochs", "lr")
    lines = []
    for row in every:
        names = _changed(row)
        twins = [o for o in every if not _changed(o) and all(o[k] == row[k] for k in same)]
        if len(names) == 1 and twins:
            name = names[0]
            lines.append([
                _NAMES.get(name, name), row["task"], row["rows"], row["lr"], _USUAL[name],
                _seeds(twins).split(" (")[0], row[name], f"{float(row['after']):.3g}",
            ])  # fmt: skip
    lines.sort(key=lambda line: (line[0], line[1], float(line[3]), line[6]))
    head = "setting | task | rows | rate | usual | held-out loss | changed to | held-out loss"
    where = _machines([row for row in every if _changed(row)])
    text = f"*One other setting changed at a time, the rest as above; {where}, 1 thread.*\n\n"
    return text + table(head, lines)


def _seeds(rows: list[dict[str, str]]) -> str:
    """Return the range of losses, and of the shares of learned answers where they are known."""
    if not rows:
        return "–"
    losses = [f"{loss:.3g}" for loss in sorted(float(row["after"]) for row in rows)]
    cell = "–".join(dict.fromkeys((losses[0], losses[-1])))
    known = sorted(float(row["whole_learned"]) for row in rows if row["whole_learned"])
    whole = [f"{share:.0%}" for share in known[:1] + known[-1:]]
    return cell + (f" ({'–'.join(dict.fromkeys(whole))})" if whole else "")


def gguf_answers() -> str:
    """Return a line a program and file: right answers, and those that are float32's."""
    rows = list({(row["program"], row["file"]): row for row in read("gguf_answers")}.values())
    lines = [
        [
            row["program"],
            row["file"],
            *(f"{row[k]} of {row['questions']}" for k in ("right", "as_f32")),
        ]
        for row in rows
    ]
    head = "program | base and adapter | right answers | as in float32 here"
    text = "*The learned questions of the recorded session, greedily; SmolLM2-135M, a Q4_1 file"
    return f"{text}; {machine(rows[-1])}, {rows[-1]['date']}.*\n\n" + table(head, lines)


def recipes() -> str:
    """Return a line a recipe, of its newest run."""
    rows = list(last_of(read("recipes"), "recipe").values())
    lines = []
    for row in rows:
        right = f"{row['right_before']} → {row['right_after']} of {row['examples']}"
        lines.append([row["recipe"], row["rows"], row["steps"], row["minutes"],
                      f"{float(row['peak_mb']) / 1000:.1f}",
                      f"{row['loss_before']} → {row['loss_after']}",
                      right if row["right_after"] else "–"])  # fmt: skip
    text = "held-out loss and right answers before and after; other work on the machine"
    head = "recipe | rows | steps | minutes in all | peak, GB | loss | right answers"
    return caption(text, rows) + table(head, lines)


def tune() -> str:
    """Return what tunings found, beside the best of the whole runs that they stand for."""
    rows = [row for row in read("tune") if row["share"]]
    lines = []
    for row in rows:
        whole = [one for one in read("tune", task=row["task"]) if not one["share"]]
        best = next(one["lr"] for one in whole if one["whole run"] == row["whole run"])
        lines.append([row["task"], row["held-out tokens"], row["before"],
                      f"{row['tuning']} at {float(row['lr']):g}",
                      f"{row['whole run']} at {float(best):g}", row["above the best"],
                      row["share of processor time"]])  # fmt: skip
    text = (
        f"SmolLM2-135M, bf16, r=8, {rows[-1]['steps of a run']} steps, six rates from 1e-4 to 5e-3"
    )
    head = (
        "task | held-out tokens | loss before | tuned | best of six whole runs | above the best | "
        "share of their processor time"
    )
    return caption(text, rows) + table(head, lines)
