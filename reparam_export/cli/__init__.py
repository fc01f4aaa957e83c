"""The command line. No logic in it: one command, one file; each is one stage, ``convert`` is all of them.

A command is a module with the name ``command``; it is found by its file name and imported when it is called.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from reparam_export import plugins
from reparam_export.errors import ReparamError, clipped

EXIT_CODES = """Exit codes: 0 proven and written; 1 not equivalent, or added cost; 2 wrong call; 3 checkpoint or base not
understood; 4 cannot be fused; 5 the target refused, or the disk did; 6 latency not decided; 70 a fault of reparam-export itself."""
FLOW = ("inspect", "fuse", "verify", "export", "bench", "report", "convert")  # in the order of the work; others follow


class Commands(click.Group):
    """The modules of this folder as commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = plugins.names("cli")
        return [*(name for name in FLOW if name in found), *(name for name in found if name not in FLOW)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in plugins.names("cli"):
            return None
        command: click.Command = plugins.load("cli", cmd_name).command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError as error:  # click would make 1 of it, which means: not equivalent
            raise ReaderGoneError from error


class ReaderGoneError(Exception):
    """Whoever read the output, such as ``head``, has closed it."""


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXIT_CODES,
)
@click.version_option(package_name="reparam-export")
def cli() -> None:
    """Fold trained adapters into their base weights, prove that nothing changed, and export.

    \b
    reparam-export convert ckpt.pt --to trt
    reparam-export convert cifar.pt --base timm:vit_base_patch16_224 --base-weights ViT-B_16.npz \\
        --config cifar.yaml --to onnx --to trt -o out/
    """
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_no_cast_warning)


def _no_cast_warning(record: logging.LogRecord) -> bool:
    """diffusers warns of every cast of a whole model, and a proof runs it in float64 on purpose."""
    return "should be kept in float32" not in record.getMessage()


def main() -> None:
    """Entry point: runs the command; turns errors into one message and the documented exit code."""
    as_json = "--json" in sys.argv[1:]
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.main(standalone_mode=False)
    except ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what python flushes when it ends
        sys.exit(128 + 13)  # what a shell says of a command that SIGPIPE ended
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("Aborted", "interrupted", 130, as_json)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\n{context.get_usage()}" if context is not None and not as_json else ""
        _fail("UsageError", error.format_message() + hint, error.exit_code, as_json)
    except ReparamError as error:
        _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except MemoryError:
        _fail("MemoryError", "out of memory", 5, as_json)
    except OSError as error:
        _fail("OSError", f"{error.filename or 'output'}: {error.strerror or error}", 5, as_json)
    except Exception as error:  # a fault of ours must not look like a verdict
        import traceback

        traceback.print_exc()
        _fail(type(error).__name__, f"internal error, please report it: {type(error).__name__}: {error}", 70, as_json)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM, from ``timeout`` or a cancelled CI job, is Ctrl-C: what was measured is kept, what is half written goes."""
    raise KeyboardInterrupt


def _fail(kind: str, message: str, code: int, as_json: bool) -> None:
    from reparam_export.console import clean

    message = clipped(message)
    if as_json:
        import json

        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}, indent=1))
    click.echo("\n".join(clean(line) for line in f"error: {message}".splitlines()), err=True)
    sys.exit(code)
