"""The promises of monitor_progress.sh and sync_results.sh, against a real sshd on loopback with keys of its own."""
import contextlib
import filecmp
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, kill, missing, need, run, start, wait_for

import checkpointing
from checkpointing import read_progress

JOB = "tests/counting_job.py"
MONITOR, SYNC = ROOT / "monitor_progress.sh", ROOT / "sync_results.sh"


# -- the far side: sshd, and hosts that misbehave


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Far:
    """Host names for ssh: box (a good one), norsync, banner, closed, silent, changed, cut and slow."""

    def __init__(self, place):
        self.place, self.processes = place, []
        for key in ("host", "other_host", "user", "norsync", "banner", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / key], check=True)
        empty = place / "empty"
        empty.mkdir()
        for tool in ("sh", "date", "find", "sed", "head", "tr", "ps", "cut", "sort", "hostname"):
            (empty / tool).symlink_to(shutil.which(tool))
        force = 'command="%s",restrict %s'
        keys = [(place / "user.pub").read_text(),
                force % (f"PATH={empty} exec /bin/sh -c \\\"$SSH_ORIGINAL_COMMAND\\\"", (place / "norsync.pub").read_text()),
                force % ("echo Welcome to the machine; exec /bin/sh -c \\\"$SSH_ORIGINAL_COMMAND\\\"",
                         (place / "banner.pub").read_text())]
        (place / "authorized_keys").write_text("".join(keys))
        self.port = free_port()
        (place / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/authorized_keys\n"
            f"PidFile {place}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "MaxStartups 100\nSubsystem sftp internal-sftp\n")
        os.makedirs("/run/sshd", exist_ok=True)
        self.sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", place / "sshd_config"], stderr=subprocess.DEVNULL)
        self.silent = socket.create_server(("127.0.0.1", 0))   # the kernel accepts, nobody speaks
        self.cutter = Cutter(self.port)
        (place / "known_changed").write_text(f"changed {(place / 'other_host.pub').read_text()}")
        hosts = {"box": (self.port, "user"), "norsync": (self.port, "norsync"), "banner": (self.port, "banner"),
                 "closed": (free_port(), "user"), "silent": (self.silent.getsockname()[1], "user"),
                 "changed": (self.port, "user"), "cut": (self.cutter.port, "user")}
        (place / "ssh_config").write_text("".join(
            f"Host {name}\n HostName 127.0.0.1\n Port {port}\n User {os.environ.get('USER', 'root')}\n HostKeyAlias {name}\n"
            f" IdentityFile {place}/{key}\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {place}/known_{'changed' if name == 'changed' else 'hosts'}\n GlobalKnownHostsFile /dev/null\n"
            for name, (port, key) in hosts.items()))
        # The client under test is the real one; only its configuration and its patience are ours.
        self.bin = place / "bin"
        self.bin.mkdir()
        self.tool("ssh", f"""
            for a do shift; case $a in ServerAliveInterval=10) a=ServerAliveInterval=1 ;; ConnectTimeout=10) a=ConnectTimeout=3 ;; esac
            set -- "$@" "$a"; done
            exec {shutil.which('ssh')} -F {place}/ssh_config "$@" """)
        wait_for(lambda: self.answers(), "sshd")

    def answers(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as s:
            return s.recv(3) == b"SSH"

    def tool(self, name, script, place=None):
        path = (place or self.bin) / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)

    def env(self, **more):
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "LANG": "C", **{k: str(v) for k, v in more.items()}}

    def close(self):
        self.sshd.kill()
        self.silent.close()
        self.cutter.server.shutdown()


class Cutter:
    """Passes connections on to sshd, slowly, and cuts the next one after `allow` bytes from it."""

    def __init__(self, port):
        outer = self
        self.allow = None

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with socket.create_connection(("127.0.0.1", port)) as far:
                    up = threading.Thread(target=outer.pump, args=(self.request, far, False), daemon=True)
                    up.start()
                    outer.pump(far, self.request, True)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = allow_reuse_address = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def pump(self, source, sink, counted):
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                passed += len(data)
                if counted and self.allow is not None and passed > self.allow:
                    self.allow = None
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    need("ssh", "ssh-keygen", "rsync", "perl")
    if not os.path.exists("/usr/sbin/sshd"):
        missing("sshd")
    if os.geteuid():
        missing("root (for sshd)")
    place = Far(tmp_path_factory.mktemp("far"))
    yield place
    place.close()


def monitor(far, *arguments, code=None, **more):
    done = subprocess.run(["bash", MONITOR, *map(str, arguments)], env=far.env(**more), capture_output=True, text=True,
                          timeout=100)
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def sync(far, *arguments, code=0, **more):
    done = subprocess.run(["bash", SYNC, *map(str, arguments)], env=far.env(**more), capture_output=True, text=True, timeout=100)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 1 and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines), lines
    return done.stdout + done.stderr


def progress_file(directory, **changes):
    """A PROGRESS.txt as a run would leave it, of a process that is this test's own."""
    now = int(time.time())
    keys = {"Status": "RUNNING", "Progress": "40/100 samples (40.0%)", "Heartbeat": now, "Advanced": now, "Interval": "30 s",
            "PID": os.getpid(), "Host": socket.gethostname(), **changes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "PROGRESS.txt").write_text("A job\n" + "".join(f"{k}: {v}\n" for k, v in keys.items()))


def word(done):
    return re.search(r": ([A-Z]+)", done.stdout)[1]


# -- monitor: each verdict, with its real cause


def env(**more):
    return {**os.environ, **{key: str(value) for key, value in more.items()}}


def test_running_then_complete_with_bar_lines_and_both_ages(far, tmp_path):
    process = start(JOB, tmp_path / "run", 300, env=env(PAUSE=0.01), stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "run" / "PROGRESS.txt").exists(), "the start")
    running = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert f"box:{tmp_path}/run: RUNNING" in running.stdout
    assert re.search(r"\[#*-+\] \d+%", running.stdout) and "Progress: " in running.stdout
    assert re.search(r"written \d+ s before it was fetched, fetched \d+ s ago", running.stdout)
    process.wait(timeout=60)
    complete = monitor(far, "-1", f"box:{tmp_path}", code=0)
    assert "COMPLETE" in complete.stdout and "[########################################] 100%" in complete.stdout


def test_it_watches_until_all_have_ended_and_rings_once_for_each_change(far, tmp_path):
    processes = [start(JOB, tmp_path / str(i), 100 * i, env=env(PAUSE=0.02), stdout=subprocess.DEVNULL) for i in (1, 2)]
    wait_for(lambda: all((tmp_path / str(i) / "PROGRESS.txt").exists() for i in (1, 2)), "both")
    done = monitor(far, "-i", 1, f"box:{tmp_path}", code=0)
    for process in processes:
        process.wait(timeout=30)
    assert done.stdout.count("\a") == 2 and done.stdout.count("1: RUNNING") >= 2


def test_a_notification_goes_to_osascript_with_text_as_arguments(far, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    far.tool("osascript", f'printf "%s\\n" "$@" >> {shlex.quote(str(tmp_path / "said"))}', stub)
    process = start(JOB, tmp_path / "run", 200, env=env(PAUSE=0.01), stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "run" / "PROGRESS.txt").exists(), "the start")
    monitor(far, "-i", 1, tmp_path, code=0, PATH=f"{stub}:{far.bin}:/usr/bin:/bin")
    process.wait(timeout=30)
    said = (tmp_path / "said").read_text().splitlines()
    assert said.count("COMPLETE") == 1 and said[-3:] == ["--", "COMPLETE", f"{tmp_path}/run was RUNNING"]


def test_dead_after_sigkill_once_three_heartbeats_are_missed(far, tmp_path):
    process = start(JOB, tmp_path, 10**6, env=env(PAUSE=0.01, RUN_OPTIONS='{"heartbeat": 1}'), stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the start")
    kill(process)
    first = monitor(far, "-1", f"box:{tmp_path}")
    done = wait_for(lambda: (lambda d: d if "DEAD" in d.stdout else None)(monitor(far, "-1", f"box:{tmp_path}")), "DEAD", 20)
    assert first.returncode in (1, 4) and done.returncode == 1 and "start it again" in done.stdout


def test_dead_although_its_process_number_belongs_to_another_now(far, tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    progress_file(tmp_path, Heartbeat=int(time.time()) - 600, PID=other.pid)
    done = monitor(far, "-1", f"box:{tmp_path}", code=1)
    other.kill()
    assert word(done) == "DEAD" and "belongs to another" in done.stdout


def test_stalled_when_the_work_hangs_and_when_the_process_is_stopped(far, tmp_path):
    options = '{"heartbeat": 0.5, "stall_after": 1}'
    process = start(JOB, tmp_path, 100, env=env(HANG_AT=5, RUN_OPTIONS=options), stdout=subprocess.DEVNULL)
    wait_for(lambda: read_progress(tmp_path / "PROGRESS.txt").get("Status") == "STALLED", "the hang", 20)
    done = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert word(done) == "STALLED" and "has not moved for" in done.stdout
    process.send_signal(signal.SIGSTOP)
    done = wait_for(lambda: (lambda d: d if "no heartbeat" in d.stdout else None)(monitor(far, "-1", f"box:{tmp_path}")), "it", 30)
    kill(process)
    assert word(done) == "STALLED"


def test_failed_shows_its_error_and_interrupted_is_said(far, tmp_path):
    start(JOB, tmp_path / "a", 100, env=env(FAIL_AT=25), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).wait(30)
    process = start(JOB, tmp_path / "b", 10**6, env=env(PAUSE=0.01), stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "b" / "PROGRESS.txt").exists(), "the start")
    process.terminate()
    process.wait(timeout=30)
    done = monitor(far, f"box:{tmp_path}", code=1)   # without -1: all have ended
    assert "a: FAILED ValueError: step 25 is wrong in two lines" in done.stdout and "b: INTERRUPTED" in done.stdout


@pytest.mark.parametrize("host", ["closed", "silent"])
def test_unreachable_is_exit_code_3_and_bounded_in_time(far, tmp_path, host):
    began = time.monotonic()
    done = monitor(far, "-1", f"{host}:{tmp_path}", code=3, MONITOR_TIMEOUT=6)
    assert word(done) == "UNREACHABLE" and time.monotonic() - began < 30


def test_a_far_side_that_freezes_does_not_freeze_the_monitor(far, tmp_path):
    progress_file(tmp_path)
    stub = tmp_path / "stub"
    stub.mkdir()
    far.tool("ssh", "sleep 1000", stub)
    done = monitor(far, "-1", f"box:{tmp_path}", code=3, MONITOR_TIMEOUT=2, PATH=f"{stub}:{far.bin}:/usr/bin:/bin")
    assert word(done) == "UNREACHABLE"


def test_unreachable_is_not_death_the_last_state_stays_with_its_age_and_it_recovers(far, tmp_path):
    process = start(JOB, tmp_path / "run", 10**6, env=env(PAUSE=0.02), stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "run" / "PROGRESS.txt").exists(), "the start")
    stub, down = tmp_path / "stub", tmp_path / "down"
    stub.mkdir()
    far.tool("ssh", f'[ -e {down} ] && {{ echo "connect to host: Network is unreachable" >&2; exit 255; }}; exec {far.bin}/ssh "$@"',
             stub)
    with open(tmp_path / "screen", "w+") as screen:
        watcher = subprocess.Popen(["bash", MONITOR, "-i", "1", f"box:{tmp_path}"], stdout=screen, stderr=screen,
                                   env=far.env(PATH=f"{stub}:{far.bin}:/usr/bin:/bin"))
        text = lambda: (tmp_path / "screen").read_text()   # noqa: E731
        wait_for(lambda: "RUNNING" in text(), "RUNNING")
        down.touch()
        wait_for(lambda: text().count("UNREACHABLE") >= 2, "UNREACHABLE twice")
        lost = text()[text().index("UNREACHABLE"):]
        assert "last known: RUNNING" in lost and "Network is unreachable" in lost and "Progress: " in lost
        assert text().count("\a") == 1, "one notification for the change, none for the next look"
        down.unlink()
        wait_for(lambda: "run: RUNNING" in text()[text().rindex("UNREACHABLE"):], "recovery", 30)
        watcher.terminate()
        watcher.wait(timeout=10)
    kill(process)


def test_a_laptop_that_slept_looks_again_before_it_judges(far, tmp_path):
    progress_file(tmp_path / "run")
    with open(tmp_path / "screen", "w+") as screen:
        watcher = subprocess.Popen(["bash", MONITOR, "-i", "600", f"box:{tmp_path}"], stdout=screen, env=far.env())
        text = lambda: (tmp_path / "screen").read_text()   # noqa: E731
        wait_for(lambda: text().count("RUNNING") == 1, "the first look")
        watcher.send_signal(signal.SIGSTOP)
        time.sleep(18)
        watcher.send_signal(signal.SIGCONT)
        wait_for(lambda: text().count(": RUNNING") >= 2, "a look right after waking", 20)
        watcher.terminate()
        watcher.wait(timeout=10)


def test_ages_are_those_of_the_remote_clock_when_the_laptops_is_an_hour_off(far, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    far.tool("date", f'[ "$*" = +%s ] && exec echo $(($({shutil.which("date")} +%s) + 3600)); exec {shutil.which("date")} "$@"', stub)
    progress_file(tmp_path / "run", Heartbeat=int(time.time()) - 12)
    done = monitor(far, "-1", f"box:{tmp_path}", code=4, PATH=f"{stub}:{far.bin}:/usr/bin:/bin")
    assert word(done) == "RUNNING" and re.search(r"written 1[2-9] s before it was fetched, fetched [0-5] s ago", done.stdout)


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, os.urandom(5000), b"x" * (50 << 20), b"Status\nHeartbeat: \n",
                                     b"A job\nStatus: COMPLETELY\n", b"A job\nProgress: 1/1 (100%)\nNote: COMPLETE\n"])
def test_a_progress_file_that_is_none_is_called_so_and_is_not_complete(far, tmp_path, content):
    (tmp_path / "PROGRESS.txt").write_bytes(content)
    done = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert word(done) == "UNKNOWN" and len(done.stdout) < 50_000


def test_only_the_status_line_decides(far, tmp_path):
    progress_file(tmp_path, Title="COMPLETE", Note="Status: COMPLETE")
    assert word(monitor(far, "-1", f"box:{tmp_path}", code=4)) == "RUNNING"


def test_nothing_from_the_remote_file_runs_or_garbles_the_screen(far, tmp_path):
    nasty = "\x1b[2J\x1b]0;title\x07 $(touch %s/pwned) `touch %s/pwned` %%s%%n \\033[31m; rm -rf /" % (tmp_path, tmp_path)
    directory = tmp_path / "a $(touch pwned) 'b\" %s"
    progress_file(directory, Note=nasty, Progress="9999999999999999999999/1 x (999999999999999%)", Heartbeat="9" * 30,
                  Advanced="08", Interval="-1 s")
    done = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert "\x1b" not in done.stdout and "\x07" not in done.stdout and not list(tmp_path.rglob("pwned"))
    assert "$(touch pwned) 'b\" %s: " in done.stdout


@pytest.mark.parametrize("name", ["with space", "quo'te", 'dou"ble', "dollar$HOME", "semi;colon", "star*", "back\\slash", "-dash"])
def test_a_path_is_only_a_name(far, tmp_path, name):
    progress_file(tmp_path / name, Status="COMPLETE")
    for target in (f"box:{tmp_path / name}", str(tmp_path / name)):
        assert "COMPLETE" in monitor(far, "-1", target, code=0).stdout


def test_a_local_directory_and_several_targets_and_remote_from_the_environment(far, tmp_path):
    progress_file(tmp_path / "a", Status="COMPLETE")
    progress_file(tmp_path / "b", Status="FAILED", Error="it broke")
    done = monitor(far, "-1", tmp_path / "a", f"box:{tmp_path / 'b'}", code=1)
    assert "a: COMPLETE" in done.stdout and "b: FAILED it broke" in done.stdout
    assert "COMPLETE" in monitor(far, "-1", code=0, REMOTE=f"box:{tmp_path / 'a'}", SSH_KEY=far.place / "user").stdout


@pytest.mark.parametrize("arguments, words", [
    ([], "usage"), (["-x"], "usage"), (["-i", "soon", "."], "number of seconds"), (["-i", "0", "."], "number of seconds"),
    (["-k", "/nowhere", "."], "no key"), (["/nowhere"], "no such directory"), (["box:/nowhere"], "no such directory"),
    (["--", "-oProxyCommand=x"], "not a directory")])
def test_usage_errors_are_exit_code_2(far, arguments, words):
    done = monitor(far, *arguments, code=2)
    assert words in done.stderr


def test_a_wrong_key_and_a_changed_host_key_say_what_to_type(far, tmp_path):
    done = monitor(far, "-1", "-k", far.place / "stranger", f"box:{tmp_path}", code=2, **{"PATH": f"{only(far, tmp_path)}:/usr/bin:/bin"})
    assert "ssh-copy-id" in done.stderr
    done = monitor(far, "-1", f"changed:{tmp_path}", code=2)
    assert "ssh-keygen -R changed" in done.stderr


def only(far, place):
    """A directory with an ssh that offers no key but the one it is given."""
    stub = place / "only"
    stub.mkdir(exist_ok=True)
    config = (far.place / "ssh_config").read_text()
    (stub / "config").write_text(re.sub(r" IdentityFile .*\n", "", config))
    far.tool("ssh", f'exec {shutil.which("ssh")} -F {stub}/config "$@"', stub)
    return stub


def test_ctrl_c_in_mid_fetch_ends_at_once_with_130_and_leaves_no_process(far, tmp_path):
    watcher = subprocess.Popen(["bash", MONITOR, f"silent:{tmp_path}"], env=far.env(TMPDIR=tmp_path), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mine = lambda: subprocess.run(["pgrep", "-f", "silent.*sh -s"], capture_output=True, text=True).stdout.split()   # noqa: E731
    wait_for(mine, "the fetch")
    os.killpg(watcher.pid, signal.SIGINT)
    assert watcher.wait(timeout=5) == 130
    wait_for(lambda: not mine(), "the end of ssh", 5)
    assert not list(tmp_path.glob("monitor.*"))


# -- sync


def same(a, b, names):
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def test_files_arrive_while_they_are_made_and_are_equal_at_the_end(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    process = start("generate.py", "--n", 100000, "--every", 1000, "--out", there, stdout=subprocess.DEVNULL)
    wait_for(lambda: (there / "PROGRESS.txt").exists(), "the start")
    assert "there: RUNNING" in monitor(far, "-1", f"box:{there}", code=4).stdout
    while process.poll() is None:
        sync(far, f"box:{there}", here)
        assert not list(here.glob("*.tmp")) and not (here / ".lock").exists()
    sync(far, f"box:{there}", here)
    names = sorted(p.name for p in there.iterdir() if not p.name.startswith("."))
    assert sorted(p.name for p in here.iterdir() if not p.name.startswith(".")) == names and same(there, here, names)
    assert read_progress(here / "PROGRESS.txt")["Status"] == "COMPLETE"
    assert checkpointing.verify([here]) == 0
    assert "there: COMPLETE" in monitor(far, "-1", f"box:{there}", code=0).stdout


def test_a_real_training_seen_from_running_to_complete_and_copied_whole(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    run("generate.py", "--n", 200, "--out", there)
    process = start("train_magvit.py", "--data", there, "--out", there / "train", "--epochs", 2, "--device", "cpu",
                    "--heartbeat", 1, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (there / "train" / "PROGRESS.txt").exists(), "the training", 60)
    seen = monitor(far, "-1", f"box:{there}")
    assert "there/train: RUNNING" in seen.stdout and "there: COMPLETE" in seen.stdout
    sync(far, f"box:{there}", here)
    done = monitor(far, "-i", 1, f"box:{there}", code=0)
    process.wait(timeout=30)
    assert "train: COMPLETE" in done.stdout
    sync(far, f"box:{there}", here)
    assert same(there / "train", here / "train", ["best_model.pt", "final_model.pt", "metrics.json", "PROGRESS.txt"])
    assert checkpointing.verify([here]) == 0


def test_it_copies_results_only_and_deletes_nothing(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    for name in ("checkpoint_00000.npz", "dataset.npz", ".lock", ".reserve", "x.tmp", ".x.npz.12-abcdef01.tmp", "a.npz.corrupt"):
        (there / name).write_bytes(b"content")
    here.mkdir()
    (here / "mine.txt").write_text("mine")
    line = sync(far, f"box:{there}", here)
    assert "2 new files" in line
    copied = {p.name for p in here.iterdir()} - {".sync_results.lock"}
    assert copied == {"checkpoint_00000.npz", "dataset.npz", "PROGRESS.txt", "mine.txt"}
    shutil.rmtree(there)
    there.mkdir()
    sync(far, f"box:{there}", here)          # the remote is empty
    there.rmdir()
    assert "no such directory" in sync(far, f"box:{there}", here, code=2)
    assert {p.name for p in here.iterdir()} - {".sync_results.lock"} == copied


def test_the_progress_file_is_fresh_even_with_the_same_size_and_second(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there, Progress="40/100 samples (40.0%)")
    stamp = time.time() - 100
    os.utime(there / "PROGRESS.txt", (stamp, stamp))
    sync(far, f"box:{there}", here)
    progress_file(there, Progress="41/100 samples (41.0%)")
    os.utime(there / "PROGRESS.txt", (stamp, stamp))
    sync(far, f"box:{there}", here)
    assert "41/100" in (here / "PROGRESS.txt").read_text()


def big(there, megabytes=20):
    there.mkdir()
    (there / "checkpoint_00000.npz").write_bytes(os.urandom(megabytes << 20))


def test_a_connection_cut_in_mid_file_leaves_no_half_file_and_the_next_run_goes_on(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there)
    far.cutter.allow = 12 << 20
    assert "the next run goes on" in sync(far, f"cut:{there}", here, code=75)
    assert not (here / "checkpoint_00000.npz").exists()
    kept = here / ".rsync-partial" / "checkpoint_00000.npz"
    assert 1 << 20 < kept.stat().st_size < 20 << 20
    sync(far, f"cut:{there}", here)
    assert same(there, here, ["checkpoint_00000.npz"])


def test_an_old_whole_file_stays_until_the_new_one_is_whole(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there)
    here.mkdir()
    (here / "checkpoint_00000.npz").write_bytes(b"old")
    far.cutter.allow = 12 << 20
    sync(far, f"cut:{there}", here, code=75)
    assert (here / "checkpoint_00000.npz").read_bytes() == b"old"


def test_sshd_stopped_in_mid_transfer_is_noticed(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 300)
    copier = subprocess.Popen(["bash", SYNC, f"box:{there}", here], env=far.env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
    wait_for(lambda: here.exists() and any(p.stat().st_size > 1 << 20 for p in here.glob(".checkpoint*")), "the transfer")
    sessions = subprocess.run(["pgrep", "-P", str(far.sshd.pid)], capture_output=True, text=True).stdout.split()
    for pid in sessions:
        os.kill(int(pid), signal.SIGSTOP)
    try:
        output = copier.communicate(timeout=60)[0]
    finally:
        for pid in sessions:
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
    assert copier.returncode == 75, output
    assert not (here / "checkpoint_00000.npz").exists()


@pytest.mark.parametrize("host, code, words", [
    ("closed", 75, "the next run goes on"), ("silent", 75, "the next run goes on"), ("changed", 2, "ssh-keygen -R changed"),
    ("norsync", 2, "no rsync on norsync"), ("banner", 2, "prints text at login")])
def test_each_trouble_has_its_exit_code_and_says_what_to_do(far, tmp_path, host, code, words):
    progress_file(tmp_path / "there")
    assert words in sync(far, f"{host}:{tmp_path / 'there'}", tmp_path / "here", code=code)


def test_a_wrong_key_and_wrong_arguments_are_settings(far, tmp_path):
    progress_file(tmp_path / "there")
    path = f"{only(far, tmp_path)}:/usr/bin:/bin"
    assert "does not accept the key" in sync(far, "-k", far.place / "stranger", f"box:{tmp_path / 'there'}", tmp_path / "here",
                                             code=2, PATH=path)
    sync(far, "-k", far.place / "user", f"box:{tmp_path / 'there'}", tmp_path / "here", PATH=path)
    assert "no key" in sync(far, "-k", "/nowhere", "box:x", tmp_path / "here", code=2)
    assert "no such directory" in sync(far, "box:/nowhere", tmp_path / "here", code=2)
    for arguments in ([], ["one"], ["-x"]):
        assert subprocess.run(["bash", SYNC, *arguments], env=far.env(), capture_output=True).returncode == 2


def test_a_full_disk_here_is_exit_code_1_and_the_next_run_goes_on(far, tmp_path, small_disk):
    there, disk = tmp_path / "there", small_disk(4 << 20)
    there.mkdir()
    for i in range(6):
        (there / f"checkpoint_{i}.npz").write_bytes(os.urandom(1 << 20))
    assert "no room" in sync(far, f"box:{there}", disk / "here", code=1)
    assert all(p.stat().st_size == 1 << 20 for p in (disk / "here").glob("checkpoint_*"))
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    sync(far, f"box:{there}", disk / "here")
    assert same(there, disk / "here", [f"checkpoint_{i}.npz" for i in range(6)])


def test_a_local_directory_that_cannot_be_written_is_exit_code_1(far, tmp_path, small_disk):
    progress_file(tmp_path / "there")
    disk = small_disk()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    sync(far, f"box:{tmp_path / 'there'}", disk, code=1)
    sync(far, f"box:{tmp_path / 'there'}", disk / "below", code=1)
    (tmp_path / "file").touch()
    sync(far, f"box:{tmp_path / 'there'}", tmp_path / "file", code=1)


def test_eight_at_once_are_one_that_works_and_seven_that_leave_quietly(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 100)
    copiers = [subprocess.Popen(["bash", SYNC, f"box:{there}", here], env=far.env(), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for _ in range(8)]
    outputs = [copier.communicate(timeout=60)[0] for copier in copiers]
    assert [copier.returncode for copier in copiers] == [0] * 8
    assert sum("new files" in output for output in outputs) == 1 and outputs.count("") == 7
    assert same(there, here, ["checkpoint_00000.npz"])


@pytest.mark.parametrize("owner", ["dead", "another"])
def test_a_lock_file_of_a_dead_process_or_with_anothers_number_does_not_block(far, tmp_path, owner):
    here = tmp_path / "here"
    here.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (here / ".sync_results.lock").write_text(f"{dead.pid if owner == 'dead' else os.getpid()}\n")
    progress_file(tmp_path / "there")
    assert "new files" in sync(far, f"box:{tmp_path / 'there'}", here)


@pytest.mark.parametrize("name", ["with space", "quo'te", 'dou"ble', "dollar$HOME", "semi;colon", "star*", "a`b`", "(paren)", "ä"])
def test_names_with_shell_characters_are_only_names_here_and_there(far, tmp_path, name):
    progress_file(tmp_path / name)
    (tmp_path / name / f"checkpoint {name}.npz").write_text("x")
    (tmp_path / name / "checkpoint_1.npz").write_text("x")
    here = tmp_path / "here" / name
    sync(far, f"box:{tmp_path / name}", here)
    assert same(tmp_path / name, here, ["checkpoint_1.npz", "PROGRESS.txt", f"checkpoint {name}.npz"])
    sync(far, str(tmp_path / name), tmp_path / "local" / name)
    assert same(tmp_path / name, tmp_path / "local" / name, ["checkpoint_1.npz", "PROGRESS.txt"])


def test_it_needs_nothing_from_the_environment(far, tmp_path):
    progress_file(tmp_path / "there")
    done = subprocess.run(["env", "-i", f"PATH={far.bin}:/usr/bin:/bin", "/bin/bash", SYNC, f"box:{tmp_path / 'there'}",
                           tmp_path / "here"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "here" / "PROGRESS.txt").exists(), done.stderr


def test_it_works_with_an_rsync_that_rejects_what_openrsync_rejects(far, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    rejected = "--info|--append-verify|--mkpath|--protect-args|-s|--ignore-missing-args|--no-inc-recursive|--log-file"
    allowed = ("-a -r -t -rt -z -i -I -c -e --stats --progress --out-format --partial --partial-dir --delay-updates --bwlimit "
               "--checksum --chmod --exclude --include --filter --max-size --temp-dir --prune-empty-dirs")
    far.tool("rsync", f"""
        for a do case $a in {'|'.join(f"{r}|{r}=*" for r in rejected.split('|'))}) echo "rsync: unrecognized option $a" >&2; exit 1 ;;
            -*) case " {allowed} " in *" ${{a%%=*}} "*) ;; *) echo "rsync: not measured on openrsync: $a" >&2; exit 1 ;; esac ;;
        esac; done; exec {shutil.which('rsync')} "$@" """, stub)
    progress_file(tmp_path / "there", Status="COMPLETE")
    (tmp_path / "there" / "checkpoint_1.npz").write_text("x")
    sync(far, f"box:{tmp_path / 'there'}", tmp_path / "here", PATH=f"{stub}:{far.bin}:/usr/bin:/bin")
    assert same(tmp_path / "there", tmp_path / "here", ["checkpoint_1.npz", "PROGRESS.txt"])


def test_ctrl_c_and_sigterm_leave_no_process_behind(far, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        copier = subprocess.Popen(["bash", SYNC, f"silent:{tmp_path}", tmp_path / "here"], env=far.env(), start_new_session=True,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        mine = lambda: subprocess.run(["pgrep", "-f", "silent rsync --server"], capture_output=True, text=True).stdout   # noqa: E731
        wait_for(mine, "the transfer")
        os.killpg(copier.pid, number)
        assert copier.wait(timeout=5) == code
        wait_for(lambda: not mine(), "the end of ssh", 5)


def test_a_run_is_bounded_in_time(far, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    far.tool("ssh", "sleep 1000", stub)
    copier = subprocess.Popen(["bash", SYNC, f"box:{tmp_path}", tmp_path / "here"], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env=far.env(PATH=f"{stub}:{far.bin}:/usr/bin:/bin", SYNC_SECONDS=3))
    output = copier.communicate(timeout=30)[0]
    assert copier.returncode == 75 and "not finished after 3 s" in output


# -- what macOS lacks


BASH_4 = (r"mapfile|readarray|declare -A|local -n|&>>|\|&|\$\{\w+(,,|\^\^|@\w)|EPOCHSECONDS|wait -n|\[\[ -v|coproc|;;&|read -t 0\.|"
          r"source <\(|\w\[-1\]|printf '%\(")
GNU = (r"date -d|date --|grep -P|sed -i|sed -r|readlink -f|stat -c|\btimeout \d|\bflock \d|--info=|--mkpath|--append-verify|"
       r"--protect-args|head -n -|xargs -r|\bseq \d|\btac\b|sort -V|mktemp --|find [^|]*-printf|\\\+'|ps -o etimes")


@pytest.mark.parametrize("script", [MONITOR, SYNC])
def test_the_scripts_use_nothing_that_bash_3_2_bsd_tools_or_openrsync_lack(script):
    for number, line in enumerate(script.read_text().splitlines(), 1):
        code = re.sub(r"(^|\s)#.*", "", line)
        for lint in (BASH_4, GNU):
            assert not re.search(lint, code), f"{script.name}:{number}: {line}"
        assert line.isascii(), f"{script.name}:{number}: bash 3.2 misreads a variable before a non-ASCII byte"


@pytest.mark.parametrize("line", ["mapfile -t a < f", "echo ${v,,}", "declare -A m", "date -d now", "sed -i s/a/b/ f", "cmd |& tee"])
def test_the_lint_itself_catches_them(line):
    assert re.search(BASH_4, line) or re.search(GNU, line)


def test_shellcheck_is_clean():
    need("shellcheck")
    subprocess.run(["shellcheck", MONITOR, SYNC, ROOT / ".ci" / "run"], check=True)


def test_python_is_the_only_other_thing_the_laptop_needs_for_verify(tmp_path):
    assert subprocess.run([sys.executable, "-I", "-S", ROOT / "checkpointing.py", "verify", tmp_path],
                          capture_output=True).returncode == 1
    assert Path(MONITOR).stat().st_mode & 0o111 and Path(SYNC).stat().st_mode & 0o111
