"""Whatever bytes a file has, its reader gives a result or one sentence; see `fuzz_readers`."""

import functools
import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz_readers
from fuzz_readers import READERS, check, seeds
from robustkern._files import parse_json, read_bytes
from robustkern._pickles import check_pickle
from robustkern.training import CheckpointError, UsageError, checkpoint, config
from robustkern.training.yaml_files import dump_yaml, load_yaml

READ = sorted(READERS)


@st.composite
def damaged(draw, files):
    """A valid file, with some of its bytes changed, cut out, repeated or moved."""
    content = draw(st.sampled_from(files))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        new = draw(st.one_of(st.binary(max_size=12), st.just(content[start:end] * 2), st.just(content[:8])))
        content = content[:start] + new + content[end:]
    return content


@pytest.mark.parametrize("reader", READ)
def test_files_as_they_should_be_are_taken(reader):
    outcomes = [check(reader, content) for content in seeds(reader)]
    assert None in outcomes or reader == "manifest"  # its checkpoint is empty


@pytest.mark.parametrize("reader", READ)
def test_damaged_files_are_one_sentence(reader):
    files = seeds(reader)

    @settings(max_examples=40)
    @given(damaged(files))
    def feed(content):
        check(reader, content)

    feed()


@pytest.mark.parametrize("reader", READ)
def test_any_bytes_are_one_sentence(reader):
    @settings(max_examples=25)
    @given(
        st.one_of(st.binary(max_size=200), st.text(max_size=80).map(lambda text: text.encode("utf8", "surrogatepass")))
    )
    def feed(content):
        check(reader, content)

    feed()


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@pytest.mark.parametrize("reader", ["description", "manifest", "plan", "metrics"])
def test_values_of_wrong_types_are_one_sentence(reader):
    """Well-formed JSON with a wrong value in some place."""
    (content,) = seeds(reader)
    fields = json.loads(content.splitlines()[0])

    @given(st.dictionaries(st.sampled_from(sorted(fields)), ANYTHING, min_size=1, max_size=3))
    def feed(changed):
        check(reader, json.dumps({**fields, **changed}).encode())

    feed()


@given(st.dictionaries(st.sampled_from([*config.TrainingConfig.__dataclass_fields__, "other"]), ANYTHING, max_size=4))
def test_settings_of_wrong_types_are_one_sentence(changed):
    check("configuration", dump_yaml({"data": "digits", "method": "standard", **changed}).encode("latin1", "replace"))


def zipped(content, method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    return out.getvalue()


@functools.cache
def zeros():
    """70 MB in a few kilobytes."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as file:
        member = tarfile.TarInfo("zeros")
        member.size = 70 << 20
        file.write(member.tobuf())
        for _ in range(70):
            file.write(bytes(1 << 20))
    return out.getvalue()


LAUGHS = "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(30))
BOMBS = {
    "labels without end": ("idx.gz", lambda: gzip.compress(b"\0\0\x08\x01\0\0\0\x09" + bytes(1 << 26)), "more than 9"),
    "a header of 2^96 bytes": ("idx", lambda: bytes((0, 0, 8, 3)) + b"\xff" * 12, "more than 268435456"),
    "a header whose size overflows": ("idx", lambda: struct.pack(">BBBB3I", 0, 0, 8, 3, 1 << 31, 1 << 31, 4), "more"),
    "no pixels": ("idx", lambda: struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 1 << 31, 4), "none or more"),
    "archive of zeros": ("archive", zeros, "unpacks to more than"),
    "a name of 40 MB": ("archive", lambda: gzip.compress(long_name(), 1), "has no test_batch"),
    "members without end": ("archive", lambda: members(), "more than 10000 members"),
    "a batch twice": ("packed", lambda: twice(), "stands twice"),
    "a memo of 2^31 places": ("cifar", lambda: b"\x80\x02]r\xff\xff\xff\x7f.", "more than 200000 instructions"),
    "a string of 2^62 bytes": ("cifar", lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.", "read safely"),
    "a million lists": ("cifar", lambda: b"\x80\x02" + b"]" * 1_000_000 + b".", "more than 200000 instructions"),
    "lists of shared lists": ("cifar", lambda: shared_lists(), "it makes more than"),
    "a key of shared tuples": ("cifar", lambda: b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.", "it makes more than"),
    "a key of remembered tuples": ("cifar", lambda: b"\x80\x02}" + remembered() + b"K\x01s.", "it makes more than"),
    "a key of many mappings": ("cifar", lambda: many_mappings(), "it makes more than"),
    "a text encoded again and again": ("cifar", lambda: encoded_again(), "more bytes than it has"),
    "a key in a checkpoint": ("pickled", lambda: b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.", "it makes more than"),
    "state for a function": ("cifar", lambda: b"\x80\x02c_codecs\nencode\n}b.", "change a function"),
    "aliases of aliases": ("yaml", lambda: LAUGHS.encode(), "anchors, aliases and tags are not read"),
    "a deep flow": ("yaml", lambda: b"[" * 60_000, "levels"),
    "a long document": ("yaml", lambda: b"a: 1\n" * 100_000, "longer than"),
    "a long number": ("yaml", lambda: b"epochs: " + b"9" * 60_000, "epochs|digits"),
    "deep JSON": ("plan", lambda: b"[" * 60_000, "nested too deeply"),
    "a long plan": ("plan", lambda: b" " * (1 << 20), "larger than"),
    "compressed entries": ("checkpoint", lambda: zipped(bytes(40 << 20)), "larger than they are stored"),
    "10^12 bytes": ("pickled", lambda: b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\x10\xa5\xd4\xe8\0\x85R.", "import"),
    "pixels without end": ("image", lambda: wide_png(60_000, 60_000), "pixels|readable"),
}  # fmt: skip


def long_name():
    member = tarfile.TarInfo("x" * (40 << 20))
    return member.tobuf(tarfile.GNU_FORMAT)


def members():
    return gzip.compress(tarfile.TarInfo("a").tobuf() * 20_000, 1)


def twice():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("test_batch"))
    return out.getvalue()


def remembered(count=60):
    """`count` tuples, each holding the one before it twice."""
    return b"K\x01q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(count))


def many_mappings():
    """Thirty thousand mappings, each with half a million elements to hash."""
    return b"\x80\x02" + remembered(18) + b"}h\x12K\x01s0" * 30_000 + b"N."


def encoded_again():
    """Bytes as Python 3 writes them in protocol 2, four megabytes ten thousand times."""
    text = b"X" + struct.pack("<I", 4 << 20) + b"a" * (4 << 20)
    calls = b"](" + b"h\0h\1h\2\x86R" * 10_000 + b"e."
    return b"\x80\x02c_codecs\nencode\nq\0" + text + b"q\1X\6\0\0\0latin1q\2" + calls


def shared():
    """A list of forty lists, which a traversal sees as 2^40 elements."""
    inner = []
    for _ in range(40):
        inner = [inner, inner]
    return inner


def shared_lists():
    return pickle.dumps({"data": fuzz_readers.np.zeros((2, 3072), "uint8"), "labels": shared()}, 2)


def wide_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.long
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_little_time_and_memory(kind, monkeypatch):
    monkeypatch.setattr(fuzz_readers.cifar, "_MOST_UNPACKED", 64 << 20)  # an eighth: quicker to reach
    reader, make, message = BOMBS[kind]
    content = make()
    started = time.process_time()
    tracemalloc.start()
    try:
        sentence = check(reader, content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert re.search(message, sentence or ""), sentence
    assert time.process_time() - started < 20
    assert peak < 300 << 20


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("+7", 7), ("1:00", "1:00"), ("1_000", "1_000"), ("0b11", "0b11"),
        ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("y", "y"), ("true", True), ("False", False), ("~", None),
        ("null", None), ("", None), ("5e-4", 5e-4), ("1e5", 1e5), (".5", 0.5), ("1.", 1.0), ("-.inf", -float("inf")),
        ("2026-01-01", "2026-01-01"), ("<<", "<<"), ("=", "="), ("'010'", "010"), ("12e03", 12e3), ("1.5.2", "1.5.2"),
    ],
)  # fmt: skip
def test_yaml_is_version_1_2(text, value):
    read = load_yaml(f"a: {text}")["a"]
    assert read == value and type(read) is type(value)


@given(
    st.dictionaries(st.text(max_size=6), st.one_of(ANYTHING, st.from_regex(r"[-+.0-9eEoxaf:_~]{1,7}", fullmatch=True)))
)
def test_yaml_reads_what_it_wrote(values):
    def same(a, b):
        if isinstance(a, dict):
            return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and (a == b or a != a)

    assert same(values, load_yaml(dump_yaml(values)))


@pytest.mark.parametrize(
    "text", ["{a: 1, a: 2}", "{1: a, 0x1: b}", "a: &x 1", "a: !!int 1", "a: !!python/name:os.x", "? [a]"]
)
def test_yaml_refuses(text):
    with pytest.raises(UsageError, match="not YAML in line 1"):
        load_yaml(text)


# --- files ------------------------------------------------------------------------------------------------------------


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than the 4 bytes"):
        read_bytes(path, 4)
    os.mkfifo(tmp_path / "pipe")
    for strange in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="not a regular file|Is a directory"):
            read_bytes(strange, 4)


def test_json_has_no_key_twice():
    assert parse_json(b'{"a": [1, {"a": 2}]}') == {"a": [1, {"a": 2}]}
    for text in ('{"a": 1, "a": 2}', "[" * 100_000, "\x00", b"\xff"):
        with pytest.raises(ValueError, match="."):
            parse_json(text)


def test_buffers_of_another_size_are_refused_before_anything_is_loaded():
    state, content = fuzz_readers.state(), fuzz_readers.state().to_bytes()
    kept = {name: value.clone() for name, value in state.model.state_dict().items()}
    stored = torch.load(io.BytesIO(content), weights_only=True)
    changes = [
        ("optimizer", "state", 0, "momentum_buffer", torch.zeros(1).expand(10**12)),
        ("progress", "step", "many"),
        ("progress", "rows", [{"epoch": 1}]),
        ("progress", "epoch", 3),
        ("progress", "sums", {}),
        ("model", "weight", torch.zeros(2, 2, dtype=torch.float64)),
        ("optimizer", "state", []),
        ("optimizer", "param_groups", 0, "lr", "fast"),
        ("optimizer", "param_groups", 0, "momentum", shared()),
        ("progress", "best", dict.fromkeys(checkpoint._OF_THE_BEST, shared())),
    ]
    for *keys, last, value in changes:
        changed = torch.load(io.BytesIO(content), weights_only=True)
        place = changed
        for key in keys:
            place = place[key]
        place[last] = value
        buffer = io.BytesIO()
        torch.save(changed, buffer)
        with pytest.raises(CheckpointError) as caught:
            state.load_bytes(buffer.getvalue(), "checkpoint")
        assert "\n" not in str(caught.value)
        assert all(torch.equal(kept[name], value) for name, value in state.model.state_dict().items())
    assert stored["progress"]["step"] == 0


@given(ANYTHING, st.integers(0, 5))
def test_pickles_that_make_little_are_taken(value, protocol):
    assert check_pickle(pickle.dumps([value, (value, value), {"a": value}], protocol), 1000) == set()


def test_what_a_pickle_makes_is_counted():
    inner = ()
    for _ in range(9):
        inner = (inner, inner)
    with pytest.raises(ValueError, match="it makes more than 1000 objects"):
        check_pickle(pickle.dumps(inner), 100)
    assert check_pickle(pickle.dumps(inner), 1000) == set()
    assert check_pickle(pickle.dumps(os.mkdir, 2), 10) == {"posix mkdir"}
