"""The `nextscale` command: what it writes, what it keeps, how it fails."""

import argparse
import copy
import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from training_toys import in_processes

import nextscale
from sample import sinks
from sample.commands.job import Job
from sample.commands.prompts import unread
from sample.files import atomically, read_png_text, write_png
from sample.images import make_requests
from sample.plan import untrained
from sample.plan_text import PlanConfig
from sample.processes import tell
from sample.sinks import NpzFile, file_stem, grid

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a red star", "a blue heart above a cross", "two rings"]


@pytest.fixture
def sample(text_folder, class_folder, capsys):
    """Runs `nextscale sample`; gives (exit code, stdout, stderr)."""

    def run(*argv, model="text"):
        folder = {"text": text_folder, "class": class_folder}[model]
        code = nextscale.main(["sample", "--model", str(folder), "--device", "cpu", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(path):
    return np.asarray(Image.open(path))


def stamp(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*seed*.png")}


def test_pictures_with_their_origin(sample, text_pipeline, tmp_path):
    code, out, _ = sample("a red star", "--n", 3, "--seed", 7, "--guidance", 2, "--out", tmp_path)
    assert code == 0
    assert names(tmp_path) == ["a-red-star_grid.png", *(f"a-red-star_seed{s}.png" for s in (7, 8, 9)), "settings.json"]
    assert out.startswith(f"{tmp_path} (see a-red-star_grid.png): 3 images (0 were there already), ")
    assert out.endswith(" images/s\n")
    wanted = text_pipeline("a red star", num_images_per_prompt=3, seed=7, guidance_scale=2.0).images
    for seed, image in zip((7, 8, 9), wanted):
        made = Image.open(tmp_path / f"a-red-star_seed{seed}.png")
        assert np.array_equal(np.asarray(made), np.asarray(image))
        assert (made.text["prompt"], made.text["seed"]) == ("a red star", str(seed))
        assert json.loads(made.text["settings"])["guidance_scale"] == 2.0
    assert Image.open(tmp_path / "a-red-star_grid.png").size == (
        386,
        386,
    )  # two by two of 8 pixels, 24 times enlarged, 2 apart


def test_the_same_command_goes_on(sample, tmp_path):
    sample("a red star", "--n", 2, "--out", tmp_path)
    before = stamp(tmp_path)
    damaged = tmp_path / "a-red-star_seed1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    code, out, _ = sample("a red star", "--n", 4, "--out", tmp_path)
    after = stamp(tmp_path)
    assert code == 0 and "4 images (1 were there already)" in out
    assert len(after) == 4
    assert after["a-red-star_seed0.png"] == before["a-red-star_seed0.png"]
    assert after["a-red-star_seed1.png"] != before["a-red-star_seed1.png"]
    assert "4 images (4 were there already)\n" in sample("a red star", "--n", 4, "--out", tmp_path)[1]
    code, out, _ = sample("two rings", "--n", 1, "--out", tmp_path)  # another prompt, the same settings: welcome
    assert code == 0 and (tmp_path / "two-rings_seed0.png").exists()
    code, _, err = sample("a red star", "--top-k", 3, "--out", tmp_path)
    assert code == 2
    file = tmp_path / "settings.json"
    assert err == f"nextscale: error: {file} is of images with top_k None, not 3: choose another --out\n"


def test_batch_size_does_not_matter(sample, tmp_path):
    for size in (1, 3):
        assert sample("two rings", "--n", 4, "--batch-size", size, "--out", tmp_path / str(size))[0] == 0
    for path in (tmp_path / "1").glob("*seed*.png"):
        assert np.abs(pixels(path).astype(int) - pixels(tmp_path / "3" / path.name)).max() <= 1


def test_coarse_to_fine(sample, tmp_path):
    code, out, _ = sample("two rings", "--n", 2, "--show-scales", "--out", tmp_path)
    assert code == 0 and "see two-rings_grid.png, two-rings_scales.png" in out
    row, image = pixels(tmp_path / "scales" / "two-rings_seed0.png"), pixels(tmp_path / "two-rings_seed0.png")
    assert row.shape == (8, 24, 3)  # three scales
    assert np.array_equal(row[:, 16:], image) and not np.array_equal(row[:, :8], image)
    assert Image.open(tmp_path / "two-rings_scales.png").size == (576, 386)


@pytest.mark.parametrize("more", [[], ["--show-scales"]])
def test_pictures_that_are_not_numbers_are_not_written(class_pipeline, tmp_path, capsys, more):
    broken = copy.deepcopy(class_pipeline)
    broken.vqvae.decoder.conv_out.weight.data[0, 0, 0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    words = [
        "sample",
        "--class",
        "1",
        "--device",
        "cpu",
        "--model",
        tmp_path / "model",
        "--out",
        tmp_path / "out",
        *more,
    ]
    assert nextscale.main([*map(str, words)]) == 2
    assert "the image of 1, seed 0, is not finite" in capsys.readouterr().err and not list(tmp_path.glob("out/*.png"))


def test_geneval_tree(sample, tmp_path):
    lines = [{"tag": "colors", "include": [], "prompt": prompt} for prompt in PROMPTS]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    tree = tmp_path / "tree"
    assert sample("--prompts", prompts, "--n", 2, "--out", tree)[0] == 0
    wanted = [
        f"{g:05d}/{name}" for g in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert names(tree) == [*wanted, "settings.json"]
    assert [json.loads((tree / f"{g:05d}" / "metadata.jsonl").read_text()) for g in range(3)] == lines
    assert Image.open(tree / "00001" / "samples" / "0001.png").text["prompt"] == PROMPTS[1]
    prompts.write_text("\n".join(PROMPTS))  # plain texts: the same prompts, so the same job
    assert "6 images (6 were there already)" in sample("--prompts", prompts, "--n", 2, "--out", tree)[1]
    prompts.write_text("a cross")
    code, _, err = sample("--prompts", prompts, "--n", 2, "--out", tree)
    assert code == 2 and "settings.json is of images with requests" in err


@pytest.mark.parametrize(("images", "block"), [(3, 1), (300, 4), (6400, 100), (50_000, 256)])
def test_shards_are_small_where_the_job_is(tmp_path, images, block):
    """So that many processes have some of a small job each; the same for any number of them, which may then differ."""
    assert NpzFile(tmp_path / "x.npz", make_requests([0], per_prompt=images)).block == block


@pytest.mark.parametrize("text", ["--seed=3", "--prompts=/etc/passwd", "-x", "--"])
def test_what_stands_behind_two_dashes_is_a_text(sample, tmp_path, text):
    code, out, _ = sample("--seed", 1, "--out", tmp_path, "--", text)
    assert code == 0 and out.startswith(f"{tmp_path}: 1 images")
    (made,) = tmp_path.glob("*_seed1.png")
    assert read_png_text(made)["prompt"] == text


def test_shards_of_an_earlier_release_go_on_as_they_were(tmp_path):
    requests = make_requests([0], per_prompt=300)
    made = np.random.default_rng(0).integers(0, 256, (300, 2, 2, 3), dtype=np.uint8)
    before = NpzFile(tmp_path / "x.npz", requests, block=256)
    for request, image in zip(requests[:270], made):
        before.write(request, image)
    again = NpzFile(tmp_path / "x.npz", requests)
    assert again.missing(requests) == requests[256:]
    for request, image in zip(requests[256:], made[256:]):
        again.write(request, image)
    again.finish()
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], made)
    torn = NpzFile(tmp_path / "y.npz", requests)
    for request, image in zip(requests, made):
        torn.write(request, image)
    np.save(torn.parts / "000003-of-4.npy", made[:3])
    with pytest.raises(ValueError, match="holds other images than"):
        torn.finish()


def test_captions_that_the_bundled_model_cannot_read_are_told(capsys):
    tell(unread(["a red star", "three circles", "a ring and a blue square", "a cross above a heart"]))
    assert capsys.readouterr().err == ""
    tell(unread(["a dog on a sofa", "a star", ""]))
    assert "'a dog on a sofa' and 1 more it does not understand" in capsys.readouterr().err


def test_fewer_layers_of_a_model_that_was_not_trained_for_them_are_cautioned(tiny_text_model, capsys):
    tell(untrained(PlanConfig(cache="window:50%").build(tiny_text_model)))
    assert capsys.readouterr().err == ""
    subnet = PlanConfig(plan="supernet:1", depth=1)
    tell(untrained(subnet.build(tiny_text_model)))
    assert "was trained to run 1 of its 2 layers from scale 1 on" in capsys.readouterr().err
    trained = copy.deepcopy(tiny_text_model)
    trained.register_to_config(subnets={"depths": [1], "bridge": 1})
    tell(untrained(subnet.build(trained)))
    assert capsys.readouterr().err == ""
    tell(untrained(PlanConfig(depth=1).build(trained)))  # its first scale always ran all layers
    assert "from scale 0 on" in capsys.readouterr().err


def test_sampling_tells_of_untrained_layers(sample, tmp_path):
    code, _, said = sample("a red star", "--plan", "supernet:1", "--depth", 1, "--out", tmp_path)
    assert code == 0 and "was trained to run 1 of its 2 layers from scale 1 on" in said


def test_without_out_other_settings_have_folders_of_their_own(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for guidance, folder in ((1, "pictures"), (2, "pictures-2"), (1, "pictures"), (3, "pictures-3"), (2, "pictures-2")):
        code, out, _ = sample("a star", "--guidance", guidance)
        assert code == 0 and out.startswith(f"{folder}:")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "pictures-2", "pictures-3"]
    assert "(1 were there already)" in sample("a star", "--guidance", 2)[1]
    (tmp_path / "pictures-4").write_text("a file in the way")
    assert sample("a star", "--guidance", 4)[1].startswith("pictures-5:")
    assert "choose another --out" in sample("a star", "--guidance", 2, "--out", "pictures")[2]


def test_classes_to_npz(sample, class_pipeline, tmp_path):
    file = tmp_path / "samples.npz"
    assert sample("--class", "0-1,4", "--n", 2, "--seed", 5, "--out", file, model="class")[0] == 0
    assert names(tmp_path) == ["samples.npz", "samples.npz.json"]
    with np.load(file) as made:
        assert made.files == ["arr_0", "arr_1"]
        images, labels = made["arr_0"], made["arr_1"]
    assert labels.dtype == np.int64 and labels.tolist() == [0, 0, 1, 1, 4, 4]
    wanted = class_pipeline(class_labels=[0, 0, 1, 1, 4, 4], seed=5, output_type="np").images
    assert images.dtype == np.uint8 and np.array_equal(images, (wanted * 255).round().astype(np.uint8))
    assert "6 images (6 were there already)" in sample(
        "--class", "0-1,4", "--n", 2, "--seed", 5, "--out", file, model="class"
    )[1]  # fmt: skip
    assert sample("--class", "all", "--out", tmp_path / "all", model="class")[0] == 0
    assert len(list((tmp_path / "all").glob("class-*_seed*.png"))) == 5


def test_npz_shards_survive(tmp_path):
    assert make_requests("a red star", per_prompt=2) == make_requests(["a red star"], per_prompt=2)
    assert make_requests(3) == make_requests([3])
    requests = make_requests([0, 1, 2], per_prompt=3)
    picture = {(r.group, r.place): np.full((4, 5, 3), r.seed, np.uint8) for r in requests}
    first = NpzFile(tmp_path / "x.npz", requests, block=4)
    for request in requests[:6]:
        first.write(request, picture[request.group, request.place])
    again = NpzFile(tmp_path / "x.npz", requests, block=4)
    assert again.missing(requests) == requests[4:]  # the half-filled shard is made again
    for request in requests[4:]:
        again.write(request, picture[request.group, request.place])
    again.finish()
    assert again.missing(requests) == [] and names(tmp_path) == ["x.npz"]
    assert np.load(tmp_path / "x.npz")["arr_0"][:, 0, 0, 0].tolist() == list(range(9))


def test_interrupted(sample, tmp_path, monkeypatch):
    written = []

    def write_then_stop(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write_png(path, *rest)

    monkeypatch.setattr(sinks, "write_png", write_then_stop)
    code, _, err = sample("a red star", "--n", 5, "--out", tmp_path)
    assert code == 130
    assert err.splitlines()[-1] == "nextscale: stopped with 2 of 5 images done; the same command continues"
    monkeypatch.undo()
    code, out, _ = sample("a red star", "--n", 5, "--out", tmp_path)
    assert code == 0 and "5 images (2 were there already)" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give what to draw"),
        (["a star", "--class", "3"], "give what to draw"),
        (["--class", "3"], "--class is for class models"),
        (["a star", "--n", "0"], "--n must be 1 or more, got 0"),
        (["a star", "--n", "some"], "argument --n: invalid int value: 'some'"),
        (["a star", "--gidance", "3"], "unrecognized arguments: --gidance"),
        (["a star", "--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["a star", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["\udcff"], "prompt must be text in UTF-8, got '\\udcff'"),
        (["a star", "--negative", "\udcff"], "--negative must be text in UTF-8"),
        (["a star", "--seed", "-5"], "seed must be in [0, 2**63), got -5"),
        (
            ["a star", "--seed", str(2**63 - 1), "--n", "2"],
            "seed must be in [0, 2**63 - 2] for 2 images, got 9223372036854775807",
        ),
        (["a star", "--out", "/proc/x"], "--out must be where files can be made, got /proc/x: /proc: "),
        (
            ["a star", "--search", "best", "--reward", "json:loads"],
            "reward json:loads raised TypeError: loads() takes 1",
        ),
        (["a star", "--dtype", "int4"], "dtype must be one of auto, float32"),
        (["a star", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is not a file"),
        (
            ["a star", "--model", "no/such/model/here"],
            "model 'no/such/model/here' is not 'scenes', is no folder here, and",
        ),
        (["a star", "--show-scales", "--out", "x.npz"], "--show-scales needs a folder"),
        (["a star", "--out", "star.png"], "--out must be a folder, or FILE.npz, got star.png"),
        (["a star", "--out", "star.NPZ"], "--out must be a folder, or FILE.npz, got star.NPZ"),
        (["a star", "--device", "meta"], "device 'meta' cannot be used"),
        (["a star", "--negative", "b", "--guidance", "0"], "--negative acts through guidance, and no scale is"),
        (
            ["a star", "--guidance", "2", "--guidance-ramp", "linear", "--guidance-until", "1"],
            "--guidance-until 1: none",
        ),
        (["a star", "--search", "3 best", "--n", "5"], "--n 5 goes with a method's name, and --search '3 best' says"),
        (["a star", "a dog", "--search", "best", "--reward", "scenes"], "cannot read 'a dog'"),
        (["a star", "--search", "tts", "--reward", "scenes", "--sharpness", "inf"], "sharpness must be a number"),
        (["a star", "--search", "best", "--reward", "scenes", "--budget", "nan"], "budget must be a number above 0"),
        (["a star", "--search", "best", "--reward", "scenes", "--enough", "nan"], "enough must be a number, got nan"),
    ],
)
def test_mistakes_are_one_line(sample, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = sample(*argv)
    assert code == 2 and out == ""
    assert err.startswith("nextscale: error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "latin.txt"], "--prompts latin.txt must be text in UTF-8: byte 2 is none of it"),
        (["a star", "--out", "latin.txt"], "--out must be a folder, got latin.txt: latin.txt is a file"),
        (["a star", "--out", "latin.txt/x"], "--out must be in a folder, got latin.txt/x: latin.txt is a file"),
        (["a star", "--out", "folder.npz"], "--out must be a file, got folder.npz, which is a folder"),
    ],
)
def test_files_that_cannot_be_are_one_line(sample, tmp_path, monkeypatch, argv, message):
    (tmp_path / "latin.txt").write_bytes(b"a \xff")
    (tmp_path / "folder.npz").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sample(*argv) == (2, "", f"nextscale: error: {message}\n")
    assert names(tmp_path) == ["latin.txt"]


def test_a_wrong_value_is_told_before_that_the_folder_is_of_others(sample, tmp_path):
    assert sample("a star", "--out", tmp_path)[0] == 0
    by_scale = ["--guidance", "0,1,1", "--guidance-ramp", "constant"]
    assert "--guidance-ramp constant is for one --guidance" in sample("a star", *by_scale, "--out", tmp_path)[2]
    assert "guidance must be in [0, 1000]" in sample("a star", "--guidance", -1, "--out", tmp_path)[2]
    assert "is of images with guidance_scale None, not 2.0" in sample("a star", "--guidance", 2, "--out", tmp_path)[2]
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"model_digest": "0", "dtype": "int8"}))
    assert "is of images with model_digest '0', not" in sample("a star", "--out", tmp_path)[2]  # it explains the other
    for text in ("{broken", "[1, 2]", "3"):
        (tmp_path / "settings.json").write_text(text)
        message = f"{tmp_path}/settings.json is not what nextscale wrote beside its images: choose another --out\n"
        assert sample("a star", "--out", tmp_path)[2].endswith(message)


def test_prompts_may_be_piped(sample, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\n")))
    assert "--prompts - must be text in UTF-8: byte 2" in sample("--prompts", "-", "--out", tmp_path / "a")[2]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a star\n\na ring\n")))
    assert sample("--prompts", "-", "--out", tmp_path / "a")[0] == 0
    assert len(list((tmp_path / "a").rglob("samples/0000.png"))) == 2
    os.mkfifo(tmp_path / "pipe")
    writer = Thread(target=(tmp_path / "pipe").write_text, args=("a star\n",))
    writer.start()
    assert sample("--prompts", tmp_path / "pipe", "--out", tmp_path / "b")[0] == 0
    writer.join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--prompts - can be read by one process only" in sample("--prompts", "-", "--out", tmp_path / "c")[2]
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "photo.txt").write_text("[photo] a star")
    assert sample("--prompts", tmp_path / "photo.txt", "--out", tmp_path / "d")[0] == 0
    (tmp_path / "list.json").write_text('["a star", "a ring"]')
    assert "is a list in JSON: give one text" in sample("--prompts", tmp_path / "list.json", "--out", tmp_path / "c")[2]


def test_lines_of_prompts_end_at_newlines_and_are_of_one_kind(sample, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red\u2028star\r\na ring\x85\f now\n", newline="")
    assert sample("--prompts", prompts, "--out", tmp_path / "a")[0] == 0
    assert len(list((tmp_path / "a").rglob("samples/0000.png"))) == 2
    prompts.write_text('a star\n\n{"prompt": "a ring"}\n')
    assert "line 3 is a JSON object, and the first line is a text" in sample("--prompts", prompts)[2]
    prompts.write_text('\n{"prompt": "a ring", "note": "x\u2028y"}\na star\n')
    assert "line 3 is not a JSON object with a prompt" in sample("--prompts", prompts)[2]


def test_two_jobs_that_begin_at_once_do_not_mix(tmp_path):
    """Both looked when nothing was there; the second finds the first one's file when it would write its own."""
    first, second = (Job(tmp_path / "new" / "settings.json", {"guidance": g}) for g in (0.0, 3.0))
    first.check()
    second.check()
    first.save()
    with pytest.raises(ValueError, match=r"is of images with guidance 0.0, not 3.0: choose another --out"):
        second.save()
    first.save()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["settings.json"]


def test_a_full_disk_is_told_with_its_place(tmp_path):
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*picture\.png"):
        atomically(tmp_path / "picture.png", full)


def test_mistakes_of_the_front_door(capsys):
    assert nextscale.main(["smaple"]) == 2
    assert "invalid choice: 'smaple'" in capsys.readouterr().err
    for words in (["--out", ""], ["--out="]):
        assert nextscale.main(["sample", "a star", *words]) == 2
        assert "--out must not be empty" in capsys.readouterr().err
    assert nextscale.main([]) == 0
    assert "nextscale COMMAND --help" in capsys.readouterr().out
    with pytest.raises(AttributeError, match="has no attribute 'plane'"):
        _ = nextscale.plane
    assert nextscale.plain.__module__ == "sample.plan" and "plain" in dir(nextscale)


def test_more_mistakes(sample, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a star"}\nnot json\n')
    assert "line 2 is not a JSON object with a prompt" in sample("--prompts", prompts, "--out", tmp_path)[2]
    prompts.write_text("\n")
    assert "holds no line" in sample("--prompts", prompts, "--out", tmp_path)[2]
    assert (
        "--class 7: class_labels must be in 0..4, or 5 for the null class, got 7"
        in sample("--class", "7", "--out", tmp_path, model="class")[2]
    )
    assert "--class must be like 3" in sample("--class", "cat", "--out", tmp_path, model="class")[2]
    assert "this model draws classes: give --class," in sample("a cat", "--out", tmp_path / "new", model="class")[2]
    assert sample("a cat", "--out", prompts)[0] == 2  # a file is in the way


@pytest.mark.parametrize("how", [["nextscale.py"], ["-m", "nextscale"]])
def test_help_is_quick(how):
    started = time.process_time(), os.times()
    done = subprocess.run([sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    ended = os.times()
    assert "sample" in done.stdout
    seconds = ended.children_user + ended.children_system - started[1].children_user - started[1].children_system
    assert seconds < 0.5
    loaded = "import sys, nextscale; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=True)


def test_file_names():
    assert file_stem("a red star") == "a-red-star"
    assert file_stem(3) == "class-3"
    assert file_stem("../etc") != file_stem("etc") and "/" not in file_stem("../etc")
    assert file_stem("A red star") != file_stem("a red star")
    assert file_stem("a-red-star") != file_stem("a red star")
    assert file_stem("ünter") != file_stem("nter")
    assert len(file_stem("long " * 100)) < 100
    assert file_stem("日本") == f"{file_stem('日本')}" and file_stem("日本")


@pytest.mark.parametrize(("prompts", "n", "columns"), [(2, 3, 3), (5, 2, 4), (3, 1, 2), (2, 40, 8)])
def test_the_overview_has_the_pictures_of_a_prompt_in_one_row(text_folder, tmp_path, prompts, n, columns):
    words = [f"{number} stars" for number in range(prompts)]
    assert nextscale.main(["sample", *words, "--n", str(n), "--model", str(text_folder), "--out", str(tmp_path)]) == 0
    one, sheet = Image.open(tmp_path / f"{sinks.file_stem('0 stars')}_seed0.png"), Image.open(tmp_path / "all_grid.png")
    side = one.width * round(192 / one.height)
    assert sheet.width == columns * (side + 2) - 2


def test_grid_places_pictures_in_reading_order():
    sheet = np.asarray(grid([Image.new("RGB", (2, 2), (i, i, i)) for i in range(5)], gap=1, least=2))
    assert sheet.shape == (5, 8, 3)
    assert [sheet[0, 0, 0], sheet[0, 3, 0], sheet[0, 6, 0], sheet[3, 0, 0], sheet[3, 3, 0]] == [0, 1, 2, 3, 4]
    assert sheet[3, 6, 0] == 255 and sheet[2, 0, 0] == 255


def test_text_of_any_language_survives(tmp_path):
    write_png(tmp_path / "x.png", np.zeros((2, 2, 3), np.uint8), {"prompt": "ein grüner Stern ★"})
    assert read_png_text(tmp_path / "x.png") == {"prompt": "ein grüner Stern ★"}
    assert names(tmp_path) == ["x.png"]


def test_an_npz_of_another_job_is_not_taken_for_this_one(sample, tmp_path):
    file, words = tmp_path / "x.npz", ["--class", "0", "--n", 2, "--out", tmp_path / "x.npz"]
    np.savez(file, np.zeros((2, 8, 8, 3), np.uint8))
    code, out, err = sample(*words, model="class")
    assert (code, out) == (2, "")
    assert err.endswith(f"{file} is there, and no {file}.json says what made it: choose another --out\n")
    file.rename(tmp_path / "x.npz.parts")
    assert sample(*words, model="class")[0] == 2
    (tmp_path / "x.npz.parts").unlink()
    assert sample(*words, model="class")[0] == 0
    assert sample(*words, "--top-k", 3, model="class")[0] == 2


def test_a_model_that_has_moved_redraws_nothing(text_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(text_folder.parent)
    words = ["sample", "two rings", "--n", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert nextscale.main([*words, "--model", text_folder.name]) == 0
    before = stamp(tmp_path / "out")
    assert nextscale.main([*words, "--model", f"./{text_folder.name}/"]) == 0
    assert "2 images (2 were there already)" in capsys.readouterr().out and stamp(tmp_path / "out") == before


def test_other_metadata_is_another_job(sample, tmp_path):
    prompts, tree = tmp_path / "prompts.jsonl", tmp_path / "tree"
    words = ["--prompts", prompts, "--out", tree]
    prompts.write_text(json.dumps({"tag": "colors", "include": [], "prompt": "a red star"}), encoding="utf-8-sig")
    assert sample(*words)[0] == 0
    assert json.loads((tree / "00000" / "metadata.jsonl").read_text())["tag"] == "colors"
    prompts.write_text(json.dumps({"tag": "counting", "include": [], "prompt": "a red star"}))
    code, _, err = sample(*words)
    assert code == 2 and "settings.json is of images with metadata" in err
    settings = json.loads((tree / "settings.json").read_text())
    del settings["metadata"]  # as before it was kept
    (tree / "settings.json").write_text(json.dumps(settings))
    assert "1 images (1 were there already)" in sample(*words)[1]


def in_one_of_many(arguments: list[str]) -> None:
    from accelerate import PartialState

    PartialState._reset_state()
    assert nextscale.main(arguments) == 0


def test_several_processes_count_what_all_of_them_found(text_folder, tmp_path, capfd):
    words = ["a red star", "--out", str(tmp_path / "out"), "--model", str(text_folder), "--device", "cpu", "--n"]
    assert nextscale.main(["sample", *words, "3"]) == 0
    assert in_processes(2, in_one_of_many, ["sample", *words, "5"]) == [0, 0]
    assert "5 images (3 were there already)" in capfd.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    words = [str(tmp_path / "in.png"), *words, "3", "--box", "1,1,4,4"]
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "edits")
    assert in_processes(2, in_one_of_many, ["edit", *words]) == [0, 0]
    assert "3 edits (0 were there already)" in capfd.readouterr().out


@pytest.mark.parametrize(("command", "words"), [("sample", ["x"]), ("edit", ["x"]), ("evaluate", [])])
def test_lists_that_begin_with_a_minus_are_values(command, words):
    from evaluation import evaluate_options as options
    from sample.commands import edit_cli, sample_cli

    parser = argparse.ArgumentParser()
    {"sample": sample_cli, "edit": edit_cli, "evaluate": options}[command].configure(parser)
    assert parser.parse_args([*words, "--guidance-blocks", "-5,-1"]).guidance_blocks == [-5, -1]
    assert parser.parse_args([*words, "--guidance-blocks", "-2", "--out", "x"]).guidance_blocks == [-2]


@pytest.mark.slow
def test_two_processes_write_the_same_images(sample, text_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "nextscale", "sample", "--device", "cpu"]
    both = [*launch, "--model", text_folder, "--n", "3", "--prompts", prompts]
    for out in ("two", "two.npz"):
        subprocess.run([*map(str, both), "--out", str(tmp_path / out)], cwd=ROOT, check=True, timeout=300)
        assert sample("--prompts", prompts, "--n", 3, "--out", tmp_path / out.replace("two", "one"))[0] == 0
    paths = [Path(name) for name in names(tmp_path / "one")]
    assert names(tmp_path / "two") == [str(path) for path in paths] and len(paths) == 13
    for path in paths:
        if path.suffix == ".png":
            assert np.abs(pixels(tmp_path / "one" / path).astype(int) - pixels(tmp_path / "two" / path)).max() <= 1
    files = [np.load(tmp_path / f"{name}.npz") for name in ("one", "two")]
    assert files[0].files == ["arr_0"]  # texts have no classes
    one, two = (file["arr_0"].astype(int) for file in files)
    assert one.shape == (9, 8, 8, 3) and np.abs(one - two).max() <= 1


def test_a_reader_that_has_seen_enough_is_no_mistake():
    code = "import nextscale, sys\nnextscale.run_command = lambda argv: [print('x' * 99) for _ in range(9999)]\n"
    command = ["bash", "-c", f'"{sys.executable}" -c "$0" | head -n 1; exit ${{PIPESTATUS[0]}}']
    done = subprocess.run(
        [*command, code + "sys.exit(nextscale.main([]))"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "x" * 99 + "\n" and not done.stderr
