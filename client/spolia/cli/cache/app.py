"""The commands of `spolia cache`, put together."""

from __future__ import annotations

import typer

from spolia.cli.cache import forget, gc, get, ls, pin, rm, stat, verify

EPILOG = (
    "Exit codes: 0 done, 2 wrong usage or an invalid request, 3 nobody there or out of time (also where that is one "
    "store of several: the others' results are shown), 4 busy, 1 no such object, damaged copies, or anything else."
)

cache = typer.Typer(
    help="See and tend what the KV stores hold: those of --store, or all that the gateway knows.",
    epilog=EPILOG,
    no_args_is_help=True,
)
cache.command("ls", epilog=EPILOG)(ls.ls)
cache.command("stat", epilog=EPILOG)(stat.stat)
cache.command("get", epilog=EPILOG)(get.get)
cache.command("rm", epilog=EPILOG)(rm.rm)
cache.command("pin", epilog=EPILOG)(pin.pin)
cache.command("verify", epilog=EPILOG)(verify.verify)
cache.command("gc", epilog=EPILOG)(gc.gc)
cache.command("forget", epilog=EPILOG)(forget.forget)
