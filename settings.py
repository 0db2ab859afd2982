"""The command line of a stage, made from one dataclass that holds its settings.

Imported first by every stage: from here on Ctrl-C and a missing package end in one line.
"""
import os
import signal
import sys


def one_line_at_the_top(kind, error, trace):
    """sys.excepthook of the stages: what a person did or lacks is one line; bugs keep a trace."""
    program = os.path.basename(sys.argv[0])
    if issubclass(kind, KeyboardInterrupt):
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) and error.name in ("numpy", "torch"):
        print(f"{program}: error: {error.name} is not installed for {sys.executable}. Type: "
              "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt, then use "
              ".venv/bin/python", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def leave(number, frame):
    os.write(2, f"{os.path.basename(sys.argv[0])}: stopped by Ctrl-C\n".encode())
    os._exit(128 + number)


sys.excepthook = one_line_at_the_top
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and \
        os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.abspath(__file__)):
    signal.signal(signal.SIGINT, leave)   # numpy would make forty lines of it

import argparse   # noqa: E402
import dataclasses   # noqa: E402

from checkpointing import WRONG_SETTINGS   # noqa: E402


def option(default, help):
    """A field of a settings dataclass that parse_settings() turns into a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help})


class OneLineParser(argparse.ArgumentParser):
    """argparse, except that a mistake gets one line on stderr instead of the whole usage."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        if signal.getsignal(signal.SIGINT) is leave:   # all is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def error(self, message):
        once = os.environ.get("RANK", "0") == "0"   # torchrun starts many with the same mistake
        said = f"{self.prog}: error: {message}; see {self.prog} --help\n"
        self.exit(WRONG_SETTINGS, said if once else None)


def parse_settings(kind, description, argv=None):
    """(parser, settings) of a stage: a field of the dataclass `kind` is an option, a True one a
    --no-NAME flag. parser.error() reports what only the stage can know to be wrong."""
    parser = OneLineParser(description=description)
    for field in dataclasses.fields(kind):
        name, default, text = field.name.replace("_", "-"), field.default, field.metadata["help"]
        if isinstance(default, bool):
            flag = f"--no-{name}" if default else f"--{name}"
            action = f"store_{str(not default).lower()}"
            parser.add_argument(flag, dest=field.name, action=action, help=text)
        else:
            shown = "" if default is None else f" (default {default})"
            parser.add_argument(f"--{name}", dest=field.name, default=default, help=text + shown,
                                type=str if default is None else type(default))
    return parser, kind(**vars(parser.parse_args(argv)))
