"""The command line of a stage, made from the dataclass that holds its settings. Imported first by
every stage: while it imports the rest, Ctrl-C or a missing package is one line.
"""
import argparse
import dataclasses
import os
import signal
import sys
import time


def leave(number, frame):
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(128 + number)      # numpy and torch, half imported, would make forty lines of it


def tell_what_is_missing(kind, error, trace):
    if kind is not ModuleNotFoundError or error.name not in ("numpy", "torch"):
        return sys.__excepthook__(kind, error, trace)
    sys.exit(f"error: {error.name} is not installed for {sys.executable}. Type: python3 -m venv "
             ".venv && .venv/bin/pip install -r requirements.txt, then use .venv/bin/python")


if os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.abspath(__file__)):
    sys.excepthook = tell_what_is_missing
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # torch's threads: if two programs let
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")         # them spin on, both are far slower


def option(default, help):
    """A field of a settings dataclass that parse_settings() turns into a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help})


class OneLineParser(argparse.ArgumentParser):   # a mistake is one line, not the whole usage
    def parse_args(self, *arguments):
        if signal.getsignal(signal.SIGINT) is leave:    # all is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return super().parse_args(*arguments)

    def error(self, message):   # as in processes.one_voice: the first says it, or else the others
        time.sleep(10 * (os.environ.get("LOCAL_RANK", "0") != "0"))
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parse_settings(kind, description, argv=None):
    """(parser, settings): a field of the dataclass `kind` is an option, a True one --no-NAME."""
    parser = OneLineParser(description=description)
    for field in dataclasses.fields(kind):
        name, default, text = field.name.replace("_", "-"), field.default, field.metadata["help"]
        how = {"type": str if default is None else type(default)}
        if isinstance(default, bool):
            how = {"action": "store_false" if default else "store_true"}
            name = f"no-{name}" if default else name
        elif default not in (None, ""):
            text += f" (default {default})"
        parser.add_argument(f"--{name}", dest=field.name, default=default, help=text, **how)
    return parser, kind(**vars(parser.parse_args(argv)))
