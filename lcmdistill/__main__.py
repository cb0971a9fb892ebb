"""The console script, and `python -m lcmdistill`, as torchrun and accelerate start it."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is imported ends in a sentence, too."""
    try:
        from lcmdistill.cli import main as run
    except KeyboardInterrupt:
        print("interrupted; nothing was started", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
