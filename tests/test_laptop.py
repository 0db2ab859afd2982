"""The promises of monitor_progress.sh and sync_results.sh, against a real sshd on loopback."""
import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, kill, missing, need, run, start, wait_for

import runs
from checkpointing import read_progress

MONITOR, SYNC = ROOT / "monitor_progress.sh", ROOT / "sync_results.sh"
thorough = pytest.mark.thorough
ROOT_READS_ALL = 65534      # so some tests run as nobody


# -- the far side: sshd, and hosts that misbehave


class Far:
    """Host names for ssh: box (a good one), dash, noflock (perl has to do), neither, norsync,
    banner, closed, changed."""

    def __init__(self, place):
        self.place = place
        for key in ("host", "other_host", "user", "dash", "noflock", "neither", "norsync",
                    "banner"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / key],
                           check=True)
        for name, more in (("noflock", ["perl"]), ("neither", ["rsync"]), ("norsync", [])):
            (place / f"bin-{name}").mkdir()
            for tool in ("sh", "date", "find", "sed", "head", "cut", "sort", *more):
                (place / f"bin-{name}" / tool).symlink_to(shutil.which(tool))
        shell = r'/bin/sh -c \"$SSH_ORIGINAL_COMMAND\"'
        forced = {"dash": f"exec {shell.replace('sh', 'dash', 1)}",
                  "banner": f"echo Welcome to the machine; exec {shell}"}
        forced |= {name: f"PATH={place}/bin-{name} exec {shell}"
                   for name in ("noflock", "neither", "norsync")}
        keys = [(place / "user.pub").read_text()]
        keys += [f'command="{command}",restrict {(place / f"{key}.pub").read_text()}'
                 for key, command in forced.items()]
        (place / "authorized_keys").write_text("".join(keys))
        self.port = free_port()
        (place / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {place}/host\n"
            f"AuthorizedKeysFile {place}/authorized_keys\nPidFile {place}/pid\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "MaxStartups 100\n")
        os.makedirs("/run/sshd", exist_ok=True)
        self.sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", place / "sshd_config"],
                                     stderr=subprocess.DEVNULL)
        (place / "known_changed").write_text(f"changed {(place / 'other_host.pub').read_text()}")
        closed = free_port()
        self.config = "".join(
            f"Host {name}\n HostName 127.0.0.1\n User root\n"
            f" Port {closed if name == 'closed' else self.port}\n"
            f" HostKeyAlias {name}\n IdentitiesOnly yes\n GlobalKnownHostsFile /dev/null\n"
            f" UserKnownHostsFile {place}/known_{'changed' if name == 'changed' else 'hosts'}\n"
            f" IdentityFile {place / (name if name in forced else 'user')}\n"
            for name in ("box", "closed", "changed", *forced))
        # The client under test is the real one; only its configuration is ours.
        self.bin = place / "bin"
        self.tool("ssh", f'exec {shutil.which("ssh")} -F {self.ssh_config()} "$@"')
        wait_for(self.answers, "sshd")

    def ssh_config(self, name="ssh_config", change=("", "")):
        (self.place / name).write_text(self.config.replace(*change))
        return self.place / name

    def answers(self):
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.port), 1) as s:
                return s.recv(3) == b"SSH"

    def tool(self, name, script, place=None):
        path = (place or self.bin) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)

    def stub(self, place, name, script):
        """An option for env(): PATH where program `name` is this shell script."""
        self.tool(name, script, place / "stub")
        return {"PATH": f"{place / 'stub'}:{self.bin}:/usr/bin:/bin"}

    def slow(self, place, megabytes):
        """An option for env(): so many megabytes come in a second."""
        return self.stub(place, "rsync",
                         f'exec {shutil.which("rsync")} --bwlimit={megabytes * 1024} "$@"')

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
                          capture_output=True, text=True, timeout=100)


def monitor(far, *arguments, code=None, **more):
    done = call(far, MONITOR, *arguments, **more)
    if code is not None:
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
    yield watcher, (tmp_path / "screen").read_text
    watcher.kill()
    watcher.wait()


JOB = f"""
import random, sys, time
sys.path.insert(0, {str(ROOT)!r})
import checkpointing
out, total, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
random.seed(1)
run = checkpointing.Run(out, total, every=10)
values = run.load([])
for i in run.steps(lambda: values):
    time.sleep(pause)
    values.append(random.random())
"""


def job(out, total, pause=0.0):
    """A job of somebody's own, at work, with its first state saved."""
    process = subprocess.Popen([sys.executable, "-c", JOB, out, str(total), str(pause)],
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: "(" in read_progress(out / "PROGRESS.txt").get("Checkpoint", "")
             if (out / "PROGRESS.txt").exists() else None, "the first state")
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


def training(directory, *steps, run="6f1c2a", kept=3):
    """What a training leaves that saved these steps: a record of each, the files of the last."""
    progress_file(directory)
    lines = []
    for step in steps:
        path, content = directory / f"checkpoint_{step:05d}.pt", f"{run} {step}".encode() * 99
        lines.append(json.dumps({"name": path.name, "start": step, "stop": step,
                                 "bytes": len(content),
                                 "sha256": hashlib.sha256(content).hexdigest()}) + "\n")
        if step not in steps[-kept:]:
            path.unlink(missing_ok=True)
        elif not path.exists():
            path.write_bytes(content)
    (directory / "checkpoints.jsonl").write_text("".join(lines))
    (directory / "run.json").write_text(json.dumps({"run": run, "settings": {}}, indent=1))


def states(directory):
    return sorted(int(p.stem.split("_")[1]) for p in directory.glob("checkpoint_*.pt"))


def same(a, b, names):
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def hidden(here):
    """What transfers left behind."""
    return [p for p in here.rglob(".*") if p.name != ".sync_results.lock"]


def big(there, megabytes):
    there.mkdir()
    (there / "checkpoint_00000.npz").write_bytes(os.urandom(megabytes << 20))


def in_flight(here):
    """Files of which more than 1 MB has arrived, and not yet all."""
    return [p for p in here.glob(".checkpoint*") if p.stat().st_size > 1 << 20]


# -- monitor: what a run is doing


def test_it_watches_a_run_through_its_death_and_a_new_start_until_it_is_complete(far, tmp_path):
    out = tmp_path / "run"
    process = job(out, 10**6, 0.01)
    with watching(far, tmp_path, f"box:{tmp_path}") as (watcher, text):
        wait_for(lambda: f"box:{out}: RUNNING" in text(), "RUNNING")
        process.kill()      # and nobody waits for it, as in many a container: a zombie
        wait_for(lambda: f"box:{out}: DEAD  its process is gone" in text(), "DEAD")
        process.wait()
        dead = text()[text().index(": DEAD"):]
        assert re.search(r"  Checkpoint: \d+ \(checkpoint_\d+\.pkl\)\n", dead), dead
        assert re.search(r"  to go on: \S*python\S* -c ", dead), dead
        saved = int(read_progress(out / "PROGRESS.txt")["Checkpoint"].split()[0])
        again = job(out, saved + 100, 0.01)
        again.wait()
        assert watcher.wait(timeout=60) == 0
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
    "a copy, three intervals and half a minute old": (
        {"Heartbeat": 120}, None, "RUNNING"),
    "starting": ({"Status": "INTERRUPTED"}, "held", "STARTING .* it was INTERRUPTED"),
    "interrupted": ({"Status": "INTERRUPTED"}, "free", "INTERRUPTED"),
    "hangs": ({"Status": "STALLED", "Advanced": 600}, "held",
              "STALLED .* no step for 1[0-9] min"),
    "failed": ({"Status": "FAILED", "Error": "it broke"}, "free", "FAILED .* it broke"),
    "complete": ({"Status": "COMPLETE"}, "free", "COMPLETE"),
    "words in other places": ({"Note": "Status: COMPLETE", "Title": "COMPLETE"}, "held", "RUNNING"),
}


@pytest.mark.parametrize("host", ["box:", "noflock:", "neither:", ""])
def test_the_lock_decides_or_without_one_the_heartbeat(far, tmp_path, host):
    locks = []
    for name, (changes, lock, _) in WORDS.items():
        times = {key: int(time.time()) - changes[key] for key in ("Heartbeat", "Advanced")
                 if key in changes}
        locks.append(progress_file(tmp_path / name, lock, **{**changes, **times}))
    said = monitor(far, "-1", f"{host}{tmp_path}", code=1)
    for name, (changes, lock, expected) in WORDS.items():
        line = re.search(rf".*{re.escape(str(tmp_path))}/{re.escape(name)}(  .*)?\n", said)[0]
        if host == "neither:" and lock:
            assert line.split()[0] == {LONG: "SILENT"}.get(changes.get("Heartbeat"),
                                                        changes.get("Status", "RUNNING")), line
        else:
            assert re.match(expected, line), line
    del locks


@pytest.mark.parametrize("words, code", [
    (["COMPLETE"], 0), (["COMPLETE", "RUNNING"], 4), (["COMPLETE", "INTERRUPTED"], 1),
    (["FAILED", "RUNNING"], 1), ([], 4), (["STALLED"], 4)])
def test_one_look_has_an_exit_code(far, tmp_path, words, code):
    for number, word in enumerate(words):
        progress_file(tmp_path / str(number), Status=word)
    said = monitor(far, "-1", tmp_path, code=code)
    assert all(f"{tmp_path}/{number}: {word}" in said for number, word in enumerate(words))
    assert words or "no run here yet (no PROGRESS.txt)" in said


def test_forty_runs_are_a_line_each_by_one_awk(far, tmp_path):
    stub = far.stub(tmp_path, "awk", f'echo x >> {tmp_path}/calls; exec {shutil.which("awk")} "$@"')
    for number in range(40):
        progress_file(tmp_path / f"shards/{number:02d}", ETA="764 s (2026-01-25 01:22:40 UTC)")
    said = monitor(far, "-1", f"box:{tmp_path}/shards", code=4, **stub).splitlines()
    assert sum(bool(re.match(r"RUNNING +40%  box:.*/shards/\d\d  ETA 12 min", line))
               for line in said) == 40
    assert "40 RUNNING" in said[-1] or "40 RUNNING" in said[-2]
    assert (tmp_path / "calls").read_text() == "x\n" and len(said) < 45


def test_a_file_with_many_lines_of_its_own_is_read_whole(far, tmp_path):
    progress_file(tmp_path, Status="FAILED", **{f"Field {n}": "x" * 99 for n in range(100)},
                  Error="seen")
    said = monitor(far, "-1", f"box:{tmp_path}", code=1)
    assert "FAILED  seen\n" in said and "  Field 99: x" in said


def test_the_screen_fits_40_columns_and_keeps_the_scrollback(far, tmp_path):
    progress_file(tmp_path, Progress="99/100 samples (99.0%)", Elapsed="829 s")
    screen, inside = pty.openpty()
    watcher = behind(far, MONITOR, "-i", 1, tmp_path, stdout=inside, stderr=inside)
    said = b""
    while said.count(b"again in") < 2:
        said += os.read(screen, 4096)
    watcher.kill()
    watcher.wait()
    assert said.count(b"\x1b[H\x1b[J") >= 2 and said.count(b"\x1b") == 2 * said.count(b"\x1b[H")
    lines = [line for line in said.decode().split("\r\n") if str(tmp_path) not in line]
    assert f"[{29 * '#'}-] 99%" in lines and max(map(len, lines)) <= 40, lines
    assert "  Elapsed: 13 min" in lines


def test_unreachable_is_not_death_and_two_runs_lost_ring_once(far, tmp_path):
    down = tmp_path / "down"
    stub = far.stub(tmp_path, "ssh", f"""
        [ ! -e {down} ] || {{ echo "connect to host: Network is unreachable" >&2; exit 255; }}
        exec {far.bin}/ssh "$@" """)
    locks = [progress_file(tmp_path / name, "held") for name in "ab"]
    progress_file(tmp_path / "c", Status="COMPLETE")
    with watching(far, tmp_path, f"box:{tmp_path}", **stub) as (_, text):
        wait_for(lambda: "a: RUNNING" in text(), "RUNNING")
        down.touch()
        wait_for(lambda: text().count("a: UNREACHABLE") >= 2, "UNREACHABLE twice")
        lost = text()[text().index("UNREACHABLE"):]
        assert "last known: RUNNING; connect to host: Network is unreachable" in lost
        assert "Progress: 40/100" in lost and "c: COMPLETE" in lost, "what is COMPLETE stays so"
        assert text().count("\a") == 1, "one for the change of two runs, none for the next look"
        down.unlink()
        wait_for(lambda: "a: RUNNING" in text()[text().rindex("UNREACHABLE"):], "recovery")
    del locks


def test_a_progress_file_that_is_none_is_called_so(far, tmp_path):
    for number, content in enumerate([
            b"", b"\0" * 1000, os.urandom(5000), b"x" * (50 << 20), b"Status\nHeartbeat: \n",
            b"A job\nStatus: COMPLETELY\nHeartbeat: 1\n", b"Status: COMPLETE\nHeartbeat: 1\n",
            b"A job\nProgress: 1/1 (100%)\nNote: COMPLETE\n"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "PROGRESS.txt").write_bytes(content)
        said = monitor(far, "-1", tmp_path / str(number), code=4)
        assert ": UNREADABLE  this is not" in said and len(said) < 500, said


def test_ages_are_of_the_remote_clock_and_the_end_is_told_on_the_readers_own(far, tmp_path):
    """The laptop's clock is an hour ahead; there it is about noon."""
    stub = far.stub(tmp_path, "date", f'exec {shutil.which("date")} -d "1 hour" "$@"')
    now = int(time.time())
    progress_file(tmp_path, Heartbeat=now - 12, ETA="776 s (2026-01-25 01:22:40 UTC)")
    zone = int(time.strftime("%H", time.gmtime())) - 11
    said = monitor(far, "-1", f"box:{tmp_path}", code=4, TZ=f"XXX{zone}", **stub)
    assert re.search(r": RUNNING\n(.*\n)*  written [1-9]\d? s before it was seen", said), said
    there = {time.strftime("%H:%M", time.gmtime(now + 764 + (1 - zone) * 3600 + late))
             for late in (-60, 0, 60)}
    assert re.search(r"  ETA: 12 min, at (\d\d:\d\d)\n", said)[1] in there, said


def test_nothing_from_a_file_runs_or_garbles_the_screen(far, tmp_path):
    touch = f"touch {tmp_path}/pwned"
    nasty = f"\x1b[2J\x1b]0;title\x07 $({touch}) `{touch}` %s%n \\033[31m; rm -rf /"
    progress_file(tmp_path / "a $(touch pwned) 'b\" %s\\n", Note=nasty, Advanced="08",
                  Progress="9999999999999999999999/1 x (999999999999999%)", Heartbeat="9" * 30,
                  Interval="-1 s", ETA="9" * 30 + " s (never)")
    said = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert "\x1b" not in said and "\x07" not in said and f"[{30 * '#'}] " in said
    assert "$(touch pwned) 'b\" %s\\n: RUNNING" in said and "`touch" in said
    assert not list(tmp_path.rglob("pwned"))


def test_pages_old_runs_and_runs_far_down(far, tmp_path):
    progress_file(tmp_path / "a/b/c/d/e/f", Status="COMPLETE")
    for old in ("train.old1", ".hidden"):
        progress_file(tmp_path / old, Heartbeat=1)
    assert "pictures" not in monitor(far, "-1", tmp_path, code=0)
    (tmp_path / "report.html").write_text("page")
    said = monitor(far, "-1", f"box:{tmp_path}/", code=0)
    assert said.endswith(f"pictures: box:{tmp_path}/report.html\n\n") and "old1" not in said
    assert f"box:{tmp_path}/a/b/c/d/e/f: COMPLETE" in said


@thorough
def test_several_targets_and_a_notification_with_text_as_an_argument(far, tmp_path):
    said = tmp_path / "said"
    stub = far.stub(tmp_path, "osascript", f'printf "%s\\n" "$@" >> {said}')
    locks = [progress_file(tmp_path / name, "held") for name in "ab"]
    with watching(far, tmp_path, tmp_path / "a", f"box:{tmp_path}/b", **stub) as (watcher, text):
        wait_for(lambda: "b: RUNNING" in text() and "a: RUNNING" in text(), "both")
        for name, lock in zip("ab", locks):
            progress_file(tmp_path / name, Status="COMPLETE")
            lock.close()
        assert watcher.wait(timeout=30) == 0
    lines = said.read_text().splitlines()
    news = ", ".join(line for line in lines if "was RUNNING" in line)
    assert f"{tmp_path}/a: COMPLETE, was RUNNING" in news and lines[-2] == "--"
    assert f"box:{tmp_path}/b: COMPLETE, was RUNNING" in news and "\a" not in text()


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


@pytest.mark.parametrize("host", ["box:", pytest.param("dash:", marks=thorough)])
def test_a_name_is_only_a_name_here_and_there(far, tmp_path, both, host):
    training(tmp_path / NAME / NAME, 10, 20)
    (tmp_path / NAME / NAME / f"{NAME}.npz").write_text("x")
    (tmp_path / NAME / "PROGRESS.txt").write_bytes(
        (tmp_path / NAME / NAME / "PROGRESS.txt").read_bytes().replace(b"RUNNING", b"COMPLETE"))
    code, said = both(f"{host}{tmp_path / NAME}")
    if (tmp_path / "here").exists():
        assert code == 0, said
        assert same(tmp_path / NAME / NAME, tmp_path / "here" / NAME,
                    ["checkpoint_00020.pt", f"{NAME}.npz", "PROGRESS.txt"])
        assert states(tmp_path / "here" / NAME) == [20]
    else:
        assert code == 4 and f"{host}{tmp_path / NAME}: COMPLETE" in said, said


def test_a_key_that_others_may_read_is_told_with_what_to_type(far, tmp_path, both):
    key = tmp_path / "a key"
    shutil.copy(far.place / "user", key)
    key.chmod(0o644)
    progress_file(tmp_path / "there")
    config = far.ssh_config("bare_config", (f" IdentityFile {far.place / 'user'}\n", ""))
    stub = far.stub(tmp_path, "ssh", f'exec {shutil.which("ssh")} -F {config} "$@"')
    code, said = both(f"box:{tmp_path / 'there'}", "-k", key, **stub)
    assert code == 2 and len(said.splitlines()) == 1
    subprocess.run(re.search(r"type: (chmod .*)", said)[1], shell=True, check=True)
    code, said = both(f"box:{tmp_path / 'there'}", REMOTE="", SSH_KEY=key, **stub)
    assert code in (0, 4), said
    key.write_bytes((far.place / "other_host").read_bytes())
    code, said = both(f"box:{tmp_path / 'there'}", "-k", key, **stub)
    assert code == 2 and "Permission denied (publickey)" in said, "a wrong one, in ssh's words"


def test_what_to_type_for_a_changed_host_key_helps(far, tmp_path, both):
    known = tmp_path / "known hosts"
    known.write_text(f"[127.0.0.1]:{far.port} {(far.place / 'other_host.pub').read_text()}")
    (tmp_path / "config").write_text(
        f"Host ec2\n HostName 127.0.0.1\n Port {far.port}\n IdentityFile {far.place}/user\n"
        f" UserKnownHostsFile \"{known}\"\n GlobalKnownHostsFile /dev/null\n User root\n")
    stub = far.stub(tmp_path, "ssh", f'exec {shutil.which("ssh")} -F {tmp_path}/config "$@"')
    progress_file(tmp_path / "there", Status="COMPLETE")
    code, said = both(f"ec2:{tmp_path / 'there'}", **stub)
    assert code == 2 and "another host key" in said and len(said.splitlines()) == 1
    typed = re.search(r"type: (ssh-keygen -R .*?)    ", said)[1]
    subprocess.run(typed, shell=True, check=True, capture_output=True)
    code, said = both(f"ec2:{tmp_path / 'there'}", **stub)
    assert code == 0, said


@pytest.mark.parametrize("script, arguments, words", [
    (MONITOR, [], "usage"), (MONITOR, ["-x"], "usage"), (MONITOR, ["-i", "soon", "."], "seconds"),
    (MONITOR, ["-i", "0", "."], "seconds"), (MONITOR, ["-k", "/nowhere", "."], "the key"),
    (MONITOR, ["/nowhere"], "/nowhere: no such directory\n"),
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
    stub = far.stub(tmp_path, "ssh", f"touch {tmp_path}/begun; exec {waiting}")
    script = behind(far, script, "box:x", *[tmp_path / "here"] * (script == SYNC), variables=stub)
    wait_for((tmp_path / "begun").exists, "ssh")
    os.killpg(script.pid, number)
    assert script.wait(timeout=20) == code
    wait_for(lambda: subprocess.run(["pgrep", "-f", waiting], stdout=-3).returncode == 1, "its end")


# -- sync: what comes, what stays


def test_a_run_is_copied_while_it_works_and_goes_on_from_the_copy_alone(far, tmp_path):
    there, here, other = tmp_path / "there", tmp_path / "here", tmp_path / "other"
    process = job(there / "train", 10**6, 0.01)
    for _ in range(2):
        sync(far, f"box:{there}", here)
    kill(process)
    sync(far, f"box:{there}", here)
    names = sorted(p.name for p in (here / "train").iterdir())
    assert same(there / "train", here / "train", [n for n in names if n[0] != "c"])
    assert runs.main(["verify", str(here)]) == 0
    shutil.copytree(here, other)
    begun = int(read_progress(other / "train/PROGRESS.txt")["Checkpoint"].split()[0])
    total = begun + 25
    for out in (other / "train", tmp_path / "undisturbed"):
        assert job(out, total).wait() == 0
    assert same(other / "train", tmp_path / "undisturbed", [f"checkpoint_{total:05d}.pkl"])


@thorough
def test_videos_arrive_while_they_are_made_and_are_equal_at_the_end(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    process = start("generate.py", "--n", 100000, "--every", 1000, "--out", there,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((there / "PROGRESS.txt").exists, "the start")
    assert "there: RUNNING" in monitor(far, "-1", f"box:{there}", code=4)
    while process.poll() is None:
        sync(far, f"box:{there}", here)
        assert runs.main(["verify", str(here)]) == 0, "each piece that came has its record"
    sync(far, f"box:{there}", here)
    names = sorted(p.name for p in there.iterdir() if not p.name.startswith("."))
    assert sorted(p.name for p in here.iterdir() if p.name[0] != ".") == names
    assert same(there, here, names) and runs.main(["verify", str(here)]) == 0


def test_it_copies_results_only_and_deletes_nothing(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    results = ("checkpoint_00000.npz", "dataset.npz", "checkpoint_best.pt",
               "checkpoints_overview.png", "checkpoints/last.npz")
    for name in (*results, ".lock", "x.tmp", ".x.npz.12-abcdef01.tmp", "a.npz.corrupt", "r.old1/x"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes(b"content")
    (there / "link.npz").symlink_to("dataset.npz")
    os.mkfifo(there / "pipe")
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
    content = {"report.html": 1, "train/metrics.json": 1, "train/samples/one.png": 1,
               "train/PROGRESS.txt": 1, "a.npz": 2, "train/best_model.pt": 2,
               "train/checkpoint_00020.pt": 2}
    for name in content:
        (there / name).parent.mkdir(exist_ok=True)
        if not (there / name).exists():
            (there / name).write_bytes(b"40 %")
    stamp = time.time() - 100
    os.utime(there / "report.html", (stamp, stamp))
    sync(far, there, here)
    arrived = sorted(content, key=lambda name: (here / name).stat().st_ctime_ns)
    assert [content[name] for name in arrived] == sorted(content.values())
    assert states(here / "train") == [20], "only the newest state"
    (there / "report.html").write_bytes(b"41 %")
    os.utime(there / "report.html", (stamp, stamp))
    sync(far, there, here)
    assert (here / "report.html").read_bytes() == b"41 %"


def test_as_many_states_stay_here_as_there_and_all_else_for_ever(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    (there / "checkpoints.jsonl").write_text(json.dumps(
        {"name": "checkpoint_00000.npz", "start": 0, "stop": 9, "bytes": 1, "sha256": "0" * 64}))
    (there / "checkpoint_00000.npz").write_text("x")
    steps = []
    for step, left in ((20, [20]), (50, [20, 50]), (80, [20, 50, 80]), (110, [50, 80, 110])):
        steps += [step - 10, step]
        training(there / "train", *steps)
        line = sync(far, there, here)
        assert states(here / "train") == left
    assert "1 older training states let go" in line
    (there / "checkpoint_00000.npz").unlink()
    training(there / "train", *steps, kept=1)
    sync(far, there, here)
    assert states(here / "train") == [110] and (here / "checkpoint_00000.npz").exists()
    (there / "train" / "checkpoint_00110.pt").unlink()
    sync(far, there, here)
    shutil.rmtree(there / "train")
    sync(far, there, here)
    assert states(here / "train") == [110], "no state there is no reason to let one go here"


def test_an_older_state_goes_only_once_a_newer_one_is_verified_here(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    for steps in ([10], [10, 40], [10, 40, 70]):
        training(there, *steps)
        sync(far, there, here)
    training(there, 10, 40, 70, 100)
    newest = shlex.quote(str(here / "checkpoint_00100.pt"))
    damaged = far.stub(tmp_path, "rsync", f"""
        {shutil.which('rsync')} "$@"; code=$?
        [ ! -e {newest} ] || printf X | dd of={newest} conv=notrunc status=none
        exit $code""")
    line = sync(far, there, here, code=1, **damaged)
    assert "checkpoint_00100.pt is not what" in line and "older states were kept" in line
    assert states(here) == [10, 40, 70]
    sync(far, there, here)   # a sound disk: it comes again, then one may go
    assert states(here) == [40, 70, 100] and same(there, here, ["checkpoint_00100.pt"])


@pytest.mark.parametrize("below", ["train", "."])
def test_a_run_that_began_anew_does_not_mix_with_the_old_ones_copies(far, tmp_path, below):
    there, here = tmp_path / "there", tmp_path / "here"
    training(there / below, 50, 60)
    (there / below / "best_model.pt").write_text("old")
    sync(far, there, here)
    (there / below).rename(tmp_path / "there.old1" if below == "." else there / "train.old1")
    training(there / below, 30, run="another")
    assert "a new run began there" in sync(far, there, here)
    aside = tmp_path / "here.old1" if below == "." else here / "train.old1"
    assert states(aside) == [60] and (aside / "best_model.pt").read_text() == "old"
    assert states(here / below) == [30] and not (here / below / "best_model.pt").exists()


def test_nothing_that_was_here_is_replaced_by_another_remote_or_the_first_sync(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    training(there / "train", 30)
    (there / "dataset.npz").write_text("theirs")
    for mine in ("dataset.npz", "train", "train/run.json"):
        (here / mine).parent.mkdir(parents=True)
        (here / mine).write_text("mine")
        line = sync(far, there, here, code=2)
        assert "was here before the first sync" in line and (here / mine).read_text() == "mine"
        shutil.rmtree(here)
    here.mkdir()
    (here / "dataset.npz").write_text("an older copy")
    line = sync(far, f"box:{there}", here, code=2)
    subprocess.run(re.search(r"type: (echo .*)", line)[1], shell=True, check=True)
    sync(far, f"box:{there}", here)
    assert same(there, here, ["dataset.npz"])
    training(tmp_path / "two/train", 30, run="another")
    line = sync(far, tmp_path / "two", here, code=2)
    assert f"copies of other runs, from box:{there}" in line and "type: mv" in line
    subprocess.run(re.search(r"type: (mv .*)", line)[1], shell=True, check=True)
    sync(far, tmp_path / "two", here)
    assert same(tmp_path / "two/train", here / "train", ["run.json"])


def test_directories_that_may_not_be_read_are_passed_over_files_are_an_error(far, tmp_path):
    for place in (tmp_path, *tmp_path.parents[:2]):     # pytest's own
        place.chmod(0o755)
    there, here = tmp_path / "there", tmp_path / "here"
    training(there / "train", 30)
    (there / "lost+found").mkdir(mode=0o700)
    here.mkdir()
    os.chown(here, ROOT_READS_ALL, -1)
    line = sync(far, there, here, user=ROOT_READS_ALL)
    assert "3 new files" not in line and "not readable there: lost+found\n" in line
    assert states(here / "train") == [30]
    (there / "b.png").write_text("x")
    (there / "b.png").chmod(0)
    training(there / "train", 30, 40)
    line = sync(far, there, here, user=ROOT_READS_ALL, code=2)
    assert "may not read all of" in line and "b.png" in line and "all else was brought" in line
    assert states(here / "train") == [30, 40]


# -- sync: what goes wrong


def test_why_nothing_can_be_seen_is_said_in_ssh_s_own_words(far, tmp_path):
    progress_file(tmp_path / "there")
    reset = "Read from remote host box: Connection reset by peer"
    for host, program, code, words in (
            ("closed", "", 75, "Connection refused); the next run goes on"),
            ("norsync", "", 2, "no rsync on norsync"), ("banner", "", 2, "prints text at login"),
            ("box", f"echo '{reset}' >&2; exit 255", 75, f"({reset})"),
            ("box", "echo 'sh: rsync: Permission denied' >&2; exit 12", 75, "n denied)"),
            ("", "echo 'rsync: /r/x: lstat: No such file or directory' >&2; exit 23", 0, ": 0 new"),
            ("box", "echo 'mkstemp x failed: Read-only file system' >&2; exit 23", 1, "Read-only")):
        more = far.stub(tmp_path, "rsync", f"echo 'rsync(2): poll: bad fd' >&2; {program}")
        there = tmp_path / "there"
        line = sync(far, f"{host}:{there}" if host else there, tmp_path / "here", code=code, **more)
        assert words in line
    for host, words in (("closed", "Connection refused\n"),
                        ("no-such-host.invalid", "Could not resolve hostname")):
        said = monitor(far, "-1", f"{host}:x", code=3)
        assert f"{host}:x: UNREACHABLE  " in said and words in said
    frozen = far.stub(tmp_path, "ssh", "sleep 1000")
    assert "  no answer\n" in monitor(far, "-1", "box:x", code=3, MONITOR_TIMEOUT=1, **frozen)


def test_a_local_directory_that_cannot_be_written_is_exit_code_1(far, tmp_path):
    progress_file(tmp_path / "there")
    (tmp_path / "file").touch()
    for here in ("/proc/here", "/proc", tmp_path / "file"):
        assert "cannot write in" in sync(far, tmp_path / "there", here, code=1)


def test_a_connection_cut_in_mid_file_leaves_no_half_file_and_the_next_run_goes_on(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 10)
    here.mkdir()
    (here / "checkpoint_00000.npz").write_bytes(b"old")
    (here / ".sync_results.lock").write_text(f"box:{there}\n")     # brought by a sync
    copier = behind(far, SYNC, f"box:{there}", here, variables=far.slow(tmp_path, 2))
    wait_for(lambda: in_flight(here), "the transfer")
    far.cut()
    assert "the next run goes on" in copier.communicate(timeout=30)[0] and copier.returncode == 75
    assert (here / "checkpoint_00000.npz").read_bytes() == b"old"
    assert (here / ".rsync-partial" / "checkpoint_00000.npz").stat().st_size > 1 << 20
    sync(far, f"box:{there}", here)
    assert same(there, here, ["checkpoint_00000.npz"]) and not hidden(here)


@pytest.mark.parametrize("number, everybody", [
    (signal.SIGTERM, False), pytest.param(signal.SIGTERM, True, marks=thorough),
    pytest.param(signal.SIGINT, True, marks=thorough)])
def test_a_signal_in_mid_file_loses_nothing_of_it(far, tmp_path, number, everybody):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 10)
    copier = behind(far, SYNC, f"box:{there}", here, variables=far.slow(tmp_path, 2))
    wait_for(lambda: in_flight(here), "the transfer")
    (os.killpg if everybody else os.kill)(copier.pid, number)
    copier.communicate(timeout=20)
    assert copier.returncode == 128 + number
    assert (here / ".rsync-partial" / "checkpoint_00000.npz").stat().st_size > 1 << 20


def test_with_openrsync_the_limit_in_mid_file_loses_nothing_of_it(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 6)
    stub = far.stub(tmp_path, "rsync", f'exec {sys.executable} {ROOT}/tests/openrsync.py "$@"')
    like_a_mac = {**stub, "RATE": 2 << 20, "SENT": tmp_path / "sent"}
    line = sync(far, there, here, code=75, SYNC_SECONDS=3, **like_a_mac)
    assert "not finished after 3 s; the next run goes on from here" in line
    kept = here / ".rsync-partial" / "checkpoint_00000.npz"
    assert 0 < kept.stat().st_size < 6 << 20
    sync(far, there, here, **like_a_mac)
    assert same(there, here, ["checkpoint_00000.npz"]) and not hidden(here)
    assert sum(map(int, (tmp_path / "sent").read_text().split())) == 6 << 20, "each byte once"


def test_one_works_and_the_others_leave_and_a_transfer_outlives_its_script(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 10)
    here.mkdir()
    (here / ".sync_results.lock").write_text(f"box:{there}\n{os.getpid()}\n")   # a dead one's
    copier = behind(far, SYNC, f"box:{there}", here, variables=far.slow(tmp_path, 4))
    wait_for(lambda: in_flight(here), "the transfer")
    assert [sync(far, f"box:{there}", here) for _ in range(3)] == ["", "", ""]
    kill(copier)
    assert sync(far, f"box:{there}", here) == "", "the transfer still has the lock"
    wait_for(lambda: sync(far, f"box:{there}", here), "the lock")
    assert same(there, here, ["checkpoint_00000.npz"])


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
