"""What a run says: lines while it goes, tables for a README, plots."""

from __future__ import annotations

from pathlib import Path

from shapes import GGML_FMA


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s"


def ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 20 else f"{value:.1f}x"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def shape_text(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def count(threads: int | None) -> str:
    if threads is None:
        return "GPU"
    return "1 thread" if threads == 1 else f"{threads} threads"


def machine_name(result: dict) -> str:
    machine = result["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['cpus_available']} cores"


def on_gpu(result: dict) -> bool:
    return "gpu" in result["machine"]


def is_short(row: dict) -> bool:
    return row["overhead_seconds"] > 0


# -- while it runs ---------------------------------------------------------------------------------


def operators_header() -> str:
    return (
        f"{'operator':<12} {'pass':<17} {'B x T x D':<16} {'dtype':<9} {'isa':<8} thr "
        f"{'best':>9} {'median':>7} {'call +':>8} {'GB/s':>6} {'triad':>6} {'copy':>6} "
        f"{'/triad':>7} {'/roof':>7}  bound"
    )


def operator_line(row: dict) -> str:
    rates = row["calibration_gigabytes_per_second"]
    best = {
        kind: max(rate for name, rate in rates.items() if name.startswith(kind))
        for kind in ("triad", "copy")
    }
    median = "+" + percent(row["seconds_median"] / row["seconds_min"] - 1)
    overhead = duration(row["overhead_seconds"]) if is_short(row) else ""
    return (
        f"{row['operator']:<12} {row['mode']:<17} {'x'.join(map(str, row['shape'])):<16} "
        f"{row['dtype']:<9} {row['isa']:<8} {row['threads'] or '':>3} "
        f"{duration(row['seconds_min'] - row['overhead_seconds']):>9} {median:>7} "
        f"{overhead:>8} {row['gigabytes_per_second']:>6.1f} {best['triad']:>6.1f} "
        f"{best['copy']:>6.1f} {percent(row['fraction_of_triad']):>7} "
        f"{percent(row['fraction_of_roof']):>7}  {row['bound_by']}"
        f"{', /copy ' + percent(row['fraction_of_copy']) if 'fraction_of_copy' in row else ''}"
        f"{'' if row['meets_goal'] else ', below the goal of ' + percent(row['goal'])}"
        f"{eager(row)}"
    )


def eager(row: dict) -> str:
    """On a GPU the times are those of kernels; this is a call from Python."""
    if "eager_seconds" not in row:
        return ""
    how = "" if row["timed_as"] in ("graph", "calls") else f"; {row['timed_as']}"
    return f"; called from Python {duration(row['eager_seconds'])}{how}"


def step_line(row: dict) -> str:
    overhead = row["overhead_seconds"]
    extra = f", of which {duration(overhead)} without channels" if overhead else ""
    return (
        f"{row['operator']:<12} {row['function']:<18} B = {row['shape'][0]:<4} {row['dtype']:<9} "
        f"{count(row['threads']):<9} {duration(row['seconds_min']):>9}{extra}{eager(row)}"
    )


def memory_line(row: dict) -> str:
    about = f"{row['who']:<16} {row['what']:<12} {row['mode']:<17} {shape_text(row['shape']):<18}"
    if "failed" in row:
        return f"{about} failed: {row['failed']}"
    needs = row["tensors_needed"]
    least = f", its results alone are {needs:.1f}" if needs else ""
    return f"{about} {mebibytes(row['peak_bytes'])} = {in_tensors(row):.1f} B x T x D{least}"


def unit_bytes(row: dict) -> int:
    """One (B, T, D) tensor of the case's dtype."""
    size = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[row["dtype"]]
    return row["shape"][0] * row["shape"][1] * row["shape"][2] * size


def in_tensors(row: dict) -> float:
    return row["peak_bytes"] / unit_bytes(row)


def not_run_line(row: dict) -> str:
    shape = " at " + shape_text(row["shape"]) if row.get("shape") else ""
    return f"{row['peer']}, {row['what']}{shape}: not supported here: {row['reason']}"


def allocator_line(row: dict) -> str:
    return (
        f"With malloc left as it is: {row['operator']} {row['mode']} "
        f"{'x'.join(map(str, row['shape']))} takes {duration(row['seconds_min'])} instead of "
        f"{duration(row['with_freed_memory_kept'])}, for {row['page_faults_per_call']:.0f} page "
        "faults per call"
    )


def mamba_header(what: str = "Mamba operator", shape: str = "B x T x D") -> str:
    return (
        f"{what:<33} {'pass':<9} {shape:<18} {'isa':<7} thr {'best':>9} "
        f"{'median':>7} {'ns each':>8} {'GB/s':>6} {'/roof':>6}  bound"
    )


def mamba_share(row: dict) -> str:
    """The share that the goal is about, and of what."""
    if row["goal_of"] == "copy":
        ordinary, best = row["fraction_of_ordinary_copy"], row["fraction_of_copy"]
        return f"{percent(ordinary)} of copy, {percent(best)} of the faster copy"
    return f"{percent(row['fraction_of_roof'])} of the roof"


def mamba_beside(row: dict) -> str:
    beside = row.get("beside")
    if not beside:
        return ""
    text = f"{beside['ratio']:.2f}x the time of {beside['what']}"
    if not beside["meets_goal"]:
        text += f" (goal: at most {beside['at_most']:g}x)"
    return text


def mamba_line(row: dict) -> str:
    line = (
        f"{row['operator']:<33} {row['mode']:<9} {row['shape_name']:<18} "
        f"{row['isa']:<7} {row['threads']:>3} {duration(row['seconds_min']):>9} "
        f"{'+' + percent(row['seconds_median'] / row['seconds_min'] - 1):>7} "
        f"{row['nanoseconds_per_element']:>8.3f} {row['gigabytes_per_second']:>6.1f} "
        f"{percent(row['fraction_of_roof']):>6}  {row['bound_by']}"
    )
    if row["goal_of"] == "copy":
        line += f", {mamba_share(row)}"
    if not row["meets_goal"]:
        line += f", below the goal of {percent(row['goal'])}"
    if "ggml" in row:
        line += f", {beside_ggml(row['ggml'])}"
    beside = mamba_beside(row)
    return f"{line}, {beside}" if beside else line


def beside_ggml(ggml: dict) -> str:
    text = (
        f"{ratio(ggml['ratio'])} ggml's {ggml['nanoseconds_elsewhere']:g} ns, measured elsewhere, "
        f"scaled to {ggml['nanoseconds_scaled']:.3f} by the multiply-add rate"
    )
    return text if ggml["meets_goal"] else f"{text} (goal {ggml['goal']:g}x)"


def matrix_step_line(row: dict) -> str:
    return (
        f"{row['function']:<24} {row['shape_name']:<18} B = {row['batch']:<3} {row['dtype']:<9} "
        f"{count(row['threads']):<9} {duration(row['seconds_min']):>9}: "
        f"{row['gigabytes_per_second']:.1f} GB/s, {percent(row['fraction_of_copy'])} of copying "
        f"{mebibytes(row['state_bytes'])} of state"
    )


def scaling_line(row: dict) -> str:
    scaling = row["scaling"]
    line = (
        f"{row['operator']:<33} {row['mode']:<9} {row['shape_name']:<18} "
        f"{row['isa']:<7} {count(row['threads'])}: {scaling['ratio']:.2f}x as fast as one"
    )
    return line if scaling["meets_goal"] else f"{line}, goal {scaling['goal']:g}x"


def mamba_step_line(row: dict) -> str:
    line = (
        f"{row['function']:<12} B = {row['batch']:<3} {row['layers_in_turn']:>2} layers in turn, "
        f"{row['dtype']}, {count(row['threads']):<9} {duration(row['seconds_min']):>9}: "
        f"{row['ratio_to_read']:.2f}x the time to read {mebibytes(row['weight_bytes'])} of weights "
        f"({duration(row['read_seconds'])}, by {row['read_by']})"
    )
    return line if row["meets_goal"] else f"{line}, goal {row['goal']:g}x"


BOUNDS = {"bandwidth": "memory", "special": "special functions", "issue": "instructions"}


def gpu_mamba_header() -> str:
    return (
        f"{'Mamba operator':<24} {'pass':<9} {'B x T x D':<13} {'dtype':<9} {'best':>9} "
        f"{'median':>7} {'ns each':>8} {'GB/s':>7} {'/copy':>6} {'floor':>9} {'/floor':>7}  bound"
    )


def gpu_mamba_share(row: dict) -> str:
    """The share that the goal is about, and of what."""
    if row["goal_of"] == "copy":
        return f"{percent(row['fraction_of_copy'])} of copy"
    return f"{percent(row['fraction_of_roof'])} of the floor"


def gpu_mamba_line(row: dict) -> str:
    return (
        f"{row['operator']:<24} {row['mode']:<9} {'x'.join(map(str, row['shape'])):<13} "
        f"{row['dtype']:<9} {duration(row['seconds_min']):>9} "
        f"{'+' + percent(row['seconds_median'] / row['seconds_min'] - 1):>7} "
        f"{row['nanoseconds_per_element']:>8.5f} {row['gigabytes_per_second']:>7.1f} "
        f"{percent(row['fraction_of_copy']):>6} {duration(row['floor_seconds']):>9} "
        f"{percent(row['fraction_of_roof']):>7}  {BOUNDS[row['bound_by']]}{missed(row)}{eager(row)}"
    )


def missed(row: dict) -> str:
    return "" if row["meets_goal"] else f", below the goal of {percent(row['goal'])}"


def gpu_mamba_step_line(row: dict) -> str:
    products = row.get("products_seconds")
    beside = f"; its products alone {duration(products)}" if products else ""
    return (
        f"{row['function']:<20} B = {row['batch']:<5} {row['dtype']:<9} "
        f"{duration(row['seconds_min']):>9} {row['gigabytes_per_second']:>7.1f} GB/s, "
        f"{percent(row['fraction_of_copy'])} of copy{missed(row)}{beside}{eager(row)}"
    )


def model_line(row: dict) -> str:
    return (
        f"{row['who']:<24} {row['parameters'] / 1e6:>6.1f}M {row['dtype']:<9} {row['phase']:<8} "
        f"{row['context']:>7} tokens of context: {rate(row['tokens_per_second'])} tokens/s "
        f"({duration(row['seconds_min'])}, median "
        f"+{percent(row['seconds_median'] / row['seconds_min'] - 1)})"
    )


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def long_how(row: dict) -> str:
    return f"in chunks of {row['chunk']}" if row["chunk"] else "whole"


def long_line(row: dict) -> str:
    about = f"{row['tokens']:>8} tokens, {long_how(row):<18}"
    if "failed" in row:
        return f"{about} failed: {row['failed']}"
    per_second = rate(row["tokens"] / row["seconds"])
    return (
        f"{about} {duration(row['seconds']):>9}, {per_second} tokens/s, "
        f"{mebibytes(row['peak_bytes'])}"
    )


def peers_header(threads: int | None) -> str:
    return f"Against peers, {count(threads)}, best of the rounds (range of the ratio)"


def peer_line(row: dict) -> str:
    line = (
        f"{row['what']:<42} {shape_text(row['shape']):<18} {row['dtype']:<8} ours "
        f"{duration(row['ours']['seconds_min']):>9}, {row['peer']} "
        f"{duration(row['theirs']['seconds_min']):>9}: {ratio(row['ratio'])} "
        f"({ratio(row['ratio_min'])} to {ratio(row['ratio_max'])})"
    )
    if row.get("goal"):
        line += f", goal {ratio(row['goal'])}"
    if row.get("papers_ratio"):
        line += f", the paper on a T4 GPU: {row['papers_ratio']:.0f}x"
    if row.get("note"):
        line += f"; {row['note']}"
    if row.get("projections_alone") and row["peer"] == "minGRU-pytorch":
        line += (
            f"; the projections alone {duration(row['projections_alone']['seconds_min'])} of ours"
        )
    return line


def share(row: dict) -> float:
    """Of the bandwidth that the goal is about: copy on a GPU, triad on a CPU."""
    return row.get("fraction_of_copy", row["fraction_of_triad"])


def summary(result: dict) -> str:
    rows = result["operators"]
    lines = []
    if rows:
        met = sum(row["meets_goal"] for row in rows)
        kind = "copy" if on_gpu(result) else "triad"
        lines.append(f"{met} of {len(rows)} operator timings reach their share of {kind}.")
        # At the roof the share of triad would be this; below the goal, no kernel can reach it.
        short = [
            row
            for row in rows
            if row["goal"] and share(row) < row["goal"] * row["fraction_of_roof"]
        ]
        if short:
            lines.append(
                f"{len(short)} cannot, however fast: their exponentials alone take too long for "
                "it (see /roof)."
            )
    for kind, whose in (("mamba", "Mamba's operators"), ("matrix", "the matrix memories")):
        goals = [row["meets_goal"] for row in result[kind] if row["goal"]]
        for key in ("beside", "scaling", "ggml"):
            held = [row[key] for row in result[kind] if row.get(key)]
            goals += [x["meets_goal"] for x in held if x.get("at_most") or x.get("goal")]
        if goals:
            lines.append(f"{sum(goals)} of {len(goals)} goals of {whose} are reached.")
    if goals := [row["meets_goal"] for row in result["mamba_steps"] if row["goal"]]:
        lines.append(f"{sum(goals)} of {len(goals)} goals of its step are reached.")
    if result["wrong"]:
        lines.append(f"{len(result['wrong'])} results were wrong and were not timed.")
    if result["not_run"]:
        names = sorted({row["peer"] for row in result["not_run"]})
        lines.append(f"Not everything of {', '.join(names)} can run here: see above.")
    lines.append(f"{result['settings']['minutes']} minutes.")
    return "\n".join(lines)


# -- tables for a README ---------------------------------------------------------------------------


def mebibytes(size: int | None) -> str:
    if not size:
        return "?"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def machine_text(result: dict) -> str:
    machine = result["machine"]
    if on_gpu(result):
        return (
            f"{machine['gpu']}, CUDA {machine['cuda']}, driver {machine['driver']}, "
            f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}"
        )
    return (
        f"{machine['cpu']}, {machine['cpus_available']} cores, L2 {mebibytes(machine['l2_bytes'])} "
        f"per core, L3 {mebibytes(machine['l3_bytes'])}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}"
    )


def markdown(result: dict) -> str:
    parts = [f"Measured on: {machine_text(result)}.\n"]
    rows = result["operators"]
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    if rows:
        if on_gpu(result):
            text = "Share of this GPU's own copy bandwidth, counting the bytes that must move"
        else:
            text = (
                "Share of the machine's own triad bandwidth at the same working set, counting the "
                "bytes that must move"
            )
        parts.append(text + ":\n")
        head = ["operator", "pass", "B x T x D", "dtype", "threads"]
        head += [f"{isa}: time, GB/s, share" for isa in isas]
        if on_gpu(result):
            head = [*head[:4], "called from Python", *head[5:]]
        parts.append("| " + " | ".join(head) + " |")
        parts.append("|" + "---|" * len(head))
        table: dict[tuple, dict] = {}
        for row in rows:
            key = (
                f"`{row['operator']}`",
                row["mode"],
                shape_text(row["shape"]) + (" (in L2)" if row["in_l2"] else ""),
                row["dtype"],
                str(row["threads"] or duration(row["eager_seconds"])),
            )
            table.setdefault(key, {})[row["isa"]] = row
        for key, by_isa in table.items():
            cells = []
            for isa in isas:
                row = by_isa.get(isa)
                if row is None:
                    cells.append("")
                    continue
                shares = f"**{percent(share(row))}**"
                if row["bound_by"] == "exp":
                    shares += f" ({percent(row['fraction_of_roof'])} of the exp roof)"
                time = duration(row["seconds_min"] - row["overhead_seconds"])
                cells.append(f"{time}, {row['gigabytes_per_second']:.1f}, {shares}")
            parts.append("| " + " | ".join((*key, *cells)) + " |")
        parts.append("")
    if on_gpu(result):
        parts += _gpu_mamba_table(result) + _steps_table(result) + _gpu_mamba_steps_table(result)
    else:
        parts += _mamba_table(result["mamba"]) + _steps_table(result) + _mamba_steps_table(result)
        parts += _mamba_table(result["matrix"], MATRIX_INTRO, "B x T x H x K x V (x G)")
        parts += _matrix_steps_table(result)
    parts += _memory_table(result) + _peers_table(result)
    parts += _models_table(result["models"], MODELS_INTRO) + _long_table(result)
    parts += _models_table(result["xlstm_models"], XLSTM_INTRO)
    if result["paper"]:
        batch, _, width = result["paper"][0]["shape"]
        parts.append(
            f"The paper's table: one layer, batch {batch}, input and hidden size {width} (the "
            "paper does not state its own), forward + loss + backward:\n"
        )
        parts.append("| ours | time | beside | time | ratio (range) | the paper, T4 GPU |")
        parts.append("|---|---|---|---|---|---|")
        for row in result["paper"]:
            papers = f"{row['papers_ratio']:.0f}x" if row.get("papers_ratio") else ""
            parts.append(
                f"| {row['what']} | {duration(row['ours']['seconds_min'])} | {row['peer']} "
                f"| {duration(row['theirs']['seconds_min'])} | **{ratio(row['ratio'])}** "
                f"({ratio(row['ratio_min'])} to {ratio(row['ratio_max'])}) | {papers} |"
            )
        parts.append("")
    return "\n".join(parts)


MAMBA_INTRO = (
    "Mamba's operators: time per (batch, time, channel, state) of the scan and per (batch, time, "
    "channel) of the convolution; share of the scan's roof (the larger of bytes / triad and "
    "exponentials / exp rate + other operations / multiply-add rate) and of copy bandwidth for "
    "the convolution, with the share of its roof behind it:\n"
)
MATRIX_INTRO = (
    "Matrix memories: time per (batch, time, head, K, V); share of the roof (the larger of bytes / "
    "triad and multiply-adds / multiply-add rate; chunks of 64 steps, or step by step where that "
    "needs fewer):\n"
)


def _mamba_table(rows: list[dict], intro: str = MAMBA_INTRO, shape: str = "B x T x D") -> list[str]:
    if not rows:
        return []
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    parts = [intro]
    head = ["operator", "pass", shape, "dtype", "threads"]
    head += [f"{isa}: time, ns each, share" for isa in isas]
    head += ["beside", "speed-up by threads"]
    parts += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table: dict[tuple, dict] = {}
    for row in rows:
        key = (
            f"`{row['operator']}`",
            row["mode"],
            shape_text(row["shape"]),
            row["dtype"],
            str(row["threads"]),
        )
        table.setdefault(key, {})[row["isa"]] = row
    for key, by_isa in table.items():
        cells = []
        for isa in isas:
            row = by_isa.get(isa)
            if row is None:
                cells.append("")
                continue
            text = f"{duration(row['seconds_min'])}, {row['nanoseconds_per_element']:.3f}, "
            text += f"**{mamba_share(row)}**"
            if row["goal_of"] == "copy":
                text += f" ({percent(row['fraction_of_roof'])} of the roof)"
            if "ggml" in row:
                text += f"; {ratio(row['ggml']['ratio'])} ggml"
            cells.append(text)
        first = next(iter(by_isa.values()))
        beside = [f"{r['beside']['ratio']:.2f}x" for r in by_isa.values() if r.get("beside")]
        words = f"{', '.join(beside)} the time of {first['beside']['what']}" if beside else ""
        scaling = [f"{r['scaling']['ratio']:.2f}x" for r in by_isa.values() if r.get("scaling")]
        parts.append("| " + " | ".join((*key, *cells, words, ", ".join(scaling))) + " |")
    if any("ggml" in row for row in rows):
        parts += [
            "",
            "ggml's scan of Mamba-2 was measured elsewhere (float32, AVX-512, "
            f"{GGML_FMA:g} ns per multiply-add of a lane on one core); its time is scaled by this "
            "machine's multiply-add rate.",
        ]
    return [*parts, ""]


def _matrix_steps_table(result: dict) -> list[str]:
    rows = result["matrix_steps"]
    if not rows:
        return []
    parts = [
        "One token through a matrix memory, in place: time, and share of the bandwidth of a copy of "
        "as many bytes as its state is (read and written); the call from Python is part of it:\n",
        "| function | H x K x V | dtype | threads | B | state | time | GB/s | share of copy |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        cells = (
            f"`{row['function']}`",
            shape_text(row["shape"][2:5]),
            row["dtype"],
            row["threads"],
            row["batch"],
            mebibytes(row["state_bytes"]),
            duration(row["seconds_min"]),
            f"{row['gigabytes_per_second']:.1f}",
            f"**{percent(row['fraction_of_copy'])}**",
        )
        parts.append("| " + " | ".join(map(str, cells)) + " |")
    return [*parts, ""]


def _mamba_steps_table(result: dict) -> list[str]:
    rows = result["mamba_steps"]
    if not rows:
        return []
    parts = [
        f"One token through a Mamba layer (d_model {rows[0]['width']}, "
        f"{mebibytes(rows[0]['weight_bytes'])} of weights in {rows[0]['dtype']}), beside the time "
        "to read as much; one layer again and again, whose weights the caches may keep, and as many "
        "in turn as exceed them:\n",
        "| function | dtype | threads | B | layers in turn | time | reading the weights | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            f"`{row['function']}`",
            row["dtype"],
            row["threads"],
            row["batch"],
            row["layers_in_turn"],
            duration(row["seconds_min"]),
            duration(row["read_seconds"]),
            f"**{row['ratio_to_read']:.2f}x**",
        )
        parts.append("| " + " | ".join(map(str, cells)) + " |")
    return [*parts, ""]


def _gpu_mamba_table(result: dict) -> list[str]:
    rows = result["mamba"]
    if not rows:
        return []
    parts = [
        "Mamba's operators: share of the floor, which is the longest of what the bytes take at copy "
        "bandwidth, the special functions and the instructions; the convolution's goal is its share "
        "of copy bandwidth:\n",
        "| operator | pass | B x T x D | dtype | called from Python | time | ns each | GB/s "
        "| share | floor, by |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        cells = (
            f"`{row['operator']}`",
            row["mode"],
            shape_text(row["shape"]),
            row["dtype"],
            duration(row["eager_seconds"]),
            duration(row["seconds_min"]),
            f"{row['nanoseconds_per_element']:.5f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"**{gpu_mamba_share(row)}**{missed(row)}",
            f"{duration(row['floor_seconds'])}, {BOUNDS[row['bound_by']]}",
        )
        parts.append("| " + " | ".join(cells) + " |")
    return [*parts, ""]


def _gpu_mamba_steps_table(result: dict) -> list[str]:
    rows = result["mamba_steps"]
    if not rows:
        return []
    widths = {row["function"]: row["width"] for row in rows}
    sizes = ", ".join(f"{function} {width}" for function, width in widths.items())
    parts = [
        f"One token of Mamba ({sizes} wide): time, share of copy bandwidth for weights, states and "
        "tokens; of a layer, the time of its products alone:\n",
        "| function | dtype | B | called from Python | time | GB/s | share of copy | products alone |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        products = row.get("products_seconds")
        cells = (
            f"`{row['function']}`",
            row["dtype"],
            row["batch"],
            duration(row["eager_seconds"]),
            duration(row["seconds_min"]),
            f"{row['gigabytes_per_second']:.1f}",
            f"**{percent(row['fraction_of_copy'])}**{missed(row)}",
            duration(products) if products else "",
        )
        parts.append("| " + " | ".join(map(str, cells)) + " |")
    return [*parts, ""]


MODELS_INTRO = (
    "Language models of equal size ({sizes} parameters), one sequence, {threads}, tokens per second. "
    "The transformer is written plainly with torch's scaled_dot_product_attention and a key-value "
    "cache:\n"
)
XLSTM_INTRO = (
    "xLSTM language models, ours (xLSTMLM, xLSTMLarge) beside the packages' with the same weights "
    "({sizes} parameters), one sequence, {threads}, tokens per second:\n"
)


def _models_table(rows: list[dict], intro: str) -> list[str]:
    if not rows:
        return []
    sizes = dict.fromkeys(f"{row['who']} {row['parameters'] / 1e6:.0f}M" for row in rows)
    parts = [intro.format(sizes=", ".join(sizes), threads=count(rows[0]["threads"]))]
    contexts = sorted({row["context"] for row in rows})
    head = ["model", "dtype", "phase", *(f"{context} tokens" for context in contexts)]
    parts += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table: dict[tuple, dict] = {}
    for row in rows:
        key = (row["who"], row["dtype"], row["phase"])
        table.setdefault(key, {})[row["context"]] = rate(row["tokens_per_second"])
    for key, cells in table.items():
        found = (cells.get(context, "not measured") for context in contexts)
        parts.append("| " + " | ".join((*key, *found)) + " |")
    return [*parts, ""]


def _long_table(result: dict) -> list[str]:
    rows = [row for row in result["long"] if "failed" not in row]
    if not rows:
        return []
    first = rows[0]
    parts = [
        f"A long text through a MambaLM (d_model {first['width']}, {first['layers']} blocks, "
        f"{first['dtype']}, {count(first['threads'])}): memory beyond the model and the tokens:\n",
        "| tokens | read | time | tokens/s | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        parts.append(
            f"| {row['tokens']} | {long_how(row)} | {duration(row['seconds'])} "
            f"| {rate(row['tokens'] / row['seconds'])} | {mebibytes(row['peak_bytes'])} |"
        )
    return [*parts, ""]


def _steps_table(result: dict) -> list[str]:
    if not result["steps"]:
        return []
    rows = result["steps"]
    batches = list(dict.fromkeys(row["shape"][0] for row in rows))
    dim = rows[0]["shape"][1]
    gpu = on_gpu(result)
    last = " (in a CUDA graph; called from Python)" if gpu else ""
    parts = [f"One token, D = {dim}: time per call{last}:\n"]
    head = ["function", "dtype", "device" if gpu else "threads", *(f"B = {b}" for b in batches)]
    parts += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table: dict[tuple, dict] = {}
    for row in rows:
        options = row["operator"].partition("[")[1:]
        name = f"`{row['function']}`" + (f" {''.join(options)}" if options[0] else "")
        key = (name, row["dtype"], count(row["threads"]))
        cell = duration(row["seconds_min"])
        if gpu:
            cell += f"; {duration(row['eager_seconds'])}"
        table.setdefault(key, {})[row["shape"][0]] = cell
    for key, cells in table.items():
        parts.append("| " + " | ".join((*key, *(cells.get(b, "") for b in batches))) + " |")
    return [*parts, ""]


def _memory_table(result: dict) -> list[str]:
    rows = [row for row in result["memory"] if "failed" not in row]
    if not rows:
        return []
    parts = [
        f"Peak memory of a call beyond its inputs, at {shape_text(rows[0]['shape'])}, in units of "
        f"one such {rows[0]['dtype']} tensor ({mebibytes(unit_bytes(rows[0]))}):\n",
        "| what | pass | whose | peak | its results alone |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        needs = row["tensors_needed"] or ""
        parts.append(
            f"| {row['what']} | {row['mode']} | {row['who']} | {in_tensors(row):.1f} | {needs} |"
        )
    return [*parts, ""]


def _peers_table(result: dict) -> list[str]:
    if not result["peers"] and not result["not_run"]:
        return []
    parts = ["Beside peers (same inputs and weights, results compared first):\n"]
    head = ["what", "B x T x D", "dtype", "ours", "peer", "its time", "ratio (range)"]
    parts += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["peers"]:
        note = f" ({row['note']})" if row.get("note") else ""
        parts.append(
            f"| {row['what']} | {shape_text(row['shape'])} | {row['dtype']} "
            f"| {duration(row['ours']['seconds_min'])} | {row['peer']}{note} "
            f"| {duration(row['theirs']['seconds_min'])} | **{ratio(row['ratio'])}** "
            f"({ratio(row['ratio_min'])} to {ratio(row['ratio_max'])}) |"
        )
    parts.append("")
    for row in result["not_run"]:
        parts.append(f"- {not_run_line(row)}")
    return [*parts, ""] if result["not_run"] else parts


MARKS = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")


def merge_markdown(file: Path, result: dict) -> None:
    """Puts the tables between the two marks of a file, or, where it has none, makes it of them."""
    old = file.read_text() if file.exists() else ""
    begin, end = old.find(MARKS[0]), old.find(MARKS[1])
    text = markdown(result)
    if 0 <= begin < end:
        text = old[: begin + len(MARKS[0])] + "\n" + text.rstrip() + "\n" + old[end:]
    file.write_text(text)


# -- plots -----------------------------------------------------------------------------------------

COLORS = {"avx512": "#1f5a94", "avx2": "#7fb2dd"}
OTHER_COLORS = ("#4d4d4d", "#a6a6a6", "#c58b3a")
OURS, PAPER, INK, FAINT = "#1f5a94", "#d1495b", "#222222", "#d9d9d9"


def draw(result: dict, folder: Path, name: str) -> list[Path]:
    """Draws what the result holds; without matplotlib it says so and draws nothing."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots")
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "font.family": "DejaVu Sans",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#888888",
            "figure.facecolor": "white",
        }
    )
    written = []
    if result["operators"]:
        for dtype in dict.fromkeys(row["dtype"] for row in result["operators"]):
            suffix = "" if dtype == "float32" else f"-{dtype}"
            written.append(draw_roofs(result, dtype, folder / f"{name}-roof{suffix}.png"))
    if result["mamba"] and not on_gpu(result):
        written.append(draw_mamba(result, folder / f"{name}-mamba.png"))
    elif result["mamba"]:
        for dtype in dict.fromkeys(row["dtype"] for row in result["mamba"]):
            suffix = "" if dtype == "float32" else f"-{dtype}"
            written.append(draw_mamba(result, folder / f"{name}-mamba{suffix}.png", dtype))
    if result["matrix"]:
        written.append(draw_mamba(result, folder / f"{name}-matrix.png", kind="matrix"))
    if result["models"] or result["long"]:
        written.append(draw_models(result, folder / f"{name}-models.png"))
    if result["peers"] or result["paper"]:
        written.append(draw_ratios(result, folder / f"{name}-peers.png"))
    return written


def _color(isa: str, isas: list[str]) -> str:
    others = [other for other in isas if other not in COLORS]
    return COLORS.get(isa) or OTHER_COLORS[others.index(isa) % len(OTHER_COLORS)]


def _caption(figure, result: dict) -> None:
    figure.text(0.01, 0.004, machine_text(result), fontsize=6.5, color="#666666", va="bottom")


def draw_roofs(result: dict, dtype: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    rows = [row for row in result["operators"] if row["dtype"] == dtype]
    shapes = list(dict.fromkeys(row["shape_name"] for row in rows))
    threads = sorted({row["threads"] for row in rows}, key=lambda number: number or 0)
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    bars = list(dict.fromkeys((row["operator"], row["mode"]) for row in rows))
    bars.sort(key=lambda bar: [row["operator"] for row in rows].index(bar[0]))

    height = 0.78 / len(isas)
    figure, axes = plt.subplots(
        len(threads),
        len(shapes),
        figsize=(2.6 + 2.75 * len(shapes), 1.4 + len(threads) * (0.5 + 0.36 * len(bars))),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    top = max(1.12, *(row["fraction_of_roof"] * 1.12 for row in rows))
    for row_axes, number in zip(axes, threads, strict=True):
        for ax, shape in zip(row_axes, shapes, strict=True):
            chosen = {
                (row["operator"], row["mode"], row["isa"]): row
                for row in rows
                if row["shape_name"] == shape and row["threads"] == number
            }
            for position, bar in enumerate(bars):
                for offset, isa in enumerate(isas):
                    row = chosen.get((*bar, isa))
                    if row is None:
                        continue
                    y = position + (offset - (len(isas) - 1) / 2) * height
                    share = row["fraction_of_roof"]
                    ax.barh(y, share, height * 0.92, color=_color(isa, isas), zorder=2)
                    star = "*" if row["bound_by"] == "exp" else ""
                    ax.text(
                        0.02,
                        y,
                        f"{100 * share:.0f}{star}",
                        va="center",
                        ha="left",
                        fontsize=6.5,
                        color="white" if isa != "avx2" else INK,
                        zorder=4,
                    )
            goals = {row["goal"] for row in chosen.values() if row["goal"]}
            for goal in goals:
                ax.axvline(goal, color=PAPER, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
                ax.text(
                    goal, -0.62, f"goal {100 * goal:.0f}", fontsize=6.5, color=PAPER, ha="right"
                )
            ax.axvline(1, color=INK, linewidth=1, zorder=3)
            first = next(iter(chosen.values()), None)
            label = "in L2" if shape == "in-L2" else f"B x T x D = {shape.replace('x', ' x ')}"
            if first is not None and shape != "in-L2":
                sizes = [row["working_set_bytes"] / 2**20 for row in chosen.values()]
                label += f"\n{min(sizes):.0f} to {max(sizes):.0f} MiB"
            elif first is not None:
                label += "\ninputs and outputs fit half of each core's L2"
            if ax in axes[0]:
                ax.set_title(label, fontsize=9, color=INK)
            ax.set_yticks(range(len(bars)), [f"{op}, {mode}" for op, mode in bars])
            ax.set_ylim(len(bars) - 0.45, -0.95)
            ax.set_xlim(0, top)
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
            ax.tick_params(axis="both", length=0)
            ax.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)
        row_axes[0].set_ylabel(count(number), fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_color(isa, isas)) for isa in isas]
    figure.legend(
        handles,
        [isa.replace("avx", "AVX").replace("AVX512", "AVX-512") for isa in isas],
        loc="outside upper right",
        ncols=len(isas),
        frameon=False,
    )
    figure.suptitle(
        f"Share of this machine's roof, {dtype} "
        f"(100 % = {'copy bandwidth' if on_gpu(result) else 'triad bandwidth at the same working set'};\n"
        "*: exponentials take longer than the bytes, 100 % = exp rate)",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
    _caption(figure, result)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def draw_ratios(result: dict, path: Path) -> Path:
    import matplotlib.pyplot as plt

    rows = result["peers"] + result["paper"]
    figure, ax = plt.subplots(figsize=(8.6, 1.5 + 0.36 * len(rows)), layout="constrained")
    labels = []
    for y, row in enumerate(rows):
        value = row["ratio"]
        ax.barh(y, value - 1, 0.68, 1, color=OURS if value >= 1 else OTHER_COLORS[1], zorder=2)
        ax.plot(
            [row["ratio_min"], row["ratio_max"]], [y, y], color="black", linewidth=1.2, zorder=3
        )
        times = (
            f"{duration(row['theirs']['seconds_min'])} -> {duration(row['ours']['seconds_min'])}"
        )
        ax.annotate(times, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7.5)
        farthest = max(value, row["ratio_max"], 1)
        if row.get("goal"):
            ax.plot([row["goal"]] * 2, [y - 0.42, y + 0.42], color=PAPER, linewidth=2, zorder=4)
            farthest = max(farthest, row["goal"])
        ax.annotate(
            ratio(value),
            (farthest, y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold",
        )
        if row.get("papers_ratio"):
            ax.plot(row["papers_ratio"], y, "D", color=PAPER, markersize=5, zorder=4)
            ax.annotate(
                f"{row['papers_ratio']:.0f}x",
                (row["papers_ratio"], y),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=PAPER,
            )
        note = f" ({row['note']})" if row.get("note") else ""
        where = f", {shape_text(row['shape'])}, {row['dtype']}" if on_gpu(result) else ""
        labels.append(f"{row['what']}{where}\nbeside {row['peer']}{note}")
    ax.annotate(
        "peer -> ours", (1.01, 1.0), xycoords="axes fraction", fontsize=7.5, color="#666666"
    )
    ax.set_xscale("log")
    lowest = min(1.0, *(row["ratio_min"] for row in rows))
    highest = max(max(row["ratio_max"], row.get("papers_ratio") or 1) for row in rows)
    ax.set_xlim(lowest * 0.8, highest * 4)
    ax.axvline(1, color=INK, linewidth=1, zorder=3)
    ax.set_yticks(range(len(rows)), labels, fontsize=7.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ticks = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
    if highest / lowest > 3000:
        ticks = [10**exponent for exponent in range(-3, 7)]
    ax.set_xticks([tick for tick in ticks if lowest * 0.8 <= tick <= highest * 4])
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=OURS), plt.Line2D([], [], color="black")]
    names = ["best time of the peer / our best", "range over the rounds"]
    if any(row.get("goal") for row in rows):
        handles.append(plt.Line2D([], [], color=PAPER, linewidth=2))
        names.append("goal")
    if any(row.get("papers_ratio") for row in rows):
        handles.append(plt.Line2D([], [], color=PAPER, marker="D", linestyle="", markersize=5))
        names.append("the minRNN paper, on a T4 GPU")
    figure.legend(handles, names, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    threads = rows[0]["threads"]
    ax.set_title(
        "How many times faster than the peer: "
        + (
            "GPU, kernels alone" if on_gpu(result) else f"{rows[0]['dtype']}, CPU, {count(threads)}"
        ),
        loc="left",
        fontsize=10,
        pad=14,
    )
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    _caption(figure, result)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def draw_mamba(result: dict, path: Path, dtype: str | None = None, kind: str = "mamba") -> Path:
    """Shares of the roof, with a tick at each bar's goal where the goal is about the roof."""
    import matplotlib.pyplot as plt

    rows = [row for row in result[kind] if dtype in (None, row["dtype"])]
    gpu = on_gpu(result)
    threads = sorted({row["threads"] for row in rows})
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    bars = list(dict.fromkeys((row["operator"], row["mode"], row["shape_name"]) for row in rows))
    order = list(dict.fromkeys(row["operator"] for row in rows))
    bars.sort(key=lambda bar: (order.index(bar[0]), bar[2], bar[1] == "backward"))
    shapes: dict[str, set[str]] = {}  # of each function
    for operator, _, shape_name in bars:
        shapes.setdefault(operator.partition("[")[0], set()).add(shape_name)
    height = 0.78 / len(isas)
    figure, axes = plt.subplots(
        1,
        len(threads),
        figsize=(3.4 + 3.1 * len(threads), 1.5 + 0.38 * len(bars)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    top = max(1.12, *(row["fraction_of_roof"] * 1.12 for row in rows))
    for ax, number in zip(axes[0], threads, strict=True):
        chosen = {
            (row["operator"], row["mode"], row["shape_name"], row["isa"]): row
            for row in rows
            if row["threads"] == number
        }
        for position, bar in enumerate(bars):
            for offset, isa in enumerate(isas):
                row = chosen.get((*bar, isa))
                if row is None:
                    continue
                y = position + (offset - (len(isas) - 1) / 2) * height
                share = row["fraction_of_roof"]
                ax.barh(y, share, height * 0.92, color=_color(isa, isas), zorder=2)
                star = "*" if row["bound_by"] == "bandwidth" else ""
                color = "white" if isa != "avx2" else INK
                text = f"{100 * share:.0f}{star}"
                ax.text(0.02, y, text, va="center", fontsize=6.5, color=color, zorder=4)
                if row["goal"] and row["goal_of"] == "roof":
                    ends = [y - height / 2, y + height / 2]
                    ax.plot([row["goal"]] * 2, ends, color=PAPER, linewidth=1.6, zorder=5)
        ax.axvline(1, color=INK, linewidth=1, zorder=3)
        ax.set_title(count(number), fontsize=9, color=INK)
        ax.set_xlim(0, top)
        ax.set_ylim(len(bars) - 0.45, -0.6)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        ax.tick_params(axis="both", length=0)
        ax.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)
    labels = []
    for operator, mode, shape in bars:
        several = len(shapes[operator.partition("[")[0]]) > 1
        where = f", {shape}" if gpu or several or kind == "matrix" else ""
        labels.append(f"{operator}, {mode}{where}")
    axes[0][0].set_yticks(range(len(bars)), labels, fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_color(isa, isas)) for isa in isas]
    names = [isa.replace("avx", "AVX").replace("AVX512", "AVX-512") for isa in isas]
    handles.append(plt.Line2D([], [], color=PAPER, linewidth=2))
    figure.legend(
        handles, [*names, "goal"], loc="outside upper right", ncols=len(handles), frameon=False
    )
    shape = next(row["shape"] for row in rows)
    title = (
        f"Mamba's operators: share of this machine's roof, B x T x D = {shape_text(shape)}, "
        "16 states\n(100 % = its exponentials at the exp rate and its other operations at the "
        "multiply-add rate;\n*: its bytes take longer)"
    )
    if gpu:
        title = (
            f"Mamba's operators: share of the floor, {dtype}, 16 states\n(100 % = its special "
            "functions and instructions at this GPU's rates;\n*: its bytes at copy bandwidth take "
            "longer)"
        )
    if kind == "matrix":
        title = (
            "Matrix memories: share of this machine's roof, B x T x H x K x V (x G)\n(100 % = their "
            "multiply-adds at the float32 multiply-add rate; *: their bytes take longer)"
        )
    figure.suptitle(
        title,
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
    _caption(figure, result)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def _tokens(number: float) -> str:
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if number >= size and number % size == 0:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def draw_models(result: dict, path: Path) -> Path:
    """Tokens per second against context; time and memory against the length of a text."""
    import matplotlib.pyplot as plt

    models, long = result["models"], [row for row in result["long"] if "failed" not in row]
    panels = list(dict.fromkeys(row["phase"] for row in models)) + ["time", "memory"] * bool(long)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 3.5), squeeze=False, layout="constrained"
    )
    dtypes = list(dict.fromkeys(row["dtype"] for row in models))
    for ax, panel in zip(axes[0], panels, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        if panel in ("time", "memory"):
            for row in long:
                value = row["seconds"] if panel == "time" else row["peak_bytes"] / 2**20
                lines.setdefault(long_how(row), []).append((row["tokens"], value))
            unit = "seconds" if panel == "time" else "MiB"
            ax.set_title(f"a long text: {panel}, {unit}", loc="left", fontsize=9)
            ax.set_xlabel("tokens of the text")
            if panel == "time":
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                ax.yaxis.set_minor_formatter("")
        else:
            for row in models:
                if row["phase"] == panel:
                    who = row["who"] + (f", {row['dtype']}" if len(dtypes) > 1 else "")
                    point = (row["context"], row["tokens_per_second"])
                    lines.setdefault(who, []).append(point)
            ax.set_title(f"{panel}: tokens per second", loc="left", fontsize=9)
            ax.set_xlabel("tokens of context" if panel == "decode" else "tokens of the prompt")
        for index, (label, points) in enumerate(lines.items()):
            ours = label.startswith(("MambaLM", "in chunks"))
            color = OURS if ours else OTHER_COLORS[index % len(OTHER_COLORS)]
            style = "--" if "bfloat16" in label else "-"
            points.sort()
            ax.plot(
                *zip(*points, strict=True),
                style,
                marker="o",
                markersize=4,
                color=color,
                label=label,
            )
        ticks = sorted({x for points in lines.values() for x, _ in points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [_tokens(x) for x in ticks])
        ax.set_xticks([], minor=True)
        if panel != "time":
            ax.set_ylim(0, 1.1 * max(y for points in lines.values() for _, y in points))
        ax.margins(x=0.08)
        ax.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
        ax.legend(frameon=False, fontsize=7.5)
    title = []
    if models:
        sizes = dict.fromkeys(f"{row['who']} {row['parameters'] / 1e6:.3g}M" for row in models)
        title.append(f"{' and '.join(sizes)} parameters, {count(models[0]['threads'])}")
    if long:
        title.append(f"the long text: d_model {long[0]['width']}, {long[0]['layers']} blocks")
    figure.suptitle("; ".join(title), x=0.01, ha="left", fontsize=10)
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    _caption(figure, result)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path
