"""Trees that lie on several devices, and checkpoints that several processes read and write together.

JAX settles its devices once in a process, so that these run in processes of their own.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COMMON = """
import jax, jax.numpy as jnp, numpy as np
import jaxmerge as jm

jax.config.update("jax_numpy_dtype_promotion", "strict")


def numbers(seed):
    rng = np.random.default_rng(seed)
    shapes = {"q": ((16, 4), (4, 8, 4)), "o": ((8, 4, 4), (4, 16))}
    return {
        name: {f"w_lora_{factor}": rng.normal(size=shape).astype(np.float32) for factor, shape in zip("ab", pair)}
        for name, pair in shapes.items()
    }
"""

SHARDED = """
import itertools
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

SPECS = {
    "q": {"w_lora_a": P("x", None), "w_lora_b": P(None, "y", None)},
    "o": {"w_lora_a": P("y", None, None), "w_lora_b": P("x", ("y",))},
}
WAYS = [
    {},
    {"rank": 3},
    {"method": "ties", "density": 0.5, "rank": 4},
    {"method": "dare_linear", "density": 0.5, "space": "factors", "key": jax.random.key(0)},
]
weights = [1.0, -0.5]

for kind, way in itertools.product((AxisType.Auto, AxisType.Explicit), WAYS):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    plain = [numbers(seed) for seed in range(2)]
    spread = [jax.tree.map(place, tree, SPECS) for tree in plain]
    merged = lambda trees, weights: jm.to_state(
        jm.merge([jm.from_state(tree, alpha=8.0) for tree in trees], weights, **way)
    )
    expected = merged(plain, weights)
    eager = merged(spread, weights)
    traced = jax.jit(merged)(spread, jnp.asarray(weights))
    for (path, one), spec in zip(jax.tree.leaves_with_path(eager), jax.tree.leaves(SPECS)):
        name, leaf = (key.key for key in path)
        wanted = expected[name][leaf]
        assert np.array_equal(one, wanted), (kind, way, path)
        # Ranks of 3 are not spread over 2 devices.
        fitted = P(*[axes if size % 2 == 0 else None for axes, size in zip(spec, one.shape)])
        assert one.sharding.is_equivalent_to(NamedSharding(mesh, fitted), one.ndim), (kind, way, path, one.sharding)
        if kind == AxisType.Explicit:
            assert traced[name][leaf].sharding.is_equivalent_to(one.sharding, one.ndim), (kind, way, path)
    for name in expected:
        pair = lambda tree: jm.from_state({name: tree[name]}, alpha="rank").modules[name]
        np.testing.assert_allclose(jm.delta(pair(traced)), jm.delta(pair(expected)), rtol=1e-4, atol=1e-4)
    # Adapters whose factors are spread give an adapter whose factors are.
    adapter = jm.Adapter({"q": jm.LoRA(place(plain[0]["q"]["w_lora_a"].T, P(None, "x")), np.ones((32, 4), np.float32))})
    lora = jm.merge([adapter, adapter]).modules["q"]
    assert lora.a.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2)
print("the same everywhere")
"""

# Small modules are spread whole; a large one by its rows, where there are too few of them.
SPREAD = """
import itertools, re
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

rng = np.random.default_rng(0)
SHAPES = {"a": (600, 520), "b": (600, 520), "c": (600, 520), "d": (2048, 2056)}
sources = [
    jm.Adapter({name: jm.LoRA(rng.normal(size=(rank, i)).astype(np.float32),
                              rng.normal(size=(o, rank)).astype(np.float32), 0.5) for name, (o, i) in SHAPES.items()})
    for rank in (4, 6)
]
# Method, space: entrywise ones, and linear by QR and SVD.
WAYS = [
    {"method": "ties", "density": 0.2, "rank": 4},
    {"method": "dare_ties", "density": 0.5, "key": jax.random.key(0), "rank": 4},
    {"method": "magnitude_prune", "density": 0.3, "rank": 4},
    {"rank": 4},
    {},
]
for way in WAYS:
    plain = jm.merge(sources, [1.0, -0.5], **way)
    meshes = [((8,), ("x",), AxisType.Explicit)]
    if way is WAYS[0] or way is WAYS[3]:
        meshes += [((2,), ("x",), AxisType.Explicit), ((2, 4), ("x", "y"), AxisType.Auto)]
    for shape, names, kind in meshes:
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)
        merged = jm.merge(sources, [1.0, -0.5], mesh=mesh, **way)
        for name, lora in plain.modules.items():
            other = merged.modules[name]
            assert np.array_equal(lora.a, other.a) and np.array_equal(lora.b, other.b), (way, shape, name)
            wanted = NamedSharding(mesh, P(None, names)), NamedSharding(mesh, P(names, None))
            assert other.a.sharding.is_equivalent_to(wanted[0], 2), other.a.sharding
            assert other.b.sharding.is_equivalent_to(wanted[1], 2), other.b.sharding
    print(way, "done")

# What crosses between devices is small: counts, and thin blocks of a decomposition.
mesh = jax.make_mesh((8,), ("x",))
CROSSING = re.compile(r"= (\\S+) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)[-a-z]*\\(")
for way in WAYS:
    programs = jm.lower(sources, [1.0, -0.5], mesh=mesh, **way)
    by_rows = "density" in way  # The large module alone.
    assert len(programs) == 2
    for lowered, rows in zip(programs, (False, by_rows)):
        crossing = CROSSING.findall(lowered.compile().as_text())
        sizes = [max([int(np.prod([int(d) for d in s.split(",") if d])) for s in re.findall(r"\\[([\\d,]*)\\]", shape)])
                 for shape, _ in crossing]
        if not rows:
            assert not crossing, (way, crossing)
        else:
            assert crossing and max(sizes) <= 8 * 20 * 2056, (way, sorted(zip(sizes, crossing))[-3:])

# In sharded, out sharded alike; given away, gone.
mesh = jax.make_mesh((2, 4), ("x", "y"))
place = lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "y")))
given = [jm.Adapter({n: jm.LoRA(place(l.a), place(l.b) if l.rank == 4 else l.b, l.scale) for n, l in s.modules.items()})
         for s in sources]
leaves = jax.tree.leaves([s.modules for s in given])
merged = jm.merge(given, [1.0, -0.5], method="ties", density=0.2, rank=4, mesh=mesh, donate=True)
assert all(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array))
expected = jm.merge(sources, [1.0, -0.5], method="ties", density=0.2, rank=4)
for name, lora in expected.modules.items():
    assert np.array_equal(lora.a, merged.modules[name].a) and np.array_equal(lora.b, merged.modules[name].b)
    assert merged.modules[name].a.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "y")), 2)
print("the same bits")
"""

PROCESSES = """
import sys
import orbax.checkpoint as v0

port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
assert jax.device_count() == 8
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

folder = Path(folder)
mesh = Mesh(np.array(jax.devices()), ("x",))


def spread(x):
    spec = P("x") if x.shape[0] % 8 == 0 else P()
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda at: x[at])


for seed in range(2):
    with v0.CheckpointManager(folder / str(seed)) as manager:
        items = {"model_params": v0.args.StandardSave(jax.tree.map(spread, numbers(seed)))}
        manager.save(5, args=v0.args.Composite(**items))
adapters = [jm.load(folder / str(seed), alpha=8.0) for seed in range(2)]
merged = jm.merge(adapters, [1.0, -0.5])
jm.save(merged, folder / "out")
jm.save(merged, folder / "out", force=True)
jm.save(merged, folder / "peft", format="peft", layout=str(folder / "table.json"))
again = jm.load(folder / "out")
expected = jm.merge([jm.from_state(numbers(seed), alpha=8.0) for seed in range(2)], [1.0, -0.5])
for path, lora in expected.modules.items():
    np.testing.assert_array_equal(jm.delta(again.modules[path]), jm.delta(lora))
    np.testing.assert_array_equal(jm.delta(jm.load(folder / "peft").modules[f"model.{path}"]), jm.delta(lora))

# Each process holds its part of the arrays, and writes it.
on_mesh = [jm.load(folder / str(seed), alpha=8.0, mesh=mesh) for seed in range(2)]
assert not on_mesh[0].modules["q"].a.is_fully_addressable
together = jm.merge(on_mesh, [1.0, -0.5])
leaf = jm.to_state(together)["q"]["w_lora_a"]
assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2), leaf.sharding
assert len(leaf.addressable_shards) == 4 and leaf.addressable_shards[0].data.shape == (2, 8)
jm.save(together, folder / "spread")
for path, lora in expected.modules.items():
    np.testing.assert_array_equal(jm.delta(jm.load(folder / "spread").modules[path]), jm.delta(lora))
once_more = jm.load(folder / "spread", mesh=mesh)
assert jm.to_state(once_more)["q"]["w_lora_a"].sharding.is_equivalent_to(leaf.sharding, 2)

# The same from PEFT folders, of which each process reads what its devices hold, and with a mesh for the work.
peft = [jm.load(folder / "peft", mesh=mesh), jm.load(folder / "peft")]
leaf = peft[0].modules["model.q"].a
assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2) and not leaf.is_fully_addressable
for way in ({}, {"method": "ties", "density": 0.5, "rank": 4}):
    jm.save(jm.merge([peft[0], peft[0]], [1.0, -0.5], mesh=mesh, **way), folder / "peft-spread", force=True)
    single = jm.merge([peft[1], peft[1]], [1.0, -0.5], **way)
    for path, lora in single.modules.items():
        np.testing.assert_array_equal(jm.delta(jm.load(folder / "peft-spread").modules[path]), jm.delta(lora))
together = jm.merge(on_mesh, [1.0, -0.5], mesh=mesh)
jm.save(together, folder / "spread", force=True)
for path, lora in expected.modules.items():
    np.testing.assert_array_equal(jm.delta(jm.load(folder / "spread").modules[path]), jm.delta(lora))
print("written together")
"""


def run(program, *arguments, devices):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", COMMON + textwrap.dedent(program), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process, words):
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    assert words in output


def test_trees_on_eight_devices_stay_where_they_are():
    finished(run(SHARDED, devices=8), "the same everywhere")


def test_modules_and_rows_are_spread_with_the_same_bits():
    finished(run(SPREAD.replace("\\\\", "\\"), devices=8), "the same bits")


def test_two_processes_load_and_save_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "table.json").write_text('[{"peft": "model.q", "tree": "q"}, {"peft": "model.o", "tree": "o"}]')
    pair = [run(PROCESSES, port, str(index), str(tmp_path), devices=4) for index in range(2)]
    try:
        for process in pair:
            finished(process, "written together")
    finally:
        for process in pair:
            process.kill()
    left = ["0", "1", "out", "peft", "peft-spread", "spread", "table.json"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == left


def test_two_processes_of_the_command_line(tmp_path):
    adapters = [str(ROOT / "tests" / "adapters" / name) for name in ("sms", "movie")]
    options = ["--method", "ties", "--density", "0.3", "--space", "factors", "--no-compilation-cache"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    launch = [str(ROOT / "scripts" / "launch_local"), "2", "merge", *adapters, "-o", str(tmp_path / "both"), *options]
    launch.append("--json")
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    # One of them reports, and nothing else does: what Gloo prints goes to standard error.
    assert json.loads(done.stdout)["method"] == "ties"
    assert "Traceback" not in done.stderr
    alone = [sys.executable, "-m", "jaxmerge", "merge", *adapters, "-o", str(tmp_path / "one"), *options]
    subprocess.run(alone, env=environment, capture_output=True, timeout=300, check=True)
    one, both = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "both"))
    assert one == both
    launch[1] = "x"
    assert subprocess.run(launch[:2], env=environment, capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("name", ["gs://bucket/adapter", "s3://bucket/adapter"])
def test_remote_paths_go_to_orbax_as_they_are(name, monkeypatch):
    import jaxmerge as jm
    from jaxmerge.io import orbax

    seen = []
    monkeypatch.setattr(orbax, "find", lambda path, item: seen.append(path) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jm.load(name, alpha=1.0)
    assert [str(path) for path in seen] == [name]


def test_remote_paths_on_the_command_line_stay_as_they_are(monkeypatch, capsys):
    from jaxmerge.cli import main
    from jaxmerge.io import orbax

    def unreachable(path, **options):
        raise ValueError(f"{path}: was asked for")

    checked = []
    monkeypatch.setattr(orbax, "peek", unreachable)
    monkeypatch.setattr(orbax, "check_target", lambda path, force: checked.append(str(path)))
    assert main(["merge", "gs://bucket/a", "s3://bucket/b", "-o", "gs://bucket/out"]) == 1
    told = "jaxmerge: gs://bucket/a: was asked for\njaxmerge: s3://bucket/b: was asked for\n"
    assert (capsys.readouterr().err, checked) == (told, ["gs://bucket/out"])
    assert main(["convert", "gs://bucket/a", "gs://bucket/out", "--format", "tunix"]) == 1
    assert "gs://bucket/a: was asked for" in capsys.readouterr().err


def test_a_folder_of_peft_is_not_written_to_a_remote_place(capsys):
    from jaxmerge.cli import main

    adapters = [str(Path(__file__).parent / "adapters" / name) for name in ("sms", "movie")]
    assert main(["merge", *adapters, "-o", "gs://bucket/out"]) == 1
    assert "gs://bucket/out: only Orbax checkpoints are written to such places" in capsys.readouterr().err
