"""Files to tensors: layouts, crops, labels, odd and broken files."""

import itertools
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import find_classes, make_dataset

from EqM.data import files as data
from EqM.data import images
from EqM.run import seeds
from EqM.run.errors import UserError
from helpers import labelled_files, numbered_clip, write_clip


def stripes(width, height):
    """A picture whose red grows to the right and whose green grows downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 64), (64, 100), (200, 65), (17, 300), (5, 9)])
def test_centre_crop_is_square_and_takes_the_middle(width, height):
    crop = images.centre_crop(stripes(width, height), 16).astype(float)
    assert crop.shape == (16, 16, 3)
    for axis, channel, length in ((1, 0, width), (0, 1, height)):
        share = min(width, height) / length  # of this axis that is kept
        line = crop[..., channel].mean(axis=1 - axis)
        assert line.mean() == pytest.approx(127.5, abs=6)
        assert line[-1] - line[0] == pytest.approx(255 * share * 15 / 16, abs=20)


def test_centre_crop_of_a_picture_of_that_size_is_the_picture():
    picture = stripes(16, 16)
    assert np.array_equal(images.centre_crop(picture, 16), np.asarray(picture))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16", "I"])
def test_every_kind_of_image_becomes_rgb_of_the_right_brightness(tmp_path, mode):
    if mode.startswith("I"):
        picture = Image.fromarray(np.full((20, 20), 128 * 256, np.uint16 if mode == "I;16" else np.int32))
    else:
        picture = Image.new("L" if mode in ("1", "P") else "RGB", (20, 20), 128 if mode in ("1", "P") else (128,) * 3)
        picture = picture.convert(mode, dither=Image.Dither.NONE) if mode != "L" else picture.convert("L")
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I") else "x.png")
    picture.save(path)
    read = np.asarray(images.read_image(path))
    assert read.shape == (20, 20, 3)
    assert abs(read.mean() - (255 if mode == "1" else 128)) < 3


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    stripes(40, 20).save(tmp_path / "x.jpg", exif=exif)
    assert images.read_image(tmp_path / "x.jpg").size == (20, 40)


def test_image_items(image_folder):
    files = labelled_files(image_folder, flip=False)
    pixels, label, bad = files[0, 4]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    assert (label, bad, files.class_names, len(files)) == (1, -1, ["cat", "dog"], 6)
    expected = images.centre_crop(images.read_image(image_folder / "dog/1.png"), 16)
    assert np.array_equal(pixels.permute(1, 2, 0), expected)


def test_a_clip_is_flipped_whole_or_not_at_all_and_afresh_each_epoch(clip_folder):
    plain, flipping = labelled_files(clip_folder, True, flip=False), labelled_files(clip_folder, True, flip=True)
    assert plain[0, 0][0].shape == (3, 4, 16, 16)
    outcomes = set()
    for epoch, index in itertools.product(range(4), range(4)):
        clip, _, _ = flipping[epoch, index]
        still, _, _ = plain[epoch, index]
        mirrored = torch.equal(clip, still.flip(-1))
        assert mirrored or torch.equal(clip, still)
        assert mirrored == seeds.coin(0, epoch, index)
        outcomes.add(mirrored)
        assert torch.equal(clip, flipping[epoch, index][0])
    assert outcomes == {True, False}


def test_class_folders_may_be_empty_or_named_in_any_script(tmp_path):
    for name in ("ünï çode", "東京", "empty", "b c"):
        (tmp_path / name).mkdir()
        if name != "empty":
            stripes(20, 20).save(tmp_path / name / "a picture ß.png")
    files = labelled_files(tmp_path)
    assert files.class_names == sorted(["ünï çode", "東京", "empty", "b c"])
    assert [files.class_names[label] for label in files.labels] == [n for n in files.class_names if n != "empty"]
    assert files[0, 0][0].shape == (3, 16, 16)


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        stripes(20, 20).save(file, "PNG")
    assert labelled_files(tmp_path)[0, 0][2] == -1


@pytest.fixture
def flat_clips(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(3):
        numbered_clip(tmp_path / "train" / f"v{i}.mp4", 5)
    return tmp_path


@pytest.mark.parametrize("where", ["train.csv", "train/labels.csv", "elsewhere.csv"])
def test_flat_clips_with_a_csv_given_or_found(flat_clips, where):
    (flat_clips / where).write_text("video_name,tag\nv0.mp4,run\nv2.mp4,jump\n")
    given = flat_clips / where if where.startswith("else") else None
    paths, labels, names = data.find_files(flat_clips / "train", True, given)
    assert [path.name for path in paths] == ["v0.mp4", "v2.mp4"]
    assert (labels, names) == ([1, 0], ["jump", "run"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "needs a header"),
        ("name,tag\na,b\n", "needs a header"),
        ("video_name,tag\n", "row"),
    ],
)
def test_a_bad_csv_is_told(flat_clips, text, message):
    path = flat_clips / "x.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        data.find_files(flat_clips / "train", True, path)


def test_a_folder_without_the_right_files_is_told(tmp_path, image_folder):
    for folder, video, message in [
        (tmp_path / "nowhere", False, "is not a folder"),
        (tmp_path, False, "has no class folders"),
        (image_folder, True, "holds no clips.*leave --video out"),
    ]:
        with pytest.raises(UserError, match=message):
            data.find_files(folder, video)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="holds no images.*add --video"):
        data.find_files(tmp_path, False)


def bad_files():
    """Name and maker of every way we know for a file to be bad, as f(path, whole): whole, the bytes of a good one."""
    makers = {
        "empty": lambda path, whole: path.write_bytes(b""),
        "text": lambda path, whole: path.write_text("not what its name says"),
        "zeros": lambda path, whole: path.write_bytes(bytes(5000)),
        "noise": lambda path, whole: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        "broken link": lambda path, whole: path.symlink_to("nowhere"),
        "header": lambda path, whole: path.write_bytes(whole[:40]),
        "half": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
        "end missing": lambda path, whole: path.write_bytes(whole[:-60]),
        "hole": lambda path, whole: path.write_bytes(
            whole[:200] + bytes(len(whole) // 3) + whole[200 + len(whole) // 3 :]
        ),
        "tail first": lambda path, whole: path.write_bytes(whole[::-1]),
    }
    return [(f"{name}.{kind}", make) for kind in ("png", "jpg", "mp4", "avi", "mkv") for name, make in makers.items()]


@pytest.mark.parametrize(("name", "make"), bad_files(), ids=[name for name, _ in bad_files()])
def test_a_bad_file_is_read_as_far_as_it_goes_or_replaced_by_one_of_its_class(tmp_path, name, make):
    """Never an exception or a hang. Clips may lose their end; a picture must be whole."""
    suffix = name.split(".")[1]
    clips = suffix in ("mp4", "avi", "mkv")
    good = tmp_path / "class" / f"zz.{suffix}"
    good.parent.mkdir()
    if clips:
        scene = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
        write_clip(good, scene, codec="mpeg4" if suffix == "avi" else "libx264")
    else:
        stripes(100, 100).save(good)
    make(tmp_path / "class" / name, good.read_bytes())
    files = labelled_files(tmp_path, clips, flip=False)
    assert [files.path(i) for i in range(2)][1] == str(good)
    pixels, label, bad = files[0, 0]
    expected = files[0, 1][0]
    assert pixels.shape == expected.shape and label == 0
    assert bad == -1 or torch.equal(pixels, expected)
    if name.startswith(("empty", "text", "zeros", "noise", "broken", "header")):
        assert bad == 0


@pytest.mark.filterwarnings("ignore")
def test_malformed_exif_costs_neither_the_image_nor_the_run(tmp_path):
    """Bytes of good EXIF data changed at random. EQM_FUZZ=2000 tries as often as the README says, for each format."""
    rng = random.Random(0)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x0110: "model", 0x011A: 72.0, 0x0132: "2026:01:01 00:00:00"})
    exif.get_ifd(0x8769).update({0x9003: "2026:01:01 00:00:00", 0x829A: 0.01, 0x927C: b"note" * 9})
    good, picture = exif.tobytes(), stripes(24, 16)
    folder = tmp_path / "class"
    folder.mkdir()
    for kind in ("jpg", "png", "webp"):
        whole = None
        for _ in range(int(os.environ.get("EQM_FUZZ", 100))):
            bad = bytearray(good)
            for _ in range(rng.randint(1, 30)):
                bad[rng.randrange(6, len(bad))] = rng.choice([0, 1, 255, rng.randrange(256)])
            picture.save(folder / f"x.{kind}", exif=bytes(bad))
            size = images.read_image(folder / f"x.{kind}").size
            assert size in ((24, 16), (16, 24))
            pixels, _, index = labelled_files(tmp_path, flip=False)[0, 0]
            whole = pixels if whole is None or size == (24, 16) else whole
            assert index == -1 and pixels.shape == whole.shape
        (folder / f"x.{kind}").unlink()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_the_one_that_pillow_applies(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("jpg", "png", "tif"):
        stripes(40, 20).save(tmp_path / f"x.{kind}", exif=exif)
        with Image.open(tmp_path / f"x.{kind}") as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(images.read_image(tmp_path / f"x.{kind}"), expected)


@pytest.mark.parametrize("shape", [(1, 40_000), (40_000, 1), (3, 5000)])
def test_a_long_thin_picture_is_its_middle_and_costs_no_more_than_another(shape, monkeypatch):
    picture, sizes = stripes(*shape), []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *more: sizes.append(size) or resize(image, size, *more)
    )
    crop = images.centre_crop(picture, 64)
    assert crop.shape == (64, 64, 3) and abs(crop[..., int(shape[0] < shape[1])].mean() - 127.5) < 3
    assert max(width * height for width, height in sizes) <= 64 * 64


def published_crop(image, size):
    """ADM's centre crop as it stands in their code, for pictures that are not long and thin."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    top, left = (image.size[1] - size) // 2, (image.size[0] - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(64, 64), (7, 150), (500, 30), (333, 41), (90, 640), (20, 20)])
def test_pictures_that_are_not_long_and_thin_are_cropped_bit_for_bit_as_published(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert np.array_equal(images.centre_crop(Image.fromarray(noise), 32), published_crop(Image.fromarray(noise), 32))


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 255.0), (-50.0, 305.0)])
def test_floats_from_0_to_1_are_scaled_and_others_clipped_to_255(tmp_path, values):
    column = np.repeat(np.linspace(*values, 256, dtype=np.float32)[:, None], 16, axis=1)
    Image.fromarray(column).save(tmp_path / "x.tif")
    read = np.asarray(images.read_image(tmp_path / "x.tif"))
    assert (read[0] == 0).all() and (read[-1] == 255).all() and abs(read.mean() - 127.5) < 1.5


def test_a_float_that_is_no_number_is_black(tmp_path):
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "x.tif")
    assert np.asarray(images.read_image(tmp_path / "x.tif")).max() == 0


@pytest.mark.parametrize("name", ["x.avif", "x.gif", "x.jp2", "x.JFIF", "x.tga", "x.ico", "x.qoi", "x.pcx", "x"])
def test_what_pillow_reads_is_an_image_by_extension_or_without_one_by_content(tmp_path, name):
    (tmp_path / "class").mkdir()
    form = {"x": "PNG", "x.JFIF": "JPEG"}.get(name)
    try:
        stripes(32, 32).save(tmp_path / "class" / name, form)
    except (KeyError, OSError, ValueError):
        pytest.skip("this Pillow does not write it")
    pixels, _, bad = labelled_files(tmp_path)[0, 0]
    assert bad == -1 and pixels.float().std() > 20


def test_what_is_left_out_and_the_classes_are_told_once_with_counts(tmp_path, image_folder):
    for name in ("cat", "dog", "empty"):
        (tmp_path / name).mkdir()
    for name in ("cat", "dog"):
        stripes(9, 9).save(tmp_path / name / "x.png")
        (tmp_path / name / "LICENSE").write_text("free")
        (tmp_path / name / "notes.txt").write_text("none")
    told = []
    data.find_files(tmp_path, False, tell=told.append)
    assert told == [
        "Left out 4 files and folders that are no images: 2 without extension, 2 .txt",
        "1 classes hold no images: empty",
        "3 classes: cat, dog, empty",
    ]
    told.clear()
    data.find_files(image_folder, False, tell=told.append)
    assert told == ["2 classes: cat, dog"]


def tree(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stripes(9, 9).save(path, "PNG")


def test_an_ordinary_folder_has_the_order_and_labels_of_torchvision(tmp_path):
    tree(tmp_path, [f"{c}/{f}.png" for c in ("b", "a", "B", "a b") for f in ("2", "10", "s/x", "s-t/x", "t/u/v", "Z")])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "more").symlink_to(tmp_path / "a b")
    names, index = find_classes(tmp_path)
    expected = make_dataset(tmp_path, index, extensions=(".png",))
    paths, labels, found = data.find_files(tmp_path, False)
    assert found == names and list(zip(paths, labels, strict=True)) == expected


def test_what_is_hidden_or_a_systems_own_is_neither_class_nor_file(tmp_path):
    tree(tmp_path, ["cat/x.png", "dog/x.png"])
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "cat/@eaDir", "cat/.thumbs"):
        tree(tmp_path, [f"{folder}/y.png"])
    (tmp_path / "cat/._x.png").write_bytes(b"\0\5\x16\7")
    os.mkfifo(tmp_path / "cat/pipe.png")
    paths, labels, names = data.find_files(tmp_path, False)
    assert names == ["cat", "dog"] and list(labels) == [0, 1]
    assert [path[-9:] for path in paths] == ["cat/x.png", "dog/x.png"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_loop_of_links_multiplies_nothing(tmp_path, target):
    root = tmp_path / "data"
    tree(root, ["cat/x.png", "cat/deep/y.png", "dog/z.png"])
    (root / "cat" / "deep" / "loop").symlink_to(target)
    (root / "cat" / "self").symlink_to("self")
    (root / "cat" / "a").symlink_to("deep")
    paths, _, _ = data.find_files(root, False)
    assert [os.path.relpath(path, root) for path in paths] == ["cat/x.png", "cat/deep/y.png", "dog/z.png"]


@pytest.mark.parametrize("other", ["val", "test"])
def test_the_parent_of_train_and_val_is_refused(tmp_path, other):
    tree(tmp_path, [f"{split}/{name}/x.png" for split in ("train", other) for name in ("cat", "dog")])
    (tmp_path / "train" / "files.txt").write_text("x")
    with pytest.raises(UserError, match="which hold the class folders: give .*/train$"):
        data.find_files(tmp_path, False)
    assert data.find_files(tmp_path / "train", False)[2] == ["cat", "dog"]
    tree(tmp_path, ["train/locomotive.png", f"{other}/b.png"])
    assert len(data.find_files(tmp_path, False)[2]) == 2, "classes may be called so"


@pytest.mark.parametrize("closed", ["", "cat", "cat/deep"])
def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch, closed):
    tree(tmp_path, ["cat/x.png", "cat/deep/y.png", "dog/z.png"])
    scandir = os.scandir

    def refuse(path):
        if os.path.normpath(path) == os.path.normpath(tmp_path / closed):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{closed} cannot be read .Permission denied.; give this user access"):
        data.find_files(tmp_path, False)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffvideo_name,tag\r\nv0.mp4,run\r\nv2.mp4,jump\r\n",
        "\ufeffvideo_name;tag\r\nv0.mp4;run\r\nv2.mp4;jump\r\n;\r\n",
        "video_name, tag\nv0.mp4, run\nv2.mp4 , jump \n\n",
        "tag\tvideo_name\nrun\tv0.mp4\njump\tv2.mp4\n",
        "id,video_name,tag\n1,v0,run\n2,v2,jump\n",
        "video_name,tag\n.\\v0.mp4,run\n..\\train\\v2,jump\n",
        'video_name,tag\n"v0.mp4","run"\n./v2.mp4,jump\n',
    ],
)
def test_a_csv_as_spreadsheets_write_it(flat_clips, text):
    (flat_clips / "x.csv").write_bytes(text.encode())
    paths, labels, names = data.find_files(flat_clips / "train", True, flat_clips / "x.csv")
    assert [path.name for path in paths] == ["v0.mp4", "v2.mp4"] and all(path.is_file() for path in paths)
    assert (labels, names) == ([1, 0], ["jump", "run"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("v0.mp4\nv1.mp4,b\n", "1 rows without a name or a tag: lines 2$"),
        ("v0.mp4,\n,b\nv1.mp4,c\n", "2 rows without a name or a tag: lines 2, 3$"),
        ("v0.mp4,a\nv8.mp4,a\nv9,b\n", "2 of the 3 files in .*x.csv are not in .*train: v8.mp4, v9; take"),
        ("/etc/passwd,a\n", "1 files outside .*train: /etc/passwd"),
        ("../secret.mp4,a\n", "1 files outside .*train: ../secret.mp4"),
        ("a/../../secret.mp4,a\n", "1 files outside"),
        ("..\\secret.mp4,a\n", "1 files outside"),
        ("twice,a\n", "twice may be twice.avi, twice.mp4"),
    ],
)
def test_rows_of_a_csv_that_cannot_be_followed_are_told(flat_clips, rows, message):
    for name in ("secret.mp4", "train/twice.mp4", "train/twice.avi"):
        (flat_clips / name).touch()
    (flat_clips / "x.csv").write_text("video_name,tag\n" + rows)
    with pytest.raises(UserError, match=message) as told:
        data.find_files(flat_clips / "train", True, flat_clips / "x.csv")
    assert "\n" not in str(told.value)


def test_an_absolute_path_inside_the_folder_and_hidden_leftovers_beside_a_csv_are_fine(flat_clips):
    folder = flat_clips / "train"
    (folder / "labels.csv").write_text(f"video_name,tag\n{folder}/v1.mp4,run\n")
    (folder / "._labels.csv").write_bytes(b"\0\5")
    (folder / ".ipynb_checkpoints").mkdir()
    assert data.find_files(folder, True)[0] == [folder / "v1.mp4"]
