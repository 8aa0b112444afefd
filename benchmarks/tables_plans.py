"""Tables of plans beside runs, and of what machines hold."""

from csv_tables import read, table


def plans() -> str:
    rows = read("plan_accuracy", machine="Intel(R) Xeon(R) Processor, AMX")
    lines = [
        [r["model"], r["base"], f"{r['batch']} × {r['length']}",
         "on" if r["checkpointing"] == "1" else "off", r["planned_mb"], r["measured_mb"],
         f"{100 * float(r['memory_error']):+.0f} %", r["planned_s"], r["measured_s"],
         f"{100 * float(r['time_error']):+.0f} %"]
        for r in rows
    ]  # fmt: skip
    memory, time = [[abs(float(r[f"{k}_error"])) for r in rows] for k in ("memory", "time")]
    said = (
        f"{sum(e <= 0.10 for e in memory)} of {len(rows)} peaks within 10 %, "
        f"{sum(e <= 0.25 for e in time)} of {len(rows)} times within 25 %"
    )
    head = (
        "model | base | rows × tokens | checkpointing | planned MB | measured MB | off | "
        "planned s | measured s | off"
    )
    first = rows[0]
    return (
        f"*{said}; each run in a process of its own, Xeon, AMX, {first['threads']} threads, "
        f"torch {first['torch']}, commit {first['commit']}.*\n\n" + table(head, lines)
    )


def published() -> str:
    lines = [
        [r["source"].split(",")[0].split(":")[0], f"{r['model']}, {r['base']}",
         f"{r['batch']} × {r['length']}", f"{r['published']} {r['unit']}",
         f"{r['planned']} {r['unit']}", r["verdict"]]
        for r in read("plan_published")
    ]  # fmt: skip
    head = "source | model, base | rows × tokens | published | planned | verdict"
    return "*Others' figures as they published them; none was measured again here.*\n\n" + table(
        head, lines
    )


def llama_70b() -> str:
    lines = []
    for row in read("llama_70b"):
        size = {key: int(row[f"{key} bytes"]) / 1e9 for key in (
            "base", "codes", "scales", "adapters", "gradients", "optimizer", "peak")}  # fmt: skip
        held, mine = sum(list(size.values())[:3]), sum(list(size.values())[3:6])
        room = [gb for gb in (24, 48, 80) if row[f"fits {gb} GB"] == "True"]
        lines.append([row["base format"], row["ranks"], f"{held:.1f}", f"{mine:.2f}",
                      f"{size['peak'] - held - mine:.1f}", f"{size['peak']:.1f}",
                      f"{room[0]} GB" if room else "none of these"])  # fmt: skip
    head = (
        "base | GPUs | base's part | adapter, gradients, moments | activations and gathered | "
        "peak | fits"
    )
    return table(head, lines)


def rank_memory() -> str:
    keys = ("held_bytes", "loading_bytes", "training_bytes")
    lines = [[r["base"], r["ranks"], *(f"{int(r[key]) / 1e6:.0f}" for key in keys)]
             for r in read("rank_memory")]  # fmt: skip
    return table(
        "base | processes | kept of the base | peak while reading | peak while training", lines
    )


def traffic() -> str:
    lines = [[f"{r['M']} × {r['K']} → {r['N']}", *(r[key] for key in ("weight", "launches",
              "compulsory_mb", "eager_mb", "ratio"))] for r in read("traffic")]  # fmt: skip
    return table("M × K → N | weight | launches | kernels, MB | torch ops, MB | ratio", lines)
