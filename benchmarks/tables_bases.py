"""Tables of quantized bases and of text written over them."""

from csv_tables import Row, caption, newest, read, table


def deployment() -> str:
    rows = newest(read("deployment"), "commit")
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["provider"], {})[row["what"]] = row
    lines = []
    for name, pair in found.items():
        cells = [pair[what][key] for what in ("decode", "prefill")
                 for key in ("tokens_per_s", "to_transformers")]  # fmt: skip
        lines.append([name, *cells, pair["decode"]["perplexity"], pair["decode"]["weights_mb"]])
    head = (
        "program | tokens/s written | times transformers | tokens/s read | times transformers | "
        "perplexity | weights, MB"
    )
    text = "a merged SmolLM2-135M, 64 tokens after 512, median of 3 interleaved rounds"
    return caption(text, rows) + table(head, lines)


def quantized_bases() -> str:
    rows = read("quantized_bases")
    plain = float(rows[0]["perplexity_after"])
    lines = []
    for row in rows:
        against = 100 * (float(row["perplexity_after"]) / plain - 1)
        lines.append([row["base"], *(row[key] for key in ("weights_mb", "perplexity_before",
                      "perplexity_after")), f"{against:+.1f} %"])  # fmt: skip
    text = (
        "the demo's task, 52 steps of 8 rows, one seed, perplexity over 9413 held-out tokens; "
        "the model's file is itself 4-bit, so a second 4-bit grid pays twice"
    )
    head = "base | weights, MB | before | after | against plain"
    return caption(text, rows) + table(head, lines)


def sizes() -> str:
    lines = [[r["model"], r["format"], r["linears_gb"], r["total_gb"]] for r in read("sizes")]
    head = "model | format of the linears | linears, GB | whole model, GB"
    return "*Counted on shapes; head, embeddings and norms in bfloat16.*\n\n" + table(head, lines)


def formats() -> str:
    lines = [[r["format"], r["bits_per_weight"], r["error_real"], r["error_normal"]]
             for r in read("formats")]  # fmt: skip
    head = "format | bits a weight | error, real weights | error, N(0, 1)"
    return (
        "*Relative RMS error; the real weights are the linears of all-MiniLM-L6-v2.*\n\n"
        + table(head, lines)
    )


def rounding() -> str:
    rows = read("rounding")
    lines = [[r["base"], r["loss"], f"{100 * float(r['loss_rise']):+.1f} %",
              f"{float(r['gradient_error']):.2f}"] for r in rows]  # fmt: skip
    text = "INT8 bases of SmolLM2-135M on four texts of 512 tokens, beside the plain model"
    head = "how rows are multiplied | loss | its rise | error of the adapter's gradient"
    return f"*{text}; torch {rows[0]['torch']}, commit {rows[0]['commit']}.*\n\n" + table(
        head, lines
    )


def explain() -> str:
    lines = []
    for row in read("explain"):
        if "block" in row["what"] or "alone" in row["what"] or "without" in row["what"]:
            continue
        where = "Xeon, AMX" if row["processor"].startswith("Intel") else "EPYC, AVX2"
        error = f" ± {float(row['standard error']):.3f}" if row["standard error"] else ""
        before, after = (f"{float(row[f'loss {when}']):.3f}" for when in ("before", "after"))
        change = f"{float(row['change']):+.3f}{error}"
        lines.append([f"{where}: {row['what']}", before, after, change, row["tokens"]])
    return (
        "*Loss a token without and with the adapter of `make demo`, with the standard error of "
        "the difference; text outside the task is this project's README.*\n\n"
    ) + table("text | without | with | change | tokens", lines)


def loss_curves() -> str:
    rows = read("loss_curves")
    lines = [[r["provider"], r["mean_loss_second_half"], f"{100 * float(r['distance']):.2f} %"]
             for r in rows]  # fmt: skip
    last = rows[-1]
    return (
        f"*{last['steps']} steps of {last['rows']} × {last['tokens']} tokens with SmolLM2-135M; "
        f"{last['processor']} with AVX2 alone, torch {last['torch']}.*\n\n"
    ) + table("program | mean loss, second half | distance a step", lines)


def linear() -> str:
    rows = newest([row for row in read("linear") if row["what"] != "decode"], "commit")
    counts = list(dict.fromkeys(row["M"] for row in rows))
    found = {(r["provider"], r["M"], r["what"]): r["ns_per_weight"] for r in rows}
    lines = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        cells = [f"{float(found[name, m, 'forward']):.3g} / {float(found[name, m, 'both']):.3g}"
                 for m in counts]  # fmt: skip
        lines.append([name, *cells])
    head = " | ".join(["base", *(f"{m} rows" if m != "1" else "1 row" for m in counts)])
    text = (
        "one linear of 1536 × 576, nanoseconds a weight: forward / forward and the input's "
        "gradient; median of 3 interleaved rounds"
    )
    return caption(text, rows) + table(head, lines)
