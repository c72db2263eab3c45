"""The benchmark: jaxmerge and its peers on the same inputs in one run, as ratios. Called by scripts/bench.

    scripts/bench [--parts types prune cli sweep devices grid] [--adapters 4 8] [--densities 0.2 0.5] [--readme]
    scripts/bench --parts grid [--spaces full factors knots core ctm]

Merges are of random rank-16 adapters with the shapes of Llama-3-8B (all seven linear layers), measured on two layers
and scaled to its 32. PEFT runs its own ``add_weighted_adapter`` on a model of the same shapes. Its ``*_svd`` types are
measured per shape: the kernel on the dense deltas, and one ``torch.linalg.svd`` as PEFT calls it. Modules 14336 wide
are scaled from 4096×4096 by the number of operations, since one of their decompositions takes an hour.

The grid has every method in its spaces, on the same two layers and scaled, beside the plain way on one 4096×4096
module: dense changes in NumPy, merged by ``linear`` or cut by one decomposition.

Every measurement runs in a process of its own, so that its peak memory is its own. Results go to
.bench/results.json, and with --readme into the table of README.md.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYERS, MEASURED, RANK, ALPHA = 32, 2, 16, 32
FACTOR_TYPES = ("cat", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
DENSE_TYPES = ("svd", "magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")


def needs_density(kind: str) -> bool:
    """Whether a combination type prunes."""
    return kind not in ("cat", "linear", "svd")


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The shortest of several wall times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def factors(n: int, shapes: dict[str, tuple[int, int]]) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Random factors of n adapters: module -> a, b."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / 64

    return [{name: (normal(RANK, i), normal(o, RANK)) for name, (o, i) in shapes.items()} for _ in range(n)]


def layers(count: int) -> dict[str, tuple[int, int]]:
    """The shapes of so many layers."""
    return {f"model.layers.{i}.{name}": shape for i in range(count) for name, shape in SHAPES.items()}


# Each of these runs in a process of its own and returns a record.


def ours(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """What jaxmerge takes on two layers."""
    import jax

    import jaxmerge as jm

    del modules
    adapters = [
        jm.Adapter({name: jm.LoRA(a, b, ALPHA / RANK) for name, (a, b) in one.items()})
        for one in factors(n, layers(MEASURED))
    ]
    before = _peak()
    arguments: dict[str, Any] = {"density": density} if needs_density(kind) else {}
    if "dare" in kind:
        arguments["key"] = jax.random.key(0)

    def merge() -> None:
        jax.block_until_ready(jm.merge(adapters, combination_type=kind, **arguments))

    cold = seconds(merge, 1)
    warm = seconds(merge, 1 if kind.endswith("_svd") else 15)
    return {"cold": cold, "warm": warm, "peak": _peak(), "beyond inputs": _peak() - before}


def peft_factors(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """PEFT's add_weighted_adapter on two layers."""
    import peft
    import torch

    del modules
    shapes = layers(MEASURED)
    model = torch.nn.Module()
    for name, (o, i) in shapes.items():
        place = model
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        # Never initialised, and so never in memory: nobody computes with the base model.
        place.add_module(leaf, torch.nn.utils.skip_init(torch.nn.Linear, i, o, bias=False))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[name.rsplit(".", 1)[1] for name in SHAPES])
    names = [f"a{i}" for i in range(n)]
    adapted: Any = peft.PeftModel(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    lora = {name: adapted.base_model.model.get_submodule(name) for name in shapes}
    with torch.no_grad():
        for adapter, one in zip(names, factors(n, shapes), strict=True):
            for name, (a, b) in one.items():
                lora[name].lora_A[adapter].weight.copy_(torch.from_numpy(a))
                lora[name].lora_B[adapter].weight.copy_(torch.from_numpy(b))
    before = _peak()

    def merge() -> None:
        adapted.add_weighted_adapter(
            names, [1.0] * n, "merged", combination_type=kind, density=density if needs_density(kind) else None
        )

    times = []
    for _ in range(3):
        times.append(seconds(merge, 1))
        adapted.delete_adapter("merged")
    return {"warm": min(times), "peak": _peak(), "beyond inputs": _peak() - before}


def peft_dense(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """PEFT's kernel on the dense deltas of one module of each measured shape, scaled to two layers."""
    import torch
    from peft.utils import merge_utils

    del modules
    total = 0.0
    for name, count in (("self_attn.k_proj", 2.0), ("self_attn.q_proj", 2.0 + 3 * 3.5)):
        shape = SHAPES[name]
        with torch.no_grad():
            pairs = [one[name] for one in factors(n, {name: shape})]
            start = time.perf_counter()
            deltas = [torch.from_numpy(b) @ torch.from_numpy(a) * (ALPHA / RANK) for a, b in pairs]
            weights = torch.ones(n)
            if kind == "svd":
                merge_utils.task_arithmetic(deltas, weights)
            else:
                getattr(merge_utils, kind.removesuffix("_svd"))(deltas, weights, density=density)
            total += count * (time.perf_counter() - start)
    return {"warm": MEASURED * total, "peak": _peak()}


def torch_svd(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """The decomposition that PEFT takes of every merged delta, by shape."""
    import torch

    del kind, n, density
    times = {}
    for name in ("self_attn.k_proj", "self_attn.q_proj")[:modules]:
        o, i = SHAPES[name]
        matrix = torch.randn(o, i)
        times[name] = seconds(lambda matrix=matrix: torch.linalg.svd(matrix, full_matrices=True), 1)
    return {"times": times, "peak": _peak()}


def pruning(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """`prune` by magnitude alone, of eight rows and of one large matrix."""
    del kind, n, modules
    rows = {}
    for label, shape in {"65536": (65536,), "4096×4096": (4096, 4096)}.items():
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        rows[label] = _prune_times(x, density)
    return {"times": rows, "peak": _peak()}


def _prune_times(x: np.ndarray, density: float) -> dict[str, float]:
    import jax
    import torch
    from peft.utils.merge_utils import prune

    import jaxmerge as jm

    on_device, tensor, count = jax.device_put(x), torch.from_numpy(x), int(density * x.size)
    bits = (x.view(np.int32) & 0x7FFFFFFF).ravel()
    repeats = 20 if x.size < 10**6 else 5
    return {
        "jaxmerge": seconds(lambda: jax.block_until_ready(jm.prune(on_device, density, "magnitude")), repeats),
        "PEFT": seconds(lambda: prune(tensor, density, "magnitude"), repeats),
        "torch.topk": seconds(lambda: torch.topk(tensor.abs().ravel(), count), repeats),
        "numpy.partition": seconds(lambda: np.partition(bits, x.size - count), repeats),
    }


def sweeping(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """64 settings of scale and density against one merge, on two layers."""
    import jax

    import jaxmerge as jm

    del modules
    adapters = [
        jm.Adapter({name: jm.LoRA(a, b, ALPHA / RANK) for name, (a, b) in one.items()})
        for one in factors(n, layers(MEASURED))
    ]
    grid = {"scale": list(np.linspace(0.3, 1, 8)), "density": list(np.linspace(0.1, 0.9, 8))}
    one = seconds(lambda: jax.block_until_ready(jm.merge(adapters, combination_type=kind, density=density)), 7)

    def norm(merged: jm.Adapter) -> Any:
        return sum((lora.b * lora.b).sum() for lora in merged.modules.values())

    def whole() -> None:
        jm.sweep(adapters, norm, grid, combination_type=kind)

    first = seconds(whole, 1)
    return {"one": one, "first": first, "sweep": seconds(whole, 3), "peak": _peak()}


def spreading(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """The same merge on 1, 2 and 8 devices: whether bits differ, and what crosses between devices."""
    import jax

    import jaxmerge as jm

    del modules
    rng = np.random.default_rng(0)
    shapes = {**{f"layers.{i}.proj": (512, 640) for i in range(12)}, "head": (2048, 2304)}
    adapters = [
        jm.Adapter(
            {
                name: jm.LoRA(rng.standard_normal((RANK, i), np.float32), rng.standard_normal((o, RANK), np.float32))
                for name, (o, i) in shapes.items()
            }
        )
        for _ in range(n)
    ]
    arguments: dict[str, Any] = (
        {"combination_type": kind, "density": density} if needs_density(kind) else {"rank": RANK}
    )
    if "dare" in kind:
        arguments["key"] = jax.random.key(0)
    alone, found = jm.merge(adapters, **arguments), {}
    for count in (1, 2, 8):
        mesh = jax.make_mesh((count,), ("d",), devices=jax.devices()[:count])
        merged = jm.merge(adapters, mesh=mesh, **arguments)
        same = all(
            np.array_equal(getattr(lora, leaf), getattr(alone.modules[name], leaf))
            for name, lora in merged.modules.items()
            for leaf in "ab"
        )
        text = "".join(lowered.compile().as_text() or "" for lowered in jm.lower(adapters, mesh=mesh, **arguments))
        found[str(count)] = {
            "same bits": same,
            **{
                name: len(re.findall(rf" {name}(?:-start)?\(", text))
                for name in ("all-gather", "all-to-all", "all-reduce")
            },
        }
    return {"devices": found}


def in_the_grid(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """What a method takes in a space on two layers."""
    import jax

    import jaxmerge as jm

    del modules
    method, space = kind.split("/")
    row = jm.METHODS[method]
    adapters = [
        jm.Adapter({name: jm.LoRA(a, b, ALPHA / RANK) for name, (a, b) in one.items()})
        for one in factors(n, layers(MEASURED))
    ]
    arguments: dict[str, Any] = {
        h.name: density for h in row.hyperparameters if h.kind == "density" and h.default is None
    }
    arguments |= {h.name: 1e-4 for h in row.hyperparameters if h.kind == "number" and h.default is None}
    if row.random:
        arguments["key"] = jax.random.key(0)

    def merge() -> None:
        jax.block_until_ready(jm.merge(adapters, method=method, space=space, **arguments))

    cold = seconds(merge, 1)
    return {"cold": cold, "warm": cold if cold > 60 else seconds(merge, 1 if cold > 10 else 3), "peak": _peak()}


def plain_way(kind: str, n: int, density: float, modules: int) -> dict[str, Any]:
    """The dense changes of one 4096×4096 module, their sum, and one decomposition of it, in NumPy."""
    del kind, density, modules
    shape = SHAPES["self_attn.q_proj"]
    pairs = [one["q"] for one in factors(n, {"q": shape})]
    summing = seconds(lambda: sum((b @ a) * (ALPHA / RANK) for a, b in pairs), 3)
    total = sum((b @ a) * (ALPHA / RANK) for a, b in pairs)
    return {"sum": summing, "svd": seconds(lambda: np.linalg.svd(total, full_matrices=False), 1), "peak": _peak()}


def _peak() -> float:
    """The process's largest resident memory so far, in MB."""
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measured(
    part: str, kind: str = "", n: int = 0, density: float = 0.0, modules: int = 0, devices: int = 1
) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    arguments = json.dumps([kind, n, density, modules])
    command = [sys.executable, __file__, "--measure", part, arguments]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{part} {arguments}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_types(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """All eleven combination types against PEFT."""
    svd = measured("torch_svd", modules=2)["times"]
    each = svd["self_attn.k_proj"] * 2 + svd["self_attn.q_proj"] * (2 + 3 * 3.5)
    results["torch.linalg.svd"] = svd
    rows = results["types"] = []
    for n in options.adapters:
        for kind in (*FACTOR_TYPES, *DENSE_TYPES):
            for density in options.densities if needs_density(kind) else (0.0,):
                mine = measured("ours", kind, n, density)
                if kind in DENSE_TYPES:
                    peer = measured("peft_dense", kind, n, density)
                    peer["warm"] += MEASURED * each
                else:
                    peer = measured("peft_factors", kind, n, density)
                row = {"type": kind, "n": n, "density": density, "jaxmerge": mine, "PEFT": peer}
                row["ratio"] = peer["warm"] / mine["warm"]
                rows.append(row)
                print(
                    f"{kind:20} N={n} density {density or '':4}",
                    f"jaxmerge {mine['warm']:8.3f} s (first {mine['cold']:4.1f}), {mine['peak']:5.0f} MB",
                    f"PEFT {peer['warm']:9.3f} s, {peer['peak']:5.0f} MB  {row['ratio']:7.1f}×",
                    flush=True,
                )


def bench_prune(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """`prune` alone."""
    rows = results["prune"] = []
    for density in options.densities:
        for size, times in measured("pruning", density=density)["times"].items():
            rows.append({"size": size, "density": density, "times": times})
            shown = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in times.items())
            print(f"prune {size}, density {density}: {shown}", flush=True)


def write_adapters(folder: Path, n: int, count: int) -> list[str]:
    """PEFT folders of adapters with so many layers."""
    import safetensors.numpy

    paths = []
    for index in range(n):
        rng = np.random.default_rng(index)
        path = folder / f"adapter{index}"
        path.mkdir()
        tensors = {}
        for name, (o, i) in layers(count).items():
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, i), np.float32) / 64
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((o, RANK), np.float32) / 64
        safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "llama-3-8b",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": [name.rsplit(".", 1)[1] for name in SHAPES],
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(str(path))
    return paths


def run_cli(arguments: list[str], cache: str) -> tuple[float, float]:
    """Wall seconds and peak MB of a command."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "jaxmerge", *arguments], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise SystemExit(f"jaxmerge {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


WITH_PEFT = """
import sys, transformers, peft
*folders, type_, out = sys.argv[1:]
config = transformers.BertConfig(vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                 intermediate_size=1536)
model = peft.PeftModel.from_pretrained(transformers.BertModel(config), folders[0], adapter_name="a0")
names = ["a0"]
for i, folder in enumerate(folders[1:], 1):
    names.append(f"a{i}")
    model.load_adapter(folder, names[-1])
model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=type_, density=0.2)
model.save_pretrained(out, selected_adapters=["merged"])
"""


def bench_cli(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """The command line on real small adapters, cold and warm, against PEFT; and on whole models."""
    small = [str(ROOT / "tests" / "adapters" / name) for name in ("sms", "movie", "names")]
    rows = results["cli"] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cat", "svd", "ties"):
            cache = tempfile.mkdtemp(dir=folder)
            merge = ["merge", *small, "--combination-type", kind, "-o", f"{folder}/ours", "--force"]
            merge += ["--density", "0.2"] if needs_density(kind) else []
            first, _ = run_cli(merge, cache)
            again, peak = min(run_cli(merge, cache) for _ in range(3))
            theirs = [sys.executable, "-c", WITH_PEFT, *small, kind, f"{folder}/theirs"]
            peer = seconds(lambda theirs=theirs: subprocess.run(theirs, check=True, capture_output=True), 2)
            rows.append({"type": kind, "first": first, "again": again, "peak": peak, "PEFT": peer})
            print(
                f"CLI, 3 small adapters, {kind:5} first {first:5.2f} s, again {again:5.2f} s, {peak:4.0f} MB   "
                f"PEFT {peer:5.2f} s   {peer / again:5.1f}×",
                flush=True,
            )
        whole = results["whole"] = []
        adapters = write_adapters(Path(folder), 4, options.layers)
        for kind in options.whole:
            merge = ["merge", *adapters, "--combination-type", kind, "-o", f"{folder}/whole", "--force"]
            merge += ["--density", "0.2"] if needs_density(kind) else []
            wall, peak = run_cli(merge, f"{folder}/cache")
            whole.append({"type": kind, "layers": options.layers, "seconds": wall, "peak": peak})
            print(
                f"CLI, 4 float32 adapters of {options.layers} layers, {kind}: {wall:.1f} s, {peak:.0f} MB", flush=True
            )


def bench_sweep(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """64 settings of scale and density against one merge."""
    rows = results["sweep"] = []
    for kind in ("ties", "magnitude_prune"):
        row = {"type": kind, **measured("sweeping", kind, options.adapters[0], 0.5)}
        row["ratio"] = row["sweep"] / row["one"]
        rows.append(row)
        print(
            f"sweep of 64, {kind}: {row['sweep']:.2f} s, one merge {row['one']:.3f} s: {row['ratio']:.1f} merges",
            flush=True,
        )


def bench_devices(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Bits and collectives on 1, 2 and 8 virtual devices; cores do not grow with them."""
    rows = results["devices"] = []
    for kind in ("svd", "ties", "dare_ties", "ties_svd", "dare_linear_svd"):
        found = measured("spreading", kind, options.adapters[0], 0.2, devices=8)["devices"]
        rows.append({"type": kind, "devices": found})
        for count, what in found.items():
            print(f"{kind:16} on {count} devices: {', '.join(f'{k} {v}' for k, v in what.items())}", flush=True)


def bench_grid(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every method in its spaces, seconds for the whole model and peak memory; other cells are left as they are."""
    from jaxmerge.catalog import METHODS

    found = results.setdefault("grid", {"rows": []})
    for n in options.adapters:
        found[f"plain way, N={n}"] = plain = measured("plain_way", n=n)
        print(
            f"4096×4096 alone, dense, N={n}: sum {plain['sum']:.2f} s, decomposition {plain['svd']:.1f} s", flush=True
        )
        for method, row in METHODS.items():
            count = n if row.most is None else min(n, row.most)
            for space in (name for name in row.spaces if name in options.spaces):
                mine = measured("in_the_grid", f"{method}/{space}", count, 0.5)
                cell = {"method": method, "space": space, "n": count}
                found["rows"] = [old for old in found["rows"] if {**old, **cell} != old]
                found["rows"].append({**cell, **mine})
                print(
                    f"{method:18} {space:8} N={count}  whole model {_whole(mine):7.1f} s "
                    f"(two layers, first call {mine['cold']:5.1f} s), {mine['peak']:5.0f} MB",
                    flush=True,
                )


def _whole(row: Mapping[str, Any]) -> float:
    """Seconds for the whole model."""
    return LAYERS / MEASURED * row["warm"]


def grid_table(results: dict[str, Any]) -> str:
    """The README's table: methods by spaces and numbers of adapters; those that take two have them in the first."""
    from jaxmerge.catalog import METHODS, SPACES

    rows = results["grid"]["rows"]
    fewest = min(row["n"] for row in rows if METHODS[row["method"]].most is None)
    seconds_of = {
        (row["method"], row["space"], fewest if METHODS[row["method"]].most else row["n"]): f"{_whole(row):.1f}"
        for row in rows
    }
    columns = sorted({(n, list(SPACES).index(space), space) for _, space, n in seconds_of})
    lines = [
        "| method | " + " | ".join(f"{space}, {n}" for n, _, space in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in (name for name in METHODS if any(row["method"] == name for row in rows)):
        cells = [seconds_of.get((method, space, n), "") for n, _, space in columns]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """The README's table of combination types."""
    lines = [
        "| type | N | density | jaxmerge | PEFT | ratio | peak MB, jaxmerge / PEFT |",
        "|---|---|---|---|---|---|---|",
    ]
    scale = LAYERS / MEASURED
    for row in results["types"]:
        mine, peer = row["jaxmerge"], row["PEFT"]
        ours_, theirs = (
            f"{scale * side['warm']:,.{1 if scale * side['warm'] < 100 else 0}f} s" for side in (mine, peer)
        )
        density = row["density"] or ""
        peaks = f"{mine['peak']:.0f} / {peer['peak']:.0f}"
        lines.append(
            f"| `{row['type']}` | {row['n']} | {density} | {ours_} | {theirs} | {row['ratio']:,.0f}× | {peaks} |"
        )
    return "\n".join(lines)


def write_readme(results: dict[str, Any]) -> None:
    """Puts the tables between their marks in README.md."""
    readme, tables = ROOT / "README.md", {"types": ("bench", table), "grid": ("grid", grid_table)}
    for part, (mark, make) in tables.items():
        if part not in results:
            continue
        before, _, rest = readme.read_text().partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition(f"<!-- /{mark} -->")
        if not end:
            raise SystemExit(f"README.md has no marks for the table of {part}")
        readme.write_text(f"{before}<!-- {mark} -->\n{make(results)}\n{end}{after}")


MEASUREMENTS = {
    f.__name__: f
    for f in (ours, peft_factors, peft_dense, torch_svd, pruning, sweeping, spreading, in_the_grid, plain_way)
}
PARTS = {
    "types": bench_types,
    "prune": bench_prune,
    "cli": bench_cli,
    "sweep": bench_sweep,
    "devices": bench_devices,
    "grid": bench_grid,
}


def main() -> None:
    """Runs the parts that are asked for and writes what they measured."""
    if sys.argv[1:2] == ["--measure"]:
        warnings.simplefilter("ignore")
        print(json.dumps(MEASUREMENTS[sys.argv[2]](*json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--adapters", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--whole", nargs="*", default=["svd", "ties"], help="types to merge a whole model with")
    parser.add_argument(
        "--spaces",
        nargs="+",
        default=["factors", "knots", "core", "ctm"],
        help="of the grid; full takes minutes a cell",
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the whole model")
    parser.add_argument("--readme", action="store_true", help="write the table of types into README.md")
    options = parser.parse_args()
    target = ROOT / ".bench" / "results.json"
    target.parent.mkdir(exist_ok=True)
    results: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    results["machine"] = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    for part in options.parts:
        PARTS[part](options, results)
        target.write_text(json.dumps(results, indent=1) + "\n")
    if options.readme:
        write_readme(results)


if __name__ == "__main__":
    main()
