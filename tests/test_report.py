"""The page: what its facts say, and what it promises to who opens it and to the stages.

The facts are one dict (report.gather), which is what most tests read; a browser reads the rest.
"""
import base64
import fcntl
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, missing, run

import checkpointing
import report
from checkpointing import CheckpointError

CLASSES = ("linear", "circular", "helical", "parabolic")
HOSTILE = "<img src=x onerror=alert(1)>\"'</script></style><script>alert(1)</script>&amp;{{facts}}"


# ---- what there is to show

def clips(n, frames=8, size=32, channels=1):
    """A bright square that moves a pixel a frame."""
    made = np.zeros((n, frames, channels, size, size), np.uint8)
    for i in range(n):
        for t in range(frames):
            made[i, t, :, 5 + i % 8:10 + i % 8, 4 + t:9 + t] = 200 + i
    return made


def generated(out, first=0):
    """A run of three pieces, as generate.py leaves it."""
    with checkpointing.Run(out, 48, every=16, first=first, suffix=".npz", unit="samples",
                           title="Dataset generation", settings={"seed": 42}, quiet=True) as job:
        for piece in job.pieces():
            numbers, file = list(piece), io.BytesIO()
            np.savez_compressed(file, videos=clips(len(numbers)), labels=np.array(numbers) % 4)
            piece.save(file.getvalue())


def progress(out, status="COMPLETE", title="MAGVIT training", done=100, age=0, lock=True, **more):
    """A run directory with a PROGRESS.txt; with a lock that nobody holds, unless it is a copy."""
    out.mkdir(parents=True, exist_ok=True)
    beat, share = int(time.time()) - age, "100" if status == "COMPLETE" else f"{done:.1f}"
    fields = {"Status": status, "Progress": f"{done}/100 steps ({share}%)", "Interval": "30 s",
              "Checkpoint": "90 (checkpoint_90.pt)", "Rate": "2.5 steps/s", "Heartbeat": beat,
              "ETA": "90 s (2026-01-25 01:22:40 UTC)", "Host": "far",
              "Command": f"python train_magvit.py --out {out.name}", **more}
    text = "\n".join([title, *(f"{key}: {value}" for key, value in fields.items())])
    (out / "PROGRESS.txt").write_text(text + "\n")
    if lock:
        (out / ".lock").touch()


ROW = {"value": 1.0, "baseline": 0.5, "baseline_text": "17.1 dB", "baseline_words": "a blank video"}
METRICS = {
    "rows": [{**ROW, "group": "Tokenizer", "key": "psnr_db", "words": "PSNR", "text": "31.5 dB",
              "beaten": True},
             {**ROW, "group": "Generation", "key": "judged_right", "words": "judged right",
              "text": "60.0 %", "beaten": None}],
    "classification": {"classes": CLASSES, "confusion_true_by_guessed": [[9, 1, 0, 0]] * 4},
    "warnings": ["the tokenizer is worse than a blank video: skill -3.97"]}


def history(best):
    return [{"phase": phase, "step": first + 10 * i, "train_loss": 9 / i,
             "validation_loss": 1 + abs(i - best), "learning_rate": 1e-3 / i}
            for phase, first in (("tokenizer", 0), ("transformer", 60)) for i in range(1, 7)]


def samples(path, **more):
    arrays = {"real": clips(8), "reconstructed": clips(8), "generated": clips(8),
              "generated_labels": np.arange(8) % 4, "predicted": clips(6), "given": 4, "step": 60,
              "predicted_truth": clips(6), "classes": np.array(CLASSES), **more}
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})


def training(out, preset="tiny", best=4, **more):
    progress(out, **more)
    (out / "run.json").write_text(json.dumps({"settings": {"seed": 0, "preset": preset}}))
    (out / "history.json").write_text(json.dumps(history(best)))
    (out / "metrics.json").write_text(json.dumps(METRICS))
    samples(out / "samples.npz")


@pytest.fixture
def results(tmp_path):
    """A data set, and a training of it."""
    generated(tmp_path / "results")
    training(tmp_path / "results" / "magvit_training")
    return tmp_path / "results"


def facts_of(source):
    """The facts of a directory, or in a page that was written, and the cards by name."""
    inside = r'<script type="application/json" id="facts">(.*?)</script>'
    facts = report.gather([source]) if source.is_dir() else json.loads(
        re.search(inside, source.read_text(), re.S)[1])
    return facts, {card["name"]: card for card in facts["cards"]}


def pixels(uri):
    """uint8 (H, W, C) of a PNG of ours; its checksums are seen by a browser."""
    data = base64.b64decode(uri.partition("base64,")[2])
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    lines = np.frombuffer(zlib.decompressobj().decompress(data[41:]), np.uint8).reshape(height, -1)
    assert data[37:41] == b"IDAT" and depth == 8 and not lines[:, 0].any(), "no filter"
    return lines[:, 1:].reshape(height, width, {0: 1, 2: 3}[colour])


# ---- the facts

def test_what_a_run_says(results):
    training = results / "magvit_training"
    (training / "evaluation").mkdir()       # what it holds belongs to the training
    (training / "metrics.json").rename(training / "evaluation" / "metrics.json")
    facts, cards = facts_of(results)
    assert list(cards) == ["magvit_training", "."] and not facts["notes"], "data come last"
    card = cards["magvit_training"]
    assert (card["state"], card["percent"], card["done"]) == ("COMPLETE", "100%", 100)
    pairs = dict(card["pairs"])
    assert pairs["Command"] == "python train_magvit.py --out magvit_training"
    assert pairs["Saved"] == "90 (checkpoint_90.pt)" and pairs["Host"] == "far"
    for when in ("Started", "Last written"):
        assert abs(pairs[when] - time.time()) < 600
    one, two = card["history"]
    assert (one["phase"], one["best"], one["lowest"]) == ("tokenizer", 40, 1)
    assert two["steps"] == [70, 80, 90, 100, 110, 120] and two["train"][1] == 4.5
    assert [(row["text"], row["beaten"]) for row in card["rows"]] == [
        ("31.5 dB", True), ("60.0 %", None)], "as evaluation says"
    assert card["confusion"]["names"] == list(CLASSES)
    assert card["warnings"] == METRICS["warnings"]


def test_videos_are_rows_of_one_picture(results):
    facts, cards = facts_of(results)
    films = {film["title"]: film for film in cards["magvit_training"]["films"]}
    assert list(films) == ["Reconstructed", "Predicted", "Generated"]
    film = films["Reconstructed"]
    assert (film["columns"], film["frames"]) == (["real", "reconstructed", "error"], 8)
    assert film["sets"][0] == ["120.0 dB", ""] and film["words"] == "at step 60"
    sheet = pixels(facts["sheets"][film["sheet"]])
    assert sheet.shape == (8 * 32, 3 * 8 * 32, 1)
    assert (sheet[64:96, 5 * 32:6 * 32] == clips(8)[2, 5].transpose(1, 2, 0)).all()
    assert films["Predicted"]["given"] == 4 and films["Predicted"]["columns"][1] == "predicted"
    assert [group for _, group in films["Generated"]["sets"]][::2] == list(CLASSES)
    data, = cards["."]["films"]
    assert "linear 12, circular 12, helical 12, parabolic 12" in data["words"]
    assert [group for _, group in data["sets"]] == [name for name in CLASSES for _ in range(9)]


def test_what_goes_on_stands_first_then_what_needs_somebody(tmp_path):
    training(tmp_path / "done")
    generated(tmp_path / "data")
    progress(tmp_path / "failed", "FAILED", age=100, Error="disk full")
    progress(tmp_path / "dead", "RUNNING", done=9)      # nobody holds its lock
    progress(tmp_path / "silent", "RUNNING", age=500, lock=False)
    progress(tmp_path / "stopped", "INTERRUPTED", age=600)
    progress(tmp_path / "copy", "RUNNING", done=9, age=60, lock=False)
    progress(tmp_path / "works", "RUNNING", done=40, age=700, **{"Train loss": "2.4"})
    for left in ("dead/.checkpoint_00064.pt.12-00000000.tmp", "done/checkpoint_00064.pt.corrupt"):
        (tmp_path / left).touch()
    with open(tmp_path / "works" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        facts, cards = facts_of(tmp_path)
    assert [(name, card["state"]) for name, card in cards.items()] == [
        ("copy", "RUNNING"), ("works", "RUNNING"), ("dead", "DEAD"), ("failed", "FAILED"),
        ("silent", "SILENT"), ("stopped", "INTERRUPTED"), ("done", "COMPLETE"),
        ("data", "COMPLETE")]
    assert facts["first"] == [cards["done"]["id"]], "whose pictures are shown at the top"
    assert cards["failed"]["error"] == "disk full"
    assert cards["dead"]["command"] == "python train_magvit.py --out dead"
    assert (cards["works"]["left"], cards["works"]["percent"]) == (90, "40.0%")
    assert ["Train loss", "2.4"] in cards["works"]["pairs"], "before the first epoch ends"
    assert sorted(facts["notes"]) == [
        "dead: 1 half-written files, which the next start removes (*.tmp)",
        "done: 1 failed their check and were set aside (*.corrupt)"]


def test_shards_are_one_row(tmp_path):
    for i in (1, 2, 10):
        generated(tmp_path / f"shard_{i}_of_10", first=48 * i)
    card, = facts_of(tmp_path)[0]["cards"]
    assert (card["done"], card["total"], card["state"]) == (144, 144, "COMPLETE")
    assert card["title"] == "Dataset generation, 3 of 10 shards"
    assert [shard["name"] for shard in card["shards"]] == [f"shard_{i}_of_10" for i in (1, 2, 10)]
    progress(tmp_path / "shard_10_of_10", "FAILED", "Dataset generation", 8, Error="disk full")
    card, = facts_of(tmp_path)[0]["cards"]
    assert (card["state"], card["error"], card["percent"]) == ("FAILED", "disk full", "53.1%")


def test_two_trainings_are_compared_settings_that_differ_first(tmp_path):
    training(tmp_path / "run_a")
    training(tmp_path / "run_b", "small", best=2)
    done = run("report.py", tmp_path / "run_a", tmp_path / "run_b")
    assert done.stdout.startswith(str(tmp_path / "compare.html"))
    table = facts_of(tmp_path / "compare.html")[0]["compared"]
    assert [os.path.basename(name) for name in table["names"]] == ["run_a", "run_b"]
    assert [row[:3] for row in table["rows"]] == [
        ["Settings", "preset", ["tiny", "small"]],
        ["Best validation loss", "tokenizer", ["1, step 40", "1, step 20"]],
        ["Best validation loss", "transformer", ["1, step 100", "1, step 80"]],
        ["Pace", "Rate", ["2.5 steps/s"] * 2], ["Tokenizer", "PSNR", ["31.5 dB"] * 2],
        ["Generation", "judged right", ["60.0 %"] * 2]]
    assert facts_of(tmp_path)[0]["compared"], "also on the page of their directory"


FOREIGN = b'{"settings": [1], "rows": [1, {}, {"group": 1}], "warnings": {"a": 1}}'


@pytest.mark.parametrize("damage", ["cut", "noise", "foreign"])
@pytest.mark.parametrize("name", [
    "magvit_training/PROGRESS.txt", "magvit_training/run.json", "magvit_training/history.json",
    "magvit_training/metrics.json", "magvit_training/samples.npz", "checkpoint_00016.npz",
    "made.npz", "checkpoints.jsonl"])
def test_damage_costs_only_what_is_damaged(results, name, damage):
    np.savez_compressed(results / "made.npz", videos=clips(4))
    path, content = results / name, (results / name).read_bytes()
    path.write_bytes({"cut": content[:len(content) // 2], "foreign": FOREIGN,
                      "noise": np.random.default_rng(1).bytes(5000)}[damage])
    report.write([results])
    facts, cards = facts_of(results / "report.html")
    assert {"magvit_training", "."} <= cards.keys()
    card = cards["magvit_training" if path.parent == results else "."]
    assert card["state"] == "COMPLETE" and card["films"] and card["settings"]
    if name.endswith(".npz") or name.endswith(".json") and damage != "foreign":
        assert sum(path.name in note for note in facts["notes"]) == 1, "and it is named, once"


def test_it_plays_any_videos_their_classes_called_what_the_set_says(tmp_path):
    """From the command line, where numpy is enough."""
    for name, shape in (("wide", (3, 5, 3, 16, 200)), ("five", (2, 4, 5, 8, 8)),
                        ("large", (1, 16, 3, 512, 512))):
        np.savez_compressed(tmp_path / f"{name}.npz", videos=np.full(shape, 7, np.uint8), given=3)
    known = [("ours", {"made_by": np.array("{}")}, "circular"), ("numbers", {}, "class 1"),
             ("named", {"class_names": np.array(["up", "<b>"])}, "<b>")]
    for name, more, _ in known:
        np.savez(tmp_path / f"{name}.npz", videos=np.ones((1, 8, 1, 8, 8)), labels=[1], **more)
    done = subprocess.run([sys.executable, "-c", "import sys; sys.modules['torch'] = None\n"
                           "import report; report.main()", *tmp_path.glob("*.npz")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ".html: " in done.stdout, done.stderr
    facts, cards = facts_of(next(tmp_path.glob("*.html")))
    films = {Path(name).stem: film for name, card in cards.items() for film in card["films"]}
    assert len(films) == 6 and films["wide"]["given"] == 3 and films["ours"]["given"] == 0
    for film in films.values():
        assert pixels(facts["sheets"][film["sheet"]]).shape[:2] == (
            len(film["sets"]) * film["height"], min(film["of"], 16) * film["width"])
    for name, _, words in known:
        assert films[name]["sets"] == [["", words]]


# ---- the page that is written

def test_nothing_comes_from_elsewhere():
    template = (ROOT / "report_template.html").read_text()
    assert "default-src 'none'; img-src data:" in template
    outside = template.replace("http://www.w3.org/2000/svg", "")
    for word in ("://", "url(", "@import", "src=", "innerHTML", "insertAdjacent", "eval("):
        assert word not in outside, word


def test_a_page_of_forty_noisy_runs_travels(tmp_path):
    """Noise does not compress: the worst case for the size."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 8, 3, 64, 64), np.uint8)
    training(tmp_path / "run_0")
    samples(tmp_path / "run_0" / "samples.npz", real=noise[:12], reconstructed=noise[12:],
            generated=noise, generated_labels=np.arange(24) % 4)
    (tmp_path / "run_0" / "history.json").write_text(json.dumps(history(4) * 400))
    for i in range(1, 40):
        shutil.copytree(tmp_path / "run_0", tmp_path / f"run_{i}")
    page = report.write([tmp_path])
    assert page.stat().st_size < 2_000_000
    facts, cards = facts_of(page)
    assert len(cards) == 40 and all(card["history"] for card in facts["cards"])
    assert all(film["sets"] for film in facts["cards"][0]["films"])


@pytest.mark.parametrize("paths, code, words", [
    (["nowhere"], 2, "nowhere: no such file"), (["there.npz"], 1, "there.npz"),
    (["code.npz"], 1, "videos cannot be shown"), ([".", "there.npz"], 2, "not both"),
    (["."], 1, "report.html exists and was not made by report.py; it is left alone")])
def test_what_cannot_be_done_is_one_line(tmp_path, paths, code, words):
    (tmp_path / "there.npz").write_bytes(b"PK")
    (tmp_path / "report.html").write_text("<h1>my thesis</h1>")
    np.savez(tmp_path / "code.npz", videos=np.array([print], object))
    with pytest.raises(CheckpointError, match=words) as error:
        report.write([tmp_path / path for path in paths])
    assert error.value.exit_code == code and "\n" not in str(error.value)
    assert (tmp_path / "report.html").read_text() == "<h1>my thesis</h1>"


# ---- what the stages call

def test_the_page_is_that_of_the_topmost_directory_of_ours(tmp_path):
    top, at = tmp_path / "results", report.top_of
    evaluation = top / "magvit_training" / "evaluation"
    evaluation.mkdir(parents=True)
    (top / "report.html").write_text("not ours")
    assert at(evaluation.parent) == evaluation.parent and at(top / "shard_1_of_2") == top
    (top / "report.html").write_bytes(report.MARK)
    assert at(top) == at(evaluation.parent) == at(evaluation) == top


def test_refresh_never_raises_says_so_once_and_is_not_made_at_each_step(tmp_path, capsys):
    progress(tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    page.write_text("my thesis")
    for _ in range(3):
        report.refresh(tmp_path / "run", force=True)
        report.refresh(tmp_path / "refused, so never begun", force=True)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: the page of "), said
    assert page.read_text() == "my thesis"
    page.unlink()
    report.refresh(tmp_path / "run")
    assert not page.exists(), "so soon after the one before"
    report.refresh(tmp_path / "run", force=True)
    assert page.exists(), "the end is always shown"


# ---- in a browser

def browsed(page, script, seconds=2):
    """What the script answers, run behind the page's own in Chromium after so many seconds of its
    clock, which runs faster than ours. Nothing may be complained of in its console."""
    if not shutil.which("chromium"):
        missing("chromium")
    asked = """<script>setTimeout(async () => {
            const answer = await (async () => { %s })(), box = document.createElement("pre");
            box.id = "answer";
            box.textContent = encodeURIComponent(JSON.stringify(answer));
            document.body.append(box);
        }, %d)</script></body>""" % (script, 1000 * seconds)
    (page.parent / "browsed.html").write_text(page.read_text().replace("</body>", asked))
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run([
            *("chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage "
              "--disable-quic --no-first-run --disable-background-networking --disable-sync "
              "--disable-component-update --window-size=1200,900 --enable-logging=stderr "
              "--dump-dom").split(),
            f"--virtual-time-budget={1000 * seconds + 8000:.0f}", f"--user-data-dir={directory}",
            (page.parent / "browsed.html").as_uri()], capture_output=True, text=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    answer = re.search('<pre id="answer">(.*?)</pre>', done.stdout)
    assert answer, done.stdout[-2000:]
    return json.loads(urllib.parse.unquote(answer[1]))


@pytest.mark.thorough
def test_videos_play_stop_and_step(results):
    script = """
        const at = () => document.getElementById("at").textContent, seen = new Set();
        const wait = ms => new Promise(done => setTimeout(done, ms));
        const press = key => document.body.dispatchEvent(
            new KeyboardEvent("keydown", { key, bubbles: true }));
        for (let i = 0; i < 10; i++) { seen.add(at()); await wait(200); }
        press(" ");
        const stopped = [at()];
        await wait(1000);
        stopped.push(at());
        press("ArrowRight");
        const next = at();
        press("f");
        const tiles = [...document.querySelectorAll("canvas")], data = tiles[0].getContext("2d")
            .getImageData(0, 0, 768, 96).data.filter((_, i) => i % 4 == 0);
        return [seen.size, stopped, next, tiles.length, data.reduce((a, b) => a + b, 0),
            [...tiles, ...document.querySelectorAll("svg")].every(one => one.ariaLabel)];
    """
    seen, (first, later), following, count, light, named = browsed(
        report.write([results]), script)
    assert seen > 3 and first == later and count == 8 * 3 + 6 * 2 + 8 + 36 and named
    assert int(following.split()[0]) == int(first.split()[0]) % 8 + 1
    assert light == 9 * clips(1).sum(dtype=int), "all frames, each pixel three by three"


@pytest.mark.thorough
def test_hostile_text_stays_text_and_no_page_is_wider_than_its_window(results):
    for i in range(12):
        training(results / f"a_run_with_a_rather_long_name_{i}", "x" * 60)
    progress(results / "failed", "FAILED", HOSTILE, Error=HOSTILE * 3)
    text = json.dumps(report.write([results]).read_text()).replace("</", "<\\/")
    (results / "frames.html").write_text("<body></body>")
    script = f"""
        const found = [];
        for (const width of [320, 400, 1200]) {{
            const frame = document.createElement("iframe");
            frame.style = `width:${{width}}px;height:800px;border:0`;
            frame.srcdoc = {text};
            document.body.append(frame);
            await new Promise(done => {{ frame.onload = done; }});
            const inside = frame.contentDocument;
            found.push([width - inside.documentElement.scrollWidth, inside.images.length,
                inside.querySelectorAll(".card").length, inside.body.innerText]);
        }}
        return found;
    """
    for room, images, cards, text in browsed(results / "frames.html", script):
        assert room >= 0 and images == 0 and cards == 18 and HOSTILE in text


@pytest.mark.thorough
def test_an_old_page_does_not_say_that_all_is_well(results):
    """As of a copy on a laptop: what was at work when it was made is judged when it is read."""
    progress(results / "magvit_training", "RUNNING", done=40, age=60, lock=False)
    (results / "magvit_training" / ".lock").unlink()
    facts, _ = facts_of(results)
    for age, name, words in ((0, "40.0% results", "1 at work"), (300, "! results", "1 no news")):
        for card in facts["cards"]:
            card["beat"] -= age
        (results / "report.html").write_bytes(report.page_of(facts))
        title, text = browsed(results / "report.html",
                              "return [document.title, document.body.innerText];")
        assert title == name and words in text and "40.0%, 40 of 100 steps" in text
    assert "no sign of life for 6 min; go on with python train_magvit.py" in text
