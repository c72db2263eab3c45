"""The only place that touches files: adapters in, adapters out, in the formats they come in."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmerge.base import Adapter, Energy, LoRA, Metadata, energy_kept, nonfinite_modules, on_host
from jaxmerge.io import convert, keras, orbax, peft, trees
from jaxmerge.io.peft.config import combine_configs, export_config
from jaxmerge.io.peft.keys import natural_order
from jaxmerge.layouts import Conversion
from jaxmerge.sharding import first_process, seen_everywhere, wait_for_all

if TYPE_CHECKING:
    import torch


def load(
    path: str | Path,
    *,
    alpha: trees.Alpha = None,
    scan_axis: trees.ScanAxis = None,
    item: str | None = None,
    layout: str | None = None,
    pattern: tuple[str, str] | None = None,
    mesh: Mesh | None = None,
    mapped: bool = False,
) -> Adapter:
    """Reads an adapter; its format is recognised. Where there are several processes, all of them call it.

    Args:
        path: A PEFT LoRA folder, or one that holds a single adapter in a subfolder under its name; LoHa and LoKr
            become LoRA of their exact rank. Or an Orbax checkpoint of a Flax LoRA tree: a manager's root (the latest
            step is taken), a step, or an item. Or a ``.lora.h5`` file of KerasHub.
        alpha: For Orbax, as in `from_state`.
        scan_axis: For Orbax, as in `from_state`.
        item: For Orbax, which item of a step that has several.
        layout: For Orbax, as in `from_state`.
        pattern: For Orbax, as in `from_state`.
        mesh: Puts the arrays on its devices; each process reads what its own devices hold. Those of Orbax are spread
            by its axes as those were that were saved, where it has axes of their names, and what jaxmerge makes of
            them is then spread and saved likewise; those of PEFT along their features, over all axes.
        mapped: For PEFT without a mesh, leaves tensors in the file until they are used. The file must not be
            overwritten in place for as long.

    Returns:
        The adapter, in the dtype of the file (LoHa and LoKr in float32 or wider, which holds their products); its
        arrays are on the host if there is no mesh.

    Raises:
        ValueError: If it cannot be read, or holds something that jaxmerge does not merge; one line for each
            problem, with the file and the module.
    """
    options = {"alpha": alpha, "scan_axis": scan_axis, "item": item, "layout": layout, "pattern": pattern, "mesh": mesh}
    return _read(as_path(path), "load", mapped, **options)


def peek(path: str | Path, **options: Any) -> Adapter:
    """Reads an adapter's headers alone: `load` with the shapes of tensors in place of tensors.

    Args:
        path: As in `load`.
        **options: As in `load`, but for the mesh.

    Returns:
        The adapter, its leaves `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: As `load` does.
    """
    return _read(as_path(path), "peek", False, **options)


def _read(path: Path, how: str, mapped: bool, **options: Any) -> Adapter:
    if orbax.is_remote(path):
        try:
            return getattr(orbax, how)(path, **options)
        except ImportError as error:  # What reaches a kind of storage is a package of its own.
            raise ValueError(f"{path}: {error}") from None
    if path.is_file() and path.name.endswith(keras.SUFFIX):
        return keras.load(path, **options)  # Small, and without headers to peek at.
    if not path.exists() and not path.is_symlink():
        raise ValueError(f"{path}: there is no such folder")
    if is_orbax(path):
        return getattr(orbax, how)(path, **options)
    mesh = options.pop("mesh", None)
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(
            f"{path}: is no Orbax checkpoint, whose steps have numbers for names; {', '.join(given)} can be given for "
            "such alone"
        )
    return peft.peek(path) if how == "peek" else peft.load(path, mesh, mapped)


def is_tree(path: Path) -> bool:
    """Whether a path looks like an adapter in a Flax tree, of whatever kind of file."""
    return (path.is_file() and path.name.endswith(keras.SUFFIX)) or is_orbax(path)


def is_orbax(path: Path) -> bool:
    """Whether a folder looks like an Orbax checkpoint, a step, or a manager's root; imports nothing to tell."""
    if not path.is_dir() or any((path / name).is_file() for name in (peft.WEIGHTS, peft.PICKLED)):
        return False
    return orbax.looks_like_one(path)


def save(
    adapter: Adapter,
    path: str | Path,
    format: str | None = None,
    *,
    layout: str | None = None,
    head_dim: int | None = None,
    layers: int | None = None,
    force: bool = False,
) -> Adapter:
    """Writes an adapter, whole or not at all. Where there are several processes, all of them call it.

    Args:
        adapter: Of concrete arrays.
        path: The folder; missing parents are made.
        format: A name in `jaxmerge.catalog.FORMATS`, or None for the format and layout the adapter came in. Formats
            that hold no alpha get the scale folded into B, so that alpha equal to the rank restores it.
        layout: To write another kind of tree than the adapter came in: the model's name in
            `jaxmerge.layouts.LAYOUTS`, or a JSON file with a table of your own (see `jaxmerge.layouts.Row`).
        head_dim: The size of one attention head, where the format keeps heads apart.
        layers: How many layers the model has, where the format stacks them and the adapter has not all of them.
        force: Replace a folder that is an adapter itself. Files in a PEFT folder that are neither PEFT's nor
            jaxmerge's stay where they are.

    Returns:
        The adapter as it was written: converted, if another format was asked for.

    Raises:
        ValueError: If the format is unknown, the folder may not be written, or the adapter does not fit the
            format.
        OSError: If the disk fails or is full; nothing is left then.
    """
    conversion = Conversion(format, layout, head_dim, layers)
    target = as_path(path)
    adapter = convert.placed(adapter, conversion)
    check_target([adapter], target, conversion, force)
    _check_values(adapter)
    written = convert.convert(_with_energy(adapter), conversion)
    writer = _writer(written.metadata)
    if writer is not orbax:  # Written by one process, which may not see all of what several hold.
        written = jax.tree.map(seen_everywhere, written)
    replaces = target.exists()
    wait_for_all("jaxmerge.save: nothing written yet")  # Or a process would find what another has begun.
    if writer is orbax:
        orbax.save(written, target, replaces=replaces)
    elif first_process():
        writer.save(written, target, force=force)
    wait_for_all("jaxmerge.save: all written")
    return written


def as_path(path: str | Path) -> Any:
    """A path on this machine; or one that Orbax knows how to reach, such as ``gs://bucket/folder``."""
    if str(path) == "":
        raise ValueError("a path is empty")
    if "://" not in str(path):
        return Path(path)
    from etils import epath

    return epath.Path(str(path))


def _writer(metadata: Metadata) -> Any:
    if metadata.format == "peft":
        return peft
    return keras if isinstance(metadata.place, keras.File) else orbax


def _check_values(adapter: Adapter) -> None:
    """Refuses an adapter without modules, or one that its dtype could not hold."""
    if not adapter.modules:
        raise ValueError("the adapter holds no modules and cannot be saved")
    if vanished := [name for name, lora in adapter.modules.items() if _vanished(lora, adapter.energy.get(name))]:
        raise ValueError(f"module {vanished[0]} is too small for {adapter.modules[vanished[0]].a.dtype}: it became 0")
    if broken := nonfinite_modules(adapter):
        dtype = adapter.modules[broken[0]].a.dtype
        raise ValueError(
            f"module {broken[0]} holds numbers too large for {dtype}, or NaN; smaller weights, or another dtype, may do"
        )


def _vanished(lora: LoRA, energy: Energy | None) -> bool:
    """Whether rounding made all of a merged module 0."""
    if energy is None or not float(energy.total) > float(energy.lost):
        return False
    # What lies on the devices of several processes cannot be seen as a whole from one.
    return not all((np.asarray(x) if on_host(x) else x != 0).any() for x in (lora.a, lora.b))


def _with_energy(adapter: Adapter) -> Adapter:
    """The adapter with what its truncation cost in its provenance."""
    if not adapter.energy:
        return adapter
    record = json.loads(adapter.metadata.provenance)
    record["energy_kept"] = float(energy_kept(adapter))
    record["modules"] = {
        name: {"rank": adapter.modules[name].rank, "energy_kept": float(adapter.energy[name].kept)}
        for name in sorted(adapter.modules, key=natural_order)
    }
    return dataclasses.replace(adapter, metadata=dataclasses.replace(adapter.metadata, provenance=json.dumps(record)))


def overlap_problems(paths: Sequence[Path], output: Path) -> list[str]:
    """Whether an output would overwrite an adapter that is read, or lie inside of one."""
    if orbax.is_remote(output):  # Where nothing is replaced.
        return []
    problems = []
    target = Path(os.path.realpath(output))
    for path in paths:
        if orbax.is_remote(path):
            continue
        source = Path(os.path.realpath(path))
        if target == source or (output.exists() and target == _peft_folder(path)):
            problems.append(f"{output}: is read, and would be overwritten")
        elif target in source.parents and output.exists():
            problems.append(f"{output}: holds {path}, which is read, and would be overwritten")
        elif source in target.parents and is_orbax(source):
            problems.append(f"{output}: lies inside {path}, which is read")
    return list(dict.fromkeys(problems))


def _peft_folder(path: Path) -> Path | None:
    """The folder that a PEFT adapter's files lie in, resolved; None if there is none."""
    try:
        return Path(os.path.realpath(peft.find_folder(path)))
    except ValueError:
        return None


def check_target(adapters: Sequence[Adapter], path: Path, conversion: Conversion, force: bool) -> None:
    """Raises the ValueError that `save` would raise for what these adapters are merged into, from shapes alone."""
    metadata = adapters[0].metadata
    converts = convert.check(adapters, conversion)
    writer = _writer(convert.target_metadata(str(conversion.format)) if converts else metadata)
    remote = orbax.is_remote(path)
    if remote and writer is not orbax and adapters[0].modules:  # Without any it stands for one that cannot be read.
        raise ValueError(f"{path}: only Orbax checkpoints are written to such places, and this is to be none")
    if writer is peft and force and not remote and is_orbax(path):
        raise ValueError(f"{path}: is an Orbax checkpoint, which --force does not replace by a PEFT folder; remove it")
    (orbax if remote else writer).check_target(path, force)
    if writer is orbax and not converts and metadata.place is None:
        raise ValueError(
            f"the adapter is a tree in memory, of format {metadata.format}: to_state gives it back, and files are "
            "written in the layout of those that were read, or of a format= with that of its tree"
        )


def rank_on_disk(adapter: Adapter) -> int | None:
    """The rank that all modules are filled up to when they are written, if they are."""
    ranks = {lora.rank for lora in adapter.modules.values()}
    fills = adapter.metadata.format != "peft" and orbax.is_of_one_rank(adapter.metadata)
    return max(ranks) if fills and len(ranks) > 1 else None


def combine_metadata(adapters: Sequence[Adapter]) -> tuple[Metadata, list[str]]:
    """The metadata of a merged adapter, without its provenance.

    Args:
        adapters: In the user's order. The first one's format is the result's.

    Returns:
        The metadata, and what in them cannot be reconciled.
    """
    metadatas = [adapter.metadata for adapter in adapters]
    names = [metadata.name or f"adapter {i + 1}" for i, metadata in enumerate(metadatas)]
    layouts, problems = {}, []
    for metadata, name in zip(metadatas, names, strict=True):
        for path, layout in metadata.layouts:
            if layouts.setdefault(path, (layout, name))[0] != layout:
                problems.append(f"module {path} is of different kinds in {layouts[path][1]} and {name}")
    first = metadatas[0]
    if any(metadata.format != first.format for metadata in metadatas):
        formats = ", ".join(f"{name} is {metadata.format}" for metadata, name in zip(metadatas, names, strict=True))
        return first, [*problems, f"the adapters are of different formats: {formats}"]
    config, conflicts = combine_configs(adapters, names) if first.format == "peft" else (json.loads(first.config), [])
    merged = dataclasses.replace(
        first,
        name="",
        rank=None,
        base_model=next((m.base_model for m in metadatas if m.base_model), None),
        layouts=tuple((path, layout) for path, (layout, _) in layouts.items()),
        config=json.dumps(config, sort_keys=True),
        tree=trees.widest(adapters),
        own_base="",
    )
    return merged, problems + conflicts


def from_state(
    state: Any,
    *,
    alpha: trees.Alpha = None,
    scan_axis: trees.ScanAxis = None,
    layout: str | None = None,
    pattern: tuple[str, str] | None = None,
) -> Adapter:
    """An adapter from a Flax LoRA tree in memory: ``nnx.state(model, nnx.LoRAParam)``, a pure dict, Linen params.

    The trees of flax.nnx (``nnx.LoRA``, ``nnx.LoRALinear``), of qwix (so of Tunix and MaxText), of the gemma
    library, of OpenPI and of Keras are recognised by their names. Nothing is copied to the host, and it works inside
    `jax.jit`.

    Args:
        state: The tree. Leaves that are not factors become extras.
        alpha: For qwix, OpenPI's attention and Keras, whose trees do not hold it and whose scale is alpha / rank;
            ``"rank"`` where each module's alpha is its rank.
        scan_axis: Where the layers of a scan lie in the factors; ``"none"`` for none, ``"some"`` for whichever axis
            the shapes allow. Wanted where shapes leave it open, which they do for scanned layers.
        layout: ``"nnx"``, ``"qwix"``, ``"gemma"``, ``"openpi"``, ``"maxtext-legacy"`` or ``"keras"``, where a tree
            could be of several.
        pattern: For any other tree: regular expressions that match the paths of all A and of all B, keys joined by
            ``/``, each with a group ``module`` (and ``parameter``, where a module has several). Such a tree has
            the scale alpha / rank.

    Returns:
        The adapter; `to_state` gives it back in the same structure.

    Raises:
        ValueError: If the tree is not understood; it names every module.
    """
    return trees.from_state(state, alpha=alpha, scan_axis=scan_axis, layout=layout, pattern=pattern)


def to_state(adapter: Adapter) -> Any:
    """The tree of an adapter, in the structure that `from_state` had: ``nnx.update(model, jm.to_state(merged))``.

    Args:
        adapter: From `from_state`, or merged from such.

    Returns:
        The tree, with the scale folded into B: a model whose alpha is its rank, or that has no alpha, computes what
        the adapter says.

    Raises:
        ValueError: If the adapter does not come from a tree, or the first one's has no place for a module.
    """
    return trees.to_state(adapter)


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The contents of the adapter_config.json that gives every module of an adapter its rank and scale.

    Args:
        adapter: Its scales must be known.

    Returns:
        What ``peft.LoraConfig`` takes, and `from_torch`.
    """
    return export_config(adapter)


def from_torch(state_dict: "Mapping[str, torch.Tensor]", config: Any) -> Adapter:
    """An adapter from PEFT's tensors in memory; needs torch.

    Args:
        state_dict: As ``peft.get_peft_model_state_dict`` gives it; adapter names inside the keys are dropped.
        config: The adapter's ``LoraConfig``, or its contents as a dict.

    Returns:
        The adapter. Its arrays share memory with the tensors where DLPack allows.

    Raises:
        ValueError: If it holds something that jaxmerge does not merge.
    """
    from jaxmerge.io.torch import from_torch

    return from_torch(state_dict, config)


def to_torch(adapter: Adapter) -> "dict[str, torch.Tensor]":
    """PEFT's tensors of an adapter, the inverse of `from_torch`; needs torch.

    Args:
        adapter: Of concrete arrays. `peft_config` gives the configuration that goes with the tensors.

    Returns:
        A state dict as ``peft.set_peft_model_state_dict`` takes it, on the CPU. Tensors share memory with NumPy
        arrays, which is what `load` gives; JAX arrays are copied, since torch might write to them.
    """
    from jaxmerge.io.torch import to_torch

    return to_torch(adapter)
