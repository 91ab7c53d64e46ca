"""The `spolia` command. Only this package needs typer and rich (extra `cli`)."""
