"""Starts the stages that import torch in milliseconds: python tests/zygote.py SOCKET

One process imports numpy, torch and the stages once, computes nothing (so it has no pools of
threads that a fork would lose), and forks a job for each request on SOCKET, a descriptor. A request
is a message of JSON with four descriptors: stdin, stdout, stderr, and a pipe for the job's number.

The end of this file is the job: it runs the stage as python would, as __main__, and ends as any
program does, with its exceptions, its threads and its atexit. `conftest.Forked` is the other side.
"""
import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ended = []


@atexit.register    # the first one, so it is called last
def leave():
    """Without half a second for taking all modules apart, where the exit code is plain."""
    with contextlib.suppress(OSError, ValueError):      # Python itself has a code for a full disk
        if ended and isinstance(ended[0], int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended[0] & 255)


def import_stages():
    """All of them once, so that what they import is here."""
    for path in ROOT.glob("*.py"):
        importlib.import_module(path.stem)
    importlib.import_module("torch._inductor.config")   # use_deterministic_algorithms() wants it


def receive(requests):
    """(request, descriptors) of the next request; ends the program when nobody can ask any more."""
    text, descriptors, *_ = socket.recv_fds(requests, 1 << 16, 4)
    if not text:
        raise SystemExit(0)
    return json.loads(text), descriptors


def serve(requests):
    """Fork a job for each request; returns, in the job, what it was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # of the terminal: pytest decides what follows
    pid = 1
    while pid:
        request, (*standard, answer) = receive(requests)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of OpenBLAS's thread, which is ready for this
            pid = os.fork()
            if pid == 0:
                orphan()
        if pid:
            os.waitpid(pid, 0)
            for descriptor in (*standard, answer):
                os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    if request["session"]:
        os.setsid()
    os.write(answer, str(os.getpid()).encode())
    for descriptor in (*standard, answer):
        os.close(descriptor)
    requests.close()
    os.chdir(request["cwd"])
    return request["argv"]


def orphan():
    """Go on as the child of the process that asks: it takes us when our parent has ended."""
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(0.001)


sys.path[0] = str(ROOT)
import_stages()
sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
sys.orig_argv = [sys.executable, *sys.argv]
sys.modules["numpy"].random.seed()      # or all jobs would draw the same numbers
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    ended.append(0)
except SystemExit as error:
    ended.append(error.code or 0)
    raise
