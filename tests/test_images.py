"""Images of a folder: every mode of Pillow gives the right numbers or is refused; nothing is skipped silently."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch

from robustkern import data
from robustkern.data import DataError, DataWarning
from robustkern.data.folder import read_image

Image = pytest.importorskip("PIL.Image")
RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
TRUTH = torch.from_numpy(RAMP) / 255


def png(depth, kind, rows, transparent=b"", width=2):
    """A PNG that Pillow cannot write: of any depth, kind of colour and transparent colour."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunks
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def read(tmp_path, content):
    path = tmp_path / "image"
    path.write_bytes(content)
    return torch.from_numpy(read_image(path)).movedim(2, 0)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "mode, kind, channels",
    [
        ("L", "PNG", 1), ("LA", "PNG", 1), ("RGB", "PNG", 3), ("RGBA", "PNG", 3), ("P", "PNG", 3), ("L", "BMP", 1),
        ("RGB", "BMP", 3), ("RGB", "WEBP", 3), ("RGBA", "WEBP", 3), ("L", "PPM", 1), ("RGB", "PPM", 3),
        ("L", "JPEG", 1), ("RGB", "JPEG", 3), ("CMYK", "JPEG", 3),
    ],
)  # fmt: skip
def test_eight_bits_are_v_over_255(tmp_path, mode, kind, channels):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    image = read(tmp_path, encoded(Image.fromarray(RAMP).convert("RGB").convert(mode), kind, **options))
    assert image.shape == (channels, 6, 8) and image.dtype == torch.float32
    if mode == "P":  # the web's palette is coarse
        truth = (
            torch.from_numpy(np.array(Image.fromarray(RAMP).convert("RGB").convert("P").convert("RGB"))).movedim(2, 0)
            / 255
        )
        assert torch.equal(image, truth)
    else:
        assert (image - TRUTH).abs().max() <= (3 / 255 if kind == "JPEG" else 0)


@pytest.mark.parametrize("mode, kind", [("1", "PNG"), ("1", "BMP"), ("1", "PPM")])
def test_one_bit_is_0_or_1(tmp_path, mode, kind):
    bits = RAMP % 2 == 0
    assert torch.equal(read(tmp_path, encoded(Image.fromarray(bits), kind))[0], torch.from_numpy(bits).float())


WORDS = np.array([[0, 1, 255, 256], [4660, 32768, 65534, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_sixteen_bits_of_grey_are_v_over_65535(tmp_path, kind):
    image = read(tmp_path, encoded(Image.fromarray(WORDS), kind))
    assert torch.equal(image[0], torch.from_numpy(WORDS.astype(np.float32)) / 65535)


def test_ten_bits_of_grey_fill_the_range(tmp_path):
    image = read(tmp_path, b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert image[0, 0].tolist() == pytest.approx([0, 512 / 1023, 1], abs=1e-5)


def test_floating_point_is_taken_as_it_is_or_refused(tmp_path):
    assert read(tmp_path, b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.25, 1.0)).flatten().tolist() == [0.25, 1.0]
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(DataError, match="outside the range"):
            read(tmp_path, b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.25, bad))


def test_sixteen_bits_of_colour_are_their_upper_eight(tmp_path):
    rows = [struct.pack(">6H", 0x1234, 0xFFFF, 0, 0xABCD, 0x00FF, 0x0100)]
    truth = [[0x12, 0xAB], [0xFF, 0], [0, 1]]
    assert (255 * read(tmp_path, png(16, 2, rows)))[:, 0].round().int().tolist() == truth
    grey = read(tmp_path, png(16, 4, [struct.pack(">4H", 0x1234, 0xFFFF, 0xABCD, 0xFFFF)]))  # with an alpha channel
    assert grey.shape == (1, 1, 2) and (255 * grey).round().flatten().tolist() == [0x12, 0xAB]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_of_grey_fill_the_range(tmp_path, depth):
    assert read(tmp_path, png(depth, 0, [bytes([1 << (8 - depth)])]))[0, 0, 0] == pytest.approx(
        1 / (2**depth - 1), abs=1e-6
    )


def transparent_images():
    hidden = np.full((4, 4, 4), 255, np.uint8)
    hidden[1, 1, 3] = 254  # one pixel, hardly transparent
    for kind in ("PNG", "WEBP"):
        yield f"RGBA {kind}", encoded(Image.fromarray(hidden), kind, **({"lossless": True} if kind == "WEBP" else {}))
    yield "LA", encoded(Image.fromarray(hidden).convert("LA"), "PNG")
    yield (
        "P",
        encoded(
            Image.fromarray(RAMP).convert("P"),
            "PNG",
            transparency=int(np.array(Image.fromarray(RAMP).convert("P"))[0, 0]),
        ),
    )
    yield "grey 8", png(8, 0, [b"\x01\x02"], b"\0\x01")
    yield "grey 1", png(1, 0, [b"\x40"], b"\0\x01")
    yield "grey 2", png(2, 0, [b"\x10"], b"\0\x01")
    yield "grey 16", png(16, 0, [b"\x12\x34\0\0"], b"\x12\x34")
    yield "colour 8", png(8, 2, [bytes(range(6))], b"\0\0\0\x01\0\x02")
    yield "colour 16", png(16, 2, [b"\x12\x34" * 6], b"\x12\x34" * 3)
    yield "colour and alpha 16", png(16, 6, [b"\x12\x34" * 8])


@pytest.mark.parametrize("name, content", [pytest.param(*case, id=case[0]) for case in transparent_images()])
def test_what_is_transparent_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match="image: partly transparent") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_transparent_colour_that_no_pixel_has_hides_nothing(tmp_path):
    assert (255 * read(tmp_path, png(8, 0, [b"\x01\x02"], b"\0\x07"))).round().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind, mode", [("PNG", "L"), ("PNG", "I;16"), ("JPEG", "RGB"), ("WEBP", "RGB")])
def test_orientation_is_applied(tmp_path, orientation, kind, mode):
    turned = {1: RAMP, 2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1], 5: RAMP.T, 6: np.rot90(RAMP, -1),
              7: RAMP[::-1, ::-1].T, 8: np.rot90(RAMP)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(RAMP.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(RAMP).convert(mode)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    image = read(tmp_path, encoded(stored, kind, exif=exif.tobytes(), **options))
    assert image.shape[1:] == turned.shape
    assert (image[0] - torch.from_numpy(turned.copy()) / 255).abs().max() <= (3 / 255 if kind == "JPEG" else 1e-6)


def test_what_no_classifier_can_take_is_refused(tmp_path):
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    for kind in ("PNG", "WEBP"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match="an animation of 2 pictures"):
            read(tmp_path, content)
    for content in (
        encoded(frames[0], "TIFF"),
        encoded(frames[0], "GIF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    ):
        with pytest.raises(DataError, match="not a readable image"):
            read(tmp_path, content)


# --- folders ----------------------------------------------------------------------------------------------------------


def put(root, *names, shade=7, kind="L"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".txt", ".tif", ".npy", ""):
            path.write_text("no image")
        else:
            Image.new(kind, (8, 8), shade).save(path)


def test_every_kind_of_file_is_read_and_everything_else_named(tmp_path):
    kinds = ("png", "PNG", "jpg", "jpeg", "bmp", "webp", "ppm", "pgm", "pbm", "pnm")
    put(tmp_path, *(f"train/cat/{number}.{kind}" for number, kind in enumerate(kinds)), "train/dog/1.png")
    put(
        tmp_path,
        "train/dog/more/2.png",
        "train/dog/readme.txt",
        "train/dog/x.tif",
        "train/list.txt",
        "train/cat/raw.npy",
    )
    with pytest.warns(
        DataWarning, match=r"skipped 5 that are no image .*: list.txt, cat/raw.npy, dog/more/, \.\.\.$"
    ) as told:
        images = data.load(str(tmp_path))
    assert len(told) == 1 and images.labels.bincount().tolist() == [10, 1] and images.in_shape == (1, 8, 8)


def test_a_folder_with_nothing_else_is_loaded_without_a_word(tmp_path):
    put(tmp_path, *(f"train/{name}" for name in ("cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", ".DS_Store",
                                                 "cat/._1.png", "cat/.thumbs/1.png")))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = data.load(str(tmp_path))
    assert images.classes == ("cat", "dog") and images.labels.bincount().tolist() == [1, 1]


def test_a_class_without_training_images_is_refused_and_one_without_test_images_is_not(tmp_path):
    put(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/eel/notes.txt", "test/cat/1.png")
    with pytest.raises(DataError, match=r"train/eel: a class without an image"):
        data.load(str(tmp_path))
    put(tmp_path, "train/eel/1.png")
    assert data.load(str(tmp_path), split="test").classes == ("cat", "dog", "eel")


def test_grey_is_grey_in_formats_that_know_colour_alone(tmp_path):
    put(tmp_path, "train/cat/1.webp", "train/cat/2.png", kind="RGB", shade=(9, 9, 9))
    put(tmp_path, "train/dog/1.png", shade=9)
    images = data.load(str(tmp_path)).images
    assert images.shape == (3, 1, 8, 8) and (images * 255).round().unique().tolist() == [9]
    put(tmp_path, "train/cat/3.png", kind="RGB", shade=(9, 9, 8))
    with pytest.raises(DataError, match=r"size \[[13], 8, 8\], but those before it"):
        data.load(str(tmp_path))


def test_a_pipe_with_the_name_of_an_image_is_refused(tmp_path):
    import os

    put(tmp_path, "train/cat/1.png", "train/dog/1.png")
    os.mkfifo(tmp_path / "train" / "dog" / "2.png")
    with pytest.raises(DataError, match="no regular file"):
        data.load(str(tmp_path))
