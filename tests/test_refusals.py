"""What cannot be merged is refused in words that name it; what is broken is refused, never half read."""

import dataclasses
import json
import pickle
import struct
import warnings
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

import jaxmerge as jm
from tests.cohort import Linears


class Experts(torch.nn.Module):
    """A mixture's weights as PEFT meets them: one parameter for all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(6, 3)
        self.weight = torch.nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->bo", self.weight, x)


class Grouped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = torch.nn.Conv2d(6, 9, 3, groups=3)


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


def save(folder: Path, config: peft.PeftConfig, model=Linears) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        peft.get_peft_model(model(), config).save_pretrained(str(folder))
    return folder


def lora(**config) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["first", "third"], "init_lora_weights": False, **config})


LORA = jm.LoRA(np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound adapter, to be spoiled."""
    return save(tmp_path / "sound", lora())


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key.removeprefix("base_model.model."): x for key, x in safetensors.numpy.load_file(path).items()}
    change(tensors)
    safetensors.numpy.save_file({f"base_model.model.{key}": x for key, x in tensors.items()}, path)


def assert_refused(path: Path, *words: str, lines: int = 1) -> None:
    """Loading and peeking are refused with a line that begins with the path and has the words."""
    for read in (jm.load, jm.peek):
        with pytest.raises(ValueError, match=r".") as error:
            read(path)
        assert type(error.value) is ValueError
        message = str(error.value)
        assert message.count("\n") == lines - 1, message
        assert all(line.startswith(str(path)) for line in message.splitlines()), message
        for word in words:
            assert word in message, message


# --- Kinds of adapters that are not pairs of factors -------------------------------------------------------

ATTENTION = {"target_modules": ["first"]}
FOREIGN = {
    "dora": (lambda: lora(use_dora=True), Linears, ["DoRA", "magnitudes"]),
    "kasa": (lambda: lora(kasa_config=peft.KasaConfig()), Linears, ["KaSA", "diagonal"]),
    "alora": (lambda: lora(alora_invocation_tokens=[1, 2]), Linears, ["aLoRA", "invocation"]),
    "ia3": (lambda: peft.IA3Config(target_modules=["first"], feedforward_modules=[]), Linears, ["IA3"]),
    "adalora": (lambda: peft.AdaLoraConfig(total_step=10, **ATTENTION), Linears, ["ADALORA"]),
    "vera": (lambda: peft.VeraConfig(**ATTENTION), Linears, ["VERA"]),
    "moe": (
        lambda: lora(target_modules=["router"], target_parameters=["experts.weight"]),
        Mixture,
        ["target_parameters", "experts.weight"],
    ),
    "grouped": (lambda: lora(r=3, target_modules=["grouped"]), Grouped, ["module grouped", "convolution", "3 groups"]),
}


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    config, model, words = FOREIGN[kind]
    assert_refused(save(tmp_path / kind, config(), model), *words)


# Read by their own names, and not under that of LoRA.
PRODUCTS = {
    "lokr": (lambda: peft.LoKrConfig(**ATTENTION), Linears, ["LoKr"]),
    "loha": (lambda: peft.LoHaConfig(**ATTENTION), Linears, ["LoHa"]),
}


@pytest.mark.parametrize(
    ("kind", "word"), [("dora", "DoRA"), ("kasa", "KaSA"), ("ia3", "IA³"), ("lokr", "LoKr"), ("loha", "LoHa")]
)
def test_other_kinds_are_known_by_their_keys_too(tmp_path, kind, word):
    config, model, _ = (FOREIGN | PRODUCTS)[kind]
    folder = save(tmp_path / kind, config(), model)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert_refused(folder, word, "cannot be merged")


@pytest.mark.parametrize("kind", ["adalora", "vera"])
def test_what_looks_like_lora_by_halves_is_refused_too(tmp_path, kind):
    config, model, _ = FOREIGN[kind]
    folder = save(tmp_path / kind, config(), model)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(ValueError, match=f"{kind}: "):
        jm.load(folder)


def test_an_unknown_switch_is_refused(folder):
    edit_config(folder, use_quantum_lora=True)
    assert_refused(folder, "use_quantum_lora", "does not know")
    edit_config(folder, use_quantum_lora=False)
    jm.load(folder)


def test_an_unknown_lora_tensor_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"first.lora_gate": np.ones(2, np.float32)}))
    assert_refused(folder, "first.lora_gate", "does not know")


def test_every_switch_is_told(folder):
    edit_config(folder, use_dora=True, use_qalora=True, kasa_config={"beta": 1})
    assert_refused(folder, "DoRA", "QA-LoRA", "KaSA", lines=3)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_with_a_base_of_their_own_are_merged_on_request_only(tmp_path, init):
    folder = save(tmp_path / init, lora(init_lora_weights=init, lora_alpha=6))
    adapter, plain = jm.load(folder), jm.load(save(tmp_path / "plain", lora()))
    name = {"p": "PiSSA", "o": "OLoRA"}[init[0]]
    for adapters in ([adapter, plain], [plain, adapter]):
        with pytest.raises(ValueError, match=rf"{init}: .*{name}.*allow_different_bases") as error:
            jm.merge(adapters)
        assert "\n" not in str(error.value)
    merged = jm.merge([adapter, plain], [1, 1], allow_different_bases=True)
    assert merged.modules["first"].rank == 4
    jm.merge([adapter], [2.0])  # Alone it fits its own base.


# --- Broken files ------------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in sorted({0, 1, 7, 8, 9, header - 1, header, header + 1, *range(0, len(whole), 97), len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: ") as error:
            jm.load(folder)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    jm.load(folder)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape=(2, 1), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BROKEN = {
    "empty": b"",
    "text": b"this is not a safetensors file, it is text that goes on for a while",
    "zeros": bytes(100),
    "noise": np.random.default_rng(0).bytes(5000),
    "a pickle": pickle.dumps({"a": 1}),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a header longer than the file": struct.pack("<Q", 10_000) + b'{"a": 1}',
    "a header of the largest length": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header that is no JSON": with_header(b"{not json}"),
    "a header that is a list": with_header([1, 2]),
    "overlapping offsets": with_header({"x.lora_A.weight": tensor(0, 8), "x.lora_B.weight": tensor(4, 12)}, bytes(12)),
    "offsets beyond the end": with_header(
        {"x.lora_A.weight": tensor(0, 8), "x.lora_B.weight": tensor(8, 16)}, bytes(9)
    ),
    "offsets with a hole": with_header({"x.lora_A.weight": tensor(0, 8), "x.lora_B.weight": tensor(12, 20)}, bytes(20)),
    "offsets that run backwards": with_header({"x.lora_A.weight": tensor(8, 0)}, bytes(8)),
    "a shape that does not fit": with_header({"x.lora_A.weight": tensor(0, 8, (3, 3))}, bytes(8)),
    "a shape that overflows": with_header({"x.lora_A.weight": tensor(0, 8, (2**40, 2**40))}, bytes(8)),
    "a negative size": with_header({"x.lora_A.weight": tensor(0, 8, (-2, -1))}, bytes(8)),
    "an unknown dtype": with_header({"x.lora_A.weight": tensor(0, 8, dtype="F37")}, bytes(8)),
    "data after the end": with_header({"x.lora_A.weight": tensor(0, 8)}, bytes(30)),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_file_that_is_not_safetensors_is_refused(folder, what):
    (folder / "adapter_model.safetensors").write_bytes(BROKEN[what])
    for read in (jm.load, jm.peek):
        with pytest.raises(ValueError, match=r"sound[\\/]adapter_model\.safetensors: ") as error:
            read(folder)
        assert "\n" not in str(error.value)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        jm.load(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare: .*adapter_config\.json"):
        jm.load(tmp_path / "bare")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"sound: there is no adapter_model\.safetensors"):
        jm.load(folder)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: is a file"):
        jm.load(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"3",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"r": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "string", "null", "number", "encoding", "deep", "digits"],
)
def test_a_configuration_that_cannot_be_read_is_refused(folder, text):
    (folder / "adapter_config.json").write_bytes(text)
    for read in (jm.load, jm.peek):
        with pytest.raises(ValueError, match=r"sound[\\/]adapter_config\.json: ") as error:
            read(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"r": "2"}, "r in adapter_config.json is '2'"),
        ({"r": None}, "r in adapter_config.json is None"),
        ({"r": True}, "r in adapter_config.json is True"),
        ({"r": [2]}, "r in adapter_config.json is [2]"),
        ({"r": 10**400}, "r in adapter_config.json"),
        ({"lora_alpha": "8"}, "lora_alpha in adapter_config.json is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"rank_pattern": {"first(": 2}}, "rank_pattern['first(']"),
        ({"alpha_pattern": {"*": 2}}, "alpha_pattern['*']"),
        ({"alpha_pattern": {"first": "2"}}, "alpha_pattern['first']"),
        ({"alpha_pattern": {"first": None}}, "alpha_pattern['first']"),
        ({"rank_pattern": {"first": "2"}}, "rank_pattern['first']"),
        ({"rank_pattern": ["first"]}, "rank_pattern"),
        ({"rank_pattern": "first"}, "rank_pattern"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "a\x1b[31mb"}, r"base_model_name_or_path in adapter_config.json is 'a\x1b[31mb'"),
        ({"use_rslora": "yes"}, "use_rslora in adapter_config.json is 'yes', not true or false"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out in adapter_config.json is 1, not true or false"),
        ({"target_modules": "first("}, "target_modules in adapter_config.json is not a regular expression: missing )"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_configuration_of_the_wrong_types_is_refused(folder, changes, word):
    edit_config(folder, **changes)
    assert_refused(folder, word)


def test_a_configuration_without_numbers_has_those_of_peft(tmp_path):
    folder = save(tmp_path / "eight", lora(r=8, lora_alpha=8))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["first", "third"]}')
    assert jm.load(folder).modules["first"].scale == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 3}, ["module first has rank 2", "says 3"]),
        ({"rank_pattern": {"third": 4}}, ["module third has rank 2", "says 4"]),
        ({"r": 2.5}, ["module first has rank 2", "says 2.5"]),
        ({"r": 0}, ["module first has rank 2", "says 0"]),
    ],
    ids=str,
)
def test_a_rank_that_is_not_that_of_the_tensors_is_refused(folder, changes, words):
    edit_config(folder, **changes)
    assert_refused(folder, *words, lines=1 if "rank_pattern" in changes else 2)


@pytest.mark.parametrize(("factor", "other"), [("A", "B"), ("B", "A")])
def test_a_factor_without_the_other_is_refused(folder, factor, other):
    edit_tensors(folder, lambda tensors: tensors.pop(f"third.lora_{other}.weight"))
    assert_refused(folder, "module third", f"lacks its factor {other}")


def test_every_spoiled_module_is_told(folder):
    def spoil(tensors):
        del tensors["first.lora_A.weight"]
        tensors["third.lora_B.weight"] = tensors["third.lora_B.weight"][:, :1].copy()

    edit_tensors(folder, spoil)
    assert_refused(folder, "module first lacks its factor A", "module third has factors of shapes", lines=2)


def test_what_is_wrong_in_all_layers_is_told_once(tmp_path):
    folder = tmp_path / "layers"
    paths = [f"layers.{i}.{name}" for i in range(12) for name in ("q", "k")]
    jm.save(jm.Adapter(dict.fromkeys(paths, LORA)), folder)
    edit_config(folder, r=3)
    says = "has rank 2, but adapter_config.json says 3 (12 such modules)"
    assert_refused(folder, f"module layers.*.q {says}", f"module layers.*.k {says}", lines=2)
    wide = jm.LoRA(LORA.a, np.ones((7, 2), np.float32))
    others = [
        jm.Adapter(dict.fromkeys(paths, lora), metadata=jm.Metadata(name=n)) for n, lora in (("a", LORA), ("b", wide))
    ]
    with pytest.raises(ValueError, match="has different shapes") as error:
        jm.merge(others)
    shapes = "has different shapes: 5×6 in a; 7×6 in b (12 such modules)"
    assert str(error.value).splitlines() == [f"module layers.*.{name} {shapes}" for name in ("q", "k")]


def test_a_name_that_cannot_be_shown_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"x\x1b[2J.lora_A.weight": tensors["first.lora_A.weight"]}))
    assert_refused(folder, r"characters in its name that cannot be shown: '", r"x\x1b[2J.lora_A")


def test_a_stage_as_recipes_have_it():
    sources = [adapter("one"), adapter("two")]
    found = jm.merge(sources, stages=[{"scale": {"factor": 0.5}}])  # type: ignore[list-item]
    expected = jm.merge(sources, stages=[("scale", {"factor": 0.5})])
    np.testing.assert_array_equal(found.modules["m"].b, expected.modules["m"].b)
    assert found.metadata.provenance == expected.metadata.provenance


def test_a_file_that_may_not_be_read_is_told_as_such(folder, monkeypatch):
    def denied(path, *arguments, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    real = Path.open
    monkeypatch.setattr(Path, "open", denied)
    assert_refused(folder, "adapter_model.safetensors: cannot be read: Permission denied")


def test_a_broken_link_is_told_as_such(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    assert_refused(tmp_path / "link", "is a broken link")


def test_the_change_of_a_whole_adapter_is_none():
    with pytest.raises(ValueError, match=r"delta is of one module, adapter\.modules\[path\], got Adapter"):
        jm.delta(jm.Adapter({"m": LORA}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.reshape(-1),
        lambda a: a[None],
        lambda a: a[:, :0],
        lambda a: a[:0],
        lambda a: np.concatenate([a, a]),
        lambda a: np.float32(1).reshape(()),
    ],
    ids=["flat", "3d", "no inputs", "no rank", "twice the rank", "scalar"],
)
def test_factors_of_impossible_shapes_are_refused(folder, spoil):
    key = "third.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: np.ascontiguousarray(spoil(tensors[key]))}))
    assert_refused(folder, "module third")


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "bool", "uint8"])
def test_factors_of_integers_are_refused(folder, dtype):
    key = "first.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].astype(dtype)}))
    assert_refused(folder, "module first", "F16, BF16, F32 or F64")


def test_a_bias_that_does_not_fit_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"first.lora_B.bias": np.ones(3, np.float32)}))
    assert_refused(folder, "module first", "lora_B.bias of shape (3,)")


def test_a_file_without_factors_is_refused(folder):
    safetensors.numpy.save_file({"head.weight": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    assert_refused(folder, "no LoRA factors")
    safetensors.numpy.save_file({}, folder / "adapter_model.safetensors")
    assert_refused(folder, "no LoRA factors")


def test_one_factor_under_two_names_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    key = "base_model.model.first.lora_A.weight"
    safetensors.numpy.save_file({**tensors, "first.lora_A.weight": tensors[key].copy()}, path)
    assert_refused(folder, key, "the same factor under two names")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["first.lora_A.weight", "third.lora_B.weight"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_and_inf_name_the_module(folder, tmp_path, value, where, dtype):
    sound = jm.load(folder)

    def spoil(tensors):
        tensors[where] = tensors[where].astype(dtype)
        tensors[where][1, 1] = value

    edit_tensors(folder, spoil)
    with pytest.raises(ValueError, match=rf"sound: NaN or inf in {where[:5]}$"):
        jm.merge([sound, jm.load(folder)], [1, 0])


def test_an_alpha_that_is_nan_names_the_pattern(folder):
    edit_config(folder, alpha_pattern={"first": float("nan")})
    assert_refused(folder, "alpha_pattern['first']", "nan")


def test_nan_in_a_bias_or_a_scale_names_the_module():
    good = jm.LoRA(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))
    for bad in (
        dataclasses.replace(good, bias=np.array([1, np.nan], np.float32)),
        dataclasses.replace(good, scale=float("inf")),
    ):
        with pytest.raises(ValueError, match="adapter 2: NaN or inf in x"):
            jm.merge([jm.Adapter({"x": good, "y": good}), jm.Adapter({"x": bad, "y": good})])


def test_the_largest_finite_numbers_are_no_nan():
    huge = jm.LoRA(np.full((1, 4), 3e38, np.float32), np.full((3, 1), 2e-38, np.float32))
    merged = jm.merge([jm.Adapter({"x": huge})], [1.0])
    np.testing.assert_allclose(jm.delta(merged.modules["x"]), 6.0, rtol=1e-6)


# --- Pickles -----------------------------------------------------------------------------------------------


class Evil:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


@pytest.mark.parametrize("how", ["torch", "torch's old format", "bare", "inside a state dict", "beside tensors"])
def test_a_malicious_pickle_is_not_executed(folder, tmp_path, how):
    sentinel = tmp_path / "pwned"
    path = folder / "adapter_model.bin"
    evil = Evil(sentinel)
    weights = {key: torch.ones(2, 2) for key in ("first.lora_A.weight", "first.lora_B.weight")}
    (folder / "adapter_model.safetensors").unlink()
    if how == "bare":
        path.write_bytes(pickle.dumps(evil))
    elif how == "torch's old format":
        torch.save({**weights, "x": evil}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(
            {"torch": evil, "inside a state dict": {"first.lora_A.weight": evil}}.get(how, {**weights, "x": evil}), path
        )
    with pytest.raises(ValueError, match=r"adapter_model\.bin: ") as error:
        jm.load(folder)
    assert "\n" not in str(error.value)
    assert not sentinel.exists()
    # The sentinel does appear where it is executed: the test can fail.
    pickle.loads(pickle.dumps(evil)).close()
    assert sentinel.exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"first.lora_A.weight": 3}, {"a": {"b": torch.ones(1)}}, torch.ones(3), {0: torch.ones(2, 2)}],
    ids=["list", "number", "nested", "tensor", "key"],
)
def test_a_pickle_of_other_things_is_refused(folder, content):
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: ") as error:
        jm.load(folder)
    assert "\n" not in str(error.value)


def test_a_broken_pickle_is_refused(folder):
    (folder / "adapter_model.safetensors").unlink()
    path = folder / "adapter_model.bin"
    torch.save({"base_model.model.first.lora_A.weight": torch.ones(2, 12)}, path)
    whole = path.read_bytes()
    for broken in (b"", b"garbage", whole[: len(whole) // 2], whole[:-1], bytes(500)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"adapter_model\.bin: ") as error:
            jm.load(folder)
        assert "\n" not in str(error.value)


# --- Arguments of a merge ----------------------------------------------------------------------------------


def adapter(name="", rank=2, shape=(5, 6), path="m", base=None) -> jm.Adapter:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank))
    factors = jm.LoRA(a.astype(np.float32), b.astype(np.float32))
    return jm.Adapter({path: factors}, metadata=jm.Metadata(name=name, base_model=base))


def refused(match: str, *arguments, **keywords) -> str:
    with pytest.raises(ValueError, match=match) as error:
        jm.merge([adapter(), adapter()], *arguments, **keywords)
    assert type(error.value) is ValueError
    return str(error.value)


@pytest.mark.parametrize(
    ("match", "keywords"),
    [
        ("unknown method 'tie'.*linear, ties", {"method": "tie"}),
        ("unknown space 'half'.*full, factors", {"space": "half"}),
        ("unknown combination_type 'foo_svd'.*cat, svd", {"combination_type": "foo_svd"}),
        ("leave method and space out", {"combination_type": "cat", "method": "linear"}),
        ("leave method and space out", {"combination_type": "cat", "space": "full"}),
        ("method linear has no hyperparameter density: it takes none", {"density": 0.5}),
        (
            "method ties has no hyperparameter desnity: it takes density, maj",
            {"method": "ties", "density": 1, "desnity": 1},
        ),
        ("method ties needs density", {"method": "ties"}),
        ("method magnitude_prune needs density", {"combination_type": "magnitude_prune_svd"}),
        ("Density should be >= 0, got -0.5", {"method": "ties", "density": -0.5}),
        ("Density should be >= 0, got nan", {"method": "ties", "density": float("nan")}),
        ("density should be at most 1 and above 0, got 1.5", {"method": "ties", "density": 1.5}),
        ("density should be at most 1 and above 0, got 0", {"method": "ties", "density": 0}),
        ("density should be at most 1 and above 0, got 2", {"method": "ties", "density": [0.5, 2.0]}),
        ("gamma should be at least 0 and at most 1, got 2", {"method": "breadcrumbs", "density": 0.5, "gamma": 2}),
        ("Density should be a number", {"method": "ties", "density": "half"}),
        ("Density should be a number", {"method": "ties", "density": [0.1, 0.2, 0.3]}),
        (
            "majority_sign_method 'mean' is not one of total, frequency",
            {"method": "ties", "density": 1, "majority_sign_method": "mean"},
        ),
        (r"method dare_linear draws .*key=jax\.random\.key", {"method": "dare_linear", "density": 0.5}),
        ("method dare_ties draws", {"combination_type": "dare_ties_svd", "density": 0.5}),
        ("key", {"method": "dare_linear", "density": 0.5, "key": 42}),
        ("rank must be a whole number from 1, got 0", {"rank": 0}),
        ("rank must be a whole number from 1, got -3", {"rank": -3}),
        ("rank must be a whole number from 1, got True", {"rank": True}),
        ("rank must be a whole number from 1, got 2.5", {"rank": 2.5}),
        ("rank must be a whole number from 1, got '2'", {"rank": "2"}),
        ("rank 9 is more .* the largest possible is 4", {"rank": 9}),
        ("rank 9 is more .* the largest possible is 5", {"rank": 9, "method": "ties", "density": 0.5}),
        ("rank 3 is more .* the largest possible is 2", {"rank": 3, "combination_type": "linear"}),
        ("a stage is a name, or a pair of a name and its hyperparameters, not None", {"stages": [None]}),
        ("a stage is a name, or a pair .*, not {'a': 1, 'b': 2}", {"stages": [{"a": 1, "b": 2}]}),
        (r"a stage is a name, or a pair .*, not \('scale', 0.5\)", {"stages": [("scale", 0.5)]}),
        (r"mesh should be a jax\.sharding\.Mesh, got 3", {"mesh": 3}),
        ("dtype int32 is not one of float32, bfloat16", {"dtype": "int32"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(match, keywords):
    assert "\n" not in refused(match, **keywords)


@pytest.mark.parametrize(
    ("match", "weights"),
    [
        ("1 weights for 2 adapters", [1]),
        ("3 weights for 2 adapters", [1, 2, 3]),
        ("0 weights for 2 adapters", []),
        ("weight nan is not a finite number", [1, float("nan")]),
        (r"weight 1e\+300 is more than float32 holds", [1e300, 1]),
        ("weight inf is not a finite number", np.array([np.inf, 1])),
        ("weight -inf is not a finite number", jax.numpy.array([-np.inf, 1])),
        ("array of shape", np.ones((2, 1))),
        ("array of shape", np.array(1.0)),
        ("weight", ["a", "b"]),
        (r"weights must be one number per adapter, got \[None, 1\]", [None, 1]),
        ("weight", [[1], [2]]),
        ("weight", 1.0),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(match, weights):
    assert "\n" not in refused(match, weights)


def test_a_numpy_number_is_a_rank():
    merged = jm.merge([adapter(), adapter(path="m")], rank=np.int64(3))
    assert merged.modules["m"].rank == 3
    assert json.loads(merged.metadata.provenance)["rank"] == 3


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="no adapters"):
        jm.merge([])


def test_an_adapter_without_modules_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"no LoRA|no modules|nothing"):
        jm.save(jm.Adapter({}), tmp_path / "out")


def test_shapes_that_disagree_name_the_module_and_the_adapters():
    with pytest.raises(ValueError, match=r"module m has different shapes: 5×6 in one; 5×7 in two") as error:
        jm.merge([adapter("one"), adapter("two", shape=(5, 7)), adapter("three", path="other")])
    assert "three" not in str(error.value)
    with pytest.raises(ValueError, match=r"5×6 in adapter 1, adapter 3; 7×6 in adapter 2"):
        jm.merge([adapter(), adapter(shape=(7, 6)), adapter()])


def test_factors_that_do_not_match_each_other_name_the_module():
    bad = jm.LoRA(np.ones((2, 6), np.float32), np.ones((5, 3), np.float32))
    with pytest.raises(ValueError, match=r"odd: factors of m do not match: a \(2, 6\), b \(5, 3\)"):
        jm.merge([adapter(), jm.Adapter({"m": bad}, metadata=jm.Metadata(name="odd"))])


KIND = {
    "linear": lambda: torch.nn.Linear(6, 9),
    "conv1d": lambda: torch.nn.Conv1d(6, 9, 1),
    "conv2d": lambda: torch.nn.Conv2d(6, 9, 1),
}


@pytest.mark.parametrize(("one", "two"), [("conv1d", "conv2d"), ("linear", "conv2d"), ("conv2d", "linear")])
def test_kinds_that_disagree_name_the_module_and_the_adapters(tmp_path, one, two):
    """A 1×1 convolution has the shapes of a linear layer."""
    adapters = [
        jm.load(
            save(
                tmp_path / kind, lora(target_modules=["x"]), lambda kind=kind: torch.nn.ModuleDict({"x": KIND[kind]()})
            )
        )
        for kind in (one, two)
    ]
    with pytest.raises(ValueError, match=rf"module x is of different kinds in .*{one} and .*{two}"):
        jm.merge(adapters)


def test_different_base_models_are_refused_unless_allowed():
    adapters = [adapter("one", base="org/a"), adapter("two", base="org/b"), adapter("three", base="org/a")]
    with pytest.raises(ValueError, match=r"org/a \(one, three\); org/b \(two\).*allow_different_bases"):
        jm.merge(adapters)
    assert jm.merge(adapters, allow_different_bases=True).metadata.base_model == "org/a"
    assert jm.merge([adapter(), adapter(base="org/b")]).metadata.base_model == "org/b"


def test_all_problems_are_told_together():
    one, two = adapter("one", base="org/a"), adapter("two", shape=(5, 7), base="org/b")
    one = dataclasses.replace(one, extras={"head": np.ones(2, np.float32)})
    two = dataclasses.replace(two, extras={"head": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=r"weights") as error:
        jm.merge([one, two], [1, float("nan"), 3], method="dare_ties", majority_sign_method="x", desnity=1)
    told = str(error.value).splitlines()
    for word in (
        "3 weights for 2 adapters",
        "weight nan",
        "needs density",
        "no hyperparameter desnity",
        "majority_sign_method 'x'",
        "pass key=",
        "module m has different shapes",
        "different base models",
        "does not settle these tensors",
    ):
        assert sum(word in line for line in told) == 1, word
    assert len(told) == 9


def test_every_module_and_adapter_with_nan_is_told():
    def spoiled(name):
        good = adapter(name)
        bad = dataclasses.replace(good.modules["m"], a=np.full((2, 6), np.nan, np.float32))
        return dataclasses.replace(good, modules={"m": bad, "n": bad, "fine": good.modules["m"]})

    with pytest.raises(ValueError, match="NaN") as error:
        jm.merge([spoiled("one"), adapter("two"), spoiled("three")])
    assert str(error.value).splitlines() == ["one: NaN or inf in m, n", "three: NaN or inf in m, n"]


def test_lower_refuses_what_merge_refuses():
    with pytest.raises(ValueError, match="1 weights for 2 adapters"):
        jm.lower([adapter(), adapter()], [1])


@pytest.mark.parametrize(
    ("given", "kind"), [("sms", "str"), (["sms", "movie"], "str"), (3, "int"), (adapter(), "one Adapter")], ids=str
)
def test_what_are_no_adapters(given, kind):
    for function in (jm.merge, jm.compare, jm.preview):
        with pytest.raises(ValueError, match=f"adapters should be a list of adapters, .* got {kind}"):
            function(given)
