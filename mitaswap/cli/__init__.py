"""The `mitaswap` command: typer verbs, tables and progress bars; what they do lives elsewhere.

Each verb is one file that adds its command to the app. Bad input ends with one message and exit
code 2.
"""

from mitaswap.cli._app import app, main

__all__ = ["app", "main"]
