"""``hybridkex completion``: a script that completes commands, options and file names in a shell."""

import argparse
from dataclasses import dataclass

from hybridkex.cli.arguments import Action, add_action, argument
from hybridkex.cli.choices import SHELLS
from hybridkex.cli.help_text import describe


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """The options, parsed."""

    shell: str = argument("the shell to generate the script for", choices=SHELLS)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Print a completion script for a shell. It completes commands, options, the values of "
        "options, and file names. Generate it again after an upgrade.",
        examples=[
            "completion bash > ~/.local/share/bash-completion/completions/hybridkex",
            "completion zsh > ~/.zfunc/_hybridkex   # a folder of $fpath",
            "completion fish > ~/.config/fish/completions/hybridkex.fish",
        ],
    )
    add_action(parser, Action("completion", CompletionOptions, extra="completion"))
