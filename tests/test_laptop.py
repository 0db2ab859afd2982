"""The promises of monitor_progress.sh and sync_results.sh, against a real sshd on loopback."""
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
    """Host names for ssh: box (a good one), dash, norsync, banner, closed, silent, changed, cut."""

    def __init__(self, place):
        self.place, self.processes = place, []
        for key in ("host", "other_host", "user", "norsync", "banner", "wronguser", "dash",
                    "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / key],
                           check=True)
        empty = place / "empty"
        empty.mkdir()
        for tool in ("sh", "date", "find", "sed", "head", "tr", "ps", "cut", "sort", "hostname"):
            (empty / tool).symlink_to(shutil.which(tool))
        shell = r'/bin/sh -c \"$SSH_ORIGINAL_COMMAND\"'
        forced = {"norsync": f"PATH={empty} exec {shell}",
                  "dash": f"exec {shell.replace('sh', 'dash', 1)}",
                  "banner": f"echo Welcome to the machine; exec {shell}",
                  "wronguser": "echo Please login as the user ubuntu rather than root.; exit 142"}
        keys = [(place / "user.pub").read_text()]
        keys += [f'command="{command}",restrict {(place / f"{key}.pub").read_text()}'
                 for key, command in forced.items()]
        (place / "authorized_keys").write_text("".join(keys))
        self.port = free_port()
        (place / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {place}/host\n"
            f"AuthorizedKeysFile {place}/authorized_keys\nPidFile {place}/pid\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "MaxStartups 100\nSubsystem sftp internal-sftp\n")
        os.makedirs("/run/sshd", exist_ok=True)
        self.sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", place / "sshd_config"],
                                     stderr=subprocess.DEVNULL)
        self.silent = socket.create_server(("127.0.0.1", 0))   # the kernel accepts, nobody speaks
        self.cutter = Cutter(self.port)
        (place / "known_changed").write_text(f"changed {(place / 'other_host.pub').read_text()}")
        ports = {"closed": free_port(), "silent": self.silent.getsockname()[1],
                 "cut": self.cutter.port}
        (place / "ssh_config").write_text("".join(
            f"Host {name}\n HostName 127.0.0.1\n Port {ports.get(name, self.port)}\n"
            f" User {os.environ.get('USER', 'root')}\n HostKeyAlias {name}\n"
            f" IdentityFile {place / (name if name in forced else 'user')}\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {place}/known_{'changed' if name == 'changed' else 'hosts'}\n"
            " GlobalKnownHostsFile /dev/null\n" for name in ("box", "changed", *forced, *ports)))
        # The client under test is the real one; only its configuration and its patience are ours.
        self.bin = place / "bin"
        self.bin.mkdir()
        self.tool("ssh", f"""
            for a do shift
                case $a in ServerAliveInterval=10) a=ServerAliveInterval=1 ;;
                           ConnectTimeout=10) a=ConnectTimeout=3 ;; esac
                set -- "$@" "$a"
            done
            exec {shutil.which('ssh')} -F {place}/ssh_config "$@" """)
        wait_for(lambda: self.answers(), "sshd")

    def answers(self):
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.port), 1) as s:
                return s.recv(3) == b"SSH"

    def tool(self, name, script, place=None):
        path = (place or self.bin) / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)

    def stub(self, place, name, script):
        """An option for env(): PATH where program `name` is this shell script."""
        (place / "stub").mkdir(exist_ok=True)
        self.tool(name, script, place / "stub")
        return {"PATH": f"{place / 'stub'}:{self.bin}:/usr/bin:/bin"}

    def only(self, place):
        """An option for env(): PATH where ssh offers no key but the one that it is given."""
        place = place / "only"
        place.mkdir(exist_ok=True)
        config = re.sub(r" IdentityFile .*\n", "", (self.place / "ssh_config").read_text())
        (place / "config").write_text(config)
        self.tool("ssh", f'exec {shutil.which("ssh")} -F {place}/config "$@"', place)
        return {"PATH": f"{place}:/usr/bin:/bin"}

    def env(self, **more):
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "LANG": "C",
                **{key: str(value) for key, value in more.items()}}

    def close(self):
        self.sshd.kill()
        self.sshd.wait()
        self.silent.close()
        self.cutter.server.shutdown()
        self.cutter.server.server_close()


class Cutter:
    """Passes connections on to sshd, slowly, and cuts the next one after `allow` bytes from it."""

    def __init__(self, port):
        outer = self
        self.allow, self.rate = None, None   # bytes, bytes a second

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with socket.create_connection(("127.0.0.1", port)) as far:
                    up = threading.Thread(target=outer.pump, args=(self.request, far, False),
                                          daemon=True)
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
                if counted and self.rate:
                    time.sleep(len(data) / self.rate)
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


def call(far, *arguments, **more):
    """Run a script with a bare environment; `more` are its variables."""
    return subprocess.run(["bash", *map(str, arguments)], env=far.env(**more), capture_output=True,
                          text=True, timeout=100)


def behind(far, *arguments, variables={}, **more):
    """Start a script in the background, its output in a pipe unless `more` says otherwise."""
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
    return subprocess.Popen(["bash", *map(str, arguments)], env=far.env(**variables), **more)


def monitor(far, *arguments, code=None, **more):
    done = call(far, MONITOR, *arguments, **more)
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def sync(far, *arguments, code=0, **more):
    done = call(far, SYNC, *arguments, **more)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = (done.stdout + done.stderr).splitlines()
    dated = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
    assert len(lines) <= 1 and all(map(dated.match, lines)), lines
    return done.stdout + done.stderr


def begin(out, total, **settings):
    """The counting job, started in the background, with its first PROGRESS.txt written."""
    process = start(JOB, out, total, env={**os.environ, **{k: str(v) for k, v in settings.items()}},
                    stdout=subprocess.DEVNULL)
    wait_for((out / "PROGRESS.txt").exists, "the start")
    return process


def progress_file(directory, **changes):
    """A PROGRESS.txt as a run would leave it, of a process that is this test's own."""
    now = int(time.time())
    keys = {"Status": "RUNNING", "Progress": "40/100 samples (40.0%)", "Heartbeat": now,
            "Advanced": now, "Interval": "30 s", "PID": os.getpid(), "Host": socket.gethostname()}
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{key}: {value}\n" for key, value in {**keys, **changes}.items())
    (directory / "PROGRESS.txt").write_text("A job\n" + lines)


def word(done):
    return re.search(r": ([A-Z]+)", done.stdout)[1]


# -- monitor: each verdict, with its real cause


def test_running_then_complete_with_bar_lines_and_both_ages(far, tmp_path):
    process = begin(tmp_path / "run", 300, PAUSE=0.03)
    running = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert f"box:{tmp_path}/run: RUNNING" in running.stdout
    assert re.search(r"\[#*-+\] \d+%", running.stdout) and "Progress: " in running.stdout
    assert re.search(r"written \d+ s before it was fetched, fetched \d+ s ago", running.stdout)
    process.wait(timeout=60)
    complete = monitor(far, "-1", f"box:{tmp_path}", code=0)
    assert "COMPLETE" in complete.stdout and f"[{40 * '#'}] 100%" in complete.stdout


def test_it_watches_until_all_have_ended_and_rings_once_for_each_change(far, tmp_path):
    processes = [begin(tmp_path / str(i), 200 * i, PAUSE=0.02) for i in (1, 2)]
    done = monitor(far, "-i", 1, f"box:{tmp_path}", code=0)
    for process in processes:
        process.wait(timeout=30)
    assert done.stdout.count("\a") == 2 and done.stdout.count("1: RUNNING") >= 2


def test_a_notification_goes_to_osascript_with_text_as_arguments(far, tmp_path):
    said = shlex.quote(str(tmp_path / "said"))
    stub = far.stub(tmp_path, "osascript", f'printf "%s\\n" "$@" >> {said}')
    process = begin(tmp_path / "run", 200, PAUSE=0.03)
    monitor(far, "-i", 1, tmp_path, code=0, **stub)
    process.wait(timeout=30)
    said = (tmp_path / "said").read_text().splitlines()
    assert said.count("COMPLETE") == 1
    assert said[-3:] == ["--", "COMPLETE", f"{tmp_path}/run was RUNNING"]


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "a zombie"])
def test_dead_at_once_after_sigkill_where_the_process_is_known_to_be_gone(far, tmp_path, reaped):
    process = begin(tmp_path, 10**6, PAUSE=0.01)
    running = monitor(far, "-1", f"box:{tmp_path}", code=4).stdout
    assert f"PID {process.pid} on {socket.gethostname()}; to stop it: kill {process.pid}" in running
    if reaped:
        kill(process)
    else:
        process.kill()   # and nobody waits for it, as in many a container
        time.sleep(0.2)
    done = monitor(far, "-1", f"box:{tmp_path}", code=1)
    process.wait()
    assert word(done) == "DEAD" and "start it again" in done.stdout
    assert "to stop it" not in done.stdout


def test_a_run_that_ends_while_it_is_looked_at_is_not_called_dead(far, tmp_path):
    """The file says RUNNING when it is read, COMPLETE when its process is found to be gone."""
    place = shlex.quote(str(tmp_path / "run" / "PROGRESS.txt"))
    stub = far.stub(tmp_path, "ps", f"sed -i s/RUNNING/COMPLETE/ {place}; echo Z")
    gone = subprocess.Popen(["sleep", "60"])
    progress_file(tmp_path / "run", PID=gone.pid)
    gone.kill()   # a zombie, whose last word comes between the two looks
    done = monitor(far, "-1", tmp_path / "run", code=0, **stub)
    gone.wait()
    assert word(done) == "COMPLETE"


def test_dead_although_its_process_number_belongs_to_another_now(far, tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    progress_file(tmp_path, Heartbeat=int(time.time()) - 600, PID=other.pid)
    done = monitor(far, "-1", f"box:{tmp_path}", code=1)
    other.kill()
    assert word(done) == "DEAD" and "belongs to another" in done.stdout


def seen(far, directory, words):
    """What the monitor says once it says `words`."""
    def look():
        done = monitor(far, "-1", f"box:{directory}")
        return done if words in done.stdout else None
    return wait_for(look, words, 30)


def test_stalled_when_the_work_hangs_and_when_the_process_is_stopped(far, tmp_path):
    process = begin(tmp_path, 100, HANG_AT=5, RUN_OPTIONS='{"heartbeat": 0.5, "stall_after": 1}')
    done = seen(far, tmp_path, "has not moved for")
    assert word(done) == "STALLED" and done.returncode == 4
    process.send_signal(signal.SIGSTOP)
    done = seen(far, tmp_path, "no heartbeat")
    kill(process)
    assert word(done) == "STALLED"


def test_failed_shows_its_error_and_interrupted_is_said(far, tmp_path):
    failing = begin(tmp_path / "a", 100, FAIL_AT=25, PAUSE=0.01)
    process = begin(tmp_path / "b", 10**6, PAUSE=0.01)
    process.terminate()
    process.wait(timeout=30)
    failing.wait(timeout=30)
    done = monitor(far, f"box:{tmp_path}", code=1).stdout   # without -1: all have ended
    assert "a: FAILED ValueError: step 25 is wrong in two lines" in done
    assert "b: INTERRUPTED" in done


@pytest.mark.parametrize("host", ["closed", "silent"])
def test_unreachable_is_exit_code_3_and_bounded_in_time(far, tmp_path, host):
    began = time.monotonic()
    done = monitor(far, "-1", f"{host}:{tmp_path}", code=3, MONITOR_TIMEOUT=6)
    assert word(done) == "UNREACHABLE" and time.monotonic() - began < 30


def test_a_far_side_that_freezes_does_not_freeze_the_monitor(far, tmp_path):
    progress_file(tmp_path)
    stub = far.stub(tmp_path, "ssh", "sleep 1000")
    done = monitor(far, "-1", f"box:{tmp_path}", code=3, MONITOR_TIMEOUT=2, **stub)
    assert word(done) == "UNREACHABLE"


def test_unreachable_is_not_death_the_last_state_stays_with_its_age_and_it_recovers(far, tmp_path):
    process = begin(tmp_path / "run", 10**6, PAUSE=0.02)
    down = tmp_path / "down"
    stub = far.stub(tmp_path, "ssh", f"""
        [ ! -e {down} ] || {{ echo "connect to host: Network is unreachable" >&2; exit 255; }}
        exec {far.bin}/ssh "$@" """)
    with open(tmp_path / "screen", "w+") as screen:
        watcher = behind(far, MONITOR, "-i", 1, f"box:{tmp_path}", variables=stub, stdout=screen)
        text = (tmp_path / "screen").read_text
        wait_for(lambda: "RUNNING" in text(), "RUNNING")
        down.touch()
        wait_for(lambda: text().count("UNREACHABLE") >= 2, "UNREACHABLE twice")
        lost = text()[text().index("UNREACHABLE"):]
        assert "last known: RUNNING" in lost and "Progress: " in lost
        assert "Network is unreachable" in lost
        assert text().count("\a") == 1, "one notification for the change, none for the next look"
        down.unlink()
        wait_for(lambda: "run: RUNNING" in text()[text().rindex("UNREACHABLE"):], "recovery", 30)
        watcher.terminate()
        watcher.wait(timeout=10)
    kill(process)


def test_a_laptop_that_slept_looks_again_before_it_judges(far, tmp_path):
    progress_file(tmp_path / "run")
    with open(tmp_path / "screen", "w+") as screen:
        watcher = behind(far, MONITOR, "-i", 600, f"box:{tmp_path}", stdout=screen)
        text = (tmp_path / "screen").read_text
        wait_for(lambda: text().count("RUNNING") == 1, "the first look")
        watcher.send_signal(signal.SIGSTOP)
        time.sleep(18)
        watcher.send_signal(signal.SIGCONT)
        wait_for(lambda: text().count(": RUNNING") >= 2, "a look right after waking", 20)
        watcher.terminate()
        watcher.wait(timeout=10)


def test_ages_are_those_of_the_remote_clock_when_the_laptops_is_an_hour_off(far, tmp_path):
    date = shutil.which("date")
    stub = far.stub(tmp_path, "date", f"""
        [ "$*" != +%s ] || exec echo $(($({date} +%s) + 3600))
        exec {date} "$@" """)
    progress_file(tmp_path / "run", Heartbeat=int(time.time()) - 12)
    done = monitor(far, "-1", f"box:{tmp_path}", code=4, **stub)
    assert word(done) == "RUNNING"
    assert re.search(r"written 1[2-9] s before it was fetched, fetched [0-5] s ago", done.stdout)


@pytest.mark.parametrize("content", [
    b"", b"\0" * 1000, os.urandom(5000), b"x" * (50 << 20), b"Status\nHeartbeat: \n",
    b"A job\nStatus: COMPLETELY\n", b"A job\nProgress: 1/1 (100%)\nNote: COMPLETE\n"])
def test_a_progress_file_that_is_none_is_called_so_and_is_not_complete(far, tmp_path, content):
    (tmp_path / "PROGRESS.txt").write_bytes(content)
    done = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert word(done) == "UNKNOWN" and len(done.stdout) < 50_000


def test_only_the_status_line_decides(far, tmp_path):
    progress_file(tmp_path, Title="COMPLETE", Note="Status: COMPLETE")
    assert word(monitor(far, "-1", f"box:{tmp_path}", code=4)) == "RUNNING"


def test_nothing_from_the_remote_file_runs_or_garbles_the_screen(far, tmp_path):
    touch = f"touch {tmp_path}/pwned"
    nasty = f"\x1b[2J\x1b]0;title\x07 $({touch}) `{touch}` %s%n \\033[31m; rm -rf /"
    directory = tmp_path / "a $(touch pwned) 'b\" %s"
    progress_file(directory, Note=nasty, Progress="9999999999999999999999/1 x (999999999999999%)",
                  Heartbeat="9" * 30, Advanced="08", Interval="-1 s")
    done = monitor(far, "-1", f"box:{tmp_path}", code=4)
    assert "\x1b" not in done.stdout and "\x07" not in done.stdout
    assert not list(tmp_path.rglob("pwned"))
    assert "$(touch pwned) 'b\" %s: " in done.stdout


NAMES = ["with space", "quo'te", 'dou"ble', "dollar$HOME", "semi;colon", "star*"]


@pytest.mark.parametrize("name", [*NAMES, "back\\slash", "-dash"])
def test_a_path_is_only_a_name(far, tmp_path, name):
    progress_file(tmp_path / name, Status="COMPLETE")
    for target in (f"box:{tmp_path / name}", str(tmp_path / name)):
        assert "COMPLETE" in monitor(far, "-1", target, code=0).stdout


def test_a_local_directory_and_several_targets_and_remote_from_the_environment(far, tmp_path):
    progress_file(tmp_path / "a", Status="COMPLETE")
    progress_file(tmp_path / "b", Status="FAILED", Error="it broke")
    done = monitor(far, "-1", tmp_path / "a", f"box:{tmp_path / 'b'}", code=1)
    assert "a: COMPLETE" in done.stdout and "b: FAILED it broke" in done.stdout
    done = monitor(far, "-1", code=0, REMOTE=f"box:{tmp_path / 'a'}", SSH_KEY=far.place / "user")
    assert "COMPLETE" in done.stdout


@pytest.mark.parametrize("arguments, words", [
    ([], "usage"), (["-x"], "usage"), (["-i", "soon", "."], "number of seconds"),
    (["-i", "0", "."], "number of seconds"), (["-k", "/nowhere", "."], "no key"),
    (["/nowhere"], "no such directory"), (["box:/nowhere"], "no such directory"),
    (["--", "-oProxyCommand=x"], "not a directory")])
def test_usage_errors_are_exit_code_2(far, arguments, words):
    done = monitor(far, *arguments, code=2)
    assert words in done.stderr


def test_a_wrong_key_and_a_changed_host_key_say_what_to_type(far, tmp_path):
    done = monitor(far, "-1", "-k", far.place / "stranger", f"box:{tmp_path}", code=2,
                   **far.only(tmp_path))
    assert "ssh-copy-id" in done.stderr
    done = monitor(far, "-1", f"changed:{tmp_path}", code=2)
    assert "ssh-keygen -R changed" in done.stderr


def talking_to_silent():
    """Our ssh that waits for host silent, if any."""
    return subprocess.run(["pgrep", "-f", "silent sh -s"], capture_output=True, text=True).stdout


def test_ctrl_c_in_mid_fetch_ends_at_once_with_130_and_leaves_no_process(far, tmp_path):
    watcher = behind(far, MONITOR, f"silent:{tmp_path}", variables={"TMPDIR": tmp_path},
                     start_new_session=True)
    wait_for(talking_to_silent, "the fetch")
    os.killpg(watcher.pid, signal.SIGINT)
    assert watcher.wait(timeout=5) == 130
    wait_for(lambda: not talking_to_silent(), "the end of ssh", 5)
    assert not list(tmp_path.glob("monitor.*"))


def test_it_waits_for_a_stage_that_is_about_to_appear_and_says_so(far, tmp_path):
    progress_file(tmp_path, Status="COMPLETE")
    with open(tmp_path / "screen", "w+") as screen:
        watcher = behind(far, MONITOR, "-i", 3, f"box:{tmp_path}", stdout=screen)
        text = (tmp_path / "screen").read_text
        wait_for(lambda: "One more look in 3 s" in text(), "the word")
        process = begin(tmp_path / "train", 150, PAUSE=0.06)
        assert watcher.wait(timeout=60) == 0
        process.wait(timeout=30)
    assert "train: RUNNING" in text() and "train: COMPLETE" in text()


def test_the_monitor_says_where_the_page_is_once_it_is_there(far, tmp_path):
    progress_file(tmp_path, Status="COMPLETE")
    assert "report.html" not in monitor(far, "-1", tmp_path, code=0).stdout
    (tmp_path / "report.html").write_text("page")
    assert f"pictures: {tmp_path}/report.html\n" in monitor(far, "-1", tmp_path, code=0).stdout
    there = monitor(far, "-1", f"box:{tmp_path}", code=0).stdout
    assert "pictures: report.html there; sync_results.sh brings it here\n" in there


def test_a_complete_run_alone_is_left_after_one_more_look(far, tmp_path):
    progress_file(tmp_path, Status="COMPLETE")
    assert monitor(far, "-i", 1, f"box:{tmp_path}", code=0).stdout.count(": COMPLETE") == 2


def test_runs_that_fresh_has_put_aside_do_not_count(far, tmp_path):
    progress_file(tmp_path / "train", Status="COMPLETE")
    for old in ("train.old1", "train.old12"):
        progress_file(tmp_path / old, Heartbeat=1)
    done = monitor(far, "-1", f"box:{tmp_path}", code=0)
    assert ".old" not in done.stdout
    assert monitor(far, "-1", f"box:{tmp_path / 'train.old1'}").returncode != 0, "unless asked for"


def test_the_end_is_told_in_minutes_and_on_the_readers_own_clock(far, tmp_path):
    eta = int(time.time()) + 764
    utc = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(eta))
    progress_file(tmp_path, ETA=f"764 s ({utc})", Elapsed="829 s")
    done = monitor(far, "-1", f"box:{tmp_path}", code=4, TZ="JST-9").stdout
    there = {time.strftime("%H:%M", time.gmtime(eta + 9 * 3600 + s)) for s in (0, 60)}
    assert re.search(r"ETA: 12 min, (at|on [-\d]+ at) (\d\d:\d\d)\n", done)[2] in there
    assert "Elapsed: 13 min\n" in done and "UTC" not in done


def test_a_run_that_still_loads_is_starting(far, tmp_path):
    progress_file(tmp_path, Progress="0/0 steps (0.0%)")
    done = monitor(far, "-1", f"box:{tmp_path}", code=4).stdout
    assert ": RUNNING starting" in done and "0/0" not in done and "[---" not in done


def test_a_host_that_has_no_name_and_a_refused_port_are_said_as_ssh_says_them(far, tmp_path):
    done = monitor(far, "-1", "no-such-host.invalid:x", code=3).stdout
    assert "Could not resolve hostname no-such-host.invalid" in done and "?" not in done
    assert "Connection refused\n" in monitor(far, "-1", f"closed:{tmp_path}", code=3).stdout


def test_what_a_cloud_machine_says_to_the_wrong_user_is_shown(far, tmp_path, both):
    code, said = both(f"wronguser:{tmp_path}")
    assert code == 2 and "Please login as the user ubuntu" in said


def test_a_full_disk_for_temporary_files_is_not_taken_for_the_end(far, tmp_path, small_disk):
    disk = small_disk(64 << 10)
    progress_file(tmp_path / "there", PID=99999999)
    monitor(far, "-1", f"box:{tmp_path / 'there'}", code=1)
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    for target in (f"box:{tmp_path / 'there'}", tmp_path / "there"):
        assert "is that disk full?" in monitor(far, "-1", target, code=2, TMPDIR=disk).stderr


def test_no_run_is_left_out_in_silence(far, tmp_path):
    progress_file(tmp_path / "a/b/c/d/e/f/g/h", Status="FAILED")
    assert "FAILED" in monitor(far, "-1", tmp_path / "a", code=1).stdout
    for number in range(201):
        progress_file(tmp_path / f"many/{number:03d}", Status="COMPLETE")
    assert "there are more runs than these 200" in monitor(far, "-1", tmp_path / "many", code=4).stdout


def test_no_such_directory_says_where(far):
    for target, words in (("/nowhere", "/nowhere: no such directory\n"),
                          ("box:/nowhere", "box:/nowhere: no such directory on box\n")):
        assert monitor(far, "-1", target, code=2).stderr.endswith(words)


def test_a_leading_space_and_backslashes_in_a_path_stay(far, tmp_path):
    place = tmp_path / "back\\nslash"
    progress_file(place / " space" / "run")
    with open(tmp_path / "screen", "w+") as screen:
        watcher = behind(far, MONITOR, "-i", 1, f"box:{place}", stdout=screen)
        wait_for(lambda: "RUNNING" in (tmp_path / "screen").read_text(), "RUNNING")
        progress_file(place / " space" / "run", Status="FAILED", Error="it broke")
        assert watcher.wait(timeout=30) == 1
    text = (tmp_path / "screen").read_text()
    assert f"box:{place}/ space/run: FAILED it broke" in text and text.count("\a") == 1


def test_a_directory_called_like_an_option(far, tmp_path):
    progress_file(tmp_path / "-n", Status="COMPLETE")
    there = {"cwd": tmp_path, "env": far.env(), "capture_output": True, "text": True}
    done = subprocess.run(["bash", MONITOR, "-1", "--", "-n"], **there)
    assert done.returncode == 0 and "COMPLETE" in done.stdout, done.stderr
    done = subprocess.run(["bash", SYNC, "--", "-n", "-t"], **there)
    assert done.returncode == 0 and (tmp_path / "-t" / "PROGRESS.txt").exists(), done.stderr
    home = Path.home() / "-n"
    assert not home.exists()
    home.symlink_to(tmp_path / "-n")
    try:
        assert "COMPLETE" in monitor(far, "-1", "box:-n", code=0).stdout
        sync(far, "box:-n", tmp_path / "here")
    finally:
        home.unlink()
    assert (tmp_path / "here" / "PROGRESS.txt").exists()


# -- what both say of keys, hosts and targets


@pytest.fixture(params=["monitor", "sync"])
def both(request, far, tmp_path):
    """Either script as a function of a target and its options: (exit code, all that it said)."""
    def either(target, *options, **more):
        last = [tmp_path / "here"] if request.param == "sync" else []
        command = [SYNC] if request.param == "sync" else [MONITOR, "-1"]
        done = call(far, *command, *options, target, *last, **more)
        return done.returncode, done.stdout + done.stderr
    return either


def lock_up(key):
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", key], check=True,
                   stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("key, words", [
    ("open", "type: chmod 600 {}"), ("locked", "type: ssh-add {}"), ("open.pub", "public half"),
    ("garbage", "is not a private key"), ("stranger", "type: ssh-copy-id -i {} box"),
    ("pasted", "{} is damaged")])
def test_a_key_that_does_not_work_is_told_with_ssh_s_reason(far, tmp_path, both, key, words):
    for name in ("open", "locked", "stranger"):
        shutil.copy(far.place / ("stranger" if name == "stranger" else "user"), tmp_path / name)
        (tmp_path / name).chmod(0o600)
    lock_up(tmp_path / "locked")
    (tmp_path / "open").chmod(0o644)
    shutil.copy(far.place / "user.pub", tmp_path / "open.pub")
    (tmp_path / "garbage").write_text("hello\n")
    lines = (tmp_path / "open").read_text().splitlines()
    (tmp_path / "pasted").write_text("\n".join(lines[:3] + lines[4:]))    # a line lost, and the end
    for name in ("garbage", "pasted"):
        (tmp_path / name).chmod(0o600)
    progress_file(tmp_path / "there")
    path = far.only(tmp_path)
    code, said = both(f"box:{tmp_path / 'there'}", "-k", tmp_path / key, **path)
    assert code == 2 and words.format(tmp_path / key) in said and len(said.splitlines()) == 1
    if key == "open":   # what it says is what helps
        assert "Permissions 0644" in said
        subprocess.run(re.search(r"type: (chmod .*)", said)[1], shell=True, check=True)
        code, said = both(f"box:{tmp_path / 'there'}", "-k", tmp_path / key, **path)
        assert code in (0, 4), said


def test_a_locked_key_that_the_agent_holds_is_accepted(far, tmp_path, both):
    need("ssh-agent")
    shutil.copy(far.place / "user", tmp_path / "key")
    (tmp_path / "key").chmod(0o600)
    progress_file(tmp_path / "there", Status="COMPLETE")
    socket_path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket_path], stdout=subprocess.DEVNULL)
    try:
        wait_for(socket_path.exists, "the agent")
        subprocess.run(["ssh-add", "-q", tmp_path / "key"], check=True, stderr=subprocess.DEVNULL,
                       env={**os.environ, "SSH_AUTH_SOCK": str(socket_path)})
        lock_up(tmp_path / "key")
        shutil.copy(far.place / "user.pub", tmp_path / "key.pub")
        code, said = both(f"box:{tmp_path / 'there'}", "-k", tmp_path / "key",
                          SSH_AUTH_SOCK=socket_path, **far.only(tmp_path))
    finally:
        agent.kill()
        agent.wait()
    assert code == 0, said


@pytest.mark.parametrize("port", [False, True], ids=["an alias", "a port"])
def test_what_to_type_for_a_changed_host_key_helps(far, tmp_path, both, port):
    name = f"[127.0.0.1]:{far.port}" if port else "renewed"
    known = tmp_path / "known hosts"
    known.write_text(f"{name} {(far.place / 'other_host.pub').read_text()}")
    (tmp_path / "config").write_text(
        f"Host ec2\n HostName 127.0.0.1\n Port {far.port}\n IdentityFile {far.place}/user\n"
        f" UserKnownHostsFile \"{known}\"\n GlobalKnownHostsFile /dev/null\n User root\n"
        + ("" if port else " HostKeyAlias renewed\n"))
    stub = far.stub(tmp_path, "ssh", f'exec {shutil.which("ssh")} -F {tmp_path}/config "$@"')
    progress_file(tmp_path / "there", Status="COMPLETE")
    code, said = both(f"ec2:{tmp_path / 'there'}", **stub)
    assert code == 2 and "another host key" in said
    typed = re.search(r"type: (ssh-keygen -R .*?)    ", said)[1]
    subprocess.run(typed, shell=True, check=True, capture_output=True)
    code, said = both(f"ec2:{tmp_path / 'there'}", **stub)
    assert code == 0, said


@pytest.mark.parametrize("target", [
    "box:22022:dir", "ssh://box:22022/dir", "[::1]:dir", "box::dir"])
def test_a_target_that_other_tools_take_is_told_where_ports_belong(both, target):
    code, said = both(target)
    assert code == 2 and "~/.ssh/config" in said and "'Port 22022'" in said
    if target == "box:22022:dir":
        assert "type ec2:dir" in said


@pytest.mark.parametrize("name", ["\u00e4\u00e9", "new\nline", "quo'te", "-n"])
def test_names_that_a_dash_on_the_far_side_reads(far, tmp_path, both, name):
    progress_file(tmp_path / name, Status="COMPLETE")
    code, said = both(f"dash:{tmp_path / name}")
    assert code == 0, said


def test_what_both_scripts_share_is_the_same_text():
    part = re.compile(r"# ---- shared with.*# ---- end of what is shared", re.S)
    one, other = (part.search(script.read_text())[0] for script in (MONITOR, SYNC))
    assert one == other and len(one) > 1000


# -- sync


def same(a, b, names):
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def shown(directory):
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))


def test_files_arrive_while_they_are_made_and_are_equal_at_the_end(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    process = start("generate.py", "--n", 100000, "--every", 1000, "--out", there,
                    stdout=subprocess.DEVNULL)
    wait_for(lambda: (there / "PROGRESS.txt").exists(), "the start")
    assert "there: RUNNING" in monitor(far, "-1", f"box:{there}", code=4).stdout
    while process.poll() is None:
        sync(far, f"box:{there}", here)
        assert not list(here.glob("*.tmp")) and not (here / ".lock").exists()
    sync(far, f"box:{there}", here)
    names = shown(there)
    assert shown(here) == names and same(there, here, names)
    assert read_progress(here / "PROGRESS.txt")["Status"] == "COMPLETE"
    assert checkpointing.verify([here]) == 0
    assert "there: COMPLETE" in monitor(far, "-1", f"box:{there}", code=0).stdout


def test_a_real_training_seen_from_running_to_complete_and_copied_whole(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    run("generate.py", "--n", 200, "--out", there)
    process = start("train_magvit.py", "--data", there, "--out", there / "train", "--epochs", 2,
                    "--device", "cpu", "--heartbeat", 1, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL)
    wait_for(lambda: (there / "train" / "PROGRESS.txt").exists(), "the training", 60)
    seen = monitor(far, "-1", f"box:{there}")
    assert "there/train: RUNNING" in seen.stdout and "there: COMPLETE" in seen.stdout
    sync(far, f"box:{there}", here)
    done = monitor(far, "-i", 1, f"box:{there}", code=0)
    process.wait(timeout=30)
    assert "train: COMPLETE" in done.stdout
    sync(far, f"box:{there}", here)
    names = ["best_model.pt", "final_model.pt", "evaluation/metrics.json", "PROGRESS.txt"]
    assert same(there / "train", here / "train", names)
    assert checkpointing.verify([here]) == 0


def test_it_copies_results_only_and_deletes_nothing(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    for name in ("checkpoint_00000.npz", "dataset.npz", ".lock", ".reserve", "x.tmp",
                 ".x.npz.12-abcdef01.tmp", "a.npz.corrupt"):
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
    (here / ".sync_results.lock").write_text(f"cut:{there}\n")     # brought by a sync
    far.cutter.allow = 12 << 20
    sync(far, f"cut:{there}", here, code=75)
    assert (here / "checkpoint_00000.npz").read_bytes() == b"old"


def in_flight(here):
    """Files of which more than 1 MB has arrived, and not yet all."""
    return [p for p in here.glob(".checkpoint*") if p.stat().st_size > 1 << 20]


def test_sshd_stopped_in_mid_transfer_is_noticed(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 300)
    copier = behind(far, SYNC, f"box:{there}", here)
    wait_for(lambda: in_flight(here), "the transfer")
    sessions = subprocess.run(["pgrep", "-P", str(far.sshd.pid)], capture_output=True,
                              text=True).stdout.split()
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
    ("closed", 75, "the next run goes on"), ("silent", 75, "the next run goes on"),
    ("changed", 2, "ssh-keygen -R changed"), ("norsync", 2, "no rsync on norsync"),
    ("banner", 2, "prints text at login")])
def test_each_trouble_has_its_exit_code_and_says_what_to_do(far, tmp_path, host, code, words):
    progress_file(tmp_path / "there")
    assert words in sync(far, f"{host}:{tmp_path / 'there'}", tmp_path / "here", code=code)


def test_a_wrong_key_and_wrong_arguments_are_settings(far, tmp_path):
    progress_file(tmp_path / "there")
    path, there, here = far.only(tmp_path), f"box:{tmp_path / 'there'}", tmp_path / "here"
    line = sync(far, "-k", far.place / "stranger", there, here, code=2, **path)
    assert "does not accept the key" in line
    sync(far, "-k", far.place / "user", there, here, **path)
    assert "no key" in sync(far, "-k", "/nowhere", "box:x", tmp_path / "here", code=2)
    assert "no such directory" in sync(far, "box:/nowhere", tmp_path / "here", code=2)
    for arguments in ([], ["one"], ["-x"]):
        assert call(far, SYNC, *arguments).returncode == 2


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
    copiers = [behind(far, SYNC, f"box:{there}", here) for _ in range(8)]
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


@pytest.mark.parametrize("name", [*NAMES, "a`b`", "(paren)", "\u00e4", "back\\slash", "[ab]"])
def test_names_with_shell_characters_are_only_names_here_and_there(far, tmp_path, name):
    progress_file(tmp_path / name)
    (tmp_path / name / f"checkpoint {name}.npz").write_text("x")
    (tmp_path / name / "checkpoint_1.npz").write_text("x")
    here = tmp_path / "here" / name
    sync(far, f"box:{tmp_path / name}", here)
    names = ["checkpoint_1.npz", "PROGRESS.txt", f"checkpoint {name}.npz"]
    assert same(tmp_path / name, here, names)
    sync(far, str(tmp_path / name), tmp_path / "local" / name)
    assert same(tmp_path / name, tmp_path / "local" / name, ["checkpoint_1.npz", "PROGRESS.txt"])


def test_it_needs_nothing_from_the_environment(far, tmp_path):
    progress_file(tmp_path / "there")
    bare = ["env", "-i", f"PATH={far.bin}:/usr/bin:/bin", "/bin/bash", SYNC]
    done = subprocess.run([*bare, f"box:{tmp_path / 'there'}", tmp_path / "here"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "here" / "PROGRESS.txt").exists(), done.stderr


def test_it_works_with_an_rsync_that_rejects_what_openrsync_rejects(far, tmp_path):
    rejected = ("--info --append-verify --mkpath --protect-args -s --ignore-missing-args "
                "--no-inc-recursive --log-file")
    allowed = ("-a -r -t -rt -z -i -I -c -e --stats --progress --out-format --partial "
               "--partial-dir --delay-updates --bwlimit --checksum --chmod --exclude --include "
               "--filter --max-size --temp-dir --prune-empty-dirs")
    stub = far.stub(tmp_path, "rsync", f"""
        for a do
            case " {rejected} " in *" ${{a%%=*}} "*)
                echo "rsync: unrecognized option $a" >&2; exit 1 ;; esac
            case $a in -*) case " {allowed} " in *" ${{a%%=*}} "*) ;; *)
                echo "rsync: not measured on openrsync: $a" >&2; exit 1 ;; esac ;; esac
        done
        exec {shutil.which('rsync')} "$@" """)
    progress_file(tmp_path / "there", Status="COMPLETE")
    (tmp_path / "there" / "checkpoint_1.npz").write_text("x")
    sync(far, f"box:{tmp_path / 'there'}", tmp_path / "here", **stub)
    assert same(tmp_path / "there", tmp_path / "here", ["checkpoint_1.npz", "PROGRESS.txt"])


def test_ctrl_c_and_sigterm_leave_no_process_behind(far, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        copier = behind(far, SYNC, f"silent:{tmp_path}", tmp_path / "here", start_new_session=True)
        wait_for(talking_to_silent, "the transfer")
        os.killpg(copier.pid, number)
        assert copier.wait(timeout=5) == code
        wait_for(lambda: not talking_to_silent(), "the end of ssh", 5)


def test_a_run_is_bounded_in_time(far, tmp_path):
    stub = far.stub(tmp_path, "ssh", "sleep 1000")
    line = sync(far, f"box:{tmp_path}", tmp_path / "here", code=75, SYNC_SECONDS=3, **stub)
    assert "not finished after 3 s" in line


def test_both_run_bare_with_remote_and_key_from_the_environment(far, tmp_path):
    progress_file(tmp_path / "there", Status="COMPLETE")
    more = {"REMOTE": f"box:{tmp_path / 'there'}", "SSH_KEY": far.place / "user",
            "HOME": tmp_path / "home", **far.only(tmp_path)}
    monitor(far, "-1", code=0, **more)
    sync(far, **more)
    assert same(tmp_path / "there", tmp_path / "home" / "results", ["PROGRESS.txt"])


# -- sync: a limit in mid-file, and what dead transfers leave


def openrsync(far, tmp_path, rate):
    """Variables for a script: PATH with an rsync like openrsync, of `rate` bytes a second."""
    stub = far.stub(tmp_path, "rsync", f'exec {sys.executable} {ROOT}/tests/openrsync.py "$@"')
    return {**stub, "RATE": rate, "SENT": tmp_path / "sent"}


def hidden(here):
    """What transfers left behind."""
    return [p for p in here.rglob(".*") if p.name != ".sync_results.lock"]


def test_with_openrsync_the_limit_in_mid_file_loses_nothing_of_it(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 6)
    like_a_mac = openrsync(far, tmp_path, 2 << 20)
    line = sync(far, there, here, code=75, SYNC_SECONDS=2, **like_a_mac)
    assert "not finished after 2 s; the next run goes on from here" in line
    kept = here / ".rsync-partial" / "checkpoint_00000.npz"
    assert 1 << 20 < kept.stat().st_size < 6 << 20
    for _ in range(5):
        if (here / "checkpoint_00000.npz").exists():
            break
        done = call(far, SYNC, there, here, SYNC_SECONDS=2, **like_a_mac)
        assert done.returncode in (0, 75), done.stderr
    assert same(there, here, ["checkpoint_00000.npz"]) and not hidden(here)
    assert sum(map(int, (tmp_path / "sent").read_text().split())) == 6 << 20, "each byte once"
    assert (here / "checkpoint_00000.npz").stat().st_mode & 0o777 == 0o644


def test_with_the_rsync_of_this_machine_too(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 10)
    far.cutter.rate = 1 << 20
    try:
        assert "not finished" in sync(far, f"cut:{there}", here, code=75, SYNC_SECONDS=6)
    finally:
        far.cutter.rate = None
    assert (here / ".rsync-partial" / "checkpoint_00000.npz").stat().st_size > 0
    sync(far, f"cut:{there}", here)
    assert same(there, here, ["checkpoint_00000.npz"]) and not hidden(here)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_mid_file_loses_nothing_of_it(far, tmp_path, number):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 10)
    far.cutter.rate = 2 << 20
    try:
        copier = behind(far, SYNC, f"cut:{there}", here, start_new_session=True)
        wait_for(lambda: in_flight(here), "the transfer")
        os.killpg(copier.pid, number)
        copier.communicate(timeout=15)
    finally:
        far.cutter.rate = None
    assert copier.returncode == 128 + number
    assert (here / ".rsync-partial" / "checkpoint_00000.npz").stat().st_size > 1 << 20


def users(path):
    return subprocess.run(["lsof", "-t", path], capture_output=True, text=True).stdout


def test_debris_of_a_killed_transfer_is_used_by_the_next(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    big(there, 4)
    like_a_mac = openrsync(far, tmp_path, 1 << 20)
    copier = behind(far, SYNC, there, here, variables=like_a_mac, stdout=subprocess.DEVNULL)
    debris = wait_for(lambda: in_flight(here), "the transfer")[0]
    copier.kill()
    copier.wait()
    sync(far, there, here)   # what outlived it still has the lock: nothing is touched
    assert debris.exists()
    transfer = users(debris)
    os.kill(int(transfer), signal.SIGKILL)
    wait_for(lambda: not users(debris), "its end")
    wait_for(lambda: "new files" in sync(far, there, here, **like_a_mac), "the lock", 10)
    assert same(there, here, ["checkpoint_00000.npz"]) and not hidden(here)
    assert sum(map(int, (tmp_path / "sent").read_text().split())) == 4 << 20, "each byte once"


def hidden_from_bash(tmp_path, *names):
    """A file for BASH_ENV: these programs are not there for `command -v`, and fail if called."""
    hide = tmp_path / "hide"
    hide.write_text("".join(f"{name}() {{ exit 9; }}\n" for name in names) + """
        command() {
            case "$*" in %s) return 1 ;; esac
            builtin command "$@"
        }""" % " | ".join(f'"-v {name}"' for name in names))
    return hide


@pytest.mark.parametrize("lsof", [True, False], ids=["lsof", "proc"])
def test_debris_of_a_living_transfer_and_files_of_others_stay(far, tmp_path, lsof):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    (there / "dataset.npz").write_text("data")
    here.mkdir()
    mine = [here / name for name in (".notes.A1b2c3", ".dataset.npz.backup", ".bashrc",
                                     ".dataset.npz.BACKUP", ".dataset.npz.old123")]
    for path in mine:
        path.write_text("mine")
    path = {} if lsof else {"BASH_ENV": hidden_from_bash(tmp_path, "lsof")}
    with open(here / ".dataset.npz.A1b2c3d4e5", "w") as living:
        living.write("half")
        living.flush()
        dead = here / ".dataset.npz.Zyxwv9"
        dead.write_text("half")
        sync(far, f"box:{there}", here, **path)
        assert Path(living.name).exists() and not dead.exists()
    sync(far, f"box:{there}/", f"{here}//", **path)
    assert not Path(living.name).exists() and all(p.read_text() == "mine" for p in mine)
    assert not (here / ".rsync-partial").exists() and same(there, here, ["dataset.npz"])


# -- sync: the order, and training states


def job(out, total, **more):
    """The states of a job on the standard library: one each ten steps, the last three stay."""
    return run(JOB, out, total, **more)


def states(directory):
    return sorted(int(p.stem.split("_")[1]) for p in directory.glob("checkpoint_*"))


def test_results_come_before_what_only_a_restart_needs(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    job(there / "train", 50)
    run("generate.py", "--n", 200, "--every", 100, "--out", there)
    content = {"report.html": 1, "report.png": 1, "train/best_model.pt": 2, "train/metrics.json": 3,
               "train/history.json": 3, "train/evaluation/metrics.json": 3,
               "train/samples/one.png": 3, "train/samples.npz": 4, "dataset.npz": 4}
    for name in content:
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes(os.urandom(1000))
    sync(far, f"box:{there}", here)
    content |= {"PROGRESS.txt": 1, "train/PROGRESS.txt": 1, "checkpoint_00000.npz": 4,
                "checkpoint_00100.npz": 4, "train/checkpoint_00050.json": 5}
    assert same(there, here, content)
    arrived = sorted(content, key=lambda name: (here / name).stat().st_ctime_ns)
    assert [content[name] for name in arrived] == sorted(content.values())
    assert states(here / "train") == [50], "only the newest state"


def test_as_many_states_stay_here_as_there_and_pieces_and_all_else_for_ever(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    run("generate.py", "--n", 200, "--every", 100, "--out", there)
    for total, left in ((20, [20]), (50, [20, 50]), (80, [20, 50, 80]), (110, [50, 80, 110])):
        job(there / "train", total)
        line = sync(far, f"box:{there}", here)
        assert states(here / "train") == left
        assert checkpointing.verify([here]) == 0, "with the records of those that are gone there"
    assert "1 older training states let go" in line
    (there / "checkpoint_00000.npz").unlink()
    for number in (90, 100):
        (there / "train" / f"checkpoint_{number:05d}.json").unlink()
    sync(far, f"box:{there}", here)
    assert states(here / "train") == [110] and states(here) == [0, 100]
    (there / "train" / "checkpoint_00110.json").unlink()
    sync(far, f"box:{there}", here)
    shutil.rmtree(there / "train")
    sync(far, f"box:{there}", here)
    assert states(here / "train") == [110], "no state there is no reason to let one go here"


def test_an_older_state_goes_only_once_a_newer_one_is_verified_here(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    for total in (10, 40, 70, 100):
        job(there, total)
        if total < 100:
            sync(far, there, here)
    newest = shlex.quote(str(here / "checkpoint_00100.json"))
    damaged = far.stub(tmp_path, "rsync", f"""
        {shutil.which('rsync')} "$@"; code=$?
        [ ! -e {newest} ] || printf X | dd of={newest} conv=notrunc status=none
        exit $code""")
    line = sync(far, there, here, code=1, **damaged)
    assert "checkpoint_00100.json" in line and "older states were kept" in line
    assert states(here) == [10, 40, 70, 100]
    sync(far, there, here)   # a sound disk: the copy is mended, then one may go
    assert states(here) == [40, 70, 100] and same(there, here, ["checkpoint_00100.json"])


@pytest.mark.parametrize("tool", ["sha256sum", "shasum", "openssl"])
def test_each_of_the_programs_for_sha256_will_do(far, tmp_path, tool):
    need(tool)
    there, here = tmp_path / "there", tmp_path / "here"
    others = {"shasum", "sha256sum", "openssl"} - {tool}
    hide = hidden_from_bash(tmp_path, *others)
    for total in (10, 40, 70, 100):
        job(there, total)
        sync(far, there, here, BASH_ENV=hide)
    assert states(here) == [40, 70, 100]


def test_with_the_laptops_copy_alone_the_work_goes_on_exactly_elsewhere(far, tmp_path):
    there, here, other = tmp_path / "there", tmp_path / "here", tmp_path / "other"
    process = begin(there, 1200, PAUSE=0.01)
    for number in (20, 120):   # while it runs, and once more after it was killed
        wait_for(lambda: states(there)[-1:] >= [number], "a state")
        sync(far, f"box:{there}", here)
    kill(process)
    sync(far, f"box:{there}", here)
    shutil.rmtree(there)
    shutil.copytree(here, other)
    begun = states(other)[-1]
    assert 120 <= begun < 1200
    log = run(JOB, other, 1200).stdout
    run(JOB, tmp_path / "undisturbed", 1200)
    assert f"checkpoint_{begun + 10:05d}.json" in log and f"checkpoint_{begun:05d}.json" not in log
    assert same(other, tmp_path / "undisturbed", ["checkpoint_01200.json"])
    assert checkpointing.verify([other]) == 0


@pytest.mark.parametrize("below", ["train", "."])
def test_a_run_that_began_anew_does_not_mix_with_the_old_ones_copies(far, tmp_path, below):
    there, here = tmp_path / "there", tmp_path / "here"
    job(there / below, 60)
    (there / below / "best_model.pt").write_text("old")
    sync(far, there, here)
    (there / below).rename(tmp_path / "there.old1" if below == "." else there / "train.old1")
    job(there / below, 30)
    (there / below / "best_model.pt").write_text("new")
    assert "a new run began there" in sync(far, there, here)
    aside = tmp_path / "here.old1" if below == "." else here / "train.old1"
    assert states(aside) == [60] and (aside / "best_model.pt").read_text() == "old"
    assert states(here / below) == [30] and (here / below / "best_model.pt").read_text() == "new"
    if below == "train":   # that of the far side stays there: it was copied when it was new
        (there / "train.old1" / "only_there").touch()
        sync(far, there, here)
        assert not list(here.rglob("only_there"))


def test_a_run_that_begins_anew_during_a_sync_is_seen_by_the_next(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    for place, total in ((there / "train", 60), (tmp_path / "new", 30)):
        job(place, total)
        (place / "metrics.json").write_text(f'"{place.name}"')
    train = there / "train"
    stub = far.stub(tmp_path, "rsync", f"""
        case "$*" in *.png*) mv {train} {train}.old1; mv {tmp_path}/new {train} ;; esac
        exec {shutil.which('rsync')} "$@" """)
    sync(far, there, here, **stub)
    sync(far, there, here)
    assert states(here / "train") == [30]
    assert (here / "train" / "metrics.json").read_text() == '"new"'
    assert checkpointing.verify([here / "train"]) == 0
    assert same(train, here / "train", ["run.json", "checkpoints.jsonl"])


def test_copies_of_two_remotes_do_not_push_each_other_out(far, tmp_path):
    here = tmp_path / "here"
    job(tmp_path / "one", 30)
    job(tmp_path / "two", 30)
    sync(far, tmp_path / "one", here)
    line = sync(far, tmp_path / "two", here, code=2)
    assert f"copies of other runs, from {tmp_path / 'one'}" in line and "type: mv" in line
    subprocess.run(re.search(r"type: (mv .*)", line)[1], shell=True, check=True)
    sync(far, tmp_path / "two", here)
    assert same(tmp_path / "two", here, ["run.json"])


def test_what_was_here_before_the_first_sync_is_not_replaced(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    job(there / "train", 30)
    (there / "dataset.npz").write_text("theirs")
    for mine in ("dataset.npz", "train", "train/run.json"):
        (here / mine).parent.mkdir(parents=True)
        (here / mine).write_text("mine")
        line = sync(far, f"box:{there}", here, code=2)
        assert f"{here / mine.split('/')[0]} was there before the first sync" in line
        assert (here / mine).read_text() == "mine" and not list(here.rglob("*.json.*"))
        shutil.rmtree(here)
    here.mkdir()
    (here / "notes.txt").write_text("mine")
    (here / "dataset.npz").write_text("an older copy")
    line = sync(far, f"box:{there}", here, code=2)
    subprocess.run(re.search(r"type: (echo .*)", line)[1], shell=True, check=True)
    sync(far, f"box:{there}", here)
    assert same(there, here, ["dataset.npz"]) and (here / "notes.txt").read_text() == "mine"


def test_a_run_that_works_here_is_not_moved_from_under_itself(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    job(there, 30)
    job(here, 20)
    before = sorted(path.name for path in here.iterdir())
    assert "was there before the first sync" in sync(far, f"box:{there}", here, code=2)
    assert sorted(p.name for p in here.iterdir()) == sorted([*before, ".sync_results.lock"])


def test_results_beside_states_come_whatever_they_are_called(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    job(there / "train", 30)
    names = ["checkpoint_best.pt", "checkpoint_summary.json", "checkpoints_overview.png",
             "checkpoints/last.npz"]
    for name in names:
        (there / "train" / name).parent.mkdir(exist_ok=True)
        (there / "train" / name).write_bytes(os.urandom(100))
    sync(far, f"box:{there}", here)
    assert same(there / "train", here / "train", names)


def test_a_file_that_may_not_be_read_stops_no_other(far, tmp_path):
    """root may read all, so the rsync of this test says what it says to others."""
    there, here = tmp_path / "there", tmp_path / "here"
    job(there / "train", 30)
    (there / "a.png").write_text("x")
    (there / "dataset.npz").write_text("x")
    stub = far.stub(tmp_path, "rsync", f"""
        {shutil.which('rsync')} "$@" || exit
        case "$*" in *.png*)
            echo 'rsync: [sender] send_files failed to open "/r/b.png": Permission denied (13)' >&2
            exit 23 ;;
        esac""")
    line = sync(far, f"box:{there}", here, code=2, **stub)
    assert "may not read all" in line and "b.png" in line and "all else was brought" in line
    assert same(there, here, ["a.png", "dataset.npz", "train/checkpoint_00030.json"])


def test_a_far_rsync_that_may_not_run_is_no_matter_of_some_files(far, tmp_path):
    """Nothing is brought then, and nothing says that it was."""
    there, here = tmp_path / "there", tmp_path / "here"
    job(there / "train", 30)
    stub = far.stub(tmp_path, "rsync", "echo 'sh: rsync: Permission denied' >&2; exit 12")
    line = sync(far, f"box:{there}", here, code=2, **stub)
    assert "Permission denied" in line and "all else was brought" not in line


# -- sync: small things that were wrong


def test_links_and_pipes_are_not_new_files(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    (there / "a.npz").write_text("x")
    (there / "link.npz").symlink_to("a.npz")
    os.mkfifo(there / "pipe")
    assert "1 new files" in sync(far, f"box:{there}", here)
    assert "0 new files" in sync(far, f"box:{there}", here)


def test_a_file_that_vanishes_from_a_remote_with_openrsync_is_no_trouble(far, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    progress_file(there)
    (there / "dataset.npz").write_text("x")
    gone = f"rsync(77): error: {there}/%s: lstat: No such file or directory"
    stub = far.stub(tmp_path, "rsync", f"""
        {shutil.which('rsync')} "$@"
        case "$*" in *prune*) exit ;; esac
        echo "{gone % 'checkpoint_1.npz'}" >&2
        echo "rsync(78): error: poll: bad fd" >&2
        exit 23""")
    assert "1 new files" in sync(far, f"box:{there}", here, **stub)
    far.stub(tmp_path, "rsync", f'rm -r {there}; echo "{gone % ""}" >&2; exit 23')
    assert "no such directory" in sync(far, f"box:{there}", here, code=2, **stub)


def test_ssh_s_reason_is_shown_and_not_rsync_s_last_line(far, tmp_path):
    progress_file(tmp_path / "there")
    assert "Connection refused" in sync(far, "closed:x", tmp_path / "here", code=75)
    stub = far.stub(tmp_path, "rsync", """
        printf 'Read from remote host box: Connection reset by peer\\r\\n' >&2
        echo "rsync(2529): error: poll: bad fd" >&2; exit 255""")
    line = sync(far, f"box:{tmp_path / 'there'}", tmp_path / "here", code=75, **stub)
    assert "(Read from remote host box: Connection reset by peer)" in line


# -- what macOS lacks


BASH_4 = (r"mapfile|readarray|declare -A|local -n|&>>|\|&|\$\{\w+(,,|\^\^|@\w)|EPOCHSECONDS|"
          r"wait -n|\[\[ -v|coproc|;;&|read -t 0\.|source <\(|\w\[-1\]|printf '%\(")
GNU = (r"date -d|date --|grep -P|sed -i|sed -r|readlink -f|stat -c|\btimeout \d|\bflock \d|--info=|"
       r"--mkpath|--append-verify|--protect-args|head -n -|xargs -r|\bseq \d|\btac\b|sort -V|"
       r"mktemp --|find [^|]*-printf|\\\+'|ps -o etimes|\balarm shift; exec|%q")


@pytest.mark.parametrize("script", [MONITOR, SYNC])
def test_the_scripts_use_nothing_that_bash_3_2_bsd_tools_or_openrsync_lack(script):
    for number, line in enumerate(script.read_text().splitlines(), 1):
        code = re.sub(r"(^|\s)#.*", "", line)
        for lint in (BASH_4, GNU):
            assert not re.search(lint, code), f"{script.name}:{number}: {line}"
        assert line.isascii(), f"{script.name}:{number}: bash 3.2 misreads it"
        assert len(line) <= 100, f"{script.name}:{number}: longer than 100 columns"


@pytest.mark.parametrize("line", [
    "mapfile -t a < f", "echo ${v,,}", "declare -A m", "date -d now", "sed -i s/a/b/ f",
    "cmd |& tee", "printf %q x"])
def test_the_lint_itself_catches_them(line):
    assert re.search(BASH_4, line) or re.search(GNU, line)


def test_shellcheck_is_clean():
    need("shellcheck")
    subprocess.run(["shellcheck", MONITOR, SYNC, ROOT / ".ci" / "run"], check=True)


def test_python_is_the_only_other_thing_the_laptop_needs_for_verify(tmp_path):
    verify = [sys.executable, "-I", "-S", ROOT / "checkpointing.py", "verify", tmp_path]
    assert subprocess.run(verify, capture_output=True).returncode == 1
    assert Path(MONITOR).stat().st_mode & 0o111 and Path(SYNC).stat().st_mode & 0o111
