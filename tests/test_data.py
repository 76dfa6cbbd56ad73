"""Training data: sources, decoding, keyed order, resumable streams. All data is drawn here."""

import io
import json
import os
import tarfile
from collections import Counter
from itertools import chain, islice, product
from unittest import mock

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from evaluation.scenes import TAGS
from sample.pixels import CorruptImage, crop, decode
from train.data import (
    CorruptLog,
    DataConfig,
    KeyedDataset,
    KeyedSampler,
    StreamLoader,
    _pick_split,
    build_dataset,
    build_stream,
    hash_split,
    permute,
)
from train.order import image_draws
from train.prepare import normal_of
from train.sources import FolderSource


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth picture whose mean colour names its seed."""
    level = (37 * seed) % 200
    return Image.linear_gradient("L").resize(size).point(lambda v: level + v // 8).convert("RGB")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def class_folder(root, counts=(("cat", 3), ("big_dog", 4))):
    for name, count in counts:
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(i).save(root / name / f"{i}.png")
    return root


def write_parquet(path, rows: int, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(rows)]
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=8)
    return str(path)


def write_tar(path, start: int, rows: int):
    with tarfile.open(path, "w") as tar:
        for i in range(start, start + rows):
            parts = {"jpg": encoded(picture(i), "JPEG"), "txt": b"picture %d" % i, "cls": b"%d" % (i % 3)}
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def config(source, path, tmp_path, **options) -> DataConfig:
    settings = {"size": 16, "val_fraction": 0.0, "cache_dir": str(tmp_path / "c"), **options}
    return DataConfig(source=source, path=path, **settings)


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["image"], b["image"]) and a["label"] == b["label"] and a["caption"] == b["caption"]


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    ("mode", "value", "rgb"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (0, 127), (128, 128, 128)),
        ("I;16", None, (50, 50, 50)),
        pytest.param(
            *("YCbCr", (128, 128, 128), (128, 128, 128)),
            marks=pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow cannot read its own"),
        ),
    ],
)
def test_every_mode_becomes_rgb(mode, value, rgb):
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    deep = Image.fromarray(np.full((6, 5), 257 * 50, np.uint16))
    image = deep if mode == "I;16" else Image.new(mode, (5, 6), value)
    decoded = decode(encoded(image, kind))
    assert decoded.mode == "RGB" and decoded.size == (5, 6)
    np.testing.assert_allclose(np.asarray(decoded)[3, 2], rgb, atol=1)


def test_palette_transparency_and_cmyk_jpeg():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert decode(encoded(palette)).getpixel((0, 0)) == (200, 10, 10)
    assert decode(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    jpeg = decode(encoded(Image.new("CMYK", (16, 16), (0, 0, 255, 0)), "JPEG"))
    np.testing.assert_allclose(jpeg.getpixel((8, 8)), (255, 255, 0), atol=6)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(image, "JPEG", exif=exif)).size == (10, 20)


def test_bad_bytes_bombs_and_float_images_are_corrupt():
    whole = encoded(picture(1), "JPEG")
    for data in (b"", b"not an image", whole[: len(whole) // 2], encoded(picture(1))[:60], None):
        with pytest.raises(CorruptImage):
            decode(data)
    with pytest.raises(CorruptImage, match="max_pixels=100"):
        decode(whole, max_pixels=100)
    with pytest.raises(CorruptImage, match="float"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"))


def test_large_jpegs_are_decoded_small_but_not_below_the_need():
    image = decode(encoded(picture(0, (800, 640)), "JPEG"), at_least=100)
    assert image.size == (200, 160)


@given(w=st.integers(1, 60), h=st.integers(1, 60), th=st.integers(1, 20), tw=st.integers(1, 20), u=st.floats(0, 0.999))
@settings(max_examples=60)
def test_crop_always_has_the_size(w, h, th, tw, u):
    for place, large in product((None, (u, 0.999 - u), (0.999, 0.999)), (2**24, 1)):  # made whole, or what is cut out
        with mock.patch("sample.pixels.LARGE", large):
            out = crop(Image.new("RGB", (w, h), (9, 8, 7)), (th, tw), uniforms=place)
        assert out.shape == (3, th, tw) and out.dtype == torch.uint8 and out.is_contiguous()
        assert out.amax((1, 2)).tolist() == [9, 8, 7]


@pytest.mark.parametrize("wh, resized", [((335, 500), (288, 429)), ((500, 335), (429, 288)), ((256, 256), (288, 288))])
def test_the_short_side_is_resized_as_torchvision_does(wh, resized, monkeypatch):
    """The other one is cut off to a whole number, and the centre is rounded half to even."""
    seen, plain = [], Image.Image.resize

    def resize(image, size, *more):
        seen.append(size)
        return plain(image, size, *more)

    monkeypatch.setattr(Image.Image, "resize", resize)
    crop(Image.new("RGB", wh), (256, 256))
    assert seen == [resized]
    values = np.zeros((4, 7, 3), np.uint8)
    values[:, :, 0] = np.arange(7)
    assert crop(Image.fromarray(values), (4, 4), resize_factor=1.0)[0, 0].tolist() == [2, 3, 4, 5]  # 1.5 to 2


def test_a_strip_is_cut_before_it_is_enlarged(monkeypatch):
    """Otherwise a file of a few bytes would be gigabytes; what is cut out is the same but for rounding."""
    values = np.random.default_rng(0).integers(0, 256, (3, 400, 3), np.uint8)
    strip, made = Image.fromarray(values), []
    for large in (2**24, 1000):
        monkeypatch.setattr("sample.pixels.LARGE", large)
        made.append([crop(strip, (16, 16), uniforms=place).int() for place in (None, (0.3, 0.9))])
    assert all((whole - part).abs().max() <= 1 for whole, part in zip(*made))
    assert crop(Image.new("RGB", (30000, 1), (9, 8, 7)), (256, 256)).amax((1, 2)).tolist() == [9, 8, 7]


def test_the_limit_of_pixels_is_ours(tmp_path):
    """Pillow refuses some that `max_pixels` allows."""
    Image.new("1", (20000, 10000)).save(tmp_path / "large.png")
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(CorruptImage, match="20000x10000 pixels are more than max_pixels=1000"):
        decode(tmp_path / "large.png", max_pixels=1000)
    assert decode(tmp_path / "large.png", max_pixels=10**9).size == (20000, 10000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_names_of_any_bytes_and_links_to_where_they_are(tmp_path):
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        picture(0).save(tmp_path / folder / "1.png")
    (tmp_path / "cat/self").symlink_to(tmp_path / "cat")
    (tmp_path / "cat/dogs").symlink_to(tmp_path / "dog")  # elsewhere is followed
    os.link(tmp_path / "cat/1.png", os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    source = FolderSource(tmp_path)
    assert sorted(os.fsencode(source.name(i)) for i in range(len(source))) == [
        *(b"cat/1.png", b"cat/caf\xe9.png", b"cat/dogs/1.png", b"dog/1.png")
    ]
    given = config("folder", str(tmp_path), tmp_path, val_fraction=0.3)
    assert sum(len(build_dataset(given, split)) for split in ("train", "val")) == 4
    log = CorruptLog(tmp_path / "log.txt")
    log.add(os.fsdecode(b"caf\xe9.png"), "bad")
    assert CorruptLog(tmp_path / "log.txt").names == [os.fsdecode(b"caf\xe9.png")]


def test_what_is_trained_on_is_not_what_is_validated_on(tmp_path):
    """A source of one split alone, whatever it is called, gives a share of it."""
    (tmp_path / "val").mkdir()
    for i in range(20):
        picture(i).save(tmp_path / f"val/{i}.png")
    given = config("folder", str(tmp_path), tmp_path, train_split="val", val_fraction=0.3)
    train, val = (build_dataset(given, split) for split in ("train", "val"))
    names = [{data.source.name(int(i)) for i in data.indices} for data in (train, val)]
    assert names[1] and not names[0] & names[1] and len(names[0] | names[1]) == 20
    with pytest.raises(ValueError, match="val_split='val' is what is trained on"):
        build_dataset(config("folder", str(tmp_path), tmp_path, train_split="val", val_split="val"), "val")
    assert _pick_split(["validation"], config("parquet", "x", tmp_path), "val") == ("validation", True)
    assert _pick_split(["train", "validation"], config("parquet", "x", tmp_path), "val") == ("validation", False)


def test_centre_crop_and_mirror():
    values = np.zeros((4, 8, 3), np.uint8)
    values[:, :, 0] = np.arange(8)
    out = crop(Image.fromarray(values), (4, 4), resize_factor=1.0)
    assert out[0, 0].tolist() == [2, 3, 4, 5]
    assert torch.equal(crop(Image.fromarray(values), (4, 4), resize_factor=1.0, mirror=True), out.flip(-1))


# ---------------------------------------------------------------- order


@given(n=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
@settings(max_examples=60)
def test_permutation_is_a_bijection(n, seed, epoch):
    assert sorted(permute(i, n, seed=seed, epoch=epoch) for i in range(n)) == list(range(n))


def test_permutation_of_a_billion_and_its_edges():
    n = 10**9 + 7
    places = {permute(i, n, seed=1, epoch=2) for i in range(2000)}
    assert len(places) == 2000 and max(places) > 0.99 * n and min(places) < 0.01 * n
    with pytest.raises(IndexError):
        permute(5, 5, seed=0, epoch=0)


def test_small_permutations_are_about_uniform():
    drawn = Counter(tuple(permute(i, 4, seed=3, epoch=e) for i in range(4)) for e in range(4800))
    assert len(drawn) == 24
    assert sum((count - 200) ** 2 / 200 for count in drawn.values()) < 60  # chi-square, 23 degrees: p < 1e-4 beyond


@given(world=st.integers(1, 5), start=st.integers(0, 20), count=st.integers(0, 40))
def test_samplers_of_all_ranks_share_the_counters(world, start, count):
    parts = [list(KeyedSampler(rank=r, world=world, start=start, stop=start + count)) for r in range(world)]
    assert sorted(chain(*parts)) == list(range(start, start + count))
    assert [len(KeyedSampler(rank=r, world=world, start=start, stop=start + count)) for r in range(world)] == [
        len(part) for part in parts
    ]


def test_image_draws_belong_to_an_image():
    many = image_draws(range(300), 200, 3, 5)
    assert many.shape == (300, 200) and many.dtype == torch.float32
    assert torch.equal(image_draws([7, 299], 200, 3, 5), many[[7, 299]])
    assert many.min() >= 0 and many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=0.005) and many.var() == pytest.approx(1 / 12, abs=0.002)
    for other in (image_draws(range(300), 200, 3, 6), image_draws(range(1, 301), 200, 3, 5), many.roll(1, dims=1)):
        assert torch.corrcoef(torch.stack([many.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_noise_is_normal_and_finite():
    ends = normal_of(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert torch.isfinite(ends).all() and ends[1] == 0 and ends[0] < -5 and ends[2] > 5
    noise = normal_of(image_draws(range(300), 200, 3, 5))
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)


def test_sampler_arguments():
    with pytest.raises(ValueError, match=r"rank must be in \[0, world=2\)"):
        KeyedSampler(rank=2, world=2)
    with pytest.raises(TypeError):
        len(KeyedSampler())


def test_same_images_for_any_workers_and_ranks_and_after_a_resume(tmp_path):
    class_folder(tmp_path / "d")
    keyed = KeyedDataset(build_dataset(config("folder", str(tmp_path / "d"), tmp_path, flip=True), seed=5), seed=5)
    straight = [keyed[g] for g in range(21)]
    assert Counter(x["label"] for x in straight[:7]) == {0: 4, 1: 3}  # one epoch holds every image once
    assert not all(same(keyed[g], keyed[g + 7]) for g in range(7))
    loader = DataLoader(keyed, batch_size=3, sampler=KeyedSampler(start=6, stop=21), num_workers=2)
    resumed = [image for batch in loader for image in batch["image"]]
    assert all(torch.equal(a, b["image"]) for a, b in zip(resumed, straight[6:], strict=True))
    ranks = [[keyed[g] for g in KeyedSampler(rank=r, world=2, stop=20)] for r in range(2)]
    assert all(same(ranks[g % 2][g // 2], straight[g]) for g in range(20))


def test_keyed_dataset_reads_plain_datasets_too():
    assert sorted(KeyedDataset(list(range(9)), seed=1)[g] for g in range(9, 18)) == list(range(9))
    with pytest.raises(ValueError, match="empty"):
        KeyedDataset([])


# ---------------------------------------------------------------- folders


def test_class_folder(tmp_path):
    data = build_dataset(config("folder", str(class_folder(tmp_path / "d")), tmp_path))
    assert data.classes == ("big_dog", "cat") and data.num_classes == 2 and len(data) == 7
    item = data[0]
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.uint8
    assert (item["label"], item["caption"]) == (0, "big dog")
    assert build_dataset(config("folder", str(tmp_path / "d"), tmp_path, size=(8, 24)))[6]["image"].shape == (3, 8, 24)


def test_flat_folder_with_sidecar_captions(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.JPG", "JPEG")
    (tmp_path / "1.txt").write_text("one\n")
    data = build_dataset(config("folder", str(tmp_path), tmp_path))
    assert [data[i]["caption"] for i in range(3)] == ["", "one", ""] and data[2]["label"] == 0 and data.num_classes == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_metadata(tmp_path, kind):
    (tmp_path / "d/images").mkdir(parents=True)
    for i in range(3):
        picture(i).save(tmp_path / f"d/images/{i}.png")
    rows = [{"file_name": f"images/{i}.png", "text": f"no. {i}", "label": "yx"[i % 2]} for i in range(3)]
    if kind == "jsonl":
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "file_name,text,label\n" + "\n".join(",".join(row.values()) for row in rows)
    (tmp_path / f"d/metadata.{kind}").write_text(text)
    data = build_dataset(config("folder", str(tmp_path / "d"), tmp_path))
    assert [(data[i]["label"], data[i]["caption"]) for i in range(3)] == [(1, "no. 0"), (0, "no. 1"), (1, "no. 2")]
    with pytest.raises(ValueError, match=r"caption_column='prompt'.*it has file_name, text, label"):
        build_dataset(config("folder", str(tmp_path / "d"), tmp_path, caption_column="prompt"))


def test_texts_that_are_not_utf8_are_named_and_byte_order_marks_are_none(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_bytes("\ufeffa caf\u00e9".encode())
    assert build_dataset(config("folder", str(tmp_path), tmp_path)).captions(0) == ("a caf\u00e9",)
    (tmp_path / "0.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(ValueError, match=r"caption .*0.txt must be text in UTF-8: byte 5"):
        build_dataset(config("folder", str(tmp_path), tmp_path)).captions(0)
    picture(1).save(tmp_path / "1.png")  # in training, one that cannot be read is left out, as an image is
    data = build_dataset(config("folder", str(tmp_path), tmp_path, val_fraction=0.0))
    with pytest.warns(UserWarning, match=r"first 0.png: caption .*0.txt must be text in UTF-8: byte 5"):
        assert torch.equal(data[0]["image"], data[1]["image"])
    (tmp_path / "1.png").unlink()
    (tmp_path / "metadata.csv").write_bytes("\ufefffile_name,text\n0.png,b\n".encode())
    assert build_dataset(config("folder", str(tmp_path), tmp_path)).captions(0) == ("b",)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n["0.png"]\n')
    with pytest.raises(ValueError, match="every line must be an object with file_name"):
        build_dataset(config("folder", str(tmp_path), tmp_path))


def test_whole_numbers_of_a_csv_file_are_labels(tmp_path):
    """Also as pandas writes them where some are missing: 10.0 is class 10, not a name that sorts before 2.0."""
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,10.0\n1.png,2.0\n2.png,\n")
    data = build_dataset(config("folder", str(tmp_path), tmp_path, val_fraction=0.0))
    assert [data[i]["label"] for i in range(3)] == [10, 2, -1] and data.num_classes == 11 and data.classes is None


def test_metadata_must_name_every_file(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, image 2: file_name must be a file's path, got None"):
        build_dataset(config("folder", str(tmp_path), tmp_path))


def test_validation_by_subfolder_by_path_and_by_hash(tmp_path):
    class_folder(tmp_path / "d/train")
    class_folder(tmp_path / "d/val", (("cat", 2),))
    given_split = config("folder", str(tmp_path / "d"), tmp_path, val_fraction=0.5)
    assert len(build_dataset(given_split)) == 7
    val = build_dataset(given_split, "val")
    assert len(val) == 2 and val[0]["label"] == 1  # the training folder's class order
    assert same(val.at(1, 0), val.at(1, 9))  # central crops
    by_path = config("folder", str(tmp_path / "d/train"), tmp_path, val_path=str(tmp_path / "d/val"), val_fraction=0.5)
    assert len(build_dataset(by_path)) == 7 and len(build_dataset(by_path, "val")) == 2
    hashed = config("folder", str(tmp_path / "d/train"), tmp_path, val_fraction=0.3)
    parts = [build_dataset(hashed, split) for split in ("train", "val")]
    names = [{part.source.name(i) for i in part.indices} for part in parts]
    assert len(names[0] | names[1]) == 7 and not names[0] & names[1] and all(names)


def test_validation_images_without_class_folders_have_no_label(tmp_path):
    class_folder(tmp_path / "train")
    (tmp_path / "val").mkdir()
    picture(0).save(tmp_path / "val/0.png")
    options = config("folder", str(tmp_path / "train"), tmp_path, val_path=str(tmp_path / "val"))
    assert (build_dataset(options, "val")[0]["label"], build_dataset(options, "val")[0]["caption"]) == (-1, "")
    with pytest.raises(ValueError, match="label"):
        build_dataset(options, "val", labelled=True)


def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path):
    class_folder(tmp_path / "a", (("cat", 2), ("val", 2)))
    with pytest.raises(ValueError, match="has a folder 'val' and no 'train': give train_split"):
        build_dataset(config("folder", str(tmp_path / "a"), tmp_path))
    with pytest.raises(ValueError, match="has no folder 'training'"):
        build_dataset(config("folder", str(tmp_path / "a"), tmp_path, train_split="training"))
    class_folder(tmp_path / "b", (("train", 2),))
    (tmp_path / "b/metadata.jsonl").write_text('{"file_name": "train/0.png"}')
    with pytest.raises(ValueError, match="has metadata beside a folder 'train'"):
        build_dataset(config("folder", str(tmp_path / "b"), tmp_path))


def test_metadata_may_lack_a_caption_in_its_first_line(tmp_path):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png", "text": "a cat"}\n')
    data = build_dataset(config("folder", str(tmp_path), tmp_path))
    assert [data[i]["caption"] for i in range(2)] == ["", "a cat"]


def test_limit(tmp_path):
    assert len(build_dataset(config("folder", str(class_folder(tmp_path / "d")), tmp_path, limit=3))) == 3
    assert len(build_dataset(DataConfig(size=32, num_scenes=50, limit=7))) == 7


def test_a_small_folder_can_be_validated():
    """One of two images at least, by its name alone; one image is for training."""
    assert hash_split(["a", "b"], 1e-9).sum() == 1 == hash_split(["b", "a"], 1e-9).sum()
    assert hash_split(["a", "b"], 1e-9)[0] == hash_split(["b", "a"], 1e-9)[1]
    assert not hash_split(["a"], 0.5e-9).any() and not hash_split(["a", "b"], 0.0).any()
    names = [f"{i}.png" for i in range(2000)]
    assert hash_split(names, 0.1).mean() == pytest.approx(0.1, abs=0.02)
    assert len(build_dataset(DataConfig(size=32, num_scenes=10), "val")) == 1  # 2 % of ten


def test_another_seed_crops_otherwise(tmp_path):
    options = config("folder", str(class_folder(tmp_path / "d")), tmp_path, resize_factor=2.0)
    one, again, other = (build_dataset(options, seed=seed) for seed in (1, 1, 2))
    assert all(same(one.at(i, 0), again.at(i, 0)) for i in range(7))
    assert not all(same(one.at(i, 0), other.at(i, 0)) for i in range(7))


def test_more_classes_may_be_declared_than_there_are(tmp_path):
    path = str(class_folder(tmp_path / "d"))
    assert build_dataset(config("folder", path, tmp_path, num_classes=2)).num_classes == 2
    assert build_dataset(config("folder", path, tmp_path, num_classes=9)).num_classes == 9
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        build_dataset(config("folder", path, tmp_path, num_classes=1))


def test_hidden_folders_and_links_that_return_are_not_read(tmp_path):
    root = class_folder(tmp_path / "d")
    (root / ".cache").mkdir()
    picture(0).save(root / ".cache/0.png")
    picture(0).save(root / "cat/.hidden.png")
    (root / "cat/up").symlink_to(root, target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    picture(5).save(tmp_path / "elsewhere/5.PNG")
    (root / "cat/more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    source = FolderSource(root)
    assert [source.name(i) for i in range(len(source))] == [
        *(f"big_dog/{i}.png" for i in range(4)),
        *(f"cat/{i}.png" for i in range(3)),
        "cat/more/5.PNG",
    ]


def test_an_empty_caption_is_not_the_class(tmp_path):
    root = class_folder(tmp_path / "d")
    (root / "cat/1.txt").write_text("\n")
    data = build_dataset(config("folder", str(root), tmp_path))
    assert [data[i]["caption"] for i in (4, 5)] == ["cat", ""]


def test_labels_by_number_may_leave_some_out(tmp_path):
    """The number of classes is one more than the largest; fractions are no labels, and names are sorted."""
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")

    def labelled(labels):
        rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return build_dataset(config("folder", str(tmp_path), tmp_path))

    assert labelled([0, 4, 4]).num_classes == 5
    assert labelled(["10", "9", "10"]).classes == ("10", "9")  # texts, as JSON says
    with pytest.raises(ValueError, match=r"label 0\.5 of .* must be an integer or a class name"):
        labelled([0, 0.5, 1])
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,10\n1.png,\n2.png,9\n")
    data = build_dataset(config("folder", str(tmp_path), tmp_path))
    assert data.num_classes == 11 and [data[i]["label"] for i in range(3)] == [10, -1, 9]


# ---------------------------------------------------------------- corrupt images


def test_corrupt_images_are_replaced_counted_and_named(tmp_path):
    root = class_folder(tmp_path / "d")
    (root / "big_dog/1.png").write_bytes(b"broken")
    log = tmp_path / "run/corrupt.txt"
    data = build_dataset(config("folder", str(root), tmp_path, val_path=str(root)), "val", corrupt_log=log)
    assert same(data[1], data[2])
    loader = DataLoader(data, batch_size=7, num_workers=2)
    assert next(iter(loader))["image"].shape[0] == 7
    assert data.corrupt.count == 1 and data.corrupt.names == ["big_dog/1.png"]
    assert data.corrupt.summary().startswith("1 unreadable images were skipped: big_dog/1.png; all in ")
    assert CorruptLog(log).count == 1 and CorruptLog().summary() == ""


@pytest.mark.filterwarnings("ignore:skipping images")
def test_a_folder_of_nothing_but_corrupt_images_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 images in a row cannot be read; .* 0\.png"):
        build_dataset(config("folder", str(tmp_path), tmp_path))[0]


# ---------------------------------------------------------------- tables


def test_parquet_with_labels_and_captions(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", 10, label=[i % 4 for i in range(10)], text=[f"t{i}" for i in range(10)]
    )
    data = build_dataset(config("parquet", path, tmp_path))
    assert len(data) == 10 and data.num_classes == 4 and data.classes is None
    assert (data[5]["label"], data[5]["caption"]) == (1, "t5")
    both = config("parquet", [path, path], tmp_path, val_path=path)
    assert len(build_dataset(both)) == 20 and len(build_dataset(both, "val")) == 10


def test_parquet_with_class_names_several_captions_and_other_columns(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", 3, kind=["b", "a", "b"], words=[["x", "y"], ["x", "y"], []], junk=[1, 2, 3]
    )
    data = build_dataset(config("parquet", path, tmp_path, label_column="kind", caption_column="words"))
    assert data.classes == ("a", "b") and data[0]["label"] == 1
    assert {data.at(0, epoch)["caption"] for epoch in range(20)} == {"x", "y"} and data[2]["caption"] == ""
    assert "junk" not in data.source.table.column_names


def test_texts_of_no_class_are_no_class(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", 4, label=["b", "", None, "a"])
    data = build_dataset(config("parquet", path, tmp_path))
    assert data.classes == ("a", "b") and [data[i]["label"] for i in range(4)] == [1, -1, -1, 0]
    with pytest.raises(ValueError, match="label"):
        build_dataset(config("parquet", path, tmp_path), labelled=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.5], r"label 0\.5 of .* must be an integer or a class name"),
        ([[1], [2]], "label_column='label' must hold an integer or a class name a row"),
        ([7, 10**9], "labels of path=.* go up to 1,000,000,000, of 2 images: give another label_column"),
    ],
)
def test_columns_that_are_no_labels(tmp_path, labels, message):
    path = write_parquet(tmp_path / "p.parquet", 2, label=labels)
    with pytest.raises(ValueError, match=message):
        build_dataset(config("parquet", path, tmp_path))


def test_validation_with_other_class_names_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, classes in (("train", ["cat", "dog"]), ("val", ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        rows = {"image": [picture(0)], "label": [0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    paths = [str(tmp_path / f"{name}.parquet") for name in ("train", "val")]
    with pytest.raises(ValueError, match=r"are dog, cat \(2\), and those of training cat, dog \(2\)"):
        build_dataset(config("parquet", paths[0], tmp_path, val_path=paths[1]), "val")


def test_streamed_rows_may_name_image_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i)))
    rows = {"image": [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(4)], "text": list("abcd")}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "a.parquet"))
    path = str(tmp_path / "a.parquet")
    stream = one_epoch(config("parquet", path, tmp_path, streaming=True, val_path=path))
    assert sorted(item["caption"] for item in stream) == list("abcd")


def test_columns_inside_columns_and_columns_with_dots(tmp_path):
    """Of a table: "json.text" is a part of its column json, "a.b" a column of that name; captions need no image."""
    datasets = pytest.importorskip("datasets")
    rows = {"img": [picture(i) for i in range(3)], "json": [{"text": f"text {i}", "n": i} for i in range(3)]}
    rows |= {"a.b": [f"dotted {i}" for i in range(3)], "beside": [0] * 3}
    text = datasets.Value("string")
    features = {"img": datasets.Image(), "json": {"text": text, "n": datasets.Value("int64")}, "a.b": text}
    features = datasets.Features(features | {"beside": datasets.Value("int64")})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(
        tmp_path / "saved"
    )
    for column, words in (("json.text", "text"), ("a.b", "dotted")):
        data = build_dataset(config("datasets", str(tmp_path / "saved"), tmp_path, caption_column=column))
        assert [data[i]["caption"] for i in range(3)] == [f"{words} {i}" for i in range(3)]
        assert [data.source.caption(i) for i in range(3)] == [f"{words} {i}" for i in range(3)]


def test_datasets_saved_to_disk_with_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["red_fox", "owl"])
    features = datasets.Features({"img": datasets.Image(), "label": names})
    splits = {
        split: datasets.Dataset.from_dict({"img": [picture(i) for i in range(n)], "label": [1] * n}, features=features)
        for split, n in (("train", 4), ("validation", 2))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    options = config("datasets", str(tmp_path / "saved"), tmp_path, val_fraction=0.5)
    data = build_dataset(options)
    assert len(data) == 4 and data.classes == ("red_fox", "owl") and data[0]["caption"] == "owl"
    assert len(build_dataset(options, "val")) == 2
    with pytest.raises(ValueError, match="train_split='training' is not one of train, validation"):
        build_dataset(config("datasets", str(tmp_path / "saved"), tmp_path, train_split="training"))


def test_datasets_reads_an_imagefolder(tmp_path):
    class_folder(tmp_path / "d")
    data = build_dataset(config("datasets", str(tmp_path / "d"), tmp_path))
    assert data.classes == ("big_dog", "cat") and len(data) == 7 and data[6]["caption"] == "cat"


def test_webdataset_map_style(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 6)
    write_tar(tmp_path / "b.tar", 6, 6)
    data = build_dataset(config("webdataset", str(tmp_path / "*.tar"), tmp_path))
    assert len(data) == 12 and data.num_classes == 3
    assert (data[7]["label"], data[7]["caption"]) == (1, "picture 7")


# ---------------------------------------------------------------- streams


def tars(tmp_path, shards: int = 4, rows: int = 6) -> str:
    for s in range(shards):
        write_tar(tmp_path / f"s{s}.tar", s * rows, rows)
    return str(tmp_path / "s*.tar")


def take(stream, count: int) -> list[dict]:
    return list(islice(stream, count))


def test_a_stream_repeats_shuffled_and_resumes_exactly(tmp_path):
    options = config("webdataset", tars(tmp_path), tmp_path, streaming=True, shuffle_buffer=5)
    items = take(build_dataset(options, seed=2), 60)
    epochs = [[item["caption"] for item in items[i : i + 24]] for i in (0, 24)]
    everything = [f"picture {i}" for i in range(24)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(everything)
    assert epochs[0] != epochs[1] and everything not in epochs
    for stop in (1, 7, 24, 31):
        first = build_dataset(options, seed=2)
        take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        again = build_dataset(options, seed=2)
        again.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(take(again, 20), items[stop : stop + 20], strict=True)), stop


def one_epoch(options: DataConfig):
    return build_stream(options, "val", seed=0, corrupt=CorruptLog())


def test_iterating_again_begins_again(tmp_path):
    path = tars(tmp_path, 1)
    stream = one_epoch(config("webdataset", path, tmp_path, streaming=True, val_path=path))
    once, again = list(stream), list(stream)
    assert len(once) == 6 and all(map(same, once, again))
    loader = StreamLoader(stream, batch_size=4)
    assert [len(batch["label"]) for batch in loader] == [len(batch["label"]) for batch in loader] == [4, 2]


@pytest.mark.filterwarnings("ignore:skipping images")
def test_a_stream_is_shuffled_by_its_seed_and_validated_in_order(tmp_path):
    """Of validation the first images are held, as many as asked for, once."""
    path = tars(tmp_path)
    options = config("webdataset", path, tmp_path, streaming=True, val_path=path, shuffle_buffer=5, stream_val_images=9)
    one, other = ([item["caption"] for item in take(build_dataset(options, seed=s), 24)] for s in (1, 2))
    assert one != other and sorted(one) == sorted(other)
    held = build_dataset(options, "val")
    assert [held[i]["caption"] for i in range(len(held))] == [f"picture {i}" for i in range(9)]
    options.stream_val_images = 100
    assert len(build_dataset(options, "val")) == 24
    with pytest.raises(ValueError, match=r"data\.num_classes must be given for class-conditional training"):
        build_dataset(options, labelled=True)


def test_a_stream_without_one_good_image_is_an_error(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="gave no image; 2 unreadable images"):
        next(iter(build_dataset(config("parquet", str(tmp_path / "a.parquet"), tmp_path, streaming=True))))


@pytest.mark.parametrize("shards", [4, 3])
def test_ranks_share_a_stream(tmp_path, shards):
    options = config("webdataset", tars(tmp_path, shards), tmp_path, streaming=True, val_path=tars(tmp_path, shards))
    seen = [item["caption"] for r in range(2) for item in one_epoch(options).for_rank(r, 2)]
    assert sorted(seen) == sorted(f"picture {i}" for i in range(6 * shards))


def test_parquet_streams_resume_in_the_middle_of_a_row_group(tmp_path):
    for i in range(2):
        write_parquet(tmp_path / f"{i}.parquet", 19, text=[f"t{j}" for j in range(19 * i, 19 * i + 19)])
    options = config("parquet", str(tmp_path / "*.parquet"), tmp_path, streaming=True, shuffle_buffer=5)
    straight = [item["caption"] for item in take(build_dataset(options), 80)]
    seen, state = [], None
    for count in (3, 20, 17, 40):
        stream = build_dataset(options)
        if state is not None:
            stream.load_state_dict(state)
        seen += [item["caption"] for item in take(stream, count)]
        state = json.loads(json.dumps(stream.state_dict()))
    assert seen == straight


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_shard_is_named(tmp_path, workers):
    path = tars(tmp_path)
    shard = tmp_path / "s2.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 6 // 10])
    with pytest.raises(ValueError, match=r"s2\.tar is damaged: unexpected end of data") as caught:
        build_dataset(config("webdataset", path, tmp_path))
    assert "\n" not in str(caught.value)
    stream = build_dataset(config("webdataset", path, tmp_path, streaming=True, num_classes=3))
    with pytest.raises(ValueError, match=r"s2\.tar is damaged: unexpected end of data"):
        list(islice(StreamLoader(stream, batch_size=2, num_workers=workers), 40))


def test_a_shard_cut_between_images_is_told(tmp_path):
    path = tars(tmp_path)
    shard = tmp_path / "s2.tar"
    with tarfile.open(shard) as tar:
        cut = tar.getmembers()[4].offset
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.warns(UserWarning, match=r"s2\.tar has no end mark: it may have been cut") as told:
        build_dataset(config("webdataset", path, tmp_path, streaming=True, num_classes=3))
    assert len(told) == 1


def test_metadata_may_lack_labels(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"file_name": "0.png", "label": 1}, {"file_name": "1.png", "label": None}, {"file_name": "2.png"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_dataset(config("folder", str(tmp_path), tmp_path))
    assert [data[i]["label"] for i in range(3)] == [1, -1, -1] and data.num_classes == 2
    with pytest.raises(ValueError, match="has no label: class-conditional"):
        build_dataset(config("folder", str(tmp_path), tmp_path), labelled=True)


def test_the_number_of_a_streams_classes_is_declared(tmp_path):
    options = config("webdataset", tars(tmp_path, 1), tmp_path, streaming=True)
    assert build_dataset(options).num_classes is None
    options.num_classes = 3
    stream = build_dataset(options)
    assert stream.num_classes == 3 and len(take(stream, 6)) == 6
    options.num_classes = 2
    with pytest.raises(ValueError, match=r"label 2 of 000. is not below num_classes=2"):
        take(build_dataset(options), 6)


def test_stream_loader_resumes_with_workers(tmp_path):
    options = config("webdataset", tars(tmp_path), tmp_path, streaming=True, shuffle_buffer=4)

    def loader():
        return StreamLoader(build_dataset(options, seed=1), batch_size=4, num_workers=2)

    straight = [batch["caption"] for batch in take(loader(), 9)]
    first = loader()
    take(first, 3)
    again = loader()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [batch["caption"] for batch in take(again, 6)] == straight[3:]
    with pytest.raises(ValueError, match=r"run.workers must be 2, as when the stream's position was saved, got 1"):
        StreamLoader(build_dataset(options), batch_size=4, num_workers=1).load_state_dict(first.state_dict())


def test_streams_split_by_content_and_skip_corrupt_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": encoded(picture(i)) if i != 3 else b"broken", "path": None} for i in range(30)]
    pq.write_table(pa.table({"image": images, "text": [f"t{i}" for i in range(30)]}), tmp_path / "a.parquet")
    options = config("parquet", str(tmp_path), tmp_path, streaming=True, val_fraction=0.4, shuffle_buffer=0)
    val = [item["caption"] for item in build_dataset(options, "val", corrupt_log=tmp_path / "bad.txt")]
    stream = build_dataset(options, corrupt_log=tmp_path / "bad.txt")
    train = [item["caption"] for item in take(stream, 29 - len(val))]
    assert len(val) > 2 and len(build_dataset(options, "val")) == len(val)
    assert sorted(val + train) == sorted(f"t{i}" for i in range(30) if i != 3)
    assert stream.corrupt.count == 1 and stream.num_classes == 1
    with pytest.raises(TypeError, match="streaming=False"):
        len(stream)
    options.limit = 5
    stream = build_dataset(options, corrupt_log=tmp_path / "bad.txt")
    assert {item["caption"] for item in take(stream, 20)} <= {f"t{i}" for i in range(5)}


# ---------------------------------------------------------------- scenes and mistakes


def test_scenes():
    data = build_dataset(DataConfig(size=32, num_scenes=50, val_fraction=0.1))
    val = build_dataset(DataConfig(size=32, num_scenes=50, val_fraction=0.1), "val")
    assert (len(data), len(val), data.num_classes) == (50, 5, 6)
    item = KeyedDataset(data)[3]
    assert item["image"].shape == (3, 32, 32) and item["caption"]
    assert not torch.equal(data[0]["image"], val[0]["image"])
    counting = DataConfig(size=32, num_scenes=50, val_fraction=0.1, scene_tags=dict.fromkeys(TAGS, 0) | {"counting": 1})
    assert {build_dataset(counting)[i]["label"] for i in range(50)} == {TAGS.index("counting")}
    assert torch.equal(build_dataset(counting, "val")[0]["image"], val[0]["image"])  # validation stays as it is
    for made in (data, val, build_dataset(counting)):
        assert all(made.captions(i) == (made[i]["caption"],) for i in range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "zip"}, "source='zip' must be one of scenes, folder"),
        ({"source": "folder"}, "path is required"),
        ({"path": "x"}, "takes no path"),
        ({"size": 0}, "size=0"),
        ({"resize_factor": 0.5}, "resize_factor=0.5"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"limit": 0}, "limit=0"),
        ({"flip": True}, "flip must be False"),
        ({"source": "folder", "path": "x", "streaming": True}, "not streamed"),
        ({"source": "folder", "path": ["x"]}, "takes one path"),
        ({"source": "folder", "path": "x", "scene_tags": {"counting": 2}}, "scene_tags"),
    ],
)
def test_config_mistakes(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        DataConfig(**options)
    assert "\n" not in str(caught.value)


def test_path_and_column_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.tar").write_bytes(b"junk")
    path = write_parquet(tmp_path / "a.parquet", 2, note=["a", "b"])
    class_folder(tmp_path / "mixed")
    picture(0).save(tmp_path / "mixed/loose.png")
    cases = [
        ("folder", "nowhere", {}, FileNotFoundError, "nowhere' is not a folder"),
        ("folder", "empty", {}, ValueError, "holds no images"),
        ("folder", "mixed", {}, ValueError, "mixes loose images"),
        ("parquet", "nowhere.parquet", {}, FileNotFoundError, "does not exist"),
        ("parquet", "empty", {}, ValueError, r"holds no \*.parquet files"),
        ("webdataset", "empty", {}, ValueError, r"holds no \*.tar files"),
        ("webdataset", "junk.tar", {}, ValueError, "cannot be read as webdataset"),
        ("parquet", "junk.tar", {}, ValueError, "cannot be read as parquet"),
        ("datasets", "nowhere", {}, FileNotFoundError, "does not exist"),
        ("parquet", path, {"image_column": "img"}, ValueError, "image_column='img'.*it has image, note"),
        ("parquet", path, {"label_column": "class"}, ValueError, "label_column='class'.*it has image, note"),
        ("parquet", path, {"label_column": "note", "streaming": True}, ValueError, "cannot number"),
        ("parquet", path, {"label_column": "note", "num_classes": 1}, ValueError, "num_classes=1 must be at least 2"),
    ]
    for source, where, options, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            build_dataset(config(source, str(tmp_path / where), tmp_path, **options))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"split='val'.*has no images"):
        build_dataset(config("parquet", path, tmp_path), "val")
