"""The `minilora` command: parsing and printing."""


def main() -> int:
    """Run the command with the process's arguments and return its exit code."""
    from minilora.cli.command import main as run

    return run()
