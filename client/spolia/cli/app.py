"""The commands, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from spolia.cli import bench, calibrate, chat, cluster, demo, doctor, eval, generate, serve, up, version, warm
from spolia.cli.cache.app import cache
from spolia.cli.certs import certs
from spolia.cli.keys import keys
from spolia.cli.options_only import OptionsOnly
from spolia.cli.output import exit_code, print_error
from spolia.errors import SpoliaError
from spolia.version import __version__

EPILOG = (
    "Exit codes: 0 done, 2 wrong usage or an invalid request, 3 nobody there or out of time, 4 busy, "
    "5 calibrate: no policy was shown to keep the bounds, 6 no key, or one that may not, 1 anything else."
)
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""For commands that hand their last arguments, flags included, to another program."""
HAND_OVER = {**PASS_ON, "help_option_names": []}
"""For commands that are another program from their first argument on, its `--help` included."""

app = typer.Typer(
    name="spolia",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("up", epilog=EPILOG)(up.up)
app.command("demo", epilog=EPILOG)(demo.demo)
app.command("generate", epilog=EPILOG)(generate.generate)
app.command("chat", epilog=EPILOG, cls=OptionsOnly)(chat.chat)
app.command("warm", epilog=EPILOG)(warm.warm)
app.command("cluster", epilog=EPILOG, cls=OptionsOnly)(cluster.cluster)
app.command("doctor", epilog=EPILOG, cls=OptionsOnly)(doctor.doctor)
app.add_typer(cache, name="cache")
app.add_typer(certs, name="certs")
app.add_typer(keys, name="keys")
app.command("serve", epilog=EPILOG, context_settings=PASS_ON)(serve.serve)
app.command("bench", epilog=EPILOG, context_settings=PASS_ON)(bench.bench)
app.command("eval", epilog=EPILOG, context_settings=HAND_OVER)(eval.evaluate)
app.command("calibrate", epilog=EPILOG, context_settings=HAND_OVER)(calibrate.calibrate)
app.command("version", epilog=EPILOG)(version.version)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"spolia {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say which release this is, and end."),
    ] = False,
) -> None:
    """Serve a language model whose KV is reused at any position, and talk to it."""


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. Typer ends the process itself after `--help` and wrong usage."""
    try:
        app(None if argv is None else list(argv), prog_name="spolia")
    except SpoliaError as error:
        print_error(error)
        return exit_code(error)
    return 0
