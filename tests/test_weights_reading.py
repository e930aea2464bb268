"""Reading files of unknown origin: what they hold arrives intact, and nothing in them ever runs."""

import collections
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m2f_lab.weights import UnsafeFileError
from m2f_lab.weights.reading import read_checkpoint


class Command:
    """Unpickled by the ordinary reader, it writes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"echo run > {self.marker}",)


def write_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_torch(path, content):
    torch.save(content, path)
    return path


def write_old_torch(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(3, 4, generator=generator), "a.bias": torch.arange(3)}


def assert_read(checkpoint, tensors):
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)


# -- nothing runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_pickle, write_torch, write_old_torch])
@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model.safetensors", "pytorch_model.bin"])
def test_a_file_cannot_run_a_command(tmp_path, write, name):
    marker = tmp_path / "marker"
    path = write(tmp_path / name, {"model": {"a.weight": Command(marker)}})
    with pytest.raises(UnsafeFileError, match=rf"{name} asks for \w+\.system.* which never happens here"):
        read_checkpoint(path)
    assert not marker.exists()
    if write is write_pickle:
        pickle.loads(path.read_bytes())  # the danger is real: the ordinary reader runs it
        assert marker.exists()


def test_a_folder_cannot_run_a_command(tmp_path):
    write_torch(tmp_path / "pytorch_model.bin", {"a.weight": Command(tmp_path / "marker")})
    with pytest.raises(UnsafeFileError):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "open"), ("os", "system"), ("posix", "system"),
        ("functools", "partial"), ("operator", "attrgetter"), ("numpy", "load"), ("numpy", "fromfile"),
        ("numpy.core.multiarray", "fromfile"), ("numpy.testing", "runstring"), ("torch", "load"),
        ("torch.storage", "_load_from_bytes"), ("collections", "namedtuple"), ("m2f_lab.weights", "load_weights"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 4])
def test_only_arrays_and_containers_have_names(tmp_path, module, name, protocol):
    if protocol == 2:
        program = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    else:
        words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
        program = b"\x80\x04" + words + b"\x93."
    path = tmp_path / "model.pkl"
    path.write_bytes(program)
    with pytest.raises(UnsafeFileError, match=rf"asks for {module}\.{name}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "array",
    [
        np.array([Command("never")], dtype=object),
        np.array([None], dtype=object),
        np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
        np.array(["text"]),
        np.array(["2024-01-01"], dtype="M8[D]"),
    ],
    ids=["object", "none", "record", "text", "date"],
)
def test_arrays_of_other_things_than_numbers_are_refused(tmp_path, array):
    with pytest.raises(UnsafeFileError, match=r"array of type|asks for"):
        read_checkpoint(write_pickle(tmp_path / "model.pkl", {"a": array}))


def test_the_index_of_shards_cannot_point_elsewhere(tmp_path, tensors):
    inside = tmp_path / "model"
    inside.mkdir()
    save_file(tensors, tmp_path / "secret.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its own folder"):
        read_checkpoint(inside)


# -- everything harmless arrives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_a_model_zoo(tmp_path, protocol):
    arrays = {
        "float32": np.random.default_rng(0).normal(size=(3, 4, 5)).astype("f4"),
        "float16": np.array([1.5, -2, np.inf], dtype="f2"),
        "float64": np.array([[1e300]]),
        "int64": np.arange(6).reshape(2, 3),
        "bool": np.array([True, False]),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">f4"),
        "number": np.array(3, dtype="i8"),
        "scalar": np.float32(0.5),
        "view": np.arange(10.0)[::3],
    }
    content = {"model": arrays, "__author__": "someone", "matching_heuristics": True}
    checkpoint = read_checkpoint(write_pickle(tmp_path / "model.pkl", content, protocol))
    assert checkpoint.inside == "model"
    assert set(checkpoint.tensors) == set(arrays)
    for name, array in arrays.items():
        found = checkpoint.tensors[name].numpy()
        assert found.dtype == array.dtype.newbyteorder("="), name
        np.testing.assert_array_equal(found, array)
        checkpoint.tensors[name].zero_()  # it owns its memory


def test_arrays_pickled_by_python_2(tmp_path):
    """Bytes were text then. One float32 array [1.5, -2], in the opcodes Python 2 wrote."""
    data = struct.pack("<2f", 1.5, -2)
    program = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x08" + data + b"tbs."
    )
    path = tmp_path / "model.pkl"
    path.write_bytes(program)
    assert read_checkpoint(path).tensors["a"].tolist() == [1.5, -2]


@pytest.mark.parametrize("write", [write_pickle, write_torch, write_old_torch])
def test_containers_around_the_state_dict(tmp_path, tensors, write):
    state = collections.OrderedDict((k, v.numpy() if write is write_pickle else v) for k, v in tensors.items())
    rest = {"optimizer": {"state": {0: {"step": 3}}, "groups": [{"lr": 0.1, "ids": {1, 2}}]}, "cur_epoch": 3}
    checkpoint = read_checkpoint(write(tmp_path / "weights.any", {"state_dict": state, **rest}))
    assert checkpoint.inside == "state_dict"
    assert_read(checkpoint, tensors)
    assert_read(read_checkpoint(write(tmp_path / "bare.any", state)), tensors)


def test_the_prefix_of_distributed_training_is_dropped(tmp_path, tensors):
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    checkpoint = read_checkpoint(write_torch(tmp_path / "a.pth", {"model": wrapped}))
    assert checkpoint.inside == "model → module.*"
    assert_read(checkpoint, tensors)


def test_safetensors_whatever_their_name(tmp_path, tensors):
    save_file(tensors, tmp_path / "weights.pth")
    assert_read(read_checkpoint(str(tmp_path / "weights.pth")), tensors)


def test_folders_and_shards(tmp_path, tensors):
    (tmp_path / "config.json").write_text('{"model_type": "mask2former"}')
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true}')
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "1.safetensors", "a.bias": "2.safetensors"}}))
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lists 2\.safetensors, which is missing"):
        read_checkpoint(tmp_path)
    save_file({"a.bias": tensors["a.bias"]}, tmp_path / "2.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    assert_read(checkpoint, tensors)
    assert checkpoint.config == {"model_type": "mask2former"}
    assert checkpoint.preprocessor == {"do_resize": True}

    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")  # a file of a folder knows its folder
    assert_read(checkpoint, tensors)
    assert checkpoint.config == {"model_type": "mask2former"}


# -- what is wrong is named ----------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere\.pth: expected a file, or a folder"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_a_folder_without_weights_says_where_they_may_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="Is this the right folder"):
        read_checkpoint(tmp_path)
    (tmp_path / "model_final.pkl").touch()
    with pytest.raises(FileNotFoundError, match=r"path of one of its files instead: model_final\.pkl"):
        read_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    (tmp_path / "checkpoints" / "best" / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"further down: .*checkpoints.best"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("write", [write_pickle, write_torch, write_old_torch, lambda p, c: save_file(c, p) or p])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_half_a_file(tmp_path, write, share):
    tensors = {"a": torch.randn(100, 100)}
    path = write(tmp_path / "a", {"a": tensors["a"].numpy()} if write is write_pickle else tensors)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cannot be read as a .*Is the download complete\?"):
        read_checkpoint(path)


def test_other_files(tmp_path):
    path = tmp_path / "a.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_checkpoint(path)
    path.write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(ValueError, match="is no checkpoint: it begins with b'<!DOCTYPE"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a state dict"),
        ({}, "it is empty"),
        ({"model": {"a": torch.zeros(1), "lr": 0.1}}, r"its entries \['lr'\] are no tensors"),
        ({"epoch": 3}, r"its entries \['epoch'\] are no tensors"),
    ],
)
def test_a_file_without_state_dict(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(write_torch(tmp_path / "a.pth", content))


def test_a_damaged_config_is_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_checkpoint(tmp_path)


# -- averages and prefixes -------------------------------------------------------------------------------------------


def test_the_weights_are_taken_and_their_average_is_named(tmp_path, tensors):
    averaged = {name: tensor + 1 for name, tensor in tensors.items()}
    path = write_torch(tmp_path / "both.pth", {"model_ema": averaged, "model": tensors, "epoch": 3})
    checkpoint = read_checkpoint(path)
    assert_read(checkpoint, tensors)
    assert (checkpoint.inside, checkpoint.passed_over) == ("model", ("model_ema",))
    chosen = read_checkpoint(path, entry="model_ema")
    assert_read(chosen, averaged)
    assert (chosen.inside, chosen.passed_over) == ("model_ema", ("model",))
    with pytest.raises(ValueError, match=r"no weights under 'ema'; there are model, model_ema\."):
        read_checkpoint(path, entry="ema")
    with pytest.raises(ValueError, match="there are no entries"):
        read_checkpoint(write_torch(tmp_path / "plain.pth", tensors), entry="ema")


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema", "ema", "teacher"])
def test_an_average_alone_is_taken(tmp_path, tensors, name):
    checkpoint = read_checkpoint(write_torch(tmp_path / "ema.pth", {name: tensors, "optimizer": {}}))
    assert_read(checkpoint, tensors)
    assert (checkpoint.inside, checkpoint.passed_over) == (name, ())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(tmp_path, tensors, prefix):
    path = write_torch(tmp_path / "wrapped.pth", {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    assert_read(read_checkpoint(path), tensors)


def test_the_counter_of_an_averaged_model_is_dropped(tmp_path, tensors):
    content = {f"module.{name}": tensor for name, tensor in tensors.items()} | {"n_averaged": torch.tensor(7)}
    assert_read(read_checkpoint(write_torch(tmp_path / "swa.pth", content)), tensors)
