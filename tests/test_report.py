"""The page of pictures: what it promises to who opens it, and to the stages that refresh it."""
import base64
import html.parser
import json
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from conftest import ROOT, command, missing, run, wait_for

import checkpointing
import report

pytestmark = [pytest.mark.filterwarnings("error"),   # but for what other tests have left behind
              pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
HOSTILE = "<img src=x onerror=alert(1)>\"'</script></style></svg><script>alert(1)</script>&amp;"


# ---- what there is to show

@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A real run of generate.py, and the data set that merge.py makes of it."""
    out = tmp_path_factory.mktemp("made") / "results"
    run("generate.py", "--n", 200, "--every", 64, "--out", out)
    run("merge.py", out, "--out", out / "dataset.npz")
    for path in out.glob("report.*"):   # the stages made it; the tests make their own
        path.unlink()
    return out


@pytest.fixture
def results(generated, tmp_path):
    """The same with a training beside it."""
    out = tmp_path / "results"
    shutil.copytree(generated, out)
    training(out / "magvit_training")
    return out


def progress(out, title="MAGVIT training", status="COMPLETE", done=100, total=100, unit="steps",
             age=0, share=None, **more):
    out.mkdir(parents=True, exist_ok=True)
    beat = int(time.time()) - age
    share = share or ("100" if status == "COMPLETE" else f"{min(99.9, 100 * done / total):.1f}")
    fields = {"Status": status, "Progress": f"{done}/{total} {unit} ({share}%)",
              "ETA": "90 s (2026-01-25 01:22:40 UTC)", **more, "Heartbeat": beat,
              "Advanced": beat, "Interval": "30 s", "Run": "6f1c2a", "PID": 1, "Host": "h"}
    lines = [f"{key}: {value}\n" for key, value in fields.items()]
    (out / "PROGRESS.txt").write_text(title + "\n" + "".join(lines))


def history(epochs=6):
    rows = []
    for phase, start in (("tokenizer", 0), ("transformer", 10 * epochs)):
        for i in range(1, epochs + 1):
            rows.append({"phase": phase, "epoch": i, "step": start + 10 * i, "train_loss": 9 / i,
                         "validation_loss": 10 / i, "learning_rate": 1e-3})
    rows[3]["restart"] = True
    return rows


METRICS = {
    "tokenizer": {"videos": 200, "bits_per_video": 576.0, "raw_bits": 65536, "psnr_db": 31.5,
                  "blank_psnr_db": 17.1, "skill": 0.96, "centroid_error_px": 0.1,
                  "middle_centroid_error_px": 6.8},
    "classification": {"videos": 200, "accuracy": 0.91, "classes": list(report.CLASSES),
                       "chance": 0.25, "confusion_true_by_guessed":
                       [[47, 1, 1, 1], [0, 48, 2, 0], [1, 3, 46, 0], [0, 0, 0, 50]]},
    "judge": {"accuracy_on_real": 0.99},
    "generation": {"judged_right": 0.93, "judged_right_unchosen": 0.91,
                   "judged_right_by_class": dict.fromkeys(report.CLASSES, 0.9)},
    "prediction": {"frames_given": 4,
                   "model": {"error_px": 1.5, "by_horizon": [1, 1.4, 1.8],
                             "by_class": dict.fromkeys(report.CLASSES, 1.5)},
                   "copy_last": {"error_px": 5.4, "by_horizon": [3, 5, 7],
                                 "by_class": dict.fromkeys(report.CLASSES, 5.0)},
                   "constant_velocity": {"error_px": 7.8},
                   "nearest_neighbour": {"error_px": 3.0}},
    "warnings": []}


def videos(n, frames=8, size=32, channels=1):
    """A bright square that moves a pixel a frame."""
    made = np.zeros((n, frames, channels, size, size), np.uint8)
    for i in range(n):
        for t in range(frames):
            made[i, t, :, 5 + i % 8:10 + i % 8, 4 + t:9 + t] = 200
    return made


def samples(path, **more):
    arrays = {"real": videos(8), "reconstructed": videos(8), "generated": videos(8),
              "generated_labels": np.arange(8) % 4, "predicted": videos(6),
              "predicted_truth": videos(6), "given": 4, "classes": np.array(report.CLASSES),
              "step": 60, **more}
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})


def training(out, **more):
    progress(out, **more)
    (out / "run.json").write_text(json.dumps({"run": "a", "settings": {"preset": "tiny"}}))
    (out / "history.json").write_text(json.dumps(history()))
    (out / "metrics.json").write_text(json.dumps(METRICS))
    samples(out / "samples.npz")


def page(directory):
    report.write_report(directory)
    return (directory / "report.html").read_text()


class Elements(html.parser.HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# ---- the page

def test_a_page_and_a_picture_of_real_results(results):
    done = run("report.py", results)
    assert f"{results}/report.html" in done.stdout and f"{results}/report.png" in done.stdout
    text = Elements((results / "report.html").read_text()).text
    for words in ("Dataset generation", "magvit_training", "All is well", "200 of 200 samples",
                  "linear", "every frame shows a dot", "the dots are where trajectory_2d says",
                  "Reconstructed at step 60", "Predicted", "Generated", "Confusion", "31.5 dB",
                  "copy of the last frame", "beats it", "dataset.npz: all 200 videos joined"):
        assert words in text, words
    assert "could not be drawn" not in text


def test_numpy_is_enough(results):
    code = ("import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
            f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path(sys.argv[0], run_name='__main__')")
    subprocess.run([sys.executable, "-c", code, *command("report.py", results)[1:]], check=True)
    assert "All is well" in (results / "report.html").read_text()


def test_nothing_comes_from_elsewhere(results):
    text = page(results)
    for tag, attributes in Elements(text).tags:
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), (tag, attributes)
    style = re.search("<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert "://" not in re.sub(r"base64,[\w+/=]+", "", text)


def test_every_picture_has_words(results):
    tags = Elements(page(results)).tags
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(pictures) > 50 and all(picture["alt"].strip() for picture in pictures)
    assert drawings and all("aria-hidden" in one or one["aria-label"].strip() for one in drawings)


def test_a_page_of_forty_noisy_runs_travels(tmp_path):
    """Noise does not compress: the worst case for the size."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 8, 3, 64, 64), np.uint8)
    for i in range(40):
        training(tmp_path / f"run_{i}")
        if i == 0:
            samples(tmp_path / "run_0" / "samples.npz", real=noise[:12], reconstructed=noise[12:],
                    generated=noise, generated_labels=np.arange(24) % 4)
        else:
            shutil.copy(tmp_path / "run_0" / "samples.npz", tmp_path / f"run_{i}")
    text = page(tmp_path)
    assert os.path.getsize(tmp_path / "report.html") < 2_000_000
    assert all(f">run_{i}<" in text for i in range(40)) and text.count("data:image/png") > 24
    assert text.endswith("</html>\n")


def test_hostile_text_stays_text(tmp_path, browser):
    out = tmp_path / HOSTILE.replace("/", "|")
    training(out, title=HOSTILE, status="FAILED", Error=HOSTILE, **{"Epoch": HOSTILE})
    (out / "run.json").write_text(json.dumps({"settings": {HOSTILE: HOSTILE}}))
    rows = [{**row, "phase": HOSTILE} for row in history()]
    (out / "history.json").write_text(json.dumps(rows))
    metrics = json.loads(json.dumps(METRICS).replace("helical", "</script><b onclick=x>"))
    (out / "metrics.json").write_text(json.dumps({**metrics, "warnings": [HOSTILE]}))
    samples(out / "samples.npz", classes=np.array([HOSTILE] * 4))
    (out / "checkpoint_10.pt").write_bytes(b"")
    training(tmp_path / os.fsdecode(b"\xff bad"), title="\u202e hidden \x1b[31m")
    np.savez(tmp_path / f"{HOSTILE.replace('/', '|')}.npz", videos=videos(4), labels=np.arange(4))

    text = page(tmp_path)
    tags = Elements(text).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [tag for tag, one in tags if any(key.startswith("on") for key in one)]
    assert all(one["src"].startswith("data:image/png;base64,") for tag, one in tags if tag == "img")
    assert "\u202e" not in text and "\x1b" not in text
    browser.open(tmp_path / "report.html")
    assert HOSTILE in browser.js("document.body.textContent")
    assert browser.js("document.scripts.length") == 1 and not browser.complaints()


@pytest.mark.parametrize("state, words", [
    ({"status": "RUNNING", "done": 40}, "1 at work"), ({"status": "STALLED"}, "has not moved"),
    ({"status": "FAILED", "Error": "disk full"}, "failed: disk full"),
    ({"status": "INTERRUPTED"}, "the same command goes on"),
    ({"status": "RUNNING", "done": 40, "age": 500}, "no sign of life"),
    ({"status": "COMPLETE"}, "All is well: 1 complete"),
    ({"status": "RUNNING", "share": "100"}, "All is well: 1 complete")])
def test_the_first_line_says_whether_it_is_well(tmp_path, state, words):
    progress(tmp_path / "job", title="Job", **state)
    text = page(tmp_path)
    verdict = Elements(re.search('id="verdict".*?</section>', text, re.S)[0]).text
    assert words in verdict
    works = state["status"] in ("RUNNING", "STALLED") and "share" not in state
    assert ("data-reload" in text.partition(">")[2].partition(">")[0]) == works


def test_any_part_may_be_missing(tmp_path):
    assert "Nothing here yet" in page(tmp_path)
    training(tmp_path / "t")
    for name, words in (("samples.npz", "No videos yet"), ("metrics.json", "No evaluation yet"),
                        ("history.json", "No loss curve yet"), ("run.json", "complete"),
                        ("PROGRESS.txt", "Nothing here yet")):
        (tmp_path / "t" / name).unlink()
        assert words in page(tmp_path), name


@pytest.mark.parametrize("name", ["PROGRESS.txt", "run.json", "history.json", "metrics.json",
                                  "samples.npz", "checkpoint_00064.npz", "dataset.npz",
                                  "checkpoints.jsonl"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "zeros", "pipe"])
def test_damage_costs_only_what_is_damaged(results, name, damage):
    path = next(path for path in (results / "magvit_training" / name, results / name)
                if path.exists())
    content = path.read_bytes()
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes({"empty": b"", "cut": content[:len(content) // 2],
                          "noise": np.random.default_rng(1).bytes(5000),
                          "zeros": bytes(len(content))}[damage])
    text = page(results)
    assert "could not be drawn" not in text
    assert text.count("data:image/png") > 40   # the other run is there
    if damage != "pipe" and name in ("history.json", "metrics.json", "samples.npz"):
        assert name in Elements(text).text, "it says what it could not read"


@pytest.mark.parametrize("name, content", [
    ("history.json", '{"a": 1}'), ("history.json", "[1, null, [], {}]"),
    ("history.json", '[{"step": "x"}, {"step": 1, "train_loss": "NaN", "phase": []}]'),
    ("history.json", '[{"step": 1, "train_loss": NaN, "validation_loss": Infinity}]'),
    ("history.json", '[{"step": 1e308, "train_loss": -1}, {"step": -1e308, "train_loss": 1e300}]'),
    ("history.json", "[" * 100_000), ("metrics.json", "[]"), ("metrics.json", '{"tokenizer": 3}'),
    ("metrics.json", '{"tokenizer": {"psnr_db": "high", "new": [1]}, "new": {"a": {}}}'),
    ("metrics.json", '{"classification": {"classes": ["a"], "confusion_true_by_guessed": [[1, '
     '2]]}}'),
    ("metrics.json", '{"classification": {"classes": 5, "confusion_true_by_guessed": "no"}}'),
    ("metrics.json", '{"prediction": {"model": {"error_px": NaN, "by_horizon": [null, "x", '
     'NaN]}}}'),
    ("metrics.json", '{"generation": {"judged_right_by_class": [1]}, "warnings": {"a": 1}}'),
    ("run.json", '{"settings": [1]}'), ("run.json", "7")])
def test_foreign_content_costs_only_itself(results, name, content):
    (results / "magvit_training" / name).write_text(content)
    text = page(results)
    assert "Predicted" in text and "Reconstructed" in text and "Some of the videos" in text


@pytest.mark.parametrize("arrays", [
    {"real": videos(4), "reconstructed": videos(5)},
    {"real": videos(0), "reconstructed": videos(0)},
    {"real": np.zeros(3)}, {"predicted": videos(2)}, {"predicted_truth": None},
    {"real": None, "reconstructed": None}, {"given": 99}, {"given": np.zeros(3)},
    {"generated": np.zeros((2, 8, 1, 32, 32), np.uint8)}, {"generated_labels": np.array([-5] * 8)},
    {"predicted": np.zeros((6, 8, 1, 32, 32), np.uint8)}, {"real": np.array([{}], object)},
    {"step": np.array("x")}, {"given": np.array("x")}, {"given": -3}, {"classes": np.arange(3)}])
def test_foreign_samples_cost_only_themselves(results, arrays):
    samples(results / "magvit_training" / "samples.npz", **arrays)
    text = page(results)
    assert "could not be drawn" not in text and "Loss" in text and "Some of the videos" in text


def test_videos_of_any_shape(tmp_path):
    shapes = {"one": (1, 1, 1, 1, 1), "wide": (3, 5, 3, 16, 200), "long": (2, 100, 1, 16, 16),
              "four": (3, 8, 20, 20), "five": (2, 4, 5, 8, 8), "large": (1, 16, 3, 512, 512)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        np.savez_compressed(tmp_path / f"{name}.npz", videos=rng.integers(0, 255, shape, np.uint8))
    np.savez(tmp_path / "floats.npz", videos=np.random.rand(2, 4, 1, 8, 8), labels=[7, 7])
    np.savez(tmp_path / "nothing.npz", other=np.zeros(3))
    (tmp_path / "a_damaged.npz").write_bytes(b"PK")
    text = Elements(page(tmp_path)).text
    for name in [*shapes, "floats"]:
        assert f"{name}.npz" in text
    assert "nothing.npz: there is no array named videos" in text
    assert "16 of 100 frames" in text and "class 7" in text and "could not be drawn" not in text


def test_a_broken_generator_is_seen(tmp_path, generated):
    with np.load(generated / "checkpoint_00000.npz") as archive:
        arrays = dict(archive)
    for name, change, words in (
            ("moved", {"trajectory_2d": arrays["trajectory_2d"] + 3}, "px from where"),
            ("blank", {"videos": arrays["videos"] * 0}, "100.0 % of the frames show nothing"),
            ("still", {"videos": arrays["videos"][:, :1].repeat(8, 1)}, "nothing moves"),
            ("uneven", {"labels": np.minimum(arrays["labels"], 1)}, "classes are uneven"),
            ("few", {"labels": arrays["labels"] // 2}, "only 2 of the 4 classes")):
        progress(tmp_path / name, title="Dataset generation", unit="samples")
        np.savez_compressed(tmp_path / name / "checkpoint_00000.npz", **{**arrays, **change})
        assert "Worth a look" in page(tmp_path / name) and words in page(tmp_path / name), name


def test_a_figure_that_does_not_beat_its_baseline_is_seen(tmp_path):
    training(tmp_path)
    metrics = json.loads(json.dumps(METRICS))
    metrics["prediction"]["model"]["error_px"] = 4.0
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = Elements(page(tmp_path)).text
    assert "Worth a look" in text and "does not beat nearest training video (3 px)" in text


def test_an_evaluation_belongs_to_its_training(tmp_path):
    training(tmp_path / "t")
    (tmp_path / "t" / "evaluation").mkdir()
    (tmp_path / "t" / "metrics.json").rename(tmp_path / "t" / "evaluation" / "metrics.json")
    text = page(tmp_path)
    assert text.count('<section class="card"') == 1 and "31.5 dB" in text


def test_loss_curves_mark_restarts_and_checkpoints(tmp_path):
    training(tmp_path)
    (tmp_path / "checkpoint_00040.pt").write_bytes(b"x")
    text = page(tmp_path)
    assert text.count('class="plot" ') == 3   # two phases, and the error by horizon
    assert "restarted before step 40" in text and "checkpoint_00040.pt" in text
    assert "loss, log scale" in text


def test_restarts_are_marked_from_what_progress_says(tmp_path):
    training(tmp_path)
    path = tmp_path / "PROGRESS.txt"
    path.write_text(path.read_text() + "Restarts: 20, 55\n")
    text = page(tmp_path)
    assert "restarted at step 20" in text and "restarted at step 55" in text


def test_shards_are_one_data_set(tmp_path):
    for part in (1, 2, 3):
        run("generate.py", "--n", 48, "--every", 8, "--out", tmp_path / "results", "--shard",
            f"{part}/3")
    text = page(tmp_path / "results")
    assert text.count('<section class="card"') == 1
    assert "48 of 48 samples" in text and "shard_2_of_3" in text and text.count("<td>12</td>") == 4
    report_of = tmp_path / "results" / "shard_1_of_3" / "PROGRESS.txt"
    whole = report_of.read_text()
    report_of.write_text(re.sub("Heartbeat: .*", f"Heartbeat: {time.time():.0f}", whole.replace(
        "COMPLETE", "RUNNING").replace("16/16 samples (100%)", "16/16 samples (99.9%)")))
    progress(tmp_path / "results/shard_3_of_3", "Dataset generation", "FAILED", 8, 16, "samples",
             Error="disk full")
    text = page(tmp_path / "results")
    assert "shard_3_of_3: disk full" in text and "data-reload" in text.partition("<head>")[0]
    assert "40 of 48 samples" in text and "99.9%" in text
    shutil.rmtree(tmp_path / "results" / "shard_2_of_3")
    assert "2 of 3 shards" in page(tmp_path / "results")


def test_two_runs_compared(tmp_path):
    for name, preset in (("run_a", "tiny"), ("run_b", "small")):
        training(tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps({"settings": {"preset": preset}}))
    done = run("report.py", tmp_path / "run_a", tmp_path / "run_b")
    assert done.stdout.startswith(str(tmp_path / "compare.html"))
    text = (tmp_path / "compare.html").read_text()
    table = re.search('id="compared".*?</section>', text, re.S)[0]
    assert "run_a" in table and "run_b" in table and table.count('class="plot"') == 2
    assert "preset (setting)" in table and "small" in table and table.count("31.5 dB") == 2
    assert "Trainings side by side" in page(tmp_path), "also on the page of their directory"


def without_times(text):
    text = re.sub(r'data-(made|t|at|ended)="\d+"|datetime="[^"]*"', "", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "", text)


def test_a_copy_elsewhere_gives_the_same_page(results, tmp_path):
    shutil.copytree(results, tmp_path / "laptop" / "results")
    here, there = page(results), page(tmp_path / "laptop" / "results")
    assert without_times(here) == without_times(there)
    assert (results / "report.png").read_bytes() == \
        (tmp_path / "laptop" / "results" / "report.png").read_bytes()


def test_a_large_set_is_not_read_whole(tmp_path):
    if not os.path.exists("/proc/self/status"):
        missing("/proc, for the peak memory of this process alone")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib, report\n"
            "report.write_report(pathlib.Path(sys.argv[1]))\n"
            "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])")
    peaks = []
    for n in (400, 24_000):   # 3 and 200 MB of videos
        out = tmp_path / str(n)
        out.mkdir()
        made = np.zeros((n, 8, 1, 32, 32), np.uint8)
        made[:, :, :, 10:14, 10:14] = 200
        np.savez_compressed(out / "dataset.npz", videos=made, labels=np.arange(n) % 4,
                            trajectory_3d=np.zeros((n, 8, 3), np.float32))
        began = time.monotonic()
        peaks.append(int(subprocess.check_output([sys.executable, "-c", code, out])))
        took = time.monotonic() - began
    assert took < 20 and f"{n // 4:,}" in (out / "report.html").read_text()
    assert peaks[1] < peaks[0] + 20_000, peaks   # kB


# ---- videos of any .npz, and animated PNGs

def test_predictions_beside_what_they_were_made_from(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (6, 8, 1, 16, 16), np.uint8)
    np.savez(tmp_path / "made.npz", videos=truth, labels=np.arange(6) % 4)
    guess = truth.copy()
    guess[:, 4:] = guess[:, 4:] // 8 * 8
    np.savez(tmp_path / "predicted.npz", videos=guess)
    np.savez(tmp_path / "other.npz", videos=rng.integers(0, 255, (6, 8, 1, 16, 16), np.uint8))
    names = [tmp_path / name for name in ("made.npz", "predicted.npz", "other.npz")]
    done = run("report.py", *names, "--strip", tmp_path / "strip.png")
    assert f"{tmp_path}/made.html" in done.stdout and f"{tmp_path}/strip.png" in done.stdout
    text = (tmp_path / "made.html").read_text()
    assert "made.npz and predicted.npz" in text and "made.npz and other" not in text
    assert text.count('class="set"') == 6 and text.count('class="ticks"') == 6
    assert "data-reload" not in text.partition("<head>")[0]
    assert len(decoded(tmp_path / "strip.png")) == 8


@pytest.mark.parametrize("arguments, code", [
    (["nowhere"], 2), (["nowhere.npz"], 2), (["there.npz"], 1), (["code.npz"], 1), (["."], 1),
    ([".", "there.npz"], 2), (["--wrong"], 2), (["good.npz", "--strip", "taken.png"], 1),
    (["good.npz", "--strip", "no/such/place.png"], 1)])
def test_what_cannot_be_done_is_one_line(tmp_path, arguments, code):
    (tmp_path / "there.npz").write_bytes(b"PK")
    (tmp_path / "taken.png").write_bytes(b"a photograph")
    (tmp_path / "report.html").write_text("<h1>my thesis</h1>")
    np.savez(tmp_path / "code.npz", videos=np.array([print], object))
    np.savez(tmp_path / "good.npz", videos=videos(2))
    run("report.py", *arguments, code=code, cwd=tmp_path)
    assert (tmp_path / "taken.png").read_bytes() == b"a photograph"
    assert (tmp_path / "report.html").read_text() == "<h1>my thesis</h1>"


def decoded(path):
    """The frames (H, W, C) of a PNG of ours; every length, checksum and number is checked."""
    data, at, chunks = path.read_bytes(), 8, []
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + length]
        total = struct.unpack(">I", data[at + 8 + length:at + 12 + length])[0]
        assert total == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert chunks[0][0] == b"IHDR" and chunks[-1] == (b"IEND", b"")
    width, height, depth, colour = struct.unpack(">IIBB", chunks[0][1][:10])
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    numbers = [struct.unpack(">I", body[:4])[0] for kind, body in chunks
               if kind in (b"fcTL", b"fdAT")]
    assert depth == 8 and numbers == list(range(len(numbers)))
    frames = []
    for kind, body in chunks:
        if kind in (b"IDAT", b"fdAT"):
            lines = np.frombuffer(zlib.decompress(body[4 * (kind == b"fdAT"):]), np.uint8)
            lines = lines.reshape(height, 1 + width * channels)
            assert (lines[:, 0] == lines[0, 0]).all() and lines[0, 0] in (0, 2)
            rows = lines[:, 1:]
            if lines[0, 0] == 2:
                rows = np.cumsum(rows.astype(np.uint64), 0).astype(np.uint8)
            frame = rows.reshape(height, width, channels)
            if colour == 3:
                palette = np.frombuffer(dict(chunks)[b"PLTE"], np.uint8).reshape(-1, 3)
                frame = palette[frame[..., 0]]
            frames.append(frame)
    if len(frames) > 1:
        assert struct.unpack(">II", dict(chunks)[b"acTL"]) == (len(frames), 0)
    return frames


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_holds_the_pixels(tmp_path, channels):
    rng = np.random.default_rng(channels)
    frames = rng.integers(0, 256, (5, 7, 9, channels), np.uint8)
    for content in (frames, frames[:1]):
        (tmp_path / "a.png").write_bytes(report.png(content))
        assert np.array_equal(np.stack(decoded(tmp_path / "a.png")), content)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_strip_shows_the_videos_enlarged_without_blur(tmp_path, channels):
    made = np.random.default_rng(0).integers(0, 251, (3, 8, channels, 32, 32), np.uint8)
    (tmp_path / "a.png").write_bytes(report.strip([("predicted", made, 4)]))
    frames = decoded(tmp_path / "a.png")
    assert len(frames) == 8
    for t in (0, 5):
        large = made[1, t, -1].repeat(2, 0).repeat(2, 1)
        window = np.lib.stride_tricks.sliding_window_view(frames[t][..., 2], (64, 64))
        assert (window == large).all((2, 3)).sum() == 1
        edge = report.PALETTE[report.SKY if t < 4 else report.ORANGE]
        assert (frames[t] == edge).all(2).any() and frames[t].shape[2] == 3


# ---- what the stages call

def test_the_page_is_that_of_the_topmost_directory_of_ours(tmp_path):
    (tmp_path / "results/magvit_training/evaluation").mkdir(parents=True)
    (tmp_path / "results/shard_1_of_2").mkdir()
    at = report.top_of
    assert at(tmp_path / "results/magvit_training") == tmp_path / "results/magvit_training"
    assert at(tmp_path / "results/shard_1_of_2") == tmp_path / "results"
    (tmp_path / "results/dataset.npz").write_bytes(b"")
    for name in ("results", "results/magvit_training", "results/magvit_training/evaluation"):
        assert at(tmp_path / name) == tmp_path / "results"
    (tmp_path / "results/dataset.npz").unlink()
    (tmp_path / "results/report.html").write_text("not ours")
    assert at(tmp_path / "results/magvit_training") == tmp_path / "results/magvit_training"
    (tmp_path / "results/report.html").unlink()
    page(tmp_path / "results")
    assert at(tmp_path / "results/magvit_training") == tmp_path / "results"


def test_refresh_makes_the_page_and_then_waits(results, monkeypatch):
    monkeypatch.setattr(report, "_next", 0)
    report.refresh(results / "magvit_training")
    first = (results / "report.html").stat().st_mtime_ns
    assert not (results / "magvit_training" / "report.html").exists()
    began = time.monotonic()
    for _ in range(10_000):
        report.refresh(results / "magvit_training")
    assert (time.monotonic() - began) / 10_000 < 20e-6, "a call too early costs next to nothing"
    assert (results / "report.html").stat().st_mtime_ns == first
    report.refresh(results / "magvit_training", force=True)
    assert (results / "report.html").stat().st_mtime_ns > first


def test_refresh_takes_at_most_a_hundredth_of_the_time(tmp_path, monkeypatch):
    clock, spent, waits = [0.0], [0.0], []

    def slow(top):
        waits.append(clock[0])
        cost = 0.3 + 0.1 * (len(waits) % 5)
        clock[0] += cost
        spent[0] += cost
        if len(waits) % 3 == 0:
            raise OSError("also when it fails")
    monkeypatch.setattr(report, "_next", 0)
    monkeypatch.setattr(report, "write_report", slow)
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    while clock[0] < 5000:
        report.refresh(tmp_path)
        clock[0] += 1
    assert len(waits) > 50 and spent[0] < 0.0105 * clock[0]
    assert min(b - a for a, b in zip(waits, waits[1:])) >= 30


def test_refresh_never_raises_and_says_so_once(tmp_path, monkeypatch, capsys, small_disk):
    foreign, full, broken = tmp_path / "foreign", small_disk(1 << 16), tmp_path / "broken"
    for directory in (foreign, full, broken):
        progress(directory, title="Job")
    (foreign / "report.html").write_text("my thesis")
    (full / "filler").write_bytes(bytes(checkpointing.free_bytes(full)))
    for directory, words in ((foreign, "not made by report.py"), (full, "not saved")):
        for _ in range(3):
            report.refresh(directory, 0, force=True)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("warning: ") and words in said, said
    monkeypatch.setattr(report, "page_of", lambda found: 1 / 0)
    for _ in range(3):
        report.refresh(broken, 0, force=True)
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1
    report.refresh(tmp_path / "nowhere", force=True)
    assert capsys.readouterr().err == "" and not (tmp_path / "nowhere").exists()
    report._warned.clear()
    with open(os.devnull) as log:   # one that cannot be written
        monkeypatch.setattr(sys, "stderr", log)
        report.refresh(broken, 0, force=True)
    assert (foreign / "report.html").read_text() == "my thesis"


def test_a_short_job_makes_one_page_at_its_end(results):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, report\n"
            f"for i in range(1000): report.refresh({str(results)!r})\n"
            f"assert not os.path.exists({str(results / 'report.html')!r})\n"
            f"report.refresh({str(results)!r}, force=True)")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (results / "report.html").exists()


JOB = """
import os, signal, sys
import checkpointing, report

out, end = sys.argv[1:]
try:
    with checkpointing.Run(out, 40, every=10, suffix=".txt", title="Job") as run:
        for i in run.steps(lambda file: file.write(b"x")):
            report.refresh(out)
            if i == 25 and end == "error":
                raise ValueError("no good")
            if i == 25 and end == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
finally:
    report.refresh(out, force=True)
"""


@pytest.mark.parametrize("end, code, words", [
    ("complete", 0, "All is well: 1 complete"), ("error", 1, "failed: ValueError: no good"),
    ("signal", 143, "stopped; the same command goes on")])
def test_a_job_leaves_the_page_of_its_end(tmp_path, end, code, words):
    done = subprocess.run([sys.executable, "-c", JOB, tmp_path / "out", end], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == code and "was not made" not in done.stderr
    text = (tmp_path / "out" / "report.html").read_text()
    assert words in text and "data-reload" not in text.partition("<head>")[0]


def test_two_processes_refresh_one_page_while_it_is_read(results, tmp_path):
    """Until the reader has met 200 whole pages of at least two versions: a version is a second."""
    stop = tmp_path / "stop"
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import report\n"
            f"while not os.path.exists({str(stop)!r}): report.refresh({str(results)!r}, force=True)")
    jobs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
            for _ in range(2)]
    seen, reads, end = set(), 0, time.monotonic() + 60
    while (reads < 200 or len(seen) < 2) and time.monotonic() < end:
        if (results / "report.html").exists():
            text, reads = (results / "report.html").read_text(), reads + 1
            assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
            seen.add(text)
        time.sleep(0.001)
    stop.touch()
    assert [(job.communicate()[1], job.returncode) for job in jobs] == [(b"", 0), (b"", 0)]
    assert reads >= 200 and len(seen) >= 2 and not list(results.glob(".report*"))


def test_refresh_does_not_disturb_threads_that_read(results):
    """Training reads its data while the page is made; both take the same files."""
    threads = [threading.Thread(target=report.refresh, args=(results,), kwargs={"force": True})
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results / "report.html").read_text().endswith("</html>\n")


# ---- in a browser

class Browser:
    """Headless Chromium, spoken to through a pipe in its DevTools protocol."""

    def __init__(self, directory):
        theirs, self.to = os.pipe()
        self.come, back = os.pipe()
        line = ('exec 3<&"$0" 4>&"$1"; shift; exec chromium --headless --no-sandbox --disable-gpu '
                '--disable-dev-shm-usage --disable-background-networking --remote-debugging-pipe '
                '--user-data-dir="$1" about:blank')
        self.process = subprocess.Popen(
            ["bash", "-c", line, str(theirs), str(back), str(directory)], pass_fds=(theirs, back),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(back)
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.come], [], [], 60)[0], f"no answer to {method}"
                part = os.read(self.come, 1 << 20)
                assert part, "chromium has ended"
                self.buffer += part
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def js(self, code):
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True,
                           returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, code, what):
        """Until the code says true; while the page is being replaced there is nobody to ask."""
        def true():
            try:
                return self.js(code)
            except AssertionError:
                return False
        wait_for(true, what, 40)

    def open(self, path, width=1200, height=900, still=False, dark=False, script=True):
        self.events.clear()
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=path.as_uri())
        self.wait(f"{READY} && location.href === {json.dumps(path.as_uri())}", "the page")

    def key(self, key, code=""):
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, **text)

    def complaints(self):
        """Errors, warnings and requests that are no data of the page itself."""
        bad = [event for event in self.events if event["method"] in (
            "Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")]
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]
        return bad + [url for url in asked if not url.startswith(("data:", "file:///"))] + [
            url for url in asked if url.startswith("file:") and not url.endswith(".html")]

    def close(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        missing("chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


FRAME = "document.getElementById('at').textContent"
READY = "document.readyState === 'complete' && document.body !== null"
BUTTON = "document.getElementById('play').textContent"
SHIFT = "getComputedStyle(document.querySelector('.v img')).transform"


def test_it_plays_stops_and_steps(results, browser):
    page(results)
    browser.open(results / "report.html")
    seen = {browser.js(f"new Promise(done => setTimeout(() => done({SHIFT}), 130))")
            for _ in range(12)}
    assert len(seen) > 3, "the videos move"
    browser.js("document.body.focus()")
    browser.key(" ", "Space")
    at = browser.js(FRAME)
    time.sleep(0.5)
    assert browser.js(FRAME) == at and browser.js(BUTTON) == "Play"
    browser.key("ArrowRight")
    assert int(browser.js(FRAME).split()[0]) == int(at.split()[0]) % 8 + 1
    browser.key("ArrowLeft")
    assert browser.js(FRAME) == at
    assert browser.js("getComputedStyle(document.querySelector('.path')).display") == "none"
    browser.key("p")
    assert browser.js("getComputedStyle(document.querySelector('.path')).display") == "block"
    browser.key("f")
    assert browser.js("document.querySelector('.v').clientWidth") == 8 * 96
    browser.js("document.getElementById('play').click()")
    wait_for(lambda: browser.js(FRAME) != at, "it to go on", 30)
    assert not browser.complaints()


def test_enlarged_pixels_are_whole(results, browser):
    page(results)
    browser.open(results / "report.html")
    style = "getComputedStyle(document.querySelector('.v img')).imageRendering"
    assert browser.js(style) == "pixelated"
    assert browser.js("document.querySelector('.v').clientWidth") == 96   # 3 x 32


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_no_page_is_wider_than_its_window(results, browser, width):
    page(results)
    for dark in (False, True):
        browser.open(results / "report.html", width=width, dark=dark)
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        colours = "(one => [one.color, one.backgroundColor])(getComputedStyle(document.body))"
        ink, back = (sum(map(int, re.findall(r"\d+", colour)[:3]))
                     for colour in browser.js(colours))
        assert (ink > back) == dark and abs(ink - back) > 450


def test_no_motion_where_none_is_wanted(results, browser):
    page(results)
    browser.open(results / "report.html", still=True)
    at = browser.js(FRAME)
    time.sleep(0.7)
    assert browser.js(FRAME) == at
    assert browser.js(BUTTON) == "Play"
    browser.js("document.getElementById('play').click()")   # but who asks for it gets it
    wait_for(lambda: browser.js(FRAME) != at, "it to play", 30)
    browser.js("document.getElementById('play').click()")


def test_without_script_the_first_frames_show(results, browser):
    page(results)
    browser.open(results / "report.html", script=False)
    shot = browser.call("Page.captureScreenshot", format="png")["data"]
    try:
        assert browser.js("document.documentElement.classList.contains('js')") is False
        assert browser.js(SHIFT) in ("none", "matrix(1, 0, 0, 1, 0, 0)")
        assert browser.js("[...document.images].every(one => one.complete && one.naturalWidth)")
        assert browser.js("document.querySelectorAll('svg.plot').length") > 4
        assert "Script is off" in browser.js("document.body.innerText")
        assert "UTC" in browser.js("document.querySelector('header time').textContent")
        assert len(base64.b64decode(shot)) > 10_000
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_it_looks_again_while_something_works_and_keeps_its_place(results, browser, monkeypatch):
    monkeypatch.setattr(report, "RELOAD", 1)
    progress(results / "magvit_training", status="RUNNING", done=40)
    page(results)
    browser.open(results / "report.html", height=500)
    browser.js("sessionStorage.clear(); window.first = true; "
               "document.getElementById('paths').click();"
               "document.getElementById('play').click(); "
               "document.querySelector('details').open = true")
    middle = "[...document.querySelectorAll('section')].pop().getBoundingClientRect().top"
    browser.js("scrollTo(0, 900)")
    place, at = browser.js(middle), browser.js(FRAME)
    progress(results / "magvit_training", status="RUNNING", done=50)
    page(results)
    browser.wait(f"{READY} && window.first === undefined", "it to look again")
    assert "50.0%" in browser.js("document.title")
    assert abs(browser.js(middle) - place) < 3
    assert browser.js("document.documentElement.classList.contains('paths')")
    assert browser.js("document.querySelector('details').open")
    assert browser.js(FRAME) == at and browser.js(BUTTON) == "Play"

    progress(results / "magvit_training", status="COMPLETE", done=100)
    page(results)
    browser.wait(f"{READY} && !document.documentElement.dataset.reload", "the last look")
    browser.js("window.last = true")
    time.sleep(2.5)
    assert browser.js("window.last") and "complete" in browser.js("document.body.innerText")
    assert not browser.complaints()


def test_old_news_turn_into_a_warning(results, browser, monkeypatch):
    progress(results / "magvit_training", status="RUNNING", done=40)
    page(results)
    browser.open(results / "report.html")
    words = browser.js("document.querySelector('header time').textContent")
    assert "s ago" in words or words == "just now"
    assert browser.js("document.querySelector('.stale').hidden")
    past = time.time() - 3000
    monkeypatch.setattr(report.time, "time", lambda: past)
    progress(results / "magvit_training", status="RUNNING", done=40)
    page(results)
    browser.open(results / "report.html")
    assert "50 min ago" in browser.js("document.querySelector('header time').textContent")
    assert "50 min old" in browser.js("document.querySelector('.stale').innerText")
    assert browser.js("document.querySelector('.verdict.warn, .verdict.bad') !== null")
