"""Every reader of foreign bytes, fed with random bytes, gives a result or one sentence, in bounded time and memory.

The suite feeds them by Hypothesis (`test_readers.py`).  By hand, guided by coverage, with the package atheris:

    python tests/fuzz_readers.py cifar -max_total_time=600        # one of READERS; libFuzzer's options
"""

import contextlib
import functools
import hashlib
import io
import os
import pickle
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

FUZZED_ALONE = __name__ == "__main__" and sys.argv[1:] != []
if FUZZED_ALONE:
    import atheris

    watch = atheris.instrument_imports(
        include=["robustkern", "yaml", "PIL", "tarfile", "gzip", "pickletools", "json", "zipfile"]
    )
else:
    watch = contextlib.nullcontext()

with watch:
    import gzip
    import json
    import tarfile
    import zipfile

    import PIL.Image
    import torch
    import yaml  # noqa: F401
    from safetensors.torch import save

    from robustkern import models
    from robustkern.data import DataError, cifar, folder, idx
    from robustkern.study import study
    from robustkern.training import TrainingConfig, TrainingError, UsageError, config, recipe, weights
    from robustkern.training import checkpoint as checkpoints

PIL.Image.init()
SENTENCES = (DataError, TrainingError, UsageError)


@functools.cache
def place() -> Path:
    """A folder in memory, if the system has one: fuzzers write to it thousands of times a second."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))


def written(content: bytes, name: str) -> Path:
    path = place() / name
    path.write_bytes(content)
    return path


def archive(content: bytes) -> None:
    path = written(content, "cifar-10-python.tar.gz")
    cifar._from_archive(path.parent, "test")


def packed(content: bytes) -> None:
    """The same for compressed content: no fuzzer finds its way through the compression."""
    archive(gzip.compress(content, 1))


def state() -> checkpoints.TrainState:
    model = torch.nn.Linear(2, 2)
    progress = checkpoints.Progress(0, 0, 0, {"samples": 0.0}, [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return checkpoints.TrainState(progress, model, optimizer)


SETTINGS = recipe("digits", "standard", threads=1)


def manifest(content: bytes) -> None:
    path = written(content, "checkpoint-000000001.json")
    written(b"", "checkpoint-000000001.pt")
    checkpoints.load_latest(path.parent, state(), "", SETTINGS.differences)


def pickled(content: bytes) -> None:
    """The pickle of a checkpoint, in an otherwise valid archive."""
    state().load_bytes(zipped(content), "checkpoint")


def zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(state().to_bytes())) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else old.read(entry))
    return out.getvalue()


def description(content: bytes) -> None:
    """The description of otherwise valid weights."""
    weights.load_model(written(described(content), "model.safetensors"))


@functools.cache
def network() -> dict[str, torch.Tensor]:
    return models.create("small-cnn", 2, (1, 4, 4)).state_dict()


def described(content: bytes) -> bytes:
    text = content.decode("latin1")
    return save(network(), metadata={weights.KEY: text})


def rows(content: bytes) -> None:
    # The caller turns `ValueError` into a sentence with the name of the file.
    with contextlib.suppress(ValueError):
        study.parse_rows(content)


READERS = {
    "idx": lambda content: idx.read_idx(written(content, "images"), 3),
    "idx.gz": lambda content: idx.read_idx(written(content, "images.gz"), 1),
    "cifar": lambda content: cifar.read_batch(content, "batch"),
    "cifar.bin": lambda content: cifar.read_batch(content, "batch.bin"),
    "archive": archive,
    "packed": packed,
    "image": lambda content: folder.read_image(written(content, "image.png")),
    "safetensors": lambda content: weights.load_model(written(content, "model.safetensors")),
    "description": description,
    "yaml": lambda content: config.read_settings(written(content, "config.yaml")),
    "configuration": lambda content: TrainingConfig.from_yaml(content.decode("latin1")),
    "manifest": manifest,
    "checkpoint": lambda content: state().load_bytes(content, "checkpoint"),
    "pickled": pickled,
    "plan": lambda content: study.read_plan(written(content, "plan.json")),
    "metrics": rows,
    "measures": lambda content: study.read_values(written(content, "measures.safetensors")),
}


def pictures() -> list[bytes]:
    found = []
    ramp = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for kind, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "BMP": ("1", "L", "RGB"),
        "WEBP": ("RGB", "RGBA"),
        "PPM": ("1", "L", "RGB", "I;16", "F"),
    }.items():
        for mode in modes:
            out = io.BytesIO()
            ramp.convert("L" if mode == "I;16" else mode).convert(mode).save(out, kind, exif=exif.tobytes())
            found.append(out.getvalue())
    return found


def seeds(reader: str) -> list[bytes]:
    """Valid files for a fuzzer to start from."""
    batch = {b"labels": [1, 2], b"data": np.zeros((2, 3072), np.uint8), b"filenames": [b"x.png"] * 2}
    batches = [pickle.dumps(batch, protocol=number) for number in range(6)]
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w") as file:
        member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        member.size = 10
        file.addfile(member, io.BytesIO(b"0123456789"))
    images = struct.pack(">BBBB3I", 0, 0, 8, 3, 2, 2, 2) + bytes(8)
    labels = struct.pack(">BBBBI", 0, 0, 8, 1, 2) + bytes(2)
    header = {"model": "small-cnn", "classes": ["a", "b"], "in_shape": [1, 4, 4], "eps": 0.1, "data": "digits",
              "method": "standard", "sha256": weights.digest(network())}  # fmt: skip
    head = json.dumps(header).encode()
    whole = state().to_bytes()
    settings = SETTINGS.to_yaml()
    facts = {"format": 3, "step": 1, "epoch": 0, "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest(),
             "fingerprint": "", "config": settings, "torch": "2"}  # fmt: skip
    row = {"epoch": 1, "step": 1, "orientation": 0.5, "smoothness": 0.0}
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        (inner,) = (opened.read(name) for name in opened.namelist() if name.endswith("data.pkl"))
    measures = {
        name: torch.ones(2, len(study.RADII)) if name == study._CURVE else torch.ones(2) for name in study._NAMES
    }
    return {
        "idx": [images],
        "idx.gz": [gzip.compress(labels)],
        "cifar": batches,
        "cifar.bin": [bytes(2 * 3073)],
        "archive": [gzip.compress(tarred.getvalue())],
        "packed": [tarred.getvalue()],
        "image": pictures(),
        "safetensors": [described(head)],
        "description": [head],
        "yaml": [settings.encode(), b"method: pgd\neps: 8/255\noptions: {steps: 7}\nmilestones: [1, 2]\n"],
        "configuration": [settings.encode()],
        "manifest": [json.dumps(facts).encode()],
        "checkpoint": [whole],
        "pickled": [inner],
        "plan": [b'{"data": "digits", "epochs": 1, "samples": 12, "threads": 1}'],
        "metrics": [(json.dumps(row) + "\n").encode() * 2],
        "measures": [save(measures)],
    }[reader]


def check(reader: str, content: bytes) -> str | None:
    """Feed a reader; returns its message, None if it accepted the bytes.  Any exception without a message is raised."""
    try:
        READERS[reader](content)
    except SENTENCES as error:
        sentence = str(error)
        assert sentence, f"{reader} said nothing"
        assert "\n" not in sentence and len(sentence) < 3000, f"{reader} said {sentence!r}"
        return sentence
    except UnicodeDecodeError:
        raise AssertionError(f"{reader} let a UnicodeDecodeError through") from None
    return None


if FUZZED_ALONE:
    chosen, options = sys.argv[1], sys.argv[2:]
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(seeds(chosen)):
        (corpus / str(number)).write_bytes(seed)
    torch.set_num_threads(1)
    limits = ["-timeout=10", "-rss_limit_mb=4096", "-malloc_limit_mb=2048", "-max_len=16384"]
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], lambda content: check(chosen, content))
    atheris.Fuzz()
