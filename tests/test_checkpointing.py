"""The promises of checkpointing.py, each with the machine broken under it."""
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, kill, missing, need, need_root, run, start, wait_for

import checkpointing
from checkpointing import CheckpointError, Run, find_checkpoints, problem_with, read_progress, write_atomic

JOB = "tests/counting_job.py"


def values_in(directory):
    return json.loads(find_checkpoints(directory)[-1][1].read_bytes())


def expected(total):
    return [i * i for i in range(total)]


def env(**more):
    return {**os.environ, **{key: str(value) for key, value in more.items()}}


def interpreters():
    """Every Python 3.9 to 3.13 of this machine, one of each version: {"3.9": path}."""
    found = {"%d.%d" % sys.version_info[:2]: sys.executable}
    for minor in range(9, 14):
        places = [Path(d) / f"python3.{minor}" for d in os.environ["PATH"].split(os.pathsep)]
        places += sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}"))
        for place in places:
            if f"3.{minor}" not in found and place.is_file():
                # -I: a pyenv shim that points nowhere fails here and is passed over
                if subprocess.run([place, "-I", "-c", ""], capture_output=True).returncode == 0:
                    found[f"3.{minor}"] = str(place)
    return found


# -- 1. atomic and durable


@pytest.mark.parametrize("content, bytes_", [("äb\n", "äb\n".encode()), (b"\0\1", b"\0\1"),
                                             (lambda file: file.write(b"from a function"), b"from a function")])
def test_writes_text_bytes_and_what_a_function_writes(tmp_path, content, bytes_):
    write_atomic(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == bytes_
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_a_writer_that_fails_half_way_leaves_the_old_file_and_no_temp_file(tmp_path):
    write_atomic(tmp_path / "x", "old")

    def fails(file):
        file.write(b"half")
        raise KeyError("cannot be stored")

    with pytest.raises(KeyError):
        write_atomic(tmp_path / "x", fails)
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_temp_files_of_the_dead_are_swept_and_those_of_the_living_left_alone(tmp_path):
    writing = ("import sys, time; sys.path.insert(0, %r); import checkpointing\n"
               "def slow(file): file.write(b'x'); file.flush(); print('ready', flush=True); time.sleep(60)\n"
               "checkpointing.write_atomic(%r, slow)")
    processes = {}
    for name in ("dead", "living"):
        processes[name] = subprocess.Popen([sys.executable, "-c", writing % (str(ROOT), str(tmp_path / name))],
                                           stdout=subprocess.PIPE, text=True)
        assert processes[name].stdout.readline() == "ready\n"
    kill(processes["dead"])
    (tmp_path / "mine.tmp").touch()
    checkpointing.sweep(tmp_path)
    left = sorted(os.listdir(tmp_path))
    kill(processes["living"])
    assert len(left) == 2 and left[0].startswith(".living.") and left[1] == "mine.tmp"


def traced(tmp_path, *options):
    """Run a save (record, checkpoint, progress) under strace; the calls are counted from the file `now` on."""
    script = tmp_path / "save.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import checkpointing\n"
        "with checkpointing.Run(sys.argv[1], 30, every=10, suffix='.txt', heartbeat=3600) as run:\n"
        "    for piece in run.pieces():\n"
        "        for i in piece: pass\n"
        "        if piece.start == 10: os.stat('/now')  if os.path.exists('/now') else None\n"
        "        piece.save(str(list(range(piece.start, piece.done))))\n")
    return ["strace", "-f", "-qq", "-y", "-o", str(tmp_path / "trace"), *options, sys.executable, "-I", "-S", str(script)]


CALLS = "openat,write,flock,fsync,rename,unlink,ftruncate"


def trace_of_a_save(tmp_path):
    """[(call, how many-th call of its kind in the process, line)] of the second checkpoint's save."""
    subprocess.run([*traced(tmp_path, "-e", f"trace={CALLS},stat,newfstatat"), tmp_path / "dry"], check=True, timeout=60)
    counts, save, inside = {}, [], False
    lines = (tmp_path / "trace").read_text().splitlines()
    for line in lines:
        match = re.match(r"(\d+) +(\w+)\(", line)
        if not match or match[1] != lines[0].split()[0]:   # strace counts by thread: ours is the first
            continue
        call = match[2]
        if '"/now"' in line:
            inside = True
        counts[call] = counts.get(call, 0) + 1
        if inside and call in CALLS.split(","):
            save.append((call, counts[call], line))
        if inside and call == "rename" and "PROGRESS.txt" in line:
            return save
    raise AssertionError("the trace shows no save")


def test_a_save_syncs_the_file_before_and_the_directory_after_the_rename(tmp_path):
    need("strace")
    steps = [(call, line) for call, _, line in trace_of_a_save(tmp_path)]
    story = [f"{call} {'record' if 'jsonl' in line else 'checkpoint' if 'checkpoint_' in line else 'directory'}"
             for call, line in steps if call in ("fsync", "rename")]
    assert story[:4] == ["fsync checkpoint", "fsync record", "rename checkpoint", "fsync directory"]


def test_a_kill_at_every_system_call_of_a_save_loses_only_that_piece(tmp_path):
    need("strace")
    save = trace_of_a_save(tmp_path)
    assert len(save) >= 10
    for number, (call, when, line) in enumerate(save):
        out = tmp_path / f"killed{number}"
        inject = f"inject={call}:signal=SIGKILL:when={when}"
        done = subprocess.run([*traced(tmp_path, "-e", f"trace={call}", "-e", inject), out],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode in (-9, 137), f"{line}: exit {done.returncode}"
        for _, path in find_checkpoints(out):   # every name that is there is whole
            assert path.read_text() == str(list(range(int(path.stem[11:]), int(path.stem[11:]) + 10))), line
        assert problem_with(out / "checkpoint_00000.txt", checkpointing.read_records(out)["checkpoint_00000.txt"]) is None
        again = subprocess.run([sys.executable, "-I", "-S", tmp_path / "save.py", out], capture_output=True, text=True)
        assert again.returncode == 0 and not again.stderr, f"{line}: {again.stderr}"
        assert [n for n, _ in find_checkpoints(out)] == [0, 10, 20]
        assert not list(out.glob("*.corrupt")) and not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "openat"])
def test_an_io_error_at_any_call_of_a_save_ends_in_one_line_and_a_restart_finishes(tmp_path, call):
    need("strace")
    numbers = [when for name, when, line in trace_of_a_save(tmp_path) if name == call and "PROGRESS" not in line]
    assert numbers
    for when in numbers:
        out = tmp_path / f"failed{when}"
        done = subprocess.run([*traced(tmp_path, "-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={when}"), out],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "Input/output error" in done.stderr and str(out) in done.stderr
        assert read_progress(out / "PROGRESS.txt")["Status"] == "FAILED"
        again = subprocess.run([sys.executable, "-I", "-S", tmp_path / "save.py", out], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert run("checkpointing.py", "verify", out).stdout == "3 files are whole, 0 bad\n"


def test_a_power_cut_after_a_save_returned_leaves_the_checkpoint_whole(tmp_path):
    """ext4 on a loop device, shut down without flushing anything. The naive way is the control: it must lose its file."""
    need("mkfs.ext4", "mount")
    need_root()
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount = ["mount", "-o", "loop", image, disk]
    if subprocess.run(mount, capture_output=True).returncode:
        missing("a loop device")
    try:
        with Run(disk / "run", 20, every=10, suffix=".txt") as job:
            for piece in job.pieces():
                list(piece)
                piece.save(f"{piece.start} " * 1000)
        (disk / "naive.tmp").write_text("naive " * 1000)
        os.rename(disk / "naive.tmp", disk / "naive")
        descriptor = os.open(disk, os.O_RDONLY)
        import fcntl
        fcntl.ioctl(descriptor, 0x8004587D, struct.pack("I", 2))   # EXT4_IOC_SHUTDOWN: drop what was not flushed
        os.close(descriptor)
        subprocess.run(["umount", disk], check=True)
        subprocess.run(mount, check=True)
        naive = disk / "naive"
        assert not naive.exists() or naive.read_text() != "naive " * 1000, "this power cut cuts nothing"
        for start in (0, 10):
            path = disk / "run" / f"checkpoint_{start:05d}.txt"
            assert path.read_text() == f"{start} " * 1000
        assert checkpointing.verify([disk / "run"]) == 0
    finally:
        subprocess.run(["umount", "-l", disk])


# -- 2. checked on the way back


def save_pieces(out, total=50, suffix=".json"):
    with Run(out, total, every=10, suffix=suffix) as job:
        for piece in job.pieces():
            list(piece)
            piece.save(json.dumps(list(range(piece.start, piece.done))))


DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "zeroed": lambda data: bytes(len(data)),
    "longer": lambda data: data + b" ",
    "first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last bit": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "middle bit": lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("victim", [0, 2, 4])
def test_a_damaged_piece_is_set_aside_and_made_again(tmp_path, capsys, damage, victim):
    save_pieces(tmp_path)
    path = tmp_path / f"checkpoint_{victim * 10:05d}.json"
    good = path.read_bytes()
    bad = DAMAGE[damage](good)
    path.write_bytes(bad)
    save_pieces(tmp_path)
    assert path.read_bytes() == good
    assert (tmp_path / f"{path.name}.corrupt").read_bytes() == bad
    warning = capsys.readouterr().err
    assert warning.count("warning") == 1 and path.name in warning and "Set aside" in warning


def test_a_second_damaged_file_of_the_same_name_does_not_overwrite_the_first(tmp_path):
    save_pieces(tmp_path)
    for damaged in (b"one", b"two"):
        (tmp_path / "checkpoint_00020.json").write_bytes(damaged)
        save_pieces(tmp_path)
    assert sorted(p.read_bytes() for p in tmp_path.glob("*.corrupt")) == [b"one", b"two"]


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path):
    run(JOB, tmp_path, 50)
    (tmp_path / "checkpoint_00050.json").write_bytes(b"")
    done = run(JOB, tmp_path, 50)
    assert "Set aside" in done.stderr and values_in(tmp_path) == expected(50)


def test_if_all_are_bad_the_run_stops_and_changes_nothing(tmp_path):
    run(JOB, tmp_path, 50)
    for _, path in find_checkpoints(tmp_path):
        path.write_bytes(b"[1, 2")
    for _ in range(2):   # the second start must not take an emptied directory for a new one
        done = run(JOB, tmp_path, 50, code=1)
        assert "no checkpoint is good" in done.stderr and "checkpoint_00050.json" in done.stderr
        assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "FAILED"
    assert [p.read_bytes() for _, p in find_checkpoints(tmp_path)] == [b"[1, 2"] * 3


def test_a_zip_based_file_without_a_record_is_checked_by_the_crc_of_every_member(tmp_path):
    path = tmp_path / "checkpoint_1.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in "abc":
            archive.writestr(name, name * 1000)
    assert problem_with(path) is None
    data = bytearray(path.read_bytes())
    data[data.rindex(b"ccccc")] ^= 1
    path.write_bytes(data)
    assert problem_with(path) == "member c fails its CRC"
    path.write_bytes(data[:-30])
    assert "damaged zip" in problem_with(path)
    (tmp_path / "checkpoint_2.bin").write_bytes(b"anything")
    assert "no checksum" in problem_with(tmp_path / "checkpoint_2.bin")


def test_checkpoints_are_ordered_as_numbers_and_decoys_ignored(tmp_path):
    for name in ("checkpoint_9.npz", "checkpoint_10.npz", "checkpoint_00100.npz", "checkpoint_99999.npz",
                 "checkpoint_100000.npz",
                 ".checkpoint_5.npz.1-0123abcd.tmp", "checkpoint_6.npz.tmp", "._checkpoint_7.npz", "checkpoint_8 (1).npz",
                 "checkpoint_8.npz.corrupt", "checkpoint_x.npz", "checkpoint_.npz", "checkpoint_3", "my_checkpoint_3.npz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "checkpoint_11.npz").mkdir()
    (tmp_path / "checkpoint_12.npz").symlink_to("nowhere")
    assert [n for n, _ in find_checkpoints(tmp_path)] == [9, 10, 100, 99999, 100000]


@pytest.mark.parametrize("line", ["{}", "garbage \xff", '{"name": "checkpoint_00010.json", "seal": 1}', "[1]", ""])
def test_a_torn_or_altered_record_costs_only_its_own_checkpoint(tmp_path, line):
    save_pieces(tmp_path)
    records = (tmp_path / "checkpoints.jsonl").read_text().splitlines()
    records[1] = line
    (tmp_path / "checkpoints.jsonl").write_text("\n".join(records))   # the last one without its newline
    save_pieces(tmp_path)
    assert checkpointing.verify([tmp_path]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.corrupt")) == ["checkpoint_00010.json.corrupt"]


def test_a_record_whose_digits_were_altered_is_not_believed(tmp_path):
    save_pieces(tmp_path)
    text = (tmp_path / "checkpoints.jsonl").read_text()
    (tmp_path / "checkpoints.jsonl").write_text(text.replace('"stop": 20', '"stop": 30'))
    save_pieces(tmp_path)
    assert [n for n, _ in find_checkpoints(tmp_path)] == [0, 10, 20, 30, 40]
    assert json.loads((tmp_path / "checkpoint_00010.json").read_text()) == list(range(10, 20))


def test_a_deleted_piece_is_made_again_with_a_warning(tmp_path, capsys):
    save_pieces(tmp_path)
    (tmp_path / "checkpoint_00030.json").unlink()
    assert checkpointing.verify([tmp_path]) == 1
    save_pieces(tmp_path)
    assert "checkpoint_00030.json is gone" in capsys.readouterr().err
    assert checkpointing.verify([tmp_path]) == 0


def test_pieces_that_overlap_are_refused(tmp_path, capsys):
    save_pieces(tmp_path)
    with pytest.raises(SystemExit) as stop, Run(tmp_path, 50, every=10, first=5, suffix=".json") as job:
        list(job.pieces())
    assert stop.value.code == 1 and "overlaps" in capsys.readouterr().err


# -- progress


KEYS = ["Status", "Progress", "Checkpoint", "Elapsed", "Rate", "ETA", "Last update", "Heartbeat", "Advanced", "Interval",
        "Run", "PID", "Host"]


def test_the_progress_file_has_its_keys_in_order_and_values_in_their_formats(tmp_path):
    process = start(JOB, tmp_path, 1000, 10, env=env(PAUSE=0.01))
    wait_for(lambda: len(find_checkpoints(tmp_path)) >= 2, "two checkpoints")
    lines = (tmp_path / "PROGRESS.txt").read_text().splitlines()
    kill(process)
    assert lines[0] == "Job" and [line.split(": ")[0] for line in lines[1:]] == KEYS
    formats = [r"Status: RUNNING", r"Progress: \d+/1000 steps \(\d+\.\d%\)", r"Checkpoint: \d+ \(checkpoint_\d{5}\.json\)",
               r"Elapsed: \d+ s", r"Rate: \d+\.\d steps/s", r"ETA: \d+ s \(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\)",
               r"Last update: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", r"Heartbeat: \d{10}", r"Advanced: \d{10}",
               r"Interval: 30 s", r"Run: [0-9a-f]{6}", rf"PID: {process.pid}", rf"Host: {re.escape(os.uname().nodename)}"]
    for line, format in zip(lines[1:], formats):
        assert re.fullmatch(format, line), line


def test_a_reader_that_never_pauses_sees_only_whole_versions(tmp_path):
    out, seen, broken = tmp_path, set(), []
    process = start(JOB, out, 3000, 1, env=env(RUN_OPTIONS='{"heartbeat": 0.01}'), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            text = (out / "PROGRESS.txt").read_text()
        except FileNotFoundError:
            continue
        keys = [line.split(": ")[0] for line in text.splitlines()[1:]]
        if keys != KEYS or not text.endswith("\n"):
            broken.append(text)
        seen.add(text)
    assert process.returncode == 0 and not broken
    assert len(seen) > 50, "too few versions seen for the test to mean anything"


def test_100_percent_shows_only_when_the_last_piece_is_durable(tmp_path):
    with Run(tmp_path, 1000, every=1000) as job:
        job.begin()
        for done, text in ((0, "0/1000 steps (0.0%)"), (999, "999/1000 steps (99.9%)"), (1000, "1000/1000 steps (99.9%)")):
            job.update(done)
            assert job.progress.counts() == text
        job.save(1000, "state")
        assert job.progress.counts() == "1000/1000 steps (100%)"
    assert read_progress(tmp_path / "PROGRESS.txt")["Progress"] == "1000/1000 steps (100%)"


def test_an_update_does_no_io_and_is_cheap(tmp_path, monkeypatch):
    with Run(tmp_path, 10) as job:
        job.begin()
        monkeypatch.setattr("builtins.open", None)
        monkeypatch.setattr(os, "open", None)
        monkeypatch.setattr(os, "write", None)
        job.update(5, Epoch="1/2")
        monkeypatch.undo()
        job.save(10, "x")
    # How cheap in microseconds, benchmarks/bench_generate.py measures.


def test_the_heartbeat_beats_without_updates_and_a_hang_shows_as_stalled_not_as_dead(tmp_path):
    options = json.dumps({"heartbeat": 0.1, "stall_after": 1})
    process = start(JOB, tmp_path, 100, env=env(HANG_AT=15, RUN_OPTIONS=options))
    progress = lambda: read_progress(tmp_path / "PROGRESS.txt")   # noqa: E731
    first = wait_for(lambda: progress().get("Progress", "").startswith("15/") and progress(), "the hang")
    assert first["Status"] == "RUNNING"
    stalled = wait_for(lambda: progress().get("Status") == "STALLED" and progress(), "STALLED", 20)
    later = wait_for(lambda: int(progress()["Heartbeat"]) > int(stalled["Heartbeat"]) and progress(), "another beat", 20)
    assert later["Status"] == "STALLED" and abs(int(later["Advanced"]) - int(first["Advanced"])) <= 1
    kill(process)


def test_slow_steady_work_is_not_called_stalled(tmp_path):
    """Steps of 0.3 s with stall_after 0.1: the work takes that long, so ten times longer is what counts."""
    with Run(tmp_path, 3, heartbeat=0.02, stall_after=0.1) as job:
        job.begin()
        time.sleep(0.3)
        job.update(1)
        wait_for(lambda: read_progress(tmp_path / "PROGRESS.txt").get("Status") == "RUNNING", "the next beat")
        seen = set()
        for _ in range(20):
            time.sleep(0.01)
            seen.add(read_progress(tmp_path / "PROGRESS.txt").get("Status"))
        assert seen == {"RUNNING"}
        job.save(3, "x")


def test_a_failed_write_of_the_progress_file_warns_once_and_does_not_stop_the_work(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "PROGRESS.txt").mkdir()   # a rename onto a directory fails
    with Run(out, 30, every=10, heartbeat=0.01) as job:
        for step in job.steps(lambda file: file.write(b"x")):
            time.sleep(0.003)
    assert [n for n, _ in find_checkpoints(out)] == [10, 20, 30]
    assert capsys.readouterr().err.count("PROGRESS.txt") == 1


def test_a_clock_that_jumps_gives_no_negative_times(tmp_path, monkeypatch):
    real = time.time
    with Run(tmp_path, 100, heartbeat=3600) as job:
        job.begin()
        for jump in (-86400, 86400, -10**9):
            monkeypatch.setattr(time, "time", lambda: real() + jump)
            job.update(50)
            job.progress.write("RUNNING")
            progress = read_progress(tmp_path / "PROGRESS.txt")
            assert 0 <= int(progress["Elapsed"].split()[0]) < 60
            assert float(progress["Rate"].split()[0]) > 0 and int(progress["ETA"].split()[0]) >= 0
            assert 0 <= int(progress["Heartbeat"]) - int(progress["Advanced"]) <= 1
        monkeypatch.undo()
        job.save(100, "x")


def test_elapsed_adds_up_over_restarts_without_the_time_between_and_rate_is_of_this_start(tmp_path):
    slow = env(PAUSE=0.02, RUN_OPTIONS='{"heartbeat": 0.1}')
    process = start(JOB, tmp_path, 10000, 10, env=slow)
    elapsed = lambda: int(read_progress(tmp_path / "PROGRESS.txt").get("Elapsed", "0 s").split()[0])   # noqa: E731
    wait_for(lambda: elapsed() >= 3, "three seconds of work")
    kill(process)
    time.sleep(3)
    process = start(JOB, tmp_path, 10000, 10, env=slow)
    wait_for(lambda: read_progress(tmp_path / "PROGRESS.txt").get("PID") == str(process.pid), "the second start")
    assert 3 <= elapsed() <= 4
    wait_for(lambda: elapsed() >= 5, "more work")
    rate = float(read_progress(tmp_path / "PROGRESS.txt")["Rate"].split()[0])
    kill(process)
    assert rate <= 50, "restored steps were counted as speed"


def test_a_stages_own_keys_are_shown_and_cannot_forge_a_line(tmp_path):
    with Run(tmp_path, 10, heartbeat=3600) as job:
        job.begin()
        job.update(3, Epoch="1/2", Note="x\nStatus: COMPLETE\x1b[2J")
        job.progress.write("RUNNING")
        text = (tmp_path / "PROGRESS.txt").read_text()
        job.save(10, "x")
    assert "\nEpoch: 1/2\n" in text and text.count("\nStatus: ") == 1 and "\x1b" not in text


# -- one writer


def test_a_second_process_is_refused_and_told_who_holds_the_directory(tmp_path):
    process = start(JOB, tmp_path, 1000, env=env(PAUSE=0.01))
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the first process")
    before = (tmp_path / ".lock").read_bytes()
    done = run(JOB, tmp_path, 1000, code=75)
    assert re.search(rf"PID {process.pid} on host \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC", done.stderr)
    assert (tmp_path / ".lock").read_bytes() == before
    assert read_progress(tmp_path / "PROGRESS.txt")["PID"] == str(process.pid)
    kill(process)
    run(JOB, tmp_path, 20)   # a dead process holds nothing


def test_of_eight_processes_that_start_together_one_works_and_seven_are_refused(tmp_path):
    processes = [start(JOB, tmp_path, 100, env=env(PAUSE=0.02)) for _ in range(8)]
    for process in processes:
        process.communicate(timeout=60)
    assert sorted(p.returncode for p in processes) == [0] + [75] * 7
    assert values_in(tmp_path) == expected(100)


def test_a_forked_child_that_outlives_the_job_does_not_keep_the_directory(tmp_path):
    code = (f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import checkpointing\n"
            f"with checkpointing.Run({str(tmp_path)!r}, 10) as run:\n"
            "    if os.fork() == 0: time.sleep(20); os._exit(0)\n"
            "    os.kill(os.getpid(), 9)\n")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    run(JOB, tmp_path, 20)


def test_the_same_process_is_refused_too(tmp_path, capsys):
    with Run(tmp_path, 10) as job:
        with pytest.raises(SystemExit) as stop, Run(tmp_path, 10):
            pass
        assert stop.value.code == 75
        job.begin()
        job.save(10, "x")


# -- settings


def test_other_settings_are_refused_naming_each_old_and_new_and_nothing_is_changed(tmp_path):
    run(JOB, tmp_path, 20, env=env(SETTINGS='{"seed": 1, "rate": 0.5, "kind": "a"}'))
    files = lambda: {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()   # noqa: E731
                     if p.name != ".lock"}
    before = files()
    done = run(JOB, tmp_path, 20, env=env(SETTINGS='{"seed": 2, "rate": 0.5, "size": 3}'), code=2)
    for difference in ("seed was 1, asked 2", 'kind was "a", asked "absent"', 'size was "absent", asked 3'):
        assert difference in done.stderr
    assert "rate" not in done.stderr
    assert files() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}'])
def test_a_damaged_run_json_stops_the_run(tmp_path, text):
    run(JOB, tmp_path, 20)
    (tmp_path / "run.json").write_text(text)
    assert "run.json cannot be read" in run(JOB, tmp_path, 20, code=1).stderr
    (tmp_path / "run.json").unlink()
    assert "run.json is missing" in run(JOB, tmp_path, 20, code=1).stderr


# -- stopping


@pytest.mark.parametrize("signal_, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_what_is_done_and_a_restart_goes_on_from_there(tmp_path, signal_, code):
    process = start(JOB, tmp_path, 1000, 10000, env=env(PAUSE=0.005))
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the start")
    time.sleep(0.3)
    process.send_signal(signal_)
    process.send_signal(signal_)   # as `timeout` and batch systems do
    output = process.communicate(timeout=30)[0]
    assert process.returncode == code, output
    saved = len(values_in(tmp_path))
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert 0 < saved < 1000 and progress["Status"] == "INTERRUPTED"
    assert progress["Checkpoint"] == f"{saved} (checkpoint_{saved:05d}.json)"
    assert f"{saved}/1000 steps are saved" in output
    run(JOB, tmp_path, 1000, 10000)
    assert values_in(tmp_path) == expected(1000)


def test_an_exception_ends_in_failed_with_one_line_and_keeps_its_traceback_in_the_log(tmp_path):
    process = start(JOB, tmp_path, 100, env=env(FAIL_AT=25))
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "ValueError: step 25 is wrong" in output and "Traceback" in output
    text = (tmp_path / "PROGRESS.txt").read_text()
    assert "\nStatus: FAILED\nError: ValueError: step 25 is wrong in two lines\n" in text
    run(JOB, tmp_path, 100)
    assert values_in(tmp_path) == expected(100)


def test_a_run_under_nohup_outlives_its_terminal_and_its_log_grows_line_by_line(tmp_path):
    import pty
    out, log = tmp_path / "run", tmp_path / "log"
    master, slave = pty.openpty()
    shell = subprocess.Popen(["bash", "-ic", f"nohup {sys.executable} {ROOT / JOB} {out} 500 10 > {log} 2>&1 & "
                              "sleep 60"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                             env=env(PAUSE=0.01))
    os.close(slave)
    wait_for(lambda: log.exists() and "checkpoint_00010" in log.read_text(), "a line in the log")
    assert (out / "PROGRESS.txt").exists() and not (out / "checkpoint_00500.json").exists()
    os.close(master)     # the terminal is closed: the kernel sends SIGHUP to what runs in it
    os.killpg(shell.pid, signal.SIGHUP)
    shell.wait(timeout=10)
    wait_for(lambda: read_progress(out / "PROGRESS.txt").get("Status") == "COMPLETE", "the end", 30)
    lines = log.read_text().splitlines()
    assert len([line for line in lines if line.startswith("checkpoint_")]) == 50 and "\r" not in log.read_text()


def test_a_terminal_gets_a_live_bar_with_count_percent_rate_and_eta(tmp_path):
    import pty
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / JOB, tmp_path, "100", "10"], stdin=slave, stdout=slave, stderr=slave,
                               env=env(PAUSE=0.01, COLUMNS=100))
    os.close(slave)
    screen = b""
    while True:
        try:
            screen += os.read(master, 4096)
        except OSError:   # the other end is closed
            break
    assert process.wait() == 0
    frames = screen.decode().split("\r")
    assert any(re.search(r"\[#+-+\] \d+/100 steps \(\d+\.\d%\)  \d+\.\d steps/s  ETA \d+ s", frame) for frame in frames)
    assert "complete" in frames[-2] + frames[-1]


# -- disk


def test_a_disk_too_small_for_the_estimate_is_refused_before_work_begins(tmp_path):
    done = run(JOB, tmp_path, 10**6, env=env(RUN_OPTIONS=json.dumps({"unit_bytes": 10**9})), code=1)
    assert "needs about 1,000,000,000,000,000 bytes" in done.stderr and "are free" in done.stderr
    assert not find_checkpoints(tmp_path)
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "FAILED"


@pytest.mark.parametrize("filled_by_others", [False, True])
def test_a_disk_that_fills_up_ends_in_failed_and_the_restart_continues_once_there_is_room(small_disk, filled_by_others):
    disk = small_disk()
    piece = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import checkpointing\n"
             f"with checkpointing.Run({str(disk)!r}, 10, every=1, suffix='.bin') as run:\n"
             "    for piece in run.pieces():\n"
             "        for i in piece: pass\n"
             "        piece.save(bytes([i]) * 200_000)\n")
    if filled_by_others:   # to the last byte, while the job runs
        piece = piece.replace("for i in piece: pass", "list(piece); i = piece.start\n"
                              f"        if i == 2:\n            f = open({str(disk / 'other')!r}, 'wb', 0)\n"
                              "            try:\n                while f.write(bytes(4096)): pass\n"
                              "            except OSError: pass")
    done = subprocess.run([sys.executable, "-c", piece], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    progress = read_progress(disk / "PROGRESS.txt")
    assert progress["Status"] == "FAILED"
    assert re.search(r"checkpoint_\d+\.bin: not saved, No space left on device: wanted 200,000 bytes, [\d,]+ free",
                     progress["Error"])
    saved = find_checkpoints(disk)
    assert len(saved) >= 2 and not list(disk.glob(".*.tmp")) and checkpointing.verify([disk]) == 0
    (disk / "other").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    done = subprocess.run([sys.executable, "-c", piece.replace("if i == 2:", "if False:")], capture_output=True, text=True)
    assert done.returncode == 0 and len(find_checkpoints(disk)) == 10
    assert [path.read_bytes()[:1] for _, path in find_checkpoints(disk)] == [bytes([i]) for i in range(10)]


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import checkpointing\n"
            f"with checkpointing.Run({str(tmp_path)!r}, 1) as run:\n"
            "    for piece in run.pieces():\n        list(piece); piece.save(bytes(100_000))\n")
    limited = f"trap '' XFSZ; ulimit -f 50; exec {sys.executable} -c \"$0\""
    done = subprocess.run(["bash", "-c", limited, code], capture_output=True, text=True)
    assert done.returncode == 1 and "wanted 100,000 bytes" in done.stderr and "Traceback" not in done.stderr


def test_a_read_only_directory_is_one_line(small_disk):
    disk = small_disk()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for out in (disk, disk / "below"):
        assert "Read-only file system" in run(JOB, out, 20, code=1).stderr
    (disk.parent / "file").touch()
    assert "File exists" in run(JOB, disk.parent / "file", 20, code=2).stderr


# -- retention


def test_only_the_last_states_are_kept_and_foreign_files_never_removed(tmp_path):
    (tmp_path / "checkpoint_00001.json").write_text("not of this run")
    (tmp_path / "run.json").write_text('{"run": "abc", "settings": {}}')
    (tmp_path / "notes.txt").write_text("mine")
    with Run(tmp_path, 50, every=10, suffix=".json", keep=3) as job:
        for _ in job.steps(lambda file: file.write(b"[]")):
            pass
    assert [n for n, _ in find_checkpoints(tmp_path)] == [1, 30, 40, 50] and (tmp_path / "notes.txt").exists()


def test_an_old_state_is_not_removed_before_the_new_one_reads_back_well(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop, Run(tmp_path, 50, every=10, suffix=".json", keep=2) as job:
        for step in job.steps(lambda file: file.write(b"[]")):
            if step == 25:
                monkeypatch.setattr(checkpointing, "problem_with", lambda *_: "checksum differs")
    assert stop.value.code == 1 and "older checkpoints are kept" in capsys.readouterr().err
    assert [n for n, _ in find_checkpoints(tmp_path)] == [10, 20, 30]


# -- the commands, and every Python


def test_status_says_what_every_run_below_is_doing(tmp_path):
    run(JOB, tmp_path / "done", 20)
    living = start(JOB, tmp_path / "a" / "living", 1000, env=env(PAUSE=0.02))
    dead = start(JOB, tmp_path / "a" / "dead", 1000, env=env(PAUSE=0.02))
    for name in ("living", "dead"):
        wait_for(lambda: (tmp_path / "a" / name / "PROGRESS.txt").exists(), name)
    kill(dead)
    lines = {line.split(":")[0]: line for line in run("checkpointing.py", "status", tmp_path).stdout.splitlines()}
    kill(living)
    assert "COMPLETE  20/20 steps (100%)" in lines[str(tmp_path / "done")]
    assert "RUNNING" in lines[str(tmp_path / "a" / "living")] and "heartbeat" in lines[str(tmp_path / "a" / "living")]
    assert "DEAD" in lines[str(tmp_path / "a" / "dead")] and "run the same command again" in lines[str(tmp_path / "a/dead")]
    (tmp_path / "empty").mkdir()
    run("checkpointing.py", "status", tmp_path / "empty", code=1)
    assert "no such directory" in run("checkpointing.py", "status", tmp_path / "nowhere", code=2).stderr
    assert "status, verify or accept" in run("checkpointing.py", "frobnicate", tmp_path, code=2).stderr


@pytest.mark.parametrize("text", [b"", b"\0" * 100, b"garbage", b"Title\nStatus: RUNNING\nHeartbeat: soon\nPID: x\n"])
def test_status_survives_any_progress_file(tmp_path, text):
    (tmp_path / "PROGRESS.txt").write_bytes(text)
    assert str(tmp_path) in run("checkpointing.py", "status", tmp_path).stdout


def test_verify_reads_every_checkpoint_and_names_the_bad_ones(tmp_path):
    save_pieces(tmp_path / "a")
    run(JOB, tmp_path / "b", 20)
    assert run("checkpointing.py", "verify", tmp_path).stdout == "7 files are whole, 0 bad\n"
    (tmp_path / "a" / "checkpoint_00010.json").write_text("[]")
    (tmp_path / "a" / "best.pt").write_bytes(b"PK truncated")
    done = subprocess.run([sys.executable, ROOT / "checkpointing.py", "verify", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "6 files are whole, 2 bad"
    assert f"BAD {tmp_path / 'a' / 'checkpoint_00010.json'}" in done.stdout and "best.pt" in done.stdout


EXAMPLE = next(code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
               if "values.append(simulate(i))" in code and "run.steps" in code)


@pytest.mark.parametrize("version", interpreters())
def test_the_readme_example_killed_and_restarted_gives_what_the_loop_before_it_gave(tmp_path, version):
    python = interpreters()[version]
    preamble = f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\ndef simulate(i):\n    time.sleep(%s)\n    return i * i\n"
    after = EXAMPLE
    process = subprocess.Popen([python, "-I", "-S", "-c", preamble % 0.002 + after], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    out = tmp_path / "results"
    wait_for(lambda: (out / "checkpoint_00200.json").exists(), "the second checkpoint")
    kill(process)
    assert "DEAD" in subprocess.run([python, "-I", "-S", ROOT / "checkpointing.py", "status", out], capture_output=True,
                                    text=True).stdout
    again = subprocess.run([python, "-I", "-S", "-c", preamble % 0 + after], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert values_in(out) == expected(1000)
    assert subprocess.run([python, "-I", "-S", ROOT / "checkpointing.py", "verify", out]).returncode == 0


def test_it_imports_nothing_beyond_the_standard_library():
    subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import checkpointing"],
                   check=True)


def test_a_run_in_a_thread_works_without_signals(tmp_path):
    def job():
        with Run(tmp_path, 20) as thread_run:
            for _ in thread_run.steps(lambda file: file.write(b"x")):
                pass
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_errors_are_one_line_for_a_person_and_an_exit_code_for_a_script():
    assert CheckpointError("x").exit_code == 1 and str(CheckpointError("x", 75)) == "x"
