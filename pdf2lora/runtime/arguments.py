"""The command line of a stage or a command, which have no arguments."""

import argparse


def require_no_arguments(description: str | None) -> None:
    """Prints the description for --help. Ends the process with an error for any other argument.

    description: the docstring of the program.
    """
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
