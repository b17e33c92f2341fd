"""Files of memories with one field changed and the checksums made right again: refused, or read as they were."""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from memdlm.errors import CheckpointError, ConfigError, MemDLMError, MemoryFileError, NotFiniteError
from memdlm.memory import MemoryConfig, ParametricMemory, read_memory
from memdlm.memory.files import saved
from memdlm.models import LoRAOptions, add_outer_lora, load_outer_adapter, save_outer_adapter
from tiny import MASK, random_ids, rng, tiny

WEIGHTS, CONFIG, HEADER = "adapter_model.safetensors", "adapter_config.json", "memory.json"
OPTIONS = MemoryConfig(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=8.0, inner_lr=1.0)
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 1e308, 10**30, 10**400, float("nan"), float("inf")),
    *("", "x", "0" * 64, "../..", "\ud800", [], [1], ["a"], [[]], {}, {"a": 1}, [None], list(range(100))),
]
DELETED = object()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited") / "doc.mem"
    memory = memory_of()
    with memory.write(random_ids(1, 24), generator=rng(3)):
        memory.save(folder)
    return folder


def memory_of():
    return ParametricMemory(tiny("lladamoe"), OPTIONS, mask_token_id=MASK)


def places(node, path=()):
    """Every place in a JSON value, the root first."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def edited(node, path, value):
    """A copy of a JSON value with one place changed, or deleted."""
    node = copy.deepcopy(node)
    if not path:
        return node if value is DELETED else value
    inner = node
    for key in path[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[path[-1]]
    elif path[-1] == "new":
        inner["new"] = value
    else:
        inner[path[-1]] = value
    return node


def put(folder, name, content):
    """Write a JSON file of a memory, and the checksums that belong to it."""
    (folder / name).write_text(json.dumps(content), errors="surrogatepass")
    header = json.loads((folder / HEADER).read_text(errors="surrogatepass"))
    sums = header.get("sha256") if isinstance(header, dict) else None
    if not isinstance(sums, dict) or set(sums) != {WEIGHTS, CONFIG, HEADER}:
        return
    for file in (WEIGHTS, CONFIG):
        if name != HEADER or isinstance(sums[file], str):
            sums[file] = saved.digest_of(folder / file)
    sums[HEADER] = saved._checksum(header)
    (folder / HEADER).write_text(json.dumps(header), errors="surrogatepass")


def same(found, expected):
    """Whether two memories are alike in everything that is read of them."""
    reading = lambda each: (each.rank, each.scale, each.layers)
    return (
        reading(found) == reading(expected)
        and found.pairs.keys() == expected.pairs.keys()
        and all(
            found.pairs[name][side].equal(tensor)
            for name, pair in expected.pairs.items()
            for side, tensor in pair.items()
        )
    )


def is_refused_or_same(original, folder, name, path, value, memory):
    shutil.copytree(original, folder)
    content = json.loads((folder / name).read_text())
    try:
        put(folder, name, edited(content, path, value))
    except (UnicodeEncodeError, ValueError):
        shutil.rmtree(folder)
        return "not written"
    expected = read_memory(original)
    try:
        found = memory.load(folder)
        assert same(found, expected), f"{name} {path} = {value!r:.60}"
        # As `memdlm ask` does: with the options that the file itself gives.
        own = ParametricMemory(memory.model, found.reading_config, mask_token_id=MASK).load(folder)
        assert same(own, expected), f"by its own options, {name} {path} = {value!r:.60}"
    except (ConfigError, MemoryFileError) as error:
        return is_one_line(error)
    finally:
        shutil.rmtree(folder)
    return "same"


def is_one_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 1000
    return "refused"


def cases(original, count, seed):
    random_of = random.Random(seed)
    for _ in range(count):
        name = random_of.choice([HEADER, HEADER, HEADER, CONFIG])
        content = json.loads((original / name).read_text())
        path = random_of.choice([*places(content)])
        if isinstance(content, dict) and random_of.random() < 0.1:
            path = (*random_of.choice([(), ("fingerprint",), ("config",), ("sha256",)]), "new")
            path = path if name == HEADER else ("new",)
        yield name, path, random_of.choice([*VALUES, DELETED]) if path[-1:] != ("new",) else random_of.choice(VALUES)


def run(original, tmp_path, count, seed):
    memory, seen = memory_of(), {"refused": 0, "same": 0, "not written": 0}
    for index, (name, path, value) in enumerate(cases(original, count, seed)):
        seen[is_refused_or_same(original, tmp_path / str(index), name, path, value, memory)] += 1
    assert seen["refused"] > seen["same"]


def test_a_field_of_another_kind_is_refused_or_changes_nothing(original, tmp_path):
    run(original, tmp_path, 60, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_fields_of_other_kinds_are_refused_or_change_nothing(original, tmp_path, seed):
    run(original, tmp_path, 400, seed)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        (HEADER, ("layers", 0, "num_experts"), 10**30),
        (HEADER, ("layers", 0, "num_experts"), 65535),
        (HEADER, ("layers", 0, "num_experts"), True),
        (HEADER, ("layers", 0, "in_features"), 32.0),
        (HEADER, ("fingerprint", "mask_token_id"), "31"),
        (HEADER, ("fingerprint", "weights"), ["0"]),
        (HEADER, ("fingerprint", "note"), "x"),
        (HEADER, ("format",), True),
        (HEADER, ("layers",), {"0": {}}),
        (HEADER, ("config", "inner_alpha"), float("nan")),
        (HEADER, ("provenance", "tokens"), "many"),
        (HEADER, ("provenance", "source"), 3),
        (CONFIG, ("r",), 4.0),
        (CONFIG, ("r",), 10**30),
        (CONFIG, ("lora_alpha",), [8]),
        (CONFIG, ("target_modules",), "down_proj"),
        (CONFIG, ("target_modules",), ["nothing"]),
        (CONFIG, ("use_rslora",), 1),
        (CONFIG, ("layers_to_transform",), {"a": 1}),
    ],
    ids=str,
)
def test_what_reading_needs_is_checked_before_it_is_used(original, tmp_path, name, path, value):
    assert is_refused_or_same(original, tmp_path / "doc.mem", name, path, value, memory_of()) == "refused"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 1, "format": 1}', "occurs twice"),
        ('{"format": Infinity}', "Infinity is not a JSON number"),
        ('{"format": 1e999}', "too large a number"),
        ("[]", "has format None"),
        ('"text"', "has format None"),
        ("\x00", "could not be read"),
    ],
)
def test_strange_json_is_refused(original, tmp_path, text, reason):
    shutil.copytree(original, tmp_path / "doc.mem")
    (tmp_path / "doc.mem" / HEADER).write_text(text)
    with pytest.raises(MemoryFileError, match=reason):
        read_memory(tmp_path / "doc.mem")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_memory_with_nan_in_its_tensors_is_refused(original, tmp_path, value):
    folder = tmp_path / "doc.mem"
    shutil.copytree(original, folder)
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[-1]
    tensors[name][0, 0] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    put(folder, CONFIG, json.loads((folder / CONFIG).read_text()))
    memory = memory_of()
    with pytest.raises(MemoryFileError, match=r"finite|NaN"), memory.recall(folder):
        pass
    with pytest.raises(CheckpointError, match="not a matrix of finite numbers"):
        load_outer_adapter(tiny("lladamoe"), folder)


# Learned starts and adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS, MemoryConfig.recall(inner_layer_fraction=0.5, inner_rank=4)], ids=str)
def test_edited_learned_starts_are_refused_or_read(options, tmp_path):
    if not options.is_learned:
        options = MemoryConfig(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=8.0, learn_start=True)
    memory = ParametricMemory(tiny("small"), options, mask_token_id=MASK)
    memory.learned.save(tmp_path / "start")
    content = json.loads((tmp_path / "start" / "memory_init.json").read_text())
    random_of = random.Random(1)
    for index in range(60):
        folder = tmp_path / str(index)
        shutil.copytree(tmp_path / "start", folder)
        change = edited(content, random_of.choice([*places(content)]), random_of.choice(VALUES))
        try:
            (folder / "memory_init.json").write_text(json.dumps(change))
        except (UnicodeEncodeError, ValueError):
            continue
        try:
            memory.learned.load(folder)
        except MemDLMError as error:
            is_one_line(error)
    tensors = load_file(tmp_path / "start" / "memory_init.safetensors")
    name = sorted(tensors)[0]
    for bad in (tensors[name] * float("nan"), tensors[name].long(), tensors[name][:0]):
        save_file({**tensors, name: bad}, tmp_path / "start" / "memory_init.safetensors")
        with pytest.raises(CheckpointError):
            memory.learned.load(tmp_path / "start")


def test_edited_adapter_configurations_are_refused_or_loaded(tmp_path):
    original = tmp_path / "adapter"
    save_outer_adapter(add_outer_lora(tiny("small"), LoRAOptions(r=4)), original)
    content = json.loads((original / CONFIG).read_text())
    random_of = random.Random(2)
    ids = random_ids(1, 8)
    expected = load_outer_adapter(tiny("small"), original)(ids).logits
    for index in range(60):
        folder = tmp_path / str(index)
        shutil.copytree(original, folder)
        path, value = random_of.choice([*places(content)]), random_of.choice(VALUES)
        try:
            (folder / CONFIG).write_text(json.dumps(edited(content, path, value)))
        except (UnicodeEncodeError, ValueError):
            continue
        model = tiny("small")
        try:
            load_outer_adapter(model, folder)
        except CheckpointError as error:
            is_one_line(error)
            continue
        if path not in {("lora_alpha",), ("use_rslora",), ("lora_dropout",)}:
            assert model(ids).logits.equal(expected), f"{path} = {value!r}"


def test_a_memory_that_holds_nan_is_never_saved(tmp_path):
    memory = memory_of()
    with memory.write(random_ids(1, 24), generator=rng(3)):
        file = memory.export()
        module = next(iter(file.pairs))
        file.pairs[module]["B"][0, 0] = torch.nan
        with pytest.raises(NotFiniteError, match=r"holds NaN or infinity in .*lora_B"):
            file.save(tmp_path / "doc.mem")
        with pytest.raises(MemDLMError, match="provenance"):
            memory.save(tmp_path / "doc.mem", note={1, 2})
        with pytest.raises(MemDLMError, match="provenance"):
            memory.save(tmp_path / "doc.mem", loss=float("nan"))
    assert not (tmp_path / "doc.mem").exists()
