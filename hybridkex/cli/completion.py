"""``hybridkex completion``: a script that completes commands, options and file names in a shell."""

from dataclasses import dataclass
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument
from hybridkex.cli.choices import SHELLS


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    shell: str = argument("the shell to generate the script for", choices=SHELLS)


COMMAND: Final = Command(
    "Print a completion script for a shell. It completes commands, options, their "
    "choices, and file names. Generate it again after an upgrade.",
    examples=[
        "completion bash > ~/.local/share/bash-completion/completions/hybridkex",
        "completion zsh > ~/.zfunc/_hybridkex",
        "completion fish > ~/.config/fish/completions/hybridkex.fish",
    ],
    action=Action("completion", CompletionOptions, extra="completion"),
)
