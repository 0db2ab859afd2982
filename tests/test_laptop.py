"""The promises of monitor_progress.sh and sync_results.sh, against a real sshd on loopback."""
import contextlib
import fcntl
import filecmp
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
from conftest import (ROOT, durable, environment, kill, missing, need, run, start,
                      wait_for)

import checkpointing
import runs

MONITOR, SYNC = ROOT / "monitor_progress.sh", ROOT / "sync_results.sh"
ROOT_READS_ALL = 65534      # so a test runs as nobody


# -- the far side: sshd, and hosts that misbehave


class Far:
    """Two host names for ssh: box, a real sshd, and closed, where nobody listens."""

    def __init__(self, place):
        self.place, self.bin, self.port = place, place / "bin", free_port()
        for key in ("host", "user", "another"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / key],
                           check=True)
        (place / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {place}/host\n"
            f"AuthorizedKeysFile {place}/user.pub\nPidFile {place}/pid\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "MaxStartups 100\n")
        os.makedirs("/run/sshd", exist_ok=True)
        self.sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", place / "sshd_config"],
                                     stderr=subprocess.DEVNULL)
        # The client under test is the real one; only its configuration is ours.
        self.client(place, f"Host closed\n Port {free_port()}\n"
                    f"Host box closed\n IdentityFile {place}/user\n IdentitiesOnly yes\n")
        wait_for(self.answers, "sshd")

    def client(self, place, more, known="known_hosts"):
        """An option for env(): an ssh that has this configuration, too."""
        (place / "ssh_config").write_text(
            f"{more}Host box closed\n HostName 127.0.0.1\n User root\n Port {self.port}\n"
            f" UserKnownHostsFile \"{place / known}\"\n GlobalKnownHostsFile /dev/null\n")
        script = f'exec {shutil.which("ssh")} -F {place}/ssh_config "$@"'
        return self.stub(place, "ssh", script, "bin")

    def answers(self):
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.port), 10) as s:
                return s.recv(3) == b"SSH"

    def stub(self, place, name, script, below="stub"):
        """An option for env(): PATH where program `name` is this shell script."""
        path = place / below / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        return {"PATH": f"{path.parent}:{self.bin}:/usr/bin:/bin"}

    def shell(self, place, script):
        """An option for env(): a far side where this script is what runs $line, as sshd would."""
        return self.stub(place, "ssh", f"""
            while case $1 in -[oi]) shift ;; --) ;; *) false ;; esac; do shift; done
            shift
            line=$*
            {script}""")

    def poor(self, place):
        """An option for env(): a far side without rsync and without flock: perl has to do."""
        (place / "poor").mkdir()
        for tool in ("sh", "date", "find", "sed", "head", "cut", "sort", "perl"):
            (place / "poor" / tool).symlink_to(shutil.which(tool))
        return self.shell(place, f'PATH={place}/poor exec sh -c "$line"')

    def cut(self):
        """End all connections."""
        sessions = subprocess.run(["pgrep", "-P", str(self.sshd.pid)], capture_output=True)
        for pid in sessions.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def env(self, **more):
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "LANG": "C",
                **{key: str(value) for key, value in more.items()}}

    def close(self):
        self.sshd.kill()
        self.sshd.wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    need("ssh", "ssh-keygen", "rsync", "perl", "flock")
    if not os.path.exists("/usr/sbin/sshd"):
        missing("sshd")
    if os.geteuid():
        missing("root (for sshd)")
    place = Far(tmp_path_factory.mktemp("far"))
    yield place
    place.close()


# -- what all tests do


def call(far, *arguments, user=None, **more):
    """Run a script with a bare environment; `more` are its variables."""
    return subprocess.run(["bash", *map(str, arguments)], env=far.env(**more), user=user,
                          capture_output=True, text=True, timeout=150)


def monitor(far, *arguments, code, **more):
    done = call(far, MONITOR, "-1", *arguments, **more)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def sync(far, *arguments, code=0, **more):
    done = call(far, SYNC, *arguments, **more)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = (done.stdout + done.stderr).splitlines()
    dated = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
    assert len(lines) <= 1 and all(map(dated.match, lines)), lines
    return done.stdout + done.stderr


def behind(far, *arguments, variables={}, **more):
    """Start a script in the background, its output in a pipe unless `more` says otherwise."""
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
    return subprocess.Popen(["bash", *map(str, arguments)], env=far.env(**variables),
                            start_new_session=True, **more)


@contextlib.contextmanager
def watching(far, tmp_path, *arguments, **variables):
    """The monitor at work: (its process, a function that gives what it has said so far)."""
    with open(tmp_path / "screen", "w") as screen:
        watcher = behind(far, MONITOR, "-i", 1, *arguments, variables=variables, stdout=screen)
    try:
        yield watcher, (tmp_path / "screen").read_text
    finally:
        watcher.kill()
        watcher.wait()


def job(out, total, pause=0.01):
    """A job of somebody's own, at work, with its first state saved."""
    process = start("tests/counting_job.py", out, total, env=environment(PAUSE=pause),
                    stdout=subprocess.DEVNULL)
    wait_for(lambda: durable(out), "the first state")
    return process


def progress_file(directory, lock=None, **changes):
    """A PROGRESS.txt as a run would leave it; lock: "held" (gives the file, keep it) or "free"."""
    now = int(time.time())
    keys = {"Status": "RUNNING", "Progress": "40/100 samples (40.0%)",
            "Checkpoint": "40 (checkpoint_00030.npz)", "Heartbeat": now, "Advanced": now,
            "Interval": "30 s", "Command": "python job.py --n 100"}
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{key}: {value}\n" for key, value in {**keys, **changes}.items())
    (directory / "PROGRESS.txt").write_text("A job\n" + lines)
    if lock:
        file = open(directory / ".lock", "w")
        if lock == "held":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file


def training(directory, *steps, keep=3):
    """A run that has saved these steps, and keeps the last of them."""
    with checkpointing.Run(directory, keep=keep, suffix=".pt", quiet=True) as run:
        run.load(read=lambda file: file.read())
        for step in steps:
            if step > run.durable:
                run.save(step, write=lambda file: file.write(b"%d " % step * 99))   # noqa: B023


def states(directory):
    return sorted(int(p.stem.split("_")[1]) for p in directory.glob("checkpoint_*.pt"))


def same(a, b, names):
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def typed(said, beginning):
    """Type what a script told to type, from `beginning` on."""
    command = re.search(rf"type: ({beginning} .*?)(    |$)", said, re.M)[1]
    subprocess.run(command, shell=True, check=True, capture_output=True)


# -- monitor: what a run is doing


def test_it_watches_a_run_through_its_death_and_a_new_start_until_it_is_complete(far, tmp_path):
    out = tmp_path / "run"
    process = job(out, 10**6)
    with watching(far, tmp_path, f"box:{tmp_path}") as (watcher, text):
        wait_for(lambda: f"box:{out}: RUNNING" in text(), "RUNNING")
        process.kill()      # and nobody waits for it, as in many a container: a zombie
        wait_for(lambda: f"box:{out}: DEAD  its process is gone" in text(), "DEAD")
        process.wait()
        dead = text()[text().index(": DEAD"):]
        assert re.search(r"  Checkpoint: \d+ \(checkpoint_\d+\.json\)\n", dead), dead
        assert re.search(r"  to go on: \S*python\S* \S*counting_job\.py ", dead), dead
        job(out, durable(out) + 100).wait()
        assert watcher.wait(timeout=100) == 0
    said = text()
    assert said.count(f"box:{out}: COMPLETE") == 2, "believed when seen twice"
    assert f"[{30 * '#'}] 100%" in said and "for a stage that is about to appear" in said
    changes = re.findall(rf"{out}: ([A-Z]+)", said)
    changes = [b for a, b in zip(changes, changes[1:]) if a != b]
    assert said.count("\a") == len(changes), "one bell for each change, none for a look"


LONG = 10**9    # seconds ago
WORDS = {   # what PROGRESS.txt says (times in seconds ago), its lock: what is the matter
    "held, long silent, PID of nobody, another host": (
        {"Heartbeat": LONG, "PID": 99999999, "Host": "elsewhere"}, "held",
        r"RUNNING .* no heartbeat for \d+ days: is its process stopped\?"),
    "free, just written, a PID that lives": ({"PID": os.getpid()}, "free", "DEAD .* is gone"),
    "stalled and free": ({"Status": "STALLED"}, "free", "DEAD"),
    "a copy": ({"ETA": "100000 s (2026-01-25 01:22:40 UTC)"}, None, r"RUNNING +40% .* 27 h 46 min"),
    "an old copy": ({"Heartbeat": LONG}, None, r"SILENT .* no heartbeat for \d+ days"),
    "a copy, three intervals old, but not a minute more": ({"Heartbeat": 95}, None, "RUNNING"),
    "starting": ({"Status": "INTERRUPTED"}, "held", "STARTING .* it was INTERRUPTED"),
    "interrupted": ({"Status": "INTERRUPTED"}, "free", "INTERRUPTED"),
    "hangs": ({"Status": "STALLED", "Advanced": 600}, "held",
              "STALLED .* no step for 1[0-9] min"),
    "failed": ({"Status": "FAILED", "Error": "it broke"}, "free", "FAILED .* it broke"),
    "complete": ({"Status": "COMPLETE"}, "free", "COMPLETE"),
    "words in other places": ({"Note": "Status: COMPLETE", "Title": "COMPLETE"}, "held", "RUNNING"),
    "rubbish": ({"Status": "COMPLETELY"}, None, "UNREADABLE .* this is not a whole PROGRESS.txt"),
}


@pytest.mark.parametrize("has_flock", [True, False])
def test_the_lock_decides_or_without_one_the_heartbeat(far, tmp_path, has_flock):
    locks = []
    for name, (changes, lock, _) in WORDS.items():
        times = {key: int(time.time()) - changes[key] for key in ("Heartbeat", "Advanced")
                 if key in changes}
        locks.append(progress_file(tmp_path / "runs" / name, lock, **{**changes, **times}))
    more = {} if has_flock else far.poor(tmp_path)
    said = monitor(far, f"box:{tmp_path}/runs", code=1, **more)
    for name, (_, _, expected) in WORDS.items():
        line = re.search(rf".*/runs/{re.escape(name)}(  .*)?\n", said)[0]
        assert re.match(expected, line), line
    assert "4 RUNNING" in said and said.count("\n") < 20, "a line each"
    del locks


@pytest.mark.parametrize("words, code", [
    (["COMPLETE"], 0), (["COMPLETE", "RUNNING"], 4), (["COMPLETE", "INTERRUPTED"], 1),
    (["FAILED", "RUNNING"], 1), ([], 4), (["STALLED"], 4)])
def test_one_look_has_an_exit_code(far, tmp_path, words, code):
    for number, word in enumerate(words):
        progress_file(tmp_path / str(number), Status=word)
    said = monitor(far, tmp_path, code=code)
    assert all(f"{tmp_path}/{number}: {word}" in said for number, word in enumerate(words))
    assert words or "no run here yet (no PROGRESS.txt)" in said


def test_unreachable_is_not_death_and_two_runs_lost_are_one_notification(far, tmp_path):
    """As on a Mac, which shows it; elsewhere it is a bell."""
    down, told = tmp_path / "down", tmp_path / "told"
    far.stub(tmp_path, "osascript", f'for text; do :; done; echo "$text" >> {told}')
    stub = far.stub(tmp_path, "ssh", f"""
        [ ! -e {down} ] || {{ echo "connect to host: Network is unreachable" >&2; exit 255; }}
        exec {far.bin}/ssh "$@" """)
    locks = [progress_file(tmp_path / "ab" / name, "held") for name in "ab"]
    progress_file(tmp_path / "c", Status="COMPLETE")
    targets = f"box:{tmp_path}/ab", f"box:{tmp_path}/c"
    with watching(far, tmp_path, *targets, **stub) as (_, text):
        wait_for(lambda: "b: RUNNING" in text(), "RUNNING")
        down.touch()
        wait_for(lambda: text().count("b: UNREACHABLE") >= 2, "UNREACHABLE twice")
        lost = text()[text().index("UNREACHABLE"):]
        assert "last known: RUNNING; connect to host: Network is unreachable" in lost
        assert "Progress: 40/100" in lost and "c: COMPLETE" in lost, "what is COMPLETE stays so"
        assert told.read_text() == ", ".join(
            f"{targets[0]}/{name}: UNREACHABLE, was RUNNING" for name in "ab") + "\n"
        down.unlink()
        wait_for(lambda: "a: RUNNING" in text()[text().rindex("UNREACHABLE"):], "recovery")
        assert "\a" not in text()
    del locks


def test_ages_are_of_the_remote_clock_and_the_end_is_told_on_the_readers_own(far, tmp_path):
    """The laptop's clock is an hour ahead; there it is about noon."""
    stub = far.stub(tmp_path, "date", f'exec {shutil.which("date")} -d "1 hour" "$@"')
    now = int(time.time())
    progress_file(tmp_path, Heartbeat=now - 12, ETA="776 s (2026-01-25 01:22:40 UTC)")
    zone = int(time.strftime("%H", time.gmtime())) - 11
    said = monitor(far, f"box:{tmp_path}", code=4, TZ=f"XXX{zone}", **stub)
    assert re.search(r": RUNNING\n(.*\n)*  written [1-9]\d? s before it was seen", said), said
    there = {time.strftime("%H:%M", time.gmtime(now + 764 + (1 - zone) * 3600 + late))
             for late in (-60, 0, 60)}
    assert re.search(r"  ETA: 1[12] min, at (\d\d:\d\d)\n", said)[1] in there, said


def test_nothing_from_a_file_runs_or_garbles_the_screen(far, tmp_path):
    touch = f"touch {tmp_path}/pwned"
    nasty = f"\x1b[2J\x1b]0;title\x07 $({touch}) `{touch}` %s%n \\033[31m; rm -rf /"
    progress_file(tmp_path / "a $(touch pwned) 'b\" %s\\n", Note=nasty, Advanced="08",
                  Progress="9999999999999999999999/1 x (999999999999999%)", Heartbeat="9" * 30,
                  Interval="-1 s", ETA="9" * 30 + " s (never)")
    said = monitor(far, f"box:{tmp_path}", code=4)
    assert "\x1b" not in said and "\x07" not in said and f"[{30 * '#'}] " in said
    assert "$(touch pwned) 'b\" %s\\n: RUNNING" in said and "`touch" in said
    assert not list(tmp_path.rglob("pwned"))


def test_runs_far_down_and_the_page_are_shown_old_and_hidden_runs_are_not(far, tmp_path):
    progress_file(tmp_path / "a/b/c/d/e/f", Status="COMPLETE")
    for old in ("train.old1", ".hidden"):
        progress_file(tmp_path / old, Heartbeat=1)
    (tmp_path / "report.html").write_text("page")
    said = monitor(far, f"box:{tmp_path}/", code=0)
    assert said.endswith(f"pictures: box:{tmp_path}/report.html\n\n")
    assert f"box:{tmp_path}/a/b/c/d/e/f: COMPLETE" in said


# -- both: names, keys, hosts, signals


@pytest.fixture(params=["monitor", "sync"])
def both(request, far, tmp_path):
    """Either script as a function of a target and its options: (exit code, all that it said)."""
    def either(target, *options, **more):
        command = [MONITOR, "-1"] if request.param == "monitor" else [SYNC]
        last = [] if request.param == "monitor" else [tmp_path / "here"]
        done = call(far, *command, *options, target, *last, **more)
        return done.returncode, done.stdout + done.stderr
    return either


NAME = "-a 'b' \"c\" $HOME `d` [e] *; (f) \\n \u00e4"


def test_a_name_is_only_a_name_here_and_there(far, tmp_path, both):
    """Also where the shell is dash, which reads fewer kinds of quotes than bash."""
    training(tmp_path / NAME / NAME, 10, 20)
    (tmp_path / NAME / NAME / f"{NAME}.npz").write_text("x")
    progress_file(tmp_path / NAME)
    dash = far.shell(tmp_path, 'exec dash -c "$line"')
    code, said = both(f"box:{tmp_path / NAME}", **dash)
    if (tmp_path / "here").exists():
        assert code == 0, said
        assert same(tmp_path / NAME / NAME, tmp_path / "here" / NAME,
                    ["checkpoint_00020.pt", f"{NAME}.npz", "PROGRESS.txt"])
        assert states(tmp_path / "here" / NAME) == [20]
    else:
        assert code == 4 and f"box:{tmp_path / NAME}: RUNNING" in said, said


def test_what_to_type_for_another_host_key_or_an_open_key_helps(far, tmp_path, both):
    key, another = tmp_path / "a key", (far.place / "another.pub").read_text()
    shutil.copy(far.place / "user", key)
    key.chmod(0o644)
    (tmp_path / "known hosts").write_text(f"[127.0.0.1]:{far.port} {another}")
    progress_file(tmp_path / "there", Status="COMPLETE")
    target, stub = f"box:{tmp_path}/there", far.client(tmp_path, "", "known hosts")
    for words, what in (("another host key", "ssh-keygen -R"), ("may read", "chmod 600")):
        code, said = both(target, "-k", key, **stub)
        assert code == 2 and words in said and len(said.splitlines()) == 1
        typed(said, what)
    code, said = both(target, SSH_KEY=key, **stub)
    assert code == 0, said
    key.write_bytes((far.place / "another").read_bytes())
    code, said = both(target, "-k", key, **stub)
    assert code == 2 and "Permission denied (publickey)" in said, "a wrong one, in ssh's words"


@pytest.mark.parametrize("script, arguments, words", [
    (MONITOR, [], "usage"), (MONITOR, ["-x"], "usage"), (MONITOR, ["-i", "soon", "."], "seconds"),
    (MONITOR, ["-k", "/nowhere", "."], "the key"),
    (MONITOR, ["box:/nowhere"], "no such directory on box\n"),
    (MONITOR, ["--", "-oProxyCommand=x"], "no such directory"),
    (SYNC, [], "usage"), (SYNC, ["one", "two", "three"], "usage"), (SYNC, ["-x"], "usage"),
    (SYNC, ["/nowhere", "/tmp/x"], "no such directory: /nowhere"),
    (SYNC, [str(ROOT), "ec2:/x"], "sync_results.sh FROM TO")])
def test_usage_errors_are_exit_code_2(far, script, arguments, words, tmp_path):
    done = subprocess.run(["bash", script, *arguments], cwd=tmp_path, env=far.env(),
                          capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize("script, number, code", [
    (MONITOR, signal.SIGINT, 130), (SYNC, signal.SIGINT, 130), (SYNC, signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_and_leaves_no_process(far, tmp_path, script, number, code):
    waiting = f"sleep 1000.{os.getpid()}"       # a name that no other process has
    stub = far.stub(tmp_path, "ssh", f": > {tmp_path}/begun; exec {waiting}")
    script = behind(far, script, "box:x", *[tmp_path / "here"] * (script == SYNC), variables=stub)
    wait_for((tmp_path / "begun").exists, "ssh")
    os.killpg(script.pid, number)
    assert script.wait(timeout=100) == code
    wait_for(lambda: subprocess.run(["pgrep", "-f", waiting], stdout=-3).returncode == 1, "its end")


# -- sync: what comes, what stays


def test_runs_are_copied_while_they_work_and_go_on_from_the_copy_alone(far, tmp_path):
    there, here, other = tmp_path / "there", tmp_path / "here", tmp_path / "other"
    process = job(there / "train", 10**6)
    videos = start("generate.py", "--n", 10**6, "--every", 100, "--size", 128,
                   "--out", there / "videos")
    wait_for(lambda: list((there / "videos").glob("checkpoint_*.npz")), "a piece")
    for _ in range(2):
        sync(far, f"box:{there}", here)
        assert runs.main(["verify", str(here)]) == 0, "each piece that came has its record"
    kill(process)
    kill(videos)
    sync(far, f"box:{there}", here)
    for run in ("train", "videos"):     # of the states only the newest came
        names = [p.name for p in (there / run).glob("[!.]*")
                 if run == "videos" or "checkpoint_" not in p.name]
        assert same(there / run, here / run, names)
    assert runs.main(["verify", str(here)]) == 0
    shutil.copytree(here, other)
    total = durable(other / "train") + 25
    for out in (other / "train", tmp_path / "undisturbed"):
        assert job(out, total, pause=0).wait() == 0
    assert same(other / "train", tmp_path / "undisturbed", [f"checkpoint_{total:05d}.json"])


def test_it_copies_results_only_and_deletes_nothing(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    results = ("checkpoint_00000.npz", "dataset.npz", "checkpoint_best.pt",
               "checkpoints_overview.png", "checkpoints/last.npz")
    for name in (*results, ".lock", "x.tmp", ".x.npz.12-abcdef01.tmp", "a.npz.corrupt", "r.old1/x"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes(b"content")
    (there / "link.npz").symlink_to("dataset.npz")
    here.mkdir()
    (here / "mine.txt").write_text("mine")
    assert ": 5 new files in" in sync(far, f"box:{there}", here)
    assert ": 0 new files in" in sync(far, there, here)
    copied = {str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()}
    assert copied == {*results, "PROGRESS.txt", "mine.txt", ".sync_results.lock"}
    shutil.rmtree(there)
    there.mkdir()
    sync(far, there, here)          # the remote is empty
    there.rmdir()
    assert "no such directory" in sync(far, f"box:{there}", here, code=2)
    assert {str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()} == copied


def test_what_one_looks_at_comes_first_and_fresh_with_the_same_size_and_second(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    training(there / "train", 10, 20)
    first = ["report.html", "train/metrics.json", "train/samples/one.png", "train/PROGRESS.txt"]
    then = ["a.npz", "train/best_model.pt", "train/checkpoint_00020.pt"]
    (there / "train" / "samples").mkdir()
    for name in {*first, *then} - {"train/PROGRESS.txt", "train/checkpoint_00020.pt"}:
        (there / name).write_bytes(b"40 %")
    stamp = time.time() - 100
    os.utime(there / "report.html", (stamp, stamp))
    sync(far, there, here)
    arrived = sorted([*first, *then], key=lambda name: (here / name).stat().st_ctime_ns)
    assert set(arrived[:4]) == set(first)
    assert states(here / "train") == [20], "only the newest state"
    (there / "report.html").write_bytes(b"41 %")
    os.utime(there / "report.html", (stamp, stamp))
    sync(far, there, here)
    assert (here / "report.html").read_bytes() == b"41 %"


def test_an_old_state_goes_only_once_a_newer_one_is_verified_all_else_stays(far, tmp_path):
    """As many states stay here as there."""
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    (there / "checkpoints.jsonl").write_text(json.dumps(
        {"name": "checkpoint_00000.npz", "start": 0, "stop": 9, "bytes": 1, "sha256": "0" * 64}))
    (there / "checkpoint_00000.npz").write_text("x")
    steps = []
    for step in (20, 50, 80):
        steps += [step - 10, step]
        training(there / "train", *steps)
        sync(far, there, here)
    training(there / "train", *steps, 110)
    newest = here / "train" / "checkpoint_00110.pt"
    bad_disk = far.stub(tmp_path, "rsync", f"""
        {shutil.which('rsync')} "$@"; code=$?
        [ ! -e {newest} ] || printf X | dd of={newest} conv=notrunc status=none
        exit $code""")
    line = sync(far, there, here, code=1, **bad_disk)
    assert "checkpoint_00110.pt is not what" in line and "older states were kept" in line
    assert states(here / "train") == [20, 50, 80]
    line = sync(far, there, here)       # a sound disk: it comes again, then one may go
    assert states(here / "train") == [50, 80, 110] and "1 older training states let go" in line
    assert same(there, here, ["train/checkpoint_00110.pt"])
    (there / "checkpoint_00000.npz").unlink()
    training(there / "train", *steps, 110, 120, keep=1)
    sync(far, there, here)
    assert states(here / "train") == [120] and (here / "checkpoint_00000.npz").exists()
    shutil.rmtree(there / "train")
    sync(far, there, here)
    assert states(here / "train") == [120], "no state there is no reason to let one go here"


@pytest.mark.parametrize("below", ["train", "."])
def test_a_run_that_began_anew_does_not_mix_with_the_old_ones_copies(far, tmp_path, below):
    there, here = tmp_path / "there", tmp_path / "here"
    training(there / below, 50, 60)
    (there / below / "best_model.pt").write_text("old")
    sync(far, there, here)
    (there / below).rename(tmp_path / "there.old1" if below == "." else there / "train.old1")
    training(there / below, 30)
    assert "a new run began there" in sync(far, there, here)
    aside = tmp_path / "here.old1" if below == "." else here / "train.old1"
    assert states(aside) == [60] and (aside / "best_model.pt").read_text() == "old"
    assert states(here / below) == [30] and not (here / below / "best_model.pt").exists()


def test_nothing_that_was_here_is_replaced_by_another_remote_or_the_first_sync(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    training(there / "train", 30)
    for mine in ("train", "train/run.json"):
        (here / mine).parent.mkdir(parents=True)
        (here / mine).write_text("mine")
        line = sync(far, there, here, code=2)
        assert "was here before the first sync" in line and (here / mine).read_text() == "mine"
        if mine == "train":
            shutil.rmtree(here)
    typed(sync(far, there, here, code=2), "echo")       # if it is a copy, from before this script
    sync(far, there, here)
    assert same(there, here, ["train/run.json"])
    training(tmp_path / "two/train", 30)
    line = sync(far, tmp_path / "two", here, code=2)
    assert f"copies of other runs, from {there}" in line
    typed(line, "mv")
    sync(far, tmp_path / "two", here)
    assert same(tmp_path / "two/train", here / "train", ["run.json"])


def test_directories_that_may_not_be_read_are_passed_over_and_named(far, tmp_path):
    for place in (tmp_path, *tmp_path.parents[:2]):     # pytest's own
        place.chmod(0o755)
    there, here = tmp_path / "there", tmp_path / "here"
    training(there / "train", 30)
    (there / "lost+found").mkdir(mode=0o700)
    here.mkdir()
    os.chown(here, ROOT_READS_ALL, -1)
    script = shutil.copy(SYNC, tmp_path)    # nobody may not see where the project lies
    assert "not readable there: lost+found\n" in call(far, script, there, here,
                                                      user=ROOT_READS_ALL).stdout
    assert states(here / "train") == [30]


# -- sync: what goes wrong


def test_why_nothing_comes_is_said_in_one_line(far, tmp_path):
    """In ssh's own words, where it is ssh; 75 says that the next run goes on."""
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    line = sync(far, f"closed:{there}", here, code=75)
    assert "Connection refused); the next run goes on" in line
    assert "closed:x: UNREACHABLE  ssh: connect to host" in monitor(far, "closed:x", code=3)
    frozen = far.stub(tmp_path, "ssh", "exec sleep 1000")
    assert "  no answer\n" in monitor(far, "box:x", code=3, MONITOR_TIMEOUT=1, **frozen)
    line = sync(far, f"box:{there}", here, code=75, SYNC_SECONDS=1, **frozen)
    assert "not done after 1 s; the next run goes on from here" in line
    assert "no rsync on box" in sync(far, f"box:{there}", here, code=2, **far.poor(tmp_path))
    greets = far.shell(tmp_path, 'echo Welcome; eval "$line"')
    assert "prints text at login" in sync(far, f"box:{there}", here, code=2, **greets)
    (tmp_path / "stub" / "ssh").unlink()
    lost = "Read from remote host box: Connection reset by peer"
    for said, code, end, words in (
            (lost, 255, 75, f"({lost}); the next run goes on"),
            # as openrsync says that a file went away while it looked
            ("rsync: /r/x: lstat: No such file or directory", 23, 0, ": 0 new files")):
        stub = far.stub(tmp_path, "rsync", f"echo '{said}' >&2; exit {code}")
        assert words in sync(far, f"box:{there}", here, code=end, **stub)
    for place in ("/proc/here", "/proc", there / "PROGRESS.txt"):
        assert "cannot write in" in sync(far, there, place, code=1)


@pytest.mark.parametrize("how, code", [
    ("cut", 75), ("SIGTERM", 143), pytest.param("Ctrl-C", 130, marks=pytest.mark.thorough)])
def test_an_end_in_mid_file_leaves_no_half_file_and_the_next_run_goes_on(far, tmp_path, how, code):
    there, here, name = tmp_path / "there", tmp_path / "here", "checkpoint_00000.npz"
    for place, content in ((there, os.urandom(8 << 20)), (here, b"old")):
        place.mkdir()
        (place / name).write_bytes(content)
    (here / ".sync_results.lock").write_text(f"box:{there}\n")      # "old" was brought by a sync
    slow = far.stub(tmp_path, "rsync", f'exec {shutil.which("rsync")} --bwlimit=2048 "$@"')
    copier = behind(far, SYNC, f"box:{there}", here, variables=slow)
    wait_for(lambda: any(p.stat().st_size > 1 << 20 for p in here.glob(f".{name}.*")),
             "a megabyte")
    {"cut": far.cut, "SIGTERM": copier.terminate,
     "Ctrl-C": lambda: os.killpg(copier.pid, signal.SIGINT)}[how]()
    said = copier.communicate(timeout=100)[0]
    assert copier.returncode == code and ("the next run goes on" in said) == (how == "cut")
    assert (here / name).read_bytes() == b"old"
    assert (here / ".rsync-partial" / name).stat().st_size > 1 << 20
    sync(far, f"box:{there}", here)
    assert same(there, here, [name]) and set(os.listdir(here)) == {name, ".sync_results.lock"}


def test_a_transfer_is_ended_by_sigterm_at_which_every_rsync_keeps_what_it_has(far, tmp_path):
    """openrsync, a Mac's rsync, keeps nothing at SIGALRM or SIGKILL."""
    progress_file(tmp_path / "there")
    stub = far.stub(tmp_path, "rsync", f"""
        trap 'echo TERM > {tmp_path}/told; exit 20' TERM
        touch {tmp_path}/begun
        while :; do sleep 0.1; done""")
    copier = behind(far, SYNC, tmp_path / "there", tmp_path / "here", variables=stub)
    wait_for((tmp_path / "begun").exists, "the transfer")
    copier.terminate()
    assert copier.wait(timeout=100) == 143 and (tmp_path / "told").read_text() == "TERM\n"


def test_one_works_the_others_leave_and_a_transfer_outlives_its_script(far, tmp_path):
    there, here, go = tmp_path / "there", tmp_path / "here", tmp_path / "go"
    training(there, 10)
    stub = far.stub(tmp_path, "rsync", f"""
        touch {tmp_path}/begun
        left=1000
        until [ -e {go} ] || [ $((left -= 1)) = 0 ]; do sleep 0.1; done
        exec {shutil.which("rsync")} "$@" """)
    copier = behind(far, SYNC, there, here, variables=stub)
    wait_for((tmp_path / "begun").exists, "the transfer")
    assert [sync(far, there, here) for _ in range(2)] == ["", ""]
    kill(copier)
    assert sync(far, there, here) == "", "the transfer still has the lock"
    go.touch()
    wait_for(lambda: sync(far, there, here), "the lock")
    assert states(here) == [10]


def test_a_full_disk_here_is_exit_code_1_and_the_next_run_goes_on(far, tmp_path, small_disk):
    there, disk = tmp_path / "there", small_disk(4 << 20)
    there.mkdir()
    for i in range(6):
        (there / f"checkpoint_{i}.npz").write_bytes(os.urandom(1 << 20))
    assert "No space left" in sync(far, there, disk / "here", code=1)
    assert all(p.stat().st_size == 1 << 20 for p in (disk / "here").glob("checkpoint_*"))
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    sync(far, there, disk / "here")
    assert same(there, disk / "here", [f"checkpoint_{i}.npz" for i in range(6)])


# -- what macOS lacks


def test_both_need_nothing_from_the_environment_but_remote(far, tmp_path):
    progress_file(tmp_path / "there", Status="COMPLETE")
    bare = ["env", "-i", f"PATH={far.bin}:/usr/bin:/bin", f"HOME={tmp_path}",
            f"REMOTE=box:{tmp_path}/there", f"SSH_KEY={far.place}/user", "/bin/bash"]
    for script in ([MONITOR, "-1"], [SYNC]):
        done = subprocess.run([*bare, *script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert same(tmp_path / "there", tmp_path / "results", ["PROGRESS.txt"])


BASH_4 = (r"mapfile|readarray|declare -A|local -n|&>>|\|&|\$\{\w+(,,|\^\^|@\w)|EPOCHSECONDS|"
          r"wait -n|\[\[ -v|coproc|;;&|;&|read -t 0\.|source <\(|\w\[-1\]|printf '%\(|"
          r"\{\w+\}[<>]|\bshopt -s (globstar|lastpipe|inherit)|BASHPID|SRANDOM")
GNU = (r"date -d|date --|grep -P|sed -i|sed -r|readlink -f|stat -c|\btimeout \d|\bflock \d|--info=|"
       r"--mkpath|--append-verify|--protect-args|head -n -|xargs -r|\bseq \d|\btac\b|sort -V|"
       r"mktemp --|find [^|]*-printf|find [^|]*-readable|\\\+'|ps -o etimes|%q|strftime|gensub|"
       r"asort|PROCINFO|systime")


@pytest.mark.parametrize("script, lines", [(MONITOR, 280), (SYNC, 330)])
def test_the_scripts_are_short_and_use_nothing_that_bash_3_2_or_bsd_tools_lack(script, lines):
    text = script.read_text().splitlines()
    assert len(text) <= lines and script.stat().st_mode & 0o111
    for number, line in enumerate(text, 1):
        code = re.sub(r"(^|\s)#.*", "", line)
        for lint in (BASH_4, GNU):
            assert not re.search(lint, code), f"{script.name}:{number}: {line}"
        assert line.isascii(), f"{script.name}:{number}: bash 3.2 misreads it"
        assert len(line) <= 100, f"{script.name}:{number}: longer than 100 columns"
    tried = {"--partial-dir", "--out-format", "--exclude", "--include", "--prune-empty-dirs"}
    used = set(re.findall(r"--[a-z]{2}[a-z-]*", re.sub(r"(?m)(^|\s)#.*", "", SYNC.read_text())))
    assert used <= tried, "with Apple's openrsync"


def test_shellcheck_is_clean():
    need("shellcheck")
    subprocess.run(["shellcheck", MONITOR, SYNC, ROOT / ".ci" / "run"], check=True)


def test_each_is_one_file_and_what_both_share_is_the_same_text():
    part = re.compile(r"# ---- the same in both scripts.*?# ---- the command line", re.S)
    one, other = (part.search(script.read_text())[0] for script in (MONITOR, SYNC))
    assert one == other and len(one) > 1000
