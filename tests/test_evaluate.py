"""The promises of evaluate_magvit.py: figures that cannot flatter, an evaluation saved as it
goes, on any model and any labelled set."""
import contextlib
import functools
import io
import json
import os
import shutil

import numpy as np
import pytest
from conftest import kill, run, start, wait_for
from test_videos import call, data_set  # noqa: F401

import videos
from checkpointing import read_progress, read_records

torch = pytest.importorskip("torch") if not os.environ.get("CI") else __import__("torch")
import evaluate_magvit as ev  # noqa: E402
import magvit  # noqa: E402

SIZES = magvit.Sizes(width=16, encoder_blocks=1, decoder_blocks=1, dim=32, layers=1, heads=2,
                     chain=16)


SMALL = {"frames": 4, "size": 16}       # so that measuring takes a second


def untrained(frames=8, size=32, classes=videos.CLASSES):
    """What is tested is what happens around it."""
    torch.manual_seed(0)
    return magvit.Magvit(SIZES, (frames, 1, size, size), classes)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """model.pt, set.npz, and out, where one was measured on the other."""
    home = tmp_path_factory.mktemp("home")
    (home / "model.pt").write_bytes(magvit.saved(untrained(**SMALL).state()))
    np.savez(home / "set.npz", **data_set(**SMALL), made_by="{}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ev.evaluate(ev.Settings(home / "model.pt", home / "set.npz", home / "out", "cpu"))
    (home / "said").write_text(said.getvalue())
    return home


def options(home, model="model.pt", data="set.npz", out="out"):
    return ("--model", home / model, "--data", home / data, "--out", home / out, "--device", "cpu")


@pytest.fixture
def evaluate(call):
    return functools.partial(call, ev)


def test_the_table_is_printed_from_the_rows_each_with_its_baseline(home):
    said = (home / "said").read_text()
    metrics = json.loads((home / "out" / "metrics.json").read_text())
    for line, row in zip(said.splitlines()[1:], metrics["rows"]):
        words = [row[key] for key in ("group", "words", "text", "baseline_text", "baseline_words")]
        assert line.split() == " ".join(words).split()
        assert row["beaten"] in (True, False, None) and isinstance(row["value"], (int, float))
    rows = {row["key"]: row for row in reversed(metrics["rows"])}
    assert rows["psnr_db"]["value"] == metrics["tokenizer"]["psnr_db"]
    assert rows["psnr_db"]["baseline"] == metrics["tokenizer"]["blank_psnr_db"]
    assert rows["psnr_db"]["beaten"] is False and rows["psnr_db"]["text"].endswith(" dB")
    assert rows["judged_right"]["baseline"] < ev.GOOD_JUDGE     # so what it says proves nothing
    assert rows["judged_right"]["beaten"] is None is rows["judged_right_unchosen"]["beaten"]
    hardest = [row["baseline"] for row in metrics["rows"] if row["key"] == "error_px"]
    assert len(hardest) == 3 and hardest == sorted(hardest)
    assert "true class by guessed class" in said
    assert metrics["warnings"] and all(f"WARNING: {w}" in said for w in metrics["warnings"])
    progress = read_progress(home / "out" / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE"
    assert progress["Warning"] == "; ".join(metrics["warnings"])


@pytest.mark.parametrize("change", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.write_bytes(path.read_bytes().replace(b"25", b"26"))])
def test_a_damaged_or_deleted_result_is_made_again_from_the_state(home, evaluate, change, tmp_path,
                                                                  monkeypatch):
    for name in ("model.pt", "set.npz"):
        shutil.copy(home / name, tmp_path)
    shutil.copytree(home / "out", tmp_path / "out")
    change(tmp_path / "out" / "metrics.json")
    monkeypatch.setattr(ev, "MEASURES", {})     # nothing is measured again
    assert evaluate(*options(tmp_path)) == (home / "said").read_text()
    assert (tmp_path / "out/metrics.json").read_bytes() == (
        home / "out/metrics.json").read_bytes()
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_called_again_it_shows_the_table_and_changes_nothing(home, evaluate):
    before = {p.name: p.read_bytes() for p in (home / "out").iterdir()}
    assert evaluate(*options(home)) == (home / "said").read_text()
    assert {p.name: p.read_bytes() for p in (home / "out").iterdir()
            if p.name != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


def test_killed_again_and_again_it_ends_with_the_same_figures(home, tmp_path):
    """As people run it, on all threads: SIGKILL as soon as one part more is saved."""
    for name in ("model.pt", "set.npz"):
        shutil.copy(home / name, tmp_path)
    out = tmp_path / "out"
    for number in (1, 2):       # behind the judge's training, in the generation
        process = start("evaluate_magvit.py", *options(tmp_path), "--max-minutes", 0.00001)
        wait_for(lambda: len(names := list(read_records(out))) >= number
                 and (out / names[-1]).exists(), f"part {number}")
        kill(process)
        progress = read_progress(out / "PROGRESS.txt")
        assert progress["Status"] == "RUNNING" and "(100%)" not in progress["Progress"]
    assert run("evaluate_magvit.py", *options(tmp_path)).stdout == (home / "said").read_text()
    assert (out / "metrics.json").read_bytes() == (home / "out/metrics.json").read_bytes()
    judges = [torch.load(place / list(read_records(place))[-1])["judge"]["weights"]
              for place in (home / "out", out)]
    assert all(map(torch.equal, *(judge.values() for judge in judges)))


def test_the_judge_learns_the_same_in_one_go_and_in_parts():
    bench, parts = bench_of(untrained(**SMALL), 80)[0], None
    for first, last in ((0, 1), (1, 4)):
        parts = ev.train_judge(bench, parts, first, last)
        parts = torch.load(io.BytesIO(magvit.saved(parts)), weights_only=True)
    assert magvit.saved(parts) == magvit.saved(ev.train_judge(bench, None, 0, 4))


def test_what_will_not_do_is_refused_in_one_line_and_leaves_no_directory(home, evaluate):
    arrays = data_set(seed=7, **SMALL)
    np.savez(home / "other.npz", **arrays, made_by="{}")
    assert "data was" in evaluate(*options(home, data="other.npz"), code=2)
    np.savez(home / "large.npz", **data_set())
    assert "this model takes (4, 1, 16, 16), linear" in evaluate(
        *options(home, data="large.npz", out="new"), code=2)
    np.savez(home / "two.npz", videos=arrays["videos"], labels=arrays["labels"] % 2)
    assert "2 classes of" in evaluate(*options(home, data="two.npz", out="new"), code=2)
    assert "no such data" in evaluate(*options(home, data="none.npz", out="new"), code=2)
    assert "no such model" in evaluate(*options(home, model="none.pt", out="new"), code=2)
    assert "a directory; name the best_model.pt in it" in evaluate(
        *options(home, model=".", out="new"), code=2)
    assert "must be above 0" in evaluate(*options(home), "--heartbeat", 0, code=2)
    assert not (home / "new").exists()


def test_the_smallest_foreign_set_that_is_taken_is_measured_to_the_end(evaluate, tmp_path):
    """Two classes of ten videos, so two test videos."""
    arrays = data_set(**SMALL)
    chosen = np.flatnonzero(arrays["labels"] < 2)[:20]
    np.savez(tmp_path / "set.npz", videos=arrays["videos"][chosen], labels=arrays["labels"][chosen])
    model = untrained(**SMALL, classes=["left", "right"])
    (tmp_path / "model.pt").write_bytes(magvit.saved(model.state()))
    assert "class by guessed class" in evaluate(*options(tmp_path))
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()


def test_blank_videos_do_not_score():
    real = torch.from_numpy(data_set()["videos"])
    blank = torch.zeros_like(real)
    assert (ev.count_dots(blank) == 0).all() and (ev.count_dots(real) == 1).all()
    two = torch.maximum(real, real.flip(-1).roll(1, 0))
    assert 0.5 < (ev.count_dots(two) == 2).float().mean() <= 1
    assert (ev.centroids(blank) - ev.centroids(real)).norm(dim=-1).mean() > 3


def test_centroids_are_those_of_the_data_set():
    arrays = data_set()
    found = ev.centroids(torch.from_numpy(arrays["videos"]))
    assert (found - torch.from_numpy(arrays["trajectory_2d"])).abs().max() < 0.15


def bench_of(model, count):
    arrays = data_set(count, **SMALL)
    data = videos.Data(arrays["videos"], arrays["labels"], list(videos.CLASSES))
    part = videos.split(data.labels)
    return ev.Bench(model.requires_grad_(False), data, part, 0), part


def test_codes_that_collapsed_and_accuracy_at_chance_are_said_in_words(home):
    collapsed = untrained(**SMALL)
    for linear in (collapsed.tokenizer.coarse, collapsed.tokenizer.to_code[1]):
        linear.weight.data.zero_()   # every place of every video gets the same code
    bench = bench_of(collapsed, 80)[0]
    metrics = json.loads((home / "out" / "metrics.json").read_text())
    facts, rows = ev.of_tokenizer(ev.measure_reconstruction(bench, None, 0, len(bench.many)),
                                  collapsed)
    metrics["tokenizer"] = facts | {key: value for key, _, _, value, *_ in rows} | {
        "foreground_places": 64, "skill": 0.3}
    assert metrics["tokenizer"]["active_codes"] == 1
    metrics["classification"].update(accuracy=0.26, videos=400)
    said = " ".join(ev.warnings_of(metrics, videos.CLASSES))
    for words in ("codes have collapsed", "hardly beats a blank video", "accuracy is at chance",
                  "judge of generated videos is right on only"):
        assert words in said
    metrics["tokenizer"]["skill"] = -2
    assert "worse than a blank video" in " ".join(ev.warnings_of(metrics, videos.CLASSES))


def test_no_video_is_measured_that_training_saw():
    bench, part = bench_of(untrained(**SMALL), 400)
    assert (part[bench.many] == videos.TEST).all() and (part[bench.few] == videos.TEST).all()
    assert torch.bincount(bench.labels[bench.many]).tolist() == [10] * 4
