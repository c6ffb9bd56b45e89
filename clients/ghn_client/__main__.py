"""The command ``ghn-client``; what it does is in ``cli``, and ``docs/client.md`` describes it."""

from __future__ import annotations

from ghn_client.cli.app import app


def main() -> None:
    """Runs the command line and exits with one of the documented codes."""
    app(prog_name="ghn-client")


if __name__ == "__main__":
    main()
