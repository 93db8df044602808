"""What all programs share: how they start, and how they say that something is wrong.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong (one sentence on stderr says what), 128 + n stopped
by signal n, what there was saved (130 by Ctrl-C, 143 by SIGTERM), 134 another process of the run was lost,
141 nobody reads what it prints (see tree_ffn/streams.py).
"""

import functools
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from experiments.common import provenance
from tree_ffn import streams
from tree_ffn.errors import InputError
from tree_ffn.paths import local
from tree_ffn.training.signals import Diverged, Interrupted

flags.disclaim_key_flags()  # they are those of the program that calls `define_config`


def run(
    main: Callable[..., None], argv: list[str] | None = None, *, prints: Callable[[], object] = lambda: False
) -> None:
    """Parses flags, runs `main()`, turns what went wrong into one sentence; exits.

    Args:
      main: the program; it reads its flags from absl. If it takes a `suite`, that is the first word of the
        command line where there is one before the flags.
      argv: the command line, sys.argv by default.
      prints: by the flags, whether its result is what it prints: then it ends when nobody reads it any more.

    Raises:
      SystemExit: always; its code is as in the head of this file.

    Example:
      >>> if __name__ == "__main__":       # doctest: +SKIP
      ...     run(main)
    """
    sys.unraisablehook = _unraisable
    parse, argv, suite = functools.partial(_parse, main), list(sys.argv if argv is None else argv), []
    if "suite" in inspect.signature(main).parameters and argv[1:] and not argv[1].startswith("-"):
        suite = [argv.pop(1)]
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as experiments/__init__ leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with streams.lasting(lambda: not flags.FLAGS.is_parsed() or prints()):  # --help is read before
        app.run(lambda rest: _main(lambda: main(*suite), rest), argv=argv, flags_parser=parse)


def _unraisable(args) -> None:
    """As Python's own; but on a full disk orbax closes its event loop while tensorstore still writes."""
    if "Event loop is closed" not in str(args.exc_value):
        sys.__unraisablehook__(args)


def _parse(main: Callable[..., None], argv: list[str]) -> list[str]:
    """absl's parser, with one sentence instead of the whole help text on an error."""
    if "--help" in argv[1:]:
        print(_help(main, argv[0]))
        sys.exit(0)
    try:
        rest = flags.FLAGS(_with_local_config(argv))
        for name in flags.FLAGS:
            # A config file that cannot be read says so when it is looked at: now, not in the midst of main.
            hasattr(flags.FLAGS[name].value, "keys")
        _check_config()
    except Exception as error:  # flags, config files and their arguments all end here
        # absl puts the flag before what its parser says, which names it too.
        found = next((one for one in (error, error.__context__) if isinstance(one, InputError)), None)
        _fail(found or _on_config(argv) or _on_value(error) or error, 2)
    # Other libraries log their own business at INFO level.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def define_config(name: str, default: str, words: str) -> flags.FlagHolder:
    """A flag of a config with a default, which is read here and now, with the words that change a key of it.

    Args:
      name: of the flag.
      default: the config file.
      words: help text.

    Raises:
      SystemExit: a key is unknown or its value not allowed.
    """
    from ml_collections import config_flags  # which programs without a config do without

    try:
        return config_flags.DEFINE_config_file(name, default, words, lock_config=True)
    except Exception as error:
        _fail(_on_config(sys.argv) or error, 2)


def _check_config() -> None:
    """Raises InputError if the command line sets a key of the config that does nothing."""
    flag = flags.FLAGS["config"] if "config" in flags.FLAGS else None
    if flag is not None and hasattr(flag.value, "keys") and getattr(flag, "override_values", None):
        from experiments.common.config_words import check_words  # which imports the library

        check_words(flag)


def _on_config(argv: list[str]) -> Exception | None:
    """What is wrong with a key of the config, where a word sets one that it does not have."""
    if not any("config." in word for word in argv):
        return None
    from experiments.common.config_words import unknown_key  # which imports the library: errors alone need it

    said = unknown_key(_with_local_config(argv[1:]))
    return InputError(said) if said else None


def _on_value(error: Exception) -> Exception | None:
    """What is wrong with a value that is not of its key's type, of which Python says `invalid literal`."""
    said = re.match(r"flag (--[^=]+)=(.*): (?:invalid literal for|could not convert)", str(error), re.DOTALL)
    return InputError(f"{said[1]}: {said[2]!r} is not allowed; use a number.") if said else None


def _with_local_config(argv: list[str]) -> list[str]:
    """The command line; the path of a config file is read as those of other flags are."""
    if "config" in flags.FLAGS and isinstance(flags.FLAGS["config"], flags.EnumFlag):
        return argv  # the quickstart's names of configs
    words = []
    for word in argv:
        flag, equals, path = word.partition("=")
        if equals and flag in ("--config", "-config"):
            word = f"{flag}={_config_file(path)}"
        elif words and words[-1] in ("--config", "-config"):
            word = _config_file(word)
        words.append(word)
    return words


def _config_file(path: str) -> str:
    """A local config file with its arguments; ml_collections says of others only what Python says."""
    file, colon, arguments = local(path, "--config").partition(":")
    if not (file.endswith(".py") and os.path.isfile(file)):
        raise InputError(
            f"--config: {file!r} is no config file; name one that is there, e.g. configs/quickstart.py."
        )
    return f"{file}{colon}{arguments}"


def _help(main: Callable[..., None], program: str) -> str:
    """The head of the program's file, and its flags."""
    module = sys.modules[main.__module__]
    own = program if main.__module__ == "__main__" else main.__module__
    return f"{inspect.getdoc(module)}\n\nFlags:\n{flags.FLAGS.module_help(own)}"


def _main(main: Callable[[], None], rest: list[str]) -> int:
    try:
        if rest[1:]:
            raise InputError(f"argument: {rest[1]!r} is not known; flags have the form --name=value.")
        provenance.commit()  # now: the checkout may change while this runs, the code that is loaded does not
        main()
    except InputError as error:
        _fail(error, 2)
    except Diverged as error:
        _fail(error, 1)
    except Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(error: Exception, code: int) -> NoReturn:
    """Prints `error` as one line and exits."""
    if isinstance(error, KeyError):  # its str is a repr
        error = Exception(*error.args)
    text = str(error)
    if "Error whilst parsing config file" in text:
        # Here it adds a traceback to what the file said, which ends it as `ValueError: ...`.
        text = re.split(r"^[\w.]*(?:Error|Exception): ", text, flags=re.MULTILINE)[-1]
    text = " ".join(text.split()) or type(error).__name__
    program = os.path.basename(sys.argv[0])
    print(f"{program}: {text}", file=sys.stderr, flush=True)
    sys.exit(code)
